"""What is true of one model class: where its parts are, and what its computation allows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from slm_plugin.models.config_values import Field

SEPARATE: Mapping[str, str] = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tower:
    """What stands around the text decoder of a model of images and text.

    Attributes:
        text: Model type of ``text_config``.
        text_class: Name of its config class.
        vision: Model types that ``vision_config`` may have.
        defaults: Fields that ``text_config`` may lack, because releases of transformers wrote only
            what differs from the defaults of its class.
        tied: Whether the head is the embedding where no config says so.
        fields: Checks of the fields beside the two objects.
        stored: Beginnings of names in checkpoints, each with its name in memory.
        nested_vision: transformers 4.57 has the vision model one module further in than 5.
        deepstack: The list in ``vision_config`` with one entry for each of the lowest text layers
            to whose outputs vision features are added; empty where they enter at the embedding.
    """

    text: str
    text_class: str
    vision: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    tied: bool = False
    fields: Mapping[str, Field] = field(default_factory=dict)
    stored: tuple[tuple[str, str], ...] = ()
    nested_vision: bool = False
    deepstack: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One stack of layers of a class of transformers, as a record that every method asks.

    With x the residual stream, A the attention, M the MLP and N norms, a layer computes, by its
    ``residual``:

    - ``pre``: x + A(N(x)), then x + M(N(x));
    - ``post``: x + N(A(x)), then x + N(M(x));
    - ``sandwich``: x + N(A(N(x))), then x + N(M(N(x)));
    - ``parallel``: x + A(N(x)) + M(N(x));
    - ``after``: N(x + A(x)), then N(x + M(x));
    - ``conformer``: a half of M before and one behind A, a convolution between, N at the end.

    The record of a decoder is that of its class with a head. The record of an encoder is that of
    its class without one, and holds for every class with a head: `covers`.

    Attributes:
        architecture: Name of the model class.
        model_type: Its name in ``config.json``.
        config_class: Name of its config class, where the model class does not give it.
        listed: A person has written the record; else it was made from a model by
            `slm_plugin.models.families.unlisted`.
        tower: What stands around the decoder, in classes for images and text.
        decoder: Path of the module without the head.
        embedding: Path of the token embedding in the decoder.
        heads: Names that the head has, or had in some release.
        headless: Checkpoints of the decoder alone are usual, and whole where the embedding is the
            head.
        names: Names of config fields where they are not Llama's; None for a field that may lack.
        layers: Name of the list of layers in the decoder.
        norm: Path of the norm behind the last layer, in the decoder.
        attention: Modules of a layer that make up its attention block: the attention, the norm
            before it, the norm behind it.
        mlp: Modules that make up its MLP block, in the same order.
        norms: Modules of a layer that are norms of the residual stream.
        projections: Linear maps of a layer: short name to path.
        fused: Projections that are several in one matrix, by their short name: the short names of
            these, in the order of their rows.
        residual: How the blocks are added to the residual stream.
        parallel_if: Config fields any of which makes the residual parallel, where a class has both.
        parallel_default: Whether it is parallel where the config states none of them.
        units: Units that width pruning can remove, by their names in `Dimensions.units`.
        no_fit: Why what its MLP puts out cannot be fitted; empty where it can.
        hidden_channels: Channels of the residual stream can be removed: it is read through norms
            without means alone, and linear maps of separate gates, and no size is derived from it.
        why_not: Unit to the reason why it cannot be removed.
        window: Which layers have the sliding window: none; all if there is a width; by kind; or by
            kind if ``use_sliding_window`` says so.
        kind_fields: Further config fields with one entry per layer that make layers differ.
        fields: Checks of config fields that only some classes read.
        reads: Config fields that the class computes with and most classes ignore.
        even_split: transformers 5 wants hidden_size to be a multiple of the head count.
        synonyms: Pairs of config fields that two releases call by different names.
        attentions: Implementations of attention that compute the class, the default first.
        experts: Names of the gate, up and down projection of one expert in checkpoints, where the
            installed transformers holds all experts of a layer in one tensor; else empty.
        router: Name, in the MLP, of the module that chooses experts; empty where there are none.
        stored_mlp: Name of the MLP in checkpoints.
        redundant: Pattern of stored tensors that follow from the config.
        rotary: One rotary table for all layers, one per attention type, one by three positions,
            the words of Phi-3 or GPT-NeoX, or none.
        partial_rotary: Part of a head that positions turn if the config does not state it; None
            where always the whole head is turned.
        own_head_dim: The class reads ``head_dim``; else it divides hidden_size by the heads.
        default_head_dim: Length of a head where the config lacks ``head_dim``; None for
            hidden_size / heads.
        default_rope_base: Base of the rotary frequencies where the config states none; None
            where it must.
        residual_multiplier: Config field by which what a block adds is multiplied.
        logits_divisor: Config field by which the head's output is divided.
        logits_softcap: Config field with the bound c of ``c * tanh(logits / c)``.
        gain_offset: What a norm adds to its weight before it multiplies by it.
        inputs: Names of the tensors that calibrate it, the one that must be there first; empty for
            decoders, which token ids calibrate.
        stack: Which of a class's two stacks this is; empty where the class has one.
        frames: How a mask of the inputs is one of the hidden frames: as it is, through the
            convolutions of the class, or with a stride of two.
        sees_all: Every position attends to all others; else only the last one does.
        excluded: Pattern of classes that the record does not hold for.
        pre_if: Config field that says whether norms stand before the blocks and behind the last
            layer, in place of ``residual`` and of no norm behind the last layer.
        entry: Path of the module that reads the inputs, in the class without a head; empty for
            that class itself.
        passed: What else it is called with.
        trained_only: Pattern of weights that only training uses; a checkpoint may lack them.
    """

    architecture: str
    model_type: str
    config_class: str = ""
    listed: bool = True
    tower: Tower | None = None
    decoder: str = "model"
    embedding: str = "embed_tokens"
    heads: tuple[str, ...] = ("lm_head",)
    headless: bool = False
    names: Mapping[str, str | None] = field(default_factory=dict)
    layers: str = "layers"
    norm: str = "norm"
    attention: tuple[str, ...] = ("self_attn", "input_layernorm")
    mlp: tuple[str, ...] = ("mlp", "post_attention_layernorm")
    norms: tuple[str, ...] = ()
    projections: Mapping[str, str] = field(default_factory=lambda: SEPARATE)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    residual: Literal["pre", "post", "sandwich", "parallel", "after", "conformer"] = "pre"
    parallel_if: tuple[str, ...] = ()
    parallel_default: bool = False
    units: tuple[str, ...] = ("channels", "kv_groups")
    no_fit: str = ""
    hidden_channels: bool = False
    why_not: Mapping[str, str] = field(default_factory=dict)
    window: Literal["none", "all", "by_kind", "switched"] = "none"
    kind_fields: tuple[str, ...] = ()
    fields: Mapping[str, Field] = field(default_factory=dict)
    reads: frozenset[str] = frozenset()
    even_split: bool = False
    synonyms: tuple[tuple[str, str], ...] = ()
    attentions: tuple[str, ...] = ("sdpa", "eager")
    experts: tuple[str, ...] = ()
    router: str = ""
    stored_mlp: str = ""
    redundant: str = ""
    rotary: Literal["one", "by_kind", "mrope", "phi3", "neox", "none"] = "one"
    partial_rotary: float | None = None
    own_head_dim: bool = True
    default_head_dim: int | None = None
    default_rope_base: float | None = 10_000.0
    residual_multiplier: str | None = None
    logits_divisor: str | None = None
    logits_softcap: str | None = None
    gain_offset: float = 0.0
    inputs: tuple[str, ...] = ()
    stack: str = ""
    frames: Literal["same", "convolved", "halved"] = "same"
    sees_all: bool = False
    excluded: str = ""
    pre_if: str = ""
    entry: str = ""
    passed: Mapping[str, Any] = field(default_factory=dict)
    trained_only: str = ""

    @property
    def config_name(self) -> str:
        """Name of the config class, which most families have from the model class."""
        stem = self.architecture.removesuffix("ForCausalLM").removesuffix("Model")
        return self.config_class or f"{stem}Config"

    @property
    def text_config_name(self) -> str:
        """Name of the class of the config that describes the decoder."""
        return self.config_name if self.tower is None else self.tower.text_class

    @property
    def auto_class(self) -> str:
        """The class of transformers that finds the model class by its config."""
        return "AutoModelForCausalLM" if self.tower is None else "AutoModelForImageTextToText"

    def text_config(self, config: Any) -> Any:
        """The config that describes the decoder: the model's own, or one inside of it."""
        return config if self.tower is None else config.text_config

    def fixed_layers(self, config: Any) -> int:
        """Lowest layers that must stay where they are, by the model's config.

        Vision features are added to the output of layer 0, 1, ..., whichever layers these are.
        """
        if self.tower is None or not self.tower.deepstack:
            return 0
        return len(getattr(config.vision_config, self.tower.deepstack))

    def is_parallel(self, config: Mapping[str, Any]) -> bool:
        """Whether attention and MLP of a layer read the same input."""
        stated = [config[name] for name in self.parallel_if if config.get(name) is not None]
        return self.residual == "parallel" or (any(stated) if stated else self.parallel_default)

    @property
    def by_tensors(self) -> bool:
        """Whether tensors calibrate it and not token ids: an encoder or part of one and a decoder.

        Nothing that needs a language-modelling head or removes units is offered for it.
        """
        return bool(self.inputs)

    @property
    def streams(self) -> bool:
        """Whether its layers can be read one at a time with the installed transformers."""
        return not (self.by_tensors or self.experts)

    @property
    def label(self) -> str:
        """The model type, and the stack where there are two."""
        return f"{self.model_type} ({self.stack})" if self.stack else self.model_type

    @property
    def why_limited(self) -> str:
        """Why most methods are not offered for it, as half a sentence."""
        if self.stack == "decoder":
            return "it reads an encoder: no plain language model, and only whole layers are removed"
        return "it is an encoder: no next-token logits, and only whole layers are removed"

    def covers(self, architecture: str) -> bool:
        """Whether it holds for a class: its own, or for an encoder one with another head."""
        if architecture == self.architecture or not self.by_tensors:
            return architecture == self.architecture
        stem = re.escape(self.architecture.removesuffix("Model"))
        heads = re.fullmatch(rf"{stem}For[A-Z]\w*", architecture, re.ASCII)
        return heads is not None and re.fullmatch(self.excluded or "(?!)", architecture) is None

    def residual_of(self, config: Mapping[str, Any]) -> str:
        """How the blocks are added, where a field of the config says so."""
        if self.is_parallel(config):
            return "parallel"
        return "pre" if self.pre_if and config.get(self.pre_if) else self.residual

    def norm_of(self, config: Mapping[str, Any]) -> str:
        """Path of the norm behind the last layer; empty where there is none."""
        return "" if self.pre_if and not config.get(self.pre_if) else self.norm

    @property
    def stream_norms(self) -> tuple[str, ...]:
        """Modules of a layer that are norms of the residual stream."""
        return self.norms or (*self.attention[1:], *self.mlp[1:])

    def canonical(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config with Llama's names of its fields."""
        found = dict(config)
        for name, own in self.names.items():
            if own is not None and own in found:
                found[name] = found[own]
        return found

    def parts(self, projection: str) -> tuple[str, ...]:
        """The projections in one matrix, in the order of their rows; mostly it is one."""
        return self.fused.get(projection, (projection,))

    def own_name(self, field: str) -> str:
        """The name of a field in this family's configs."""
        return self.names.get(field) or field

    @property
    def embedding_weight(self) -> str:
        """Name of the embedding's weight."""
        return f"{self.decoder}.{self.embedding}.weight"

    def in_layer(self, index: int, path: str) -> str:
        """Name of a weight of a layer's module."""
        return f"{self.decoder}.{self.layers}.{index}.{path}.weight"

    def reason(self, unit: str) -> str:
        """Why a unit cannot be removed."""
        if unit == "experts":
            return "its MLP is no mixture of experts"
        return self.why_not[unit]

    @property
    def no_hidden_channels(self) -> str:
        """Why channels of the residual stream cannot be removed; empty where they can."""
        if self.hidden_channels:
            return ""
        if self.norm_behind:
            return "norms stand between its blocks and the residual stream"
        if self.tower is not None:
            return "features of images are added to its residual stream"
        return "removing hidden channels is not implemented for its class"

    @property
    def norm_behind(self) -> bool:
        """Whether a norm stands between what a block computes and the residual stream."""
        return self.residual in ("post", "sandwich")

    @property
    def writers(self) -> tuple[str, str]:
        """Modules of a layer whose outputs are added to the residual stream, attention's first."""
        last = -1 if self.norm_behind else 0
        return self.attention[last], self.mlp[last]
