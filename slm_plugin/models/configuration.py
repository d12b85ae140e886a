"""Check ``config.json`` and adapt it to the installed transformers, before weights are fetched."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from slm_plugin.errors import ModelSourceError, UnsupportedModelError
from slm_plugin.lazy import transformers
from slm_plugin.models.border import reading
from slm_plugin.models.config_fields import check_fields, head_dim
from slm_plugin.models.config_values import Where, problem
from slm_plugin.models.families import family_of, family_of_type
from slm_plugin.models.families.family import Family, Tower
from slm_plugin.models.generation import GENERATION
from slm_plugin.models.json_file import read_object
from slm_plugin.models.rope import ORIGINAL, rope_fields, rope_settings
from slm_plugin.models.towers import TEXT, VISION, split
from slm_plugin.progress import say

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# MLX writes `quantization`.
QUANTISED = ("quantization_config", "quantization", "compression_config")
DEQUANTISE = (
    "dequantise it first: load it with transformers, save it in bfloat16 or float32 and name that "
    "folder, or take the checkpoint that it was made from"
)
# Fields that name code to run; a stock class needs none of them.
CODE = ("auto_map", "custom_pipelines", "custom_generate", "trust_remote_code")
ATTENTIONS = ("sdpa", "eager")
ATTENTION = ("attn_implementation", "_attn_implementation")
# How a library runs a model and what it remembers of a task, not which model it is: left at the
# library's defaults. One of them, `return_dict`, changes what every forward pass returns.
RUNTIME = frozenset(
    {
        *CODE,
        *ATTENTION,
        # Refused unless they are null, which one of the two releases takes for quantised.
        *QUANTISED,
        "_attn_implementation_internal",
        "_attn_implementation_autoset",
        "experts_implementation",
        "_experts_implementation",
        "_experts_implementation_internal",
        "use_kernels",
        "kernel_config",
        "return_dict",
        "use_return_dict",
        "output_hidden_states",
        "output_attentions",
        "_output_attentions",
        "torchscript",
        "use_bfloat16",
        "tf_legacy_loss",
        "pruned_heads",
        "per_layer_config",
        "is_decoder",
        "is_encoder_decoder",
        "add_cross_attention",
        "cross_attention_hidden_size",
        "tie_encoder_decoder",
        "chunk_size_feed_forward",
        "gradient_checkpointing",
        "problem_type",
        "id2label",
        "label2id",
        "num_labels",
        "finetuning_task",
        "task_specific_params",
        "prefix",
        "base_model_tp_plan",
        "base_model_ep_plan",
        "base_model_pp_plan",
        "base_model_fsdp_plan",
        "_commit_hash",
        "_name_or_path",
        "name_or_path",
        "transformers_version",
        "architectures",
        "model_type",
        "dtype",
        "torch_dtype",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "rope_local_base_freq",
        "rotary_pct",
        "rotary_emb_base",
        "partial_rotary_factor",
    }
)
# Of these, what makes up the head of an encoder, or an encoder-decoder.
OF_THE_HEAD = ("id2label", "label2id", "num_labels", "problem_type", "is_encoder_decoder")
# transformers 5 refuses a whole number for them.
FRACTIONS = ("rms_norm_eps", "initializer_range")
FORMATS = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, slots=True)
class Configuration:
    """The content of a ``config.json``.

    Attributes:
        architecture: Class of the model.
        config: Its config, with neither code nor generation settings.
        generation: Generation settings that were in it.
    """

    architecture: str
    config: PretrainedConfig
    generation: dict[str, Any]


def read_configuration(file: Path, stack: str | None = None) -> Configuration:
    """Read a ``config.json``, check it and adapt it to the installed transformers.

    Args:
        file: The file.
        stack: Which of the model's two stacks of layers, where it has two.

    Raises:
        ModelSourceError: It is malformed, contradicts itself, or describes quantised weights.
        UnsupportedModelError: Its architecture is not supported.
    """
    content = read_object(file)
    where = Where(str(file))
    family = _family(content, where, stack)
    if not family.listed:
        raise UnsupportedModelError(
            f"{file}: {family.architecture} is no listed family, so its config cannot be checked",
            hint="load the model with transformers and pass it to slm_plugin.prune",
        )
    named = [name for name in CODE if content.get(name)]
    if named:
        say(
            f"{where}: {' and '.join(named)} name code, which never runs: transformers' own "
            f"{family.architecture} is used"
        )
    if family.by_tensors:
        return _whole_layers(content, family, where)
    generation = {k: v for k, v in content.items() if k in GENERATION and v is not None}
    if family.tower is None:
        kept, attention = _decoder(content, family, where)
        number_format = _number_format(content, where)
    else:
        kept, attention, number_format = _around_decoder(content, family, where)
    kept |= {"architectures": [family.architecture], "dtype": number_format}
    with reading(f"transformers {transformers.__version__} does not take {file}"):
        config = getattr(transformers, family.config_name).from_dict(kept)
        config._attn_implementation = attention
    return Configuration(family.architecture, config, generation)


def _decoder(
    content: Mapping[str, Any], family: Family, where: Where
) -> tuple[dict[str, Any], str]:
    """The fields of a decoder for the installed transformers, and its attention."""
    _refuse_quantised(content, where)
    check_fields(content, family, where)
    rope = rope_settings(content, head_dim(content, family), family, where)
    kept = _kept(content, getattr(transformers, family.text_config_name), where)
    kept |= {name: float(kept[name]) for name in FRACTIONS if name in kept}
    groups, heads = map(family.own_name, ("num_key_value_heads", "num_attention_heads"))
    if groups in kept and kept[groups] is None:
        # Each head has its own; some classes compute with the null.
        kept[groups] = kept[heads]
    for names in family.synonyms:
        stated = {name: kept[name] for name in names if kept.get(name) is not None}
        where.check_agreement(stated)
        kept |= {name: value for value in stated.values() for name in names}
    if rope.scaling is not None:
        # The value is now in the scaling, and beside it where needed.
        kept.pop(ORIGINAL, None)
    return kept | rope_fields(rope, family), _attention(content, family, where)


def _around_decoder(
    content: Mapping[str, Any], family: Family, where: Where
) -> tuple[dict[str, Any], str, str | None]:
    """The fields of a model of images and text, its attention and the format of its weights."""
    tower = cast(Tower, family.tower)
    _refuse_quantised(content, where)
    parts = split(content, family, tower, where)
    within = where.inside(VISION)
    _refuse_quantised(parts.vision, within)
    text, attention = _decoder(parts.text, family, where.inside(TEXT))
    vision = _kept(parts.vision, transformers.PretrainedConfig, within)
    vision["model_type"] = parts.vision.get("model_type", tower.vision[0])
    kept = _kept(parts.outer, getattr(transformers, family.config_name), where)
    kept |= {TEXT: {**text, "model_type": tower.text}, VISION: vision}
    # The whole model has one format: those of the parts are left out.
    number_format = _number_format(content, where) or _number_format(parts.text, where.inside(TEXT))
    return kept, attention, number_format


def _kept(content: Mapping[str, Any], config_class: type, where: Where) -> dict[str, Any]:
    """What says which model it is."""
    kept = {k: v for k, v in content.items() if k not in GENERATION and k not in RUNTIME}
    _refuse_clobbering(kept, config_class, where)
    return kept


def _whole_layers(content: dict[str, Any], family: Family, where: Where) -> Configuration:
    """The config of an encoder: what belongs to its head stays in it, as its labels."""
    _refuse_quantised(content, where)
    check_fields(content, family, where)
    layers: dict[str, Any] = {
        name: content[name]
        for name in ("num_hidden_layers", "encoder_layers")
        if family.stack and name in content
    }
    where.check_agreement(layers)
    named = content.get("architectures") or [family.architecture]
    config_class = getattr(transformers, family.config_name)
    own = {n: v for n, v in content.items() if n not in RUNTIME}
    _refuse_clobbering(own, config_class, where)
    kept = own | {name: content[name] for name in OF_THE_HEAD if name in content}
    kept |= {"architectures": named, "dtype": _number_format(content, where)}
    with reading(f"transformers {transformers.__version__} does not take {where.file}"):
        config = config_class.from_dict(kept)
        config._attn_implementation = _attention(content, family, where)
    return Configuration(named[0], config, {})


def _family(content: Mapping[str, Any], where: Where, stack: str | None) -> Family:
    """The family of the class that the config names, by its own name or by its model type."""
    stated, model_type = content.get("architectures"), content.get("model_type")
    if not isinstance(model_type, str | None):
        raise problem(where.at("model_type"), model_type, "a name, as llama")
    if stated is None or stated == []:
        return family_of_type(model_type, where.file, stack)
    if not isinstance(stated, list) or len(stated) != 1 or not isinstance(stated[0], str):
        raise problem(where.at("architectures"), stated, "a list of one class name")
    family = family_of(stated[0], stack)
    if model_type is not None and model_type != family.model_type:
        raise where.contradiction(f"architectures {stated[0]} and model_type {model_type}")
    return family


def _refuse_quantised(content: Mapping[str, Any], where: Where) -> None:
    for name in QUANTISED:
        found = content.get(name)
        if found is not None:
            method = found.get("quant_method") if isinstance(found, dict) else None
            raise ModelSourceError(
                f"{where} describes quantised weights ({name}: {method or 'of some kind'})",
                hint=DEQUANTISE,
            )


def _refuse_clobbering(content: Mapping[str, Any], config_class: type, where: Where) -> None:
    """Check that no field would replace a method of the config class, which sets any attribute."""
    known = set(inspect.signature(config_class).parameters)
    if dataclasses.is_dataclass(config_class):
        known |= {field.name for field in dataclasses.fields(config_class)}
    for name in content:
        if hasattr(config_class, name) and name not in known:
            raise ModelSourceError(
                f"{where} holds '{name}', which is no setting of a model",
                hint="remove it from config.json",
            )


def _number_format(content: Mapping[str, Any], where: Where) -> str | None:
    """The number format of the weights; transformers 4 wrote it as ``torch_dtype``."""
    stated = {n: content[n] for n in ("dtype", "torch_dtype") if content.get(n) is not None}
    for name, value in stated.items():
        plain = value.removeprefix("torch.") if isinstance(value, str) else value
        if plain not in FORMATS and plain != "auto":
            raise problem(where.at(name), value, f"one of {', '.join(FORMATS)}")
        stated[name] = plain
    where.check_agreement(stated)
    found = next(iter(stated.values()), None)
    return None if found == "auto" else found


def plain_attention(model: PreTrainedModel) -> str | None:
    """The attention of a model where every installation has it; None for other kernels."""
    found = model.config._attn_implementation
    return str(found) if found in ATTENTIONS else None


def _attention(content: Mapping[str, Any], family: Family, where: Where) -> str:
    """One of two implementations; other names, as those of Hub kernels, would fetch code."""
    # PyTorch's has no place for a bound of the scores; transformers 4.57 leaves it out silently.
    usable = ("eager",) if content.get("attn_logit_softcapping") else family.attentions
    stated = next((content[name] for name in ATTENTION if content.get(name) is not None), None)
    if stated not in (None, *usable):
        say(f"{where} asks for the attention {stated!r}: {usable[0]} is used instead")
    return str(stated) if stated in usable else usable[0]
