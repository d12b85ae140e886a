"""Write and verify a checkpoint whose model is not in memory, one tensor or layer at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_plugin.calibration.captures import capture
from slm_plugin.export.parity import Reference, prompts
from slm_plugin.lazy import inference_mode, torch
from slm_plugin.models.checkpoint import read_checkpoint
from slm_plugin.models.fingerprint import fingerprint
from slm_plugin.models.layerwise import build
from slm_plugin.models.stored import write_tensors
from slm_plugin.models.streaming import held, values
from slm_plugin.models.towers import written_names
from slm_plugin.models.view import DecoderView
from slm_plugin.models.weight_files import INDEX

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from slm_plugin.session import Session

# The check that takes the place of those on generated tokens: each token would read the model.
LOGITS = "largest logit difference, layer by layer (no tokens were generated)"


def save_streamed(model: PreTrainedModel, folder: Path, *, max_shard_size: str) -> None:
    """Write config and weights as ``save_pretrained`` does, the same bytes in the same files.

    One tensor is in memory at a time; a merged weight is worked out when its turn comes.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.save_pretrained(folder)
    family = DecoderView.of(model).family
    parameters: dict[str, Tensor] = written_names(dict(model.named_parameters()), family)
    shards = split_torch_state_dict_into_shards(
        parameters,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in shards.filename_to_tensors.items():
        write_tensors(folder / file, {name: parameters[name] for name in names}, values)
    if shards.is_sharded:
        total = sum(parameter.numel() for parameter in parameters.values())
        index = {
            "metadata": {"total_parameters": total, **shards.metadata},
            "weight_map": shards.tensor_to_filename,
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / INDEX).write_text(text, encoding="utf-8")


def streamed_reference(session: Session) -> Reference:
    """What the session's model computes on the prompts alone: every layer is read once."""
    asked = prompts(session)
    nothing = tuple(torch.empty(1, 0, dtype=torch.long) for _ in asked)
    return Reference(asked, nothing, logits(session.view, asked))


def measure_streamed(folder: Path, expected: Reference, facts: dict[str, str]) -> dict[str, Any]:
    """Figures of a checkpoint that is read layer by layer; ``error`` alone when it does not fit.

    Args:
        folder: The checkpoint.
        expected: What the model that it was written from computes.
        facts: Parameter count and hash of that model.

    Raises:
        ModelSourceError: The checkpoint lacks weights or is damaged.
    """
    model = build(read_checkpoint(folder), "auto", torch.device("cpu"), streamed=True)
    found = logits(DecoderView.of(model), expected.prompts)
    pairs = zip(found, expected.logits, strict=True)
    return {
        "streamed_logits": max(float((mine - theirs).abs().max()) for mine, theirs in pairs),
        "parameters": abs(sum(p.numel() for p in model.parameters()) - int(facts["parameters"])),
        "weights": int(fingerprint(model).weights != facts["weights"]),
    }


@inference_mode
def logits(view: DecoderView, asked: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Logits, each ``(1, tokens, vocabulary)`` in float32 on the CPU; every layer is read once."""
    captured = capture(view, [ids.to(view.model.device) for ids in asked])
    with held(view.head):
        return tuple(view.logits(batch.final).float().cpu() for batch in captured)
