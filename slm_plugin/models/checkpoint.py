"""Check a checkpoint folder completely before any weight is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_plugin.errors import ModelSourceError
from slm_plugin.lazy import torch, transformers
from slm_plugin.models.border import reading
from slm_plugin.models.completeness import check_complete
from slm_plugin.models.configuration import Configuration, read_configuration
from slm_plugin.models.experts import stacked
from slm_plugin.models.families import family_of
from slm_plugin.models.families.family import Family
from slm_plugin.models.stored import Stored, StoredTensor, are_equal
from slm_plugin.models.towers import VISION_LAYERS, in_memory_names, vision_layers
from slm_plugin.models.weight_files import check_companions, stored_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Redundant stored tensors, and why each is redundant:
# - rotary frequencies, which old releases stored in each layer, follow from the config;
# - a head beside tied embeddings is the embedding.
FREQUENCIES = re.compile(
    r"model\.(language_model\.)?(layers\.([0-9]+)\.self_attn\.)?rotary_emb\.inv_freq"
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The contents of a checkpoint folder.

    Attributes:
        folder: The folder.
        name: Its name in messages.
        configuration: Its config.
        stored: Its tensors by name.
    """

    folder: Path
    name: str
    configuration: Configuration
    stored: dict[str, Stored]

    @property
    def config(self) -> Any:
        """The config of the decoder."""
        return self.family.text_config(self.configuration.config)

    @property
    def family(self) -> Family:
        """What is true of the model's class."""
        return family_of(self.configuration.architecture)


def read_checkpoint(folder: Path, name: str | None = None) -> Checkpoint:
    """Check config and file headers; no weight is read and no module built.

    Raises:
        ModelSourceError: The folder is not one complete, plain checkpoint.
        UnsupportedModelError: Its architecture is not supported.
    """
    name = name or str(folder)
    config = folder / "config.json"
    if not config.is_file():
        raise ModelSourceError(
            f"cannot load the checkpoint {name}: it has no config.json",
            hint="the folder needs config.json and safetensors weights of one model",
        )
    with reading(f"cannot load the checkpoint {name}"):
        check_companions(folder)
        configuration = read_configuration(config)
        stored = stored_tensors(folder)
        weights = _renamed(stored, configuration)
    found = Checkpoint(folder, name, configuration, weights)
    _check_names(found)
    _check_sizes(found)
    return found


def check_parameters(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """The completeness rule, against the parameters of a model on the meta device.

    Raises:
        ModelSourceError: Tensors are missing, misshapen or not accounted for.
    """
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    head, tied = head_weight(model), bool(model.config.tie_word_embeddings)
    if tied:
        wanted.pop(head, None)
    derived = re.compile(checkpoint.family.redundant or "(?!)")
    redundant = [
        name for name in checkpoint.stored if FREQUENCIES.fullmatch(name) or derived.fullmatch(name)
    ]
    if tied and head in checkpoint.stored:
        redundant.append(head)
    _check_missing_head(checkpoint, head, wanted)
    shapes = {name: tensor.shape for name, tensor in checkpoint.stored.items()}
    check_complete(checkpoint.name, shapes, wanted, redundant)
    if head in redundant:
        _check_tied_head(checkpoint, head)


def head_weight(model: PreTrainedModel) -> str:
    """Name of the weight of a model's language-modelling head."""
    head = model.get_output_embeddings()
    return next(f"{name}.weight" for name, module in model.named_modules() if module is head)


def _renamed(stored: dict[str, StoredTensor], configuration: Configuration) -> dict[str, Stored]:
    """Stored tensors by the names that the installed transformers has for them.

    A head may have had another name, and a decoder that was saved without its head, whose names
    begin one module further in, is whole where the embedding is the head.
    """
    family = family_of(configuration.architecture)
    stored = in_memory_names(stored, family)
    prefix = f"{family.decoder}."
    inside = family.embedding_weight.removeprefix(prefix) in stored
    tied = bool(configuration.config.tie_word_embeddings)
    if family.headless and tied and inside and family.embedding_weight not in stored:
        heads = {f"{name}.weight" for name in family.heads}
        stored = {n if n in heads else prefix + n: tensor for n, tensor in stored.items()}
    present = _head_name(getattr(transformers, family.architecture), family)
    others = {f"{name}.weight" for name in family.heads} - {f"{present}.weight"}
    named = {f"{present}.weight" if n in others else n: tensor for n, tensor in stored.items()}
    return stacked(named, family)


def _head_name(known: Any, family: Family) -> str:
    """The name of the head in the installed transformers: one of those that it ever had."""
    if len(family.heads) == 1:
        return family.heads[0]
    keys = getattr(known, "_tied_weights_keys", None) or ()
    return next(name for name in family.heads if f"{name}.weight" in keys)


def check_frequencies(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Check stored rotary frequencies against the config's, scaled or unscaled.

    Raises:
        ModelSourceError: They are others, or the config's are not finite.
    """
    tables = [table for name, table in model.named_buffers() if name.endswith("inv_freq")]
    if not all(torch.isfinite(table).all() for table in tables):
        raise ModelSourceError(
            f"the rotary settings of {checkpoint.name} give frequencies that are not finite",
            hint="correct rope_theta or rope_scaling in config.json",
        )
    stored = {n: t for n, t in checkpoint.stored.items() if FREQUENCIES.fullmatch(n)}
    if not stored:
        return
    for base in _bases(checkpoint):
        exponents = torch.arange(0, 2 * len(tables[0]), 2).float() / (2 * len(tables[0]))
        tables.append(1.0 / (base**exponents))
    for name, tensor in stored.items():
        found = tensor.read().float()
        rtol = max(torch.finfo(tensor.dtype).eps, 1e-5)
        fits = any(
            found.shape == known.shape
            and torch.allclose(found, known.float().cpu(), rtol=rtol, atol=1e-7)
            for known in tables
        )
        if not fits:
            raise ModelSourceError(
                f"{name} of {checkpoint.name} holds other rotary frequencies than its config gives",
                hint="rope_theta or rope_scaling in config.json is not what it was trained with",
            )


def _bases(checkpoint: Checkpoint) -> list[float]:
    config = checkpoint.config
    parameters = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}
    by_kind = [one for one in parameters.values() if isinstance(one, dict)]
    return [float(one["rope_theta"]) for one in by_kind or [parameters]]


def _check_names(checkpoint: Checkpoint) -> None:
    """Report weights saved from another class, instead of missing weights."""
    stored, name, family = checkpoint.stored, checkpoint.name, checkpoint.family
    embedding, prefix = family.embedding_weight, f"{family.decoder}."
    if embedding in stored:
        return
    if embedding.removeprefix(prefix) in stored:
        raise ModelSourceError(
            f"{name} holds the weights of a decoder without its head: their names lack '{prefix}'",
            hint="load it as the class with a head and save that: without one, releases of "
            "transformers make up the head or refuse it",
        )
    inner = next((full for full in sorted(stored) if full.endswith("." + embedding)), None)
    if inner:
        outer = inner.removesuffix(embedding)
        raise ModelSourceError(
            f"{name} holds weights whose names begin with '{outer}': they were saved from "
            "inside of another module",
            hint="unwrap the model, then `save_pretrained`",
        )


def _check_sizes(checkpoint: Checkpoint) -> None:
    """Check the config's sizes against the files before any module is built."""
    config, name, family = checkpoint.config, checkpoint.name, checkpoint.family
    _check_layers(checkpoint)
    sized = {family.embedding_weight: ("vocab_size", "hidden_size")}
    if "down_proj" in family.projections and "intermediate_size" not in family.names:
        down = family.in_layer(0, family.projections["down_proj"])
        sized[down] = ("hidden_size", "intermediate_size")
    for full, fields in sized.items():
        if full not in checkpoint.stored:
            check_complete(name, {}, {full: ()})
        for found, field in zip(checkpoint.stored[full].shape, fields, strict=False):
            if getattr(config, field) != found:
                own = family.own_name(field)
                raise ModelSourceError(
                    f"{name} has {own} {getattr(config, field)} in its config, but {full} of "
                    f"shape {list(checkpoint.stored[full].shape)}",
                    hint=f"correct {own} in config.json",
                )
    _check_heads(checkpoint)


def _check_layers(checkpoint: Checkpoint) -> None:
    """Check the number of layers before any is built."""
    name, family = checkpoint.name, checkpoint.family
    _check_vision_layers(checkpoint)
    count = int(checkpoint.config.num_hidden_layers)
    layers = _layers_of(checkpoint, f"{family.decoder}.{family.layers}.")
    there = max(layers, default=-1) + 1
    # Stray tensors of one layer far above are left to the completeness rule, which names them.
    whole, own = len(layers) == there, family.own_name("num_hidden_layers")
    if layers and there != count and (whole or there < count):
        raise ModelSourceError(
            f"{name} holds the weights of {there} layers, but its config says {own} {count}",
            hint=f"correct {own}, or fetch the weights that belong to the config",
        )
    found = sum(layer < count for layer in layers)
    if layers and found < count:
        raise ModelSourceError(
            f"{name} lacks layers: of {count} it holds {found}",
            hint="the checkpoint was not copied or written whole",
        )


def _layers_of(checkpoint: Checkpoint, prefix: str) -> set[int]:
    """Indices of the layers whose weights' names begin so."""
    layer = re.compile(re.escape(prefix) + r"([0-9]{1,9})\.")
    return {int(place[1]) for full in checkpoint.stored if (place := layer.match(full))}


def _check_vision_layers(checkpoint: Checkpoint) -> None:
    """Check the number of layers of the vision model, where there is one."""
    if checkpoint.family.tower is None:
        return
    count = vision_layers(checkpoint.configuration.config.vision_config)
    there = max((len(_layers_of(checkpoint, prefix)) for prefix in VISION_LAYERS), default=0)
    if there != count:
        raise ModelSourceError(
            f"{checkpoint.name} holds the weights of {there} layers of its vision model, but its "
            f"vision_config says {count}",
            hint="correct vision_config, or fetch the weights that belong to the config",
        )


def _check_heads(checkpoint: Checkpoint) -> None:
    """Check head counts against the stored rows before any module is built."""
    config = checkpoint.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for projection, field in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        path = checkpoint.family.projections.get(projection)
        full = "" if path is None else checkpoint.family.in_layer(0, path)
        if full not in checkpoint.stored or not hasattr(config, field):
            continue
        rows, heads = checkpoint.stored[full].shape[:1], getattr(config, field)
        if rows != (heads * size,):
            raise ModelSourceError(
                f"{checkpoint.name} has {field} {heads} and heads of {size}, but {full} of shape "
                f"{list(checkpoint.stored[full].shape)}",
                hint=f"correct {field} or head_dim in config.json",
            )


def _check_missing_head(checkpoint: Checkpoint, head: str, wanted: Mapping[str, object]) -> None:
    if head in wanted and head not in checkpoint.stored:
        raise ModelSourceError(
            f"{checkpoint.name} lacks {head}, and its config does not tie it to the embedding",
            hint="set tie_word_embeddings to true in config.json if the embedding is the head",
        )


def _check_tied_head(checkpoint: Checkpoint, head: str) -> None:
    embedding = checkpoint.family.embedding_weight
    if not are_equal(checkpoint.stored[head], checkpoint.stored[embedding]):
        raise ModelSourceError(
            f"{checkpoint.name} holds a head of its own ({head} differs from {embedding}), but its "
            "config says tie_word_embeddings true",
            hint="set tie_word_embeddings to false in config.json",
        )
