"""One view of every supported decoder: where its layers, projections, norms and heads are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from slm_plugin.errors import UnsupportedModelError
from slm_plugin.lazy import nn
from slm_plugin.models.operators import own_parameters
from slm_plugin.record import Record

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

SUPPORTED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class Dimensions(Record):
    """Sizes of a decoder with uniform layers, and the parameters per unit of each kind.

    All ``*_parameters`` count scalars; tied embeddings count once.
    """

    architecture: str
    layers: int
    hidden_size: int
    intermediate_size: int
    attention_heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    parameters: int
    layer_parameters: int
    channel_parameters: int
    kv_group_parameters: int

    @property
    def queries_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.attention_heads // self.kv_heads

    @property
    def units(self) -> dict[str, int]:
        """Units of a layer that width pruning removes, by what `without_units` calls them."""
        return {"channels": self.intermediate_size, "kv_groups": self.kv_heads}

    def without_layers(self, removed: int) -> Dimensions:
        """The same decoder with fewer layers."""
        return self.model_copy(
            update={
                "layers": self.layers - removed,
                "parameters": self.parameters - removed * self.layer_parameters,
            }
        )

    def without_units(self, channels: int = 0, kv_groups: int = 0) -> Dimensions:
        """The same decoder with fewer MLP channels and KV groups in every layer."""
        per_layer = channels * self.channel_parameters + kv_groups * self.kv_group_parameters
        return self.model_copy(
            update={
                "intermediate_size": self.intermediate_size - channels,
                "kv_heads": self.kv_heads - kv_groups,
                "attention_heads": self.attention_heads - kv_groups * self.queries_per_group,
                "layer_parameters": self.layer_parameters - per_layer,
                "parameters": self.parameters - self.layers * per_layer,
            }
        )


def check_architecture(name: str) -> None:
    """Check that a model class is one of SUPPORTED.

    Raises:
        UnsupportedModelError: It is not.
    """
    if name not in SUPPORTED:
        raise UnsupportedModelError(
            f"architecture {name} is not supported", hint=f"supported: {', '.join(SUPPORTED)}"
        )


@dataclass(frozen=True, slots=True)
class DecoderView:
    """Access to a causal language model's embedding, layers, final norm and head."""

    model: PreTrainedModel

    @classmethod
    def of(cls, model: PreTrainedModel) -> DecoderView:
        """Wrap a model.

        Raises:
            UnsupportedModelError: The architecture is not one of SUPPORTED, or its layers
                differ from one another in shape.
        """
        check_architecture(type(model).__name__)
        return cls(model)

    @property
    def config(self) -> PretrainedConfig:
        """The model's configuration."""
        return self.model.config

    @property
    def decoder(self) -> nn.Module:
        """The model without its language-modelling head."""
        return cast(nn.Module, self.model.model)

    @property
    def layers(self) -> nn.ModuleList:
        """Decoder layers, bottom first."""
        return cast(nn.ModuleList, self.decoder.layers)

    @property
    def norm(self) -> nn.Module:
        """The norm between the last layer and the head."""
        return cast(nn.Module, self.decoder.norm)

    @property
    def embedding(self) -> nn.Embedding:
        """Token embedding."""
        return cast(nn.Embedding, self.model.get_input_embeddings())

    @property
    def head(self) -> nn.Linear:
        """Language-modelling head."""
        return cast(nn.Linear, self.model.get_output_embeddings())

    @property
    def tied(self) -> bool:
        """Whether the head shares the embedding's weights."""
        return self.head.weight is self.embedding.weight

    def dimensions(self) -> Dimensions:
        """Dimensions of the modules in memory, independent of the config.

        Raises:
            UnsupportedModelError: Layers differ from one another in shape.
        """
        first = self.layers[0]
        shapes = _shapes(first)
        for index, layer in enumerate(self.layers):
            if _shapes(layer) != shapes:
                raise UnsupportedModelError(
                    f"layer {index} differs in shape from layer 0",
                    hint="only decoders with uniform layers can be pruned",
                )
        head_dim = cast(int, first.get_submodule("self_attn").head_dim)
        modules = projections(first)
        heads = modules["q_proj"].out_features // head_dim
        kv_heads = modules["k_proj"].out_features // head_dim
        return Dimensions(
            architecture=type(self.model).__name__,
            layers=len(self.layers),
            hidden_size=self.embedding.embedding_dim,
            intermediate_size=modules["gate_proj"].out_features,
            attention_heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=self.embedding.num_embeddings,
            tied_embeddings=self.tied,
            parameters=sum(p.numel() for p in self.model.parameters()),
            layer_parameters=sum(p.numel() for _, p in own_parameters(first)),
            channel_parameters=sum(
                _unit_size(modules[name], rows=name != "down_proj") for name in MLP_PROJECTIONS
            ),
            kv_group_parameters=head_dim
            * sum(
                _unit_size(modules[name], rows=name != "o_proj")
                * (heads // kv_heads if name in ("q_proj", "o_proj") else 1)
                for name in ATTENTION_PROJECTIONS
            ),
        )


def projections(layer: nn.Module) -> dict[str, nn.Linear]:
    """The seven linear maps of a layer by their short names."""
    found: dict[str, nn.Linear] = {}
    for block, names in (("self_attn", ATTENTION_PROJECTIONS), ("mlp", MLP_PROJECTIONS)):
        for name in names:
            found[name] = layer.get_submodule(f"{block}.{name}")  # type: ignore[assignment]
    return found


def projection_weights(layer: nn.Module) -> dict[str, Tensor]:
    """The weights of a layer's seven linear maps, by their short names."""
    return {name: linear.weight for name, linear in projections(layer).items()}


def layer_weights(layer: nn.Module) -> dict[str, Tensor]:
    """Every weight of a layer, the gains of norms too but no bias, by its name in the layer."""
    return {n: p for n, p in layer.named_parameters() if n.rpartition(".")[2] == "weight"}


def layer_lists(config: PretrainedConfig) -> Iterator[tuple[str, list[object]]]:
    """Config fields that hold one entry per layer, as ``layer_types`` or ``no_rope_layers``.

    They are recognised by name, because other lists may have the same length.
    """
    count = config.num_hidden_layers
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == count and "layer" in name:
            yield name, list(value)


def _shapes(layer: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(p.shape)) for name, p in own_parameters(layer)]


def _unit_size(linear: nn.Linear, *, rows: bool) -> int:
    """Scalars of one output row (with its bias) or one input column."""
    if rows:
        return linear.in_features + (linear.bias is not None)
    return linear.out_features
