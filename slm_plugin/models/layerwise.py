"""Build a model from a checkpoint's files: whole, or with layers that are read one at a time.

Both use one reader, so that results do not depend on the mode, nor on how a release of transformers
treats missing, surplus or misshapen tensors.

The disk offload of transformers and accelerate is not used: it keeps weights under the names of
the modules that own them, so a merged layer, which has one layer's norms and another's
projections, would silently run with the wrong ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slm_plugin.errors import ModelSourceError
from slm_plugin.lazy import nn, torch
from slm_plugin.models.border import reading
from slm_plugin.models.checkpoint import (
    Checkpoint,
    check_frequencies,
    check_parameters,
    head_weight,
)
from slm_plugin.models.empty import empty_model
from slm_plugin.models.generation import read_generation
from slm_plugin.models.streaming import run_streamed, stub_for, values
from slm_plugin.models.view import DecoderView

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def build(
    checkpoint: Checkpoint, dtype: str, device: torch.device, *, streamed: bool
) -> PreTrainedModel:
    """The model of a checkpoint, in evaluation mode.

    Args:
        checkpoint: The result of `read_checkpoint`.
        dtype: Number format in memory; ``auto`` takes the checkpoint's.
        device: Where the layers run.
        streamed: Stream the layers of the decoder and an untied head, and keep the rest in
            memory: embedding, final norm, vision model; else everything is read into memory.

    Raises:
        ModelSourceError: Weights are missing, misshapen, not accounted for, or cannot be read.
        UnsupportedModelError: The architecture is not supported.
    """
    if streamed and not checkpoint.family.streams:
        raise ModelSourceError(
            f"{checkpoint.name} is a mixture of experts, whose layers cannot be read one at a time "
            "with this release of transformers",
            hint="set `memory: whole` and a `device` that holds it, or use transformers 4.57",
        )
    model = _on_meta(checkpoint, dtype)
    check_parameters(checkpoint, model)
    view = DecoderView.of(model)
    with reading(f"cannot build the model of {checkpoint.name}"):
        # Rotary frequencies and factors are no weights: they are computed from the config.
        for name, buffer in list(model.named_buffers()):
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = buffer.to(device)
    check_frequencies(checkpoint, model)
    tied = bool(model.config.tie_word_embeddings)
    far = [*view.layers, *([] if tied else [view.head])] if streamed else []
    with reading(f"cannot read the weights of {checkpoint.name}"):
        _fill(model, checkpoint, {id(p) for m in far for p in m.parameters()}, device)
    if tied:
        view.head.weight = view.embedding.weight
    for module in far:
        run_streamed(module)
    return model.eval()


def _on_meta(checkpoint: Checkpoint, dtype: str) -> PreTrainedModel:
    """The stock class without memory for its weights."""
    config = checkpoint.configuration.config
    wanted = _number_format(dtype, config, checkpoint)
    config.dtype = wanted
    config._name_or_path = checkpoint.name
    settings = checkpoint.folder / "generation_config.json"
    generation = read_generation(settings, config, checkpoint.configuration.generation)
    with reading(f"cannot build the model of {checkpoint.name}"):
        model = empty_model(config, wanted)
    model.generation_config = generation
    return model


def _number_format(dtype: str, config: PretrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)  # type: ignore[no-any-return]
    written = getattr(config, "dtype", None)
    if isinstance(written, torch.dtype):
        return written
    return next(iter(checkpoint.stored.values())).dtype


def _fill(
    model: PreTrainedModel, checkpoint: Checkpoint, streamed: set[int], device: torch.device
) -> None:
    """Set the values of every parameter, or its position in the files."""
    tied = head_weight(model) if model.config.tie_word_embeddings else None
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            full = f"{prefix}.{name}".lstrip(".")
            if full == tied:
                continue
            stub = stub_for(checkpoint.stored[full], parameter.dtype, device)
            in_memory = id(parameter) not in streamed
            setattr(module, name, nn.Parameter(values(stub)) if in_memory else stub)
