"""What the metadata of a GGUF file says about the network, and the config that says the same.

Every key under the name of the architecture is in one of three tables: read into the config,
harmless, or neutral at the values given and refused at every other. A key in none of them is
refused: it may change what the model computes, and nothing here would do so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from slm_plugin.errors import ModelSourceError, UnsupportedModelError
from slm_plugin.models.families.family import FULL, SLIDING
from slm_plugin.models.gguf.architectures import ARCHITECTURES, Architecture
from slm_plugin.models.gguf.header import shown
from slm_plugin.models.gguf.parts import GgufModel

OTHER_MODEL = "give a checkpoint folder of the original model"
DEFAULT_BASE = 10_000.0
_MOST = 1 << 31
# Gemma 3 in its largest size, of this many layers, scales attention by the mean width of a head.
_GEMMA3_27B = 62
_USUAL_PATTERN = 6

_SIZES = (
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
)
_READ = {
    *_SIZES,
    "vocab_size",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.scale",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}
_HARMLESS = {
    "rope.scaling.finetuned": "says how the model was trained",
    "pooling_type": "concerns sentence embeddings, not logits",
    "tensor_data_layout": "names the order of query and key rows that all files have",
}
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "expert_feed_forward_length": (0,),
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
    "use_parallel_residual": (False,),
    "attention.causal": (True,),
    "attention.max_alibi_bias": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "router_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}


@dataclass(frozen=True, slots=True)
class Sliding:
    """Attention of two types, where an architecture has them.

    Attributes:
        window: Positions that a layer with sliding attention sees.
        kinds: Attention type of each layer.
        base: Base of the rotary frequencies of layers with sliding attention.
    """

    window: int
    kinds: tuple[str, ...]
    base: float


@dataclass(frozen=True, slots=True)
class Network:
    """The sizes and constants of a decoder, as its file states them.

    Attributes:
        architecture: What is true of files of this architecture.
        context: Positions that the model was made for.
        hidden: Residual stream.
        layers: Decoder layers.
        intermediate: MLP channels.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Width of a head.
        vocabulary: Rows of the embedding.
        epsilon: Epsilon of the norms.
        rope_base: Base of the rotary frequencies.
        rope: Keys that begin with ``rope.``, without that prefix.
        query_width: Attention scores are divided by its root.
        sliding: Attention of two types; None where all layers attend to all positions.
        logits_cap: Bound of the logits; None for none.
    """

    architecture: Architecture
    context: int
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    epsilon: float
    rope_base: float
    rope: dict[str, Any]
    query_width: int
    sliding: Sliding | None = None
    logits_cap: float | None = None


def read_network(model: GgufModel) -> Network:
    """Judge every key that may change the logits, and read those that the stock class can honour.

    Raises:
        UnsupportedModelError: The architecture is not Llama, Qwen2, Qwen3 or Gemma 3.
        ModelSourceError: A key is missing, malformed, contradicts the tensors, or asks for what
            the stock class does not compute; the message names key and value.
    """
    architecture = _architecture(model)
    values = _judged(model, architecture)
    return _Reader(model, architecture, values).network()


def _architecture(model: GgufModel) -> Architecture:
    fields = model.fields
    architecture = fields.get("general.architecture")
    if not isinstance(architecture, str):
        raise ModelSourceError(f"{model.name} states no general.architecture", hint=OTHER_MODEL)
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{model.name} holds a model of the architecture {shown(architecture)}",
            hint=f"GGUF files are read of {', '.join(ARCHITECTURES)}",
        )
    kind = fields.get("general.type", "model")
    if kind != "model":
        raise ModelSourceError(f"{model.name} holds no model: general.type is {shown(kind)}")
    quantised = any(
        place.kind_name not in ("F32", "F16", "BF16") for place in model.tensors.values()
    )
    if quantised and fields.get("general.quantization_version", 2) != 2:
        raise ModelSourceError(
            f"{model.name} is quantised by version "
            f"{shown(fields['general.quantization_version'])} of ggml's formats, not 2",
            hint="convert the model again with a current llama.cpp",
        )
    return ARCHITECTURES[architecture]


def _judged(model: GgufModel, architecture: Architecture) -> dict[str, Any]:
    """Values under the architecture's name that are read, once no other asks for anything."""
    from gguf import MODEL_ARCH_NAMES

    name = architecture.name
    foreign = {*MODEL_ARCH_NAMES.values(), "adapter", "clip"} - {name}
    values = {}
    for full, value in model.fields.items():
        space, _, key = full.partition(".")
        if space in foreign:
            raise refusal(model, full, value, f"the model is of the architecture {name}")
        neutral = () if key in architecture.changed else _NEUTRAL.get(key, ())
        if space != name or key in _HARMLESS or value in neutral:
            continue
        if key not in _READ | architecture.reads:
            raise refusal(model, full, value, f"no such thing is read for {name}")
        values[key] = value
    return values


def refusal(model: GgufModel, key: str, value: Any, reason: str) -> ModelSourceError:
    """The error for a key that cannot be honoured."""
    return ModelSourceError(
        f"{model.name} states {key} {shown(value)}, but {reason}", hint=OTHER_MODEL
    )


class _Reader:
    """Typed access to the values of one file."""

    def __init__(
        self, model: GgufModel, architecture: Architecture, values: dict[str, Any]
    ) -> None:
        self.model = model
        self.architecture = architecture
        self.values = values
        # No size can be larger than this, or there would be a tensor to show for it.
        self.widest = max((max(place.shape) for place in model.tensors.values()), default=0)

    def network(self) -> Network:
        context, hidden, layers = (self.size(key) for key in _SIZES[:3])
        self.check_layers(layers)
        intermediate, heads = (self.per_layer(key, layers) for key in _SIZES[3:])
        kv_heads = self.per_layer("attention.head_count_kv", layers, default=heads)
        head_dim = self.head_dim(hidden, heads)
        if heads % kv_heads:
            self.fail("attention.head_count_kv", f"{heads} query heads cannot share them evenly")
        sliding = self.sliding(context, layers)
        query_width = self.query_width(hidden, layers, heads, head_dim)
        self.check_scale(query_width)
        vocabulary = self.vocabulary()
        for key, width in (
            ("embedding_length", hidden),
            ("feed_forward_length", intermediate),
            ("attention.head_count", heads * head_dim),
            ("attention.head_count_kv", kv_heads * head_dim),
        ):
            if width > self.widest:
                self.fail(key, f"no tensor of the file is {width} wide")
        return Network(
            architecture=self.architecture,
            context=context,
            hidden=hidden,
            layers=layers,
            intermediate=intermediate,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocabulary=vocabulary,
            epsilon=self.real("attention.layer_norm_rms_epsilon"),
            # Two bases cannot both be guessed: that of full attention has to be stated.
            rope_base=self.real("rope.freq_base", None if sliding else DEFAULT_BASE),
            rope={k.removeprefix("rope."): v for k, v in self.values.items() if k[:5] == "rope."},
            query_width=query_width,
            sliding=sliding,
            logits_cap=self.cap("final_logit_softcapping"),
        )

    def size(self, key: str, default: int | None = None) -> int:
        return self.whole(key, self.values.get(key, default))

    def whole(self, key: str, value: Any) -> int:
        if value is None:
            raise ModelSourceError(
                f"{self.model.name} states no {self.architecture.name}.{key}", hint=OTHER_MODEL
            )
        if type(value) is not int or not 0 < value < _MOST:
            self.fail(key, "a whole number above 0 is wanted")
        return value

    def per_layer(self, key: str, layers: int, default: int | None = None) -> int:
        value = self.values.get(key, default)
        if not isinstance(value, list):
            return self.whole(key, value)
        if len(value) != layers or len(set(value)) != 1:
            self.fail(key, f"only one value for all {layers} layers can be read")
        return self.whole(key, value[0])

    def real(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key, default)
        if value is None:
            raise ModelSourceError(
                f"{self.model.name} states no {self.architecture.name}.{key}", hint=OTHER_MODEL
            )
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(key, "a number is wanted")
        if not math.isfinite(value) or value <= 0:
            self.fail(key, "a finite number above 0 is wanted")
        return float(value)

    def head_dim(self, hidden: int, heads: int) -> int:
        stated = self.size("attention.key_length", hidden // heads or None)
        if "attention.key_length" not in self.values and hidden % heads:
            self.fail("attention.head_count", f"{hidden} channels cannot be shared evenly")
        if self.size("attention.value_length", stated) != stated:
            self.fail("attention.value_length", f"keys are {stated} wide")
        if self.size("rope.dimension_count", stated) != stated:
            self.fail("rope.dimension_count", f"heads are {stated} wide, and turn whole")
        if stated % 2:
            self.fail("attention.key_length", "rotary positions need an even number")
        return stated

    def vocabulary(self) -> int:
        embedding = self.model.tensors.get("token_embd.weight")
        if embedding is None:
            raise ModelSourceError(
                f"{self.model.name} has no token_embd.weight", hint="the file is incomplete"
            )
        rows = embedding.shape[0]
        if self.size("vocab_size", rows) != rows:
            self.fail("vocab_size", f"token_embd.weight has {rows} rows")
        return rows

    def check_layers(self, layers: int) -> None:
        numbers = {
            int(name.split(".")[1])
            for name in self.model.tensors
            if name.startswith("blk.") and name.split(".")[1].isdecimal()
        }
        if max(numbers, default=-1) + 1 != layers:
            self.fail("block_count", f"its tensors are of {max(numbers, default=-1) + 1} layers")

    def sliding(self, context: int, layers: int) -> Sliding | None:
        """The two types of attention; a window that ends nowhere is none where there is one."""
        key = "attention.sliding_window"
        usual = self.architecture.local_base
        if usual is not None:
            base = self.real("rope.freq_base_swa", usual)
            return Sliding(self.size(key), self.kinds(layers), base)
        window = self.values.get(key, 0)
        if type(window) is not int or 0 != window < context:
            name = self.architecture.family.config_name
            self.fail(key, f"{name} attends to all {context} positions")
        return None

    def kinds(self, layers: int) -> tuple[str, ...]:
        """Attention types: a truth value for each layer, or every how many have full attention."""
        key = "attention.sliding_window_pattern"
        stated = self.values.get(key, _USUAL_PATTERN)
        if not isinstance(stated, list):
            period = self.whole(key, stated)
            stated = [number % period != 0 for number in range(1, layers + 1)]
        if len(stated) != layers or any(type(slides) is not bool for slides in stated):
            self.fail(key, f"a whole number or {layers} truth values are wanted")
        return tuple(SLIDING if slides else FULL for slides in stated)

    def query_width(self, hidden: int, layers: int, heads: int, head_dim: int) -> int:
        """What scales attention: no file of Gemma 3 states it, so llama.cpp goes by the size.

        Source: https://github.com/google/gemma_pytorch, gemma/config.py.
        """
        largest = self.architecture.name == "gemma3" and layers == _GEMMA3_27B
        return hidden // heads if largest else head_dim

    def cap(self, key: str) -> float | None:
        return self.real(key) if key in self.values else None

    def check_scale(self, width: int) -> None:
        key = "attention.scale"
        scale = self.values.get(key, 0.0)
        usual = width**-0.5
        if type(scale) is not float or (
            scale != 0 and not math.isclose(scale, usual, rel_tol=1e-6)
        ):
            self.fail(key, f"the stock attention scales by {usual:.6g}")

    def fail(self, key: str, reason: str) -> NoReturn:
        raise refusal(self.model, f"{self.architecture.name}.{key}", self.values.get(key), reason)
