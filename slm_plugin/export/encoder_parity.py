"""What an encoder in memory computes on random inputs, and whether a written one computes the same.

There is no greedy text to compare. The outputs of the class itself, its head included, have to be
equal to the last bit: both sides run on the CPU, with the same number of threads.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_plugin.lazy import inference_mode, safetensors, torch

if TYPE_CHECKING:
    from torch import Tensor

    from slm_plugin.models.view import DecoderView
    from slm_plugin.session import Session

OUTPUTS = "largest difference of an output"
SAMPLES, FRAMES = 2, 9
_GIVEN, _FOUND = "given.", "found."


def write_outputs(session: Session, file: Path, facts: dict[str, str]) -> None:
    """Write random inputs and what the session's model computes on them.

    Args:
        session: Holds the model, which stays as it is.
        file: The safetensors file.
        facts: What else the other side compares; the class and the threads are added.
    """
    from safetensors.torch import save_file

    model: Any = session.model
    if model.device.type != "cpu":
        model = copy.deepcopy(model).cpu()
    given = random_inputs(session.view, session.seed)
    tensors = {f"{_GIVEN}{name}": tensor for name, tensor in given.items()}
    tensors |= {f"{_FOUND}{name}": tensor for name, tensor in outputs_of(model, given).items()}
    named = {"named": type(model).__name__, "threads": str(torch.get_num_threads())}
    save_file({n: t.contiguous() for n, t in tensors.items()}, file, metadata=facts | named)


def measure_encoder(folder: Path, file: Path, facts: dict[str, str]) -> dict[str, Any]:
    """Figures of a checkpoint that is read by the class that its config names.

    Args:
        folder: The checkpoint.
        file: What `write_outputs` wrote.
        facts: The facts in it.

    Returns:
        The figures; ``error`` alone where the checkpoint does not fit.
    """
    from slm_plugin.export.reload import compared_weights, loaded

    torch.set_num_threads(int(facts["threads"]))
    named = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
    if named != [facts["named"]]:
        return {"error": f"its config names {named}, not {facts['named']}"}
    model, misfit = loaded(named[0], folder, facts)
    if misfit:
        return {"error": misfit}
    with safetensors.safe_open(file, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    given = {n.removeprefix(_GIVEN): t for n, t in tensors.items() if n.startswith(_GIVEN)}
    wanted = {n.removeprefix(_FOUND): t for n, t in tensors.items() if n.startswith(_FOUND)}
    found = outputs_of(model.eval(), given)
    return {"outputs": _difference(found, wanted), **compared_weights(model, facts)}


def random_inputs(view: DecoderView, seed: int) -> dict[str, Tensor]:
    """Inputs that the class reads, with padding where it has a mask, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    config, model = view.config, view.model
    mask = torch.ones((SAMPLES, FRAMES), dtype=torch.long)
    mask[-1, FRAMES // 2 :] = 0
    if view.family.model_type == "bert":
        ids = torch.randint(config.vocab_size, (SAMPLES, FRAMES), generator=generator)
        given = {"input_ids": ids, "attention_mask": mask}
        if type(model).__name__.endswith("ForMultipleChoice"):
            return {name: tensor.unsqueeze(0) for name, tensor in given.items()}
        return given
    if view.family.model_type == "whisper":
        size = (SAMPLES, config.num_mel_bins, 2 * config.max_source_positions)
        tokens = min(FRAMES, config.max_target_positions)
        ids = torch.randint(config.vocab_size, (SAMPLES, tokens), generator=generator)
        sound = torch.randn(size, generator=generator).to(model.dtype)
        return {"input_features": sound, "decoder_input_ids": ids}
    length = _wave_length(view)
    values = torch.randn((SAMPLES, length), generator=generator).to(model.dtype)
    mask = torch.ones((SAMPLES, length), dtype=torch.long)
    mask[-1, length * 2 // 3 :] = 0
    return {"input_values": values, "attention_mask": mask}


@inference_mode
def outputs_of(model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor that the class puts out by a name, but for what it keeps for later tokens."""
    # Copies: a class may write zeros over what it is given.
    output = model(**{name: tensor.clone() for name, tensor in given.items()}, return_dict=True)
    return {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}


def _wave_length(view: DecoderView) -> int:
    """Values of a sound that gives several frames, before and behind an adapter."""
    made: Any = view.decoder._get_feat_extract_output_lengths
    length = 32
    while int(made(torch.tensor(length))) < 4 * FRAMES:
        length *= 2
    return length


def _difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference of an output; infinite where another one is there."""
    if {n: t.shape for n, t in found.items()} != {n: t.shape for n, t in wanted.items()}:
        return float("inf")
    gaps = [(found[n].double() - wanted[n].double()).abs().max() for n in wanted]
    return float(torch.stack(gaps).max())
