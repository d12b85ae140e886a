"""One view of every supported model: where its layers, projections, norms and heads are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from slm_plugin.errors import UnsupportedModelError
from slm_plugin.lazy import nn, torch
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.models.families import family_of
from slm_plugin.models.families.family import Family
from slm_plugin.models.head import Head
from slm_plugin.models.operators import own_parameters

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class DecoderView:
    """Access to a model's stack of layers, the norm behind it, and a decoder's embedding and head.

    Attributes:
        model: The model.
        stack: Which of its two stacks, where it has two.
    """

    model: PreTrainedModel
    stack: str | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, stack: str | None = None) -> DecoderView:
        """Wrap a model.

        Raises:
            UnsupportedModelError: There is no family for the model's class.
            UserError: The class has two stacks of layers and none is named, or no such stack.
        """
        family_of(type(model).__name__, stack)
        return cls(model, stack)

    @property
    def family(self) -> Family:
        """What is true of the model's class."""
        return family_of(type(self.model).__name__, self.stack)

    @property
    def config(self) -> PretrainedConfig:
        """The configuration of the decoder, which is that of the model or a part of it."""
        return cast("PretrainedConfig", self.family.text_config(self.model.config))

    @property
    def fixed_layers(self) -> int:
        """Lowest layers that must stay where they are."""
        return self.family.fixed_layers(self.model.config)

    @property
    def decoder(self) -> nn.Module:
        """The model without its head."""
        if self.family.by_tensors:
            return cast(nn.Module, self.model.base_model)
        return cast(nn.Module, self.model.get_submodule(self.family.decoder))

    @property
    def layers(self) -> nn.ModuleList:
        """The layers, bottom first."""
        return cast(nn.ModuleList, self.decoder.get_submodule(self.family.layers))

    def put_layers(self, layers: nn.ModuleList) -> None:
        """Replace all layers."""
        holder, _, name = self.family.layers.rpartition(".")
        setattr(self.decoder.get_submodule(holder), name, layers)

    @property
    def norm(self) -> nn.Module:
        """The norm behind the last layer; the identity where there is none."""
        path = self.family.norm_of(vars(self.config))
        return self.decoder.get_submodule(path) if path else nn.Identity()

    @property
    def embedding(self) -> nn.Embedding:
        """Token embedding."""
        return cast(nn.Embedding, self.model.get_input_embeddings())

    @property
    def head(self) -> nn.Linear:
        """Weights of the language-modelling head."""
        return cast(nn.Linear, self.model.get_output_embeddings())

    @property
    def logits(self) -> Head:
        """The head with what the family does to its output."""
        family = self.family
        return Head(
            self.head,
            float(_setting(self.config, family.logits_divisor) or 1.0),
            _setting(self.config, family.logits_softcap),
        )

    @property
    def tied(self) -> bool:
        """Whether the head shares the embedding's weights."""
        if self.family.by_tensors:
            head: Any = self.model.get_output_embeddings()
            place = self.family.embedding
            own: Any = self.decoder.get_submodule(place) if place else None
            return head is not None and own is not None and head.weight is own.weight
        return self.head.weight is self.embedding.weight

    def dimensions(self) -> Dimensions:
        """Dimensions of the modules in memory, independent of the config.

        Raises:
            UnsupportedModelError: Layers differ from one another in more than their MLP channels.
        """
        first, family = self.layers[0], self.family
        shapes = _shapes(first, family)
        for index, layer in enumerate(self.layers):
            if _shapes(layer, family) != shapes:
                raise UnsupportedModelError(
                    f"layer {index} differs in shape from layer 0",
                    hint="only decoders whose layers differ in nothing but MLP channels can be "
                    "pruned",
                )
        if family.by_tensors:
            return self._whole_layers()
        modules = projections(first, family)
        head_dim = _head_dim(first, family, self.config)
        heads, kv_heads = _heads(modules, head_dim, self.config)
        experts = experts_of(first, family)
        found = Dimensions(
            architecture=type(self.model).__name__,
            layers=len(self.layers),
            hidden_size=self.embedding.embedding_dim,
            intermediate_size=_intermediate(modules, self.config),
            attention_heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=self.embedding.num_embeddings,
            tied_embeddings=self.tied,
            parameters=sum(p.numel() for p in self.model.parameters()),
            layer_parameters=sum(p.numel() for _, p in own_parameters(first)),
            channel_parameters=_channel(modules, family) if "channels" in family.units else 0,
            kv_group_parameters=(
                _head_size(modules, family, head_dim, heads // kv_heads, keys=1)
                if "kv_groups" in family.units
                else 0
            ),
            query_head_parameters=(
                _head_size(modules, family, head_dim, queries=1, keys=0)
                if "kv_groups" in family.units
                else 0
            ),
            experts=0 if experts is None else experts.count,
            experts_per_token=0 if experts is None else int(self.config.num_experts_per_tok),
            expert_parameters=0 if experts is None else experts.parameters,
            fixed_layers=self.fixed_layers,
            stream_vectors=_stream_vectors(first, family) if family.hidden_channels else 0,
        )
        if "channels" not in family.units:
            return found
        widths = [_channels(layer, family) for layer in self.layers]
        # The count of all parameters is measured already.
        return found.with_widths(widths).model_copy(update={"parameters": found.parameters})

    def _whole_layers(self) -> Dimensions:
        """Dimensions of a stack whose layers are only dropped or merged whole."""
        family, sizes = self.family, self.family.canonical(self.config.to_dict())
        hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
        embedding: Any = self.decoder.get_submodule(family.embedding) if family.embedding else None
        return Dimensions(
            architecture=type(self.model).__name__,
            layers=len(self.layers),
            hidden_size=hidden,
            intermediate_size=sizes["intermediate_size"],
            attention_heads=heads,
            kv_heads=heads,
            head_dim=hidden // heads,
            vocab_size=0 if embedding is None else embedding.num_embeddings,
            tied_embeddings=self.tied,
            parameters=sum(p.numel() for p in self.model.parameters()),
            layer_parameters=sum(p.numel() for _, p in own_parameters(self.layers[0])),
            channel_parameters=0,
            kv_group_parameters=0,
            stack=family.stack,
        )

    def projections(self, layer: nn.Module) -> dict[str, nn.Linear]:
        """The linear maps of one of its layers by their short names."""
        return projections(layer, self.family)

    def inputs(self, tokens: Tensor) -> dict[str, Any]:
        """Arguments of a pass over whole sequences without a cache.

        The mask says that nothing is padding. Without it transformers 4 looks for sequences packed
        into one, and makes a mask of every pair of positions where the kernel needs none.

        Args:
            tokens: Token ids, ``(samples, length)``.
        """
        given: dict[str, Any] = {"input_ids": tokens, "use_cache": False}
        if self.family.listed:
            given["attention_mask"] = torch.ones_like(tokens)
        return given

    @property
    def residual_multiplier(self) -> float:
        """Factor of what a block adds to the residual stream."""
        return float(_setting(self.config, self.family.residual_multiplier) or 1.0)


@dataclass(frozen=True, slots=True)
class Experts:
    """The routed experts of a layer and what chooses from them.

    Attributes:
        block: The MLP.
        router: Holds a weight, and a bias in some classes, whose axis 0 is the experts.
        experts: A list of one module per expert, or a module whose parameters have the experts on
            axis 0.
    """

    block: nn.Module
    router: nn.Module
    experts: nn.Module

    @property
    def count(self) -> int:
        """Number of experts."""
        return len(cast("Tensor", self.router.weight))

    @property
    def parameters(self) -> int:
        """Scalars of one expert with its row of the router."""
        parts = (self.router, self.experts)
        return sum(p.numel() for part in parts for p in part.parameters()) // self.count


def experts_of(layer: nn.Module, family: Family) -> Experts | None:
    """The experts of a layer; None in families that have none."""
    if not family.router:
        return None
    block = layer.get_submodule(family.mlp[0])
    return Experts(block, block.get_submodule(family.router), block.get_submodule("experts"))


def projections(layer: nn.Module, family: Family) -> dict[str, nn.Linear]:
    """The linear maps of a layer by their short names."""
    return {
        name: cast(nn.Linear, layer.get_submodule(path))
        for name, path in family.projections.items()
    }


def layer_kinds(view: DecoderView) -> list[tuple[object, ...]]:
    """What makes each layer differ from others: attention type, whether it has positions."""
    fields = ("layer_types", *view.family.kind_fields)
    found = [getattr(view.config, name, None) or [None] * len(view.layers) for name in fields]
    return list(zip(*found, strict=True))


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


def _head_dim(layer: nn.Module, family: Family, config: PretrainedConfig) -> int:
    if not family.listed:
        stated = getattr(config, "head_dim", None)
        return int(stated or config.hidden_size // config.num_attention_heads)
    attention: Any = layer.get_submodule(family.attention[0])
    return int(getattr(attention, "head_dim", None) or attention.head_size)


def _heads(
    modules: dict[str, nn.Linear], head_dim: int, config: PretrainedConfig
) -> tuple[int, int]:
    """Query heads and key/value heads."""
    if not modules:
        heads = int(config.num_attention_heads)
        return heads, int(getattr(config, "num_key_value_heads", None) or heads)
    heads = modules["o_proj"].in_features // head_dim
    if "k_proj" in modules:
        return heads, modules["k_proj"].out_features // head_dim
    return heads, (modules["qkv_proj"].out_features // head_dim - heads) // 2


def _intermediate(modules: dict[str, nn.Linear], config: PretrainedConfig) -> int:
    if "down_proj" in modules:
        return modules["down_proj"].in_features
    stated = next(
        (
            size
            for name in ("moe_intermediate_size", "intermediate_size", "n_inner")
            if (size := getattr(config, name, None))
        ),
        None,
    )
    # GPT-2: four times the hidden size unless it is stated.
    return int(stated or 4 * config.hidden_size)


def _shapes(layer: nn.Module, family: Family) -> list[tuple[str, tuple[float, ...]]]:
    """Shapes of a layer's parameters, those of the MLP in multiples of its channels."""
    shapes: dict[str, tuple[float, ...]]
    shapes = {name: tuple(p.shape) for name, p in own_parameters(layer)}
    if "channels" not in family.units:
        return list(shapes.items())
    width = _channels(layer, family)
    for short, path in family.projections.items():
        if not set(family.parts(short)) <= set(MLP_PROJECTIONS):
            continue
        rows, columns = shapes[f"{path}.weight"]
        if short == "down_proj":
            shapes[f"{path}.weight"] = (rows, columns / width)
            continue
        shapes[f"{path}.weight"] = (rows / width, columns)
        if f"{path}.bias" in shapes:
            shapes[f"{path}.bias"] = (rows / width,)
    return list(shapes.items())


def _channels(layer: nn.Module, family: Family) -> int:
    """MLP channels of a layer."""
    return cast(nn.Linear, layer.get_submodule(family.projections["down_proj"])).in_features


def _channel(modules: dict[str, nn.Linear], family: Family) -> int:
    """Scalars of one MLP channel of a layer."""
    return sum(
        _unit_size(linear, rows=name != "down_proj")
        for name, linear in modules.items()
        for part in family.parts(name)
        if part in MLP_PROJECTIONS
    )


def _head_size(
    modules: dict[str, nn.Linear], family: Family, head_dim: int, queries: int, keys: int
) -> int:
    """Scalars of some query heads and some key/value heads of a layer."""
    return head_dim * sum(
        _unit_size(linear, rows=name != "o_proj")
        * (queries if part in ("q_proj", "o_proj") else keys)
        for name, linear in modules.items()
        for part in family.parts(name)
        if part in ATTENTION_PROJECTIONS
    )


def _stream_vectors(layer: nn.Module, family: Family) -> int:
    """Vectors of a layer with one entry for every hidden channel."""
    modules = projections(layer, family)
    biases = sum(modules[name].bias is not None for name in ("o_proj", "down_proj"))
    return len(family.stream_norms) + biases


def _setting(config: PretrainedConfig, name: str | None) -> float | None:
    return None if name is None else getattr(config, name, None)


def _unit_size(linear: nn.Linear, *, rows: bool) -> int:
    """Scalars of one output row (with its bias) or one input column."""
    if rows:
        return linear.in_features + (linear.bias is not None)
    return linear.out_features
