"""Build a model whose layers stay in its checkpoint and are read one at a time.

The disk offload of transformers and accelerate is not used: it keeps weights under the names of
the modules that own them, so a merged layer, which has one layer's norms and another's
projections, would silently run with the wrong ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from slm_plugin.errors import ModelSourceError
from slm_plugin.models.stored import StoredTensor, stored_tensors
from slm_plugin.models.streaming import StreamedParameter, run_streamed, values
from slm_plugin.models.view import DecoderView

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

WANTED_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def checkpoint_folder(name: str, settings: dict[str, Any]) -> Path:
    """A checkpoint's folder, fetched from the Hub when it is not one already."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=list(WANTED_FILES), **settings))


def build(
    folder: Path, config: PretrainedConfig, dtype: str, device: torch.device
) -> PreTrainedModel:
    """A model with embedding and final norm in memory; layers and an untied head are streamed.

    Args:
        folder: Checkpoint folder with safetensors weights.
        config: Its config.
        dtype: Number format in memory; ``auto`` takes the checkpoint's.
        device: Where the layers run.

    Raises:
        ModelSourceError: Weights are missing, misshapen, quantised or not safetensors.
        UnsupportedModelError: The architecture is not supported.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    if getattr(config, "quantization_config", None):
        raise ModelSourceError(
            f"{folder} holds quantised weights", hint="layer by layer, only plain ones can be read"
        )
    stored = stored_tensors(folder)
    wanted = _number_format(dtype, config, stored)
    config.dtype = wanted
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=wanted)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    view = DecoderView.of(model)
    # The rotary frequencies are no weights: they are computed, and cannot be on the meta device.
    rotary: Any = view.decoder.rotary_emb
    view.decoder.rotary_emb = type(rotary)(config=model.config).to(device)
    streamed = [*view.layers, *([] if model.config.tie_word_embeddings else [view.head])]
    _fill(model, folder, stored, {id(p) for m in streamed for p in m.parameters()}, device)
    if model.config.tie_word_embeddings:
        view.head.weight = view.embedding.weight
    for module in streamed:
        run_streamed(module)
    return model


def _number_format(
    dtype: str, config: PretrainedConfig, stored: dict[str, StoredTensor]
) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)  # type: ignore[no-any-return]
    written = getattr(config, "dtype", None)
    if isinstance(written, torch.dtype):
        return written
    return next(iter(stored.values())).dtype


def _fill(
    model: PreTrainedModel,
    folder: Path,
    stored: dict[str, StoredTensor],
    streamed: set[int],
    device: torch.device,
) -> None:
    """Give every parameter its place in the files, or its values."""
    tied = "lm_head.weight" if model.config.tie_word_embeddings else None
    places = {
        f"{prefix}.{name}".lstrip("."): (module, name, parameter)
        for prefix, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
    }
    lost = sorted(places.keys() - stored.keys() - {tied})
    if lost:
        raise ModelSourceError(
            f"{folder} lacks {len(lost)} weights of a {type(model).__name__}, first {lost[0]}",
            hint="the checkpoint is incomplete or its config does not fit its weights",
        )
    for full, (module, name, parameter) in places.items():
        if full == tied:
            continue
        found = stored[full]
        if found.shape != tuple(parameter.shape):
            raise ModelSourceError(
                f"{full} of {folder} has the shape {found.shape}, its config asks for "
                f"{tuple(parameter.shape)}",
                hint="the config does not fit the weights",
            )
        stub = StreamedParameter(found, parameter.dtype, device)
        in_memory = id(parameter) not in streamed
        setattr(module, name, nn.Parameter(values(stub)) if in_memory else stub)
