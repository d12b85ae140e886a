"""The sizes of a stack of layers, as data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

from slm_plugin.models.families import family_of
from slm_plugin.models.families.family import Family
from slm_plugin.record import Record

# Gate, up and down: a channel is a row or a column of each.
_MLP_MATRICES = 3

# What has a basis of the residual stream of its own: the whole model, or every block and the head.
BasisOf: TypeAlias = Literal["model", "block"]


class Dimensions(Record):
    """Sizes of a stack of layers, and the parameters per unit of each kind.

    Layers differ at most in their MLP channels. Where they do, ``layer_widths`` has the channels of
    every layer, ``intermediate_size`` is the largest of them, and ``layer_parameters`` are those of
    a layer so wide; elsewhere ``layer_widths`` is empty.

    All ``*_parameters`` count scalars; tied embeddings count once. A unit that cannot be removed
    from models of this family has 0. Experts are those that a router chooses from, each with its
    row of the router; plans of versions that did not know them, or query heads, say 0. Where a
    model has two stacks of layers, ``stack`` says which one this is. Without token ids
    ``vocab_size`` is 0. The lowest ``fixed_layers`` must stay where they are, because vision
    features are added behind them.
    ``stream_vectors`` counts the norm weights and biases of a layer that have one entry for every
    hidden channel; it is 0 where hidden channels cannot be removed.
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
    experts: int = 0
    experts_per_token: int = 0
    expert_parameters: int = 0
    query_head_parameters: int = 0
    stack: str = ""
    fixed_layers: int = 0
    layer_widths: tuple[int, ...] = ()
    stream_vectors: int = 0

    @property
    def family(self) -> Family:
        """What is true of the model's class."""
        return family_of(self.architecture, self.stack)

    @property
    def queries_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.attention_heads // self.kv_heads

    @property
    def units(self) -> dict[str, int]:
        """Units of a layer that width pruning removes, by what `without_units` calls them."""
        found = {
            "channels": (self.intermediate_size, self.channel_parameters),
            "kv_groups": (self.kv_heads, self.kv_group_parameters),
            "query_heads": (self.attention_heads, self.query_head_parameters),
            "experts": (self.experts, self.expert_parameters),
        }
        return {unit: count for unit, (count, size) in found.items() if size}

    @property
    def hidden_parameters(self) -> int:
        """Scalars of one hidden channel in the whole model; 0 where none can be removed."""
        if not self.stream_vectors:
            return 0
        per_layer = self._hidden_in_attention + self.stream_vectors
        channels = _MLP_MATRICES * sum(self.widths)
        # With the embedding, the head unless it is the embedding, and the norm behind the layers.
        outside = self.vocab_size * (1 if self.tied_embeddings else 2) + 1
        return self.layers * per_layer + channels + outside

    @property
    def _hidden_in_attention(self) -> int:
        """Scalars of one hidden channel in q, k, v and o of a layer."""
        return 2 * self.head_dim * (self.attention_heads + self.kv_heads)

    @property
    def widths(self) -> tuple[int, ...]:
        """MLP channels of every layer."""
        return self.layer_widths or (self.intermediate_size,) * self.layers

    @property
    def width_range(self) -> str:
        """MLP channels of a layer in words: one number, or the smallest and the largest."""
        low = min(self.layer_widths, default=self.intermediate_size)
        return f"{low:,} to {self.intermediate_size:,}" if self.layer_widths else f"{low:,}"

    def with_widths(self, widths: Sequence[int]) -> Dimensions:
        """The same decoder with other numbers of MLP channels, one for every layer."""
        largest = max(widths)
        narrower = self.intermediate_size - largest
        removed = sum(self.widths) - sum(widths)
        return self.model_copy(
            update={
                "intermediate_size": largest,
                "layer_widths": tuple(widths) if min(widths) < largest else (),
                "layer_parameters": self.layer_parameters - narrower * self.channel_parameters,
                "parameters": self.parameters - removed * self.channel_parameters,
            }
        )

    def of_layer(self, layer: int) -> Dimensions:
        """The same decoder if all layers had as many MLP channels as this one."""
        if not self.layer_widths:
            return self
        return self.with_widths((self.layer_widths[layer],) * self.layers)

    def without_layers(self, removed: int) -> Dimensions:
        """The same decoder with fewer layers, which are all of one width."""
        return self.model_copy(
            update={
                "layers": self.layers - removed,
                "parameters": self.parameters - removed * self.layer_parameters,
            }
        )

    def untied(self) -> Dimensions:
        """The same decoder with a head of its own."""
        added = self.vocab_size * self.hidden_size if self.tied_embeddings else 0
        return self.model_copy(
            update={"tied_embeddings": False, "parameters": self.parameters + added}
        )

    def without_hidden(self, removed: int, *, rotated: BasisOf | None = None) -> Dimensions:
        """The same decoder with fewer hidden channels, where some can be removed.

        Args:
            removed: Hidden channels to remove.
            rotated: The residual stream is rotated before, which unties the head: by one basis for
                the model, or by one for every block, each with an operator.
        """
        if rotated is not None:
            left = self.untied().without_hidden(removed)
            added = 2 * left.layers * left.hidden_size**2 if rotated == "block" else 0
            return left.model_copy(update={"parameters": left.parameters + added})
        if not removed:
            return self
        per_layer = self._hidden_in_attention + self.stream_vectors
        per_layer += _MLP_MATRICES * self.intermediate_size
        # Of a query head in q and o, and of a key/value head in k and v.
        per_head = 2 * self.head_dim
        query_head = self.query_head_parameters
        per_group = per_head * (self.queries_per_group + 1)
        return self.model_copy(
            update={
                "hidden_size": self.hidden_size - removed,
                "parameters": self.parameters - removed * self.hidden_parameters,
                "layer_parameters": self.layer_parameters - removed * per_layer,
                "channel_parameters": self.channel_parameters - removed * _MLP_MATRICES,
                "kv_group_parameters": self.kv_group_parameters - removed * per_group,
                "query_head_parameters": query_head - removed * per_head if query_head else 0,
            }
        )

    def without_units(
        self, channels: int = 0, kv_groups: int = 0, experts: int = 0, query_heads: int = 0
    ) -> Dimensions:
        """The same decoder with fewer units in every layer.

        Args:
            channels: MLP channels to remove from every layer.
            kv_groups: KV groups.
            experts: Experts.
            query_heads: Query heads, as many of every KV group; before whole groups go.
        """
        fewer = query_heads // self.kv_heads
        group = self.kv_group_parameters - fewer * self.query_head_parameters
        per_layer = (
            kv_groups * group
            + query_heads * self.query_head_parameters
            + experts * self.expert_parameters
        )
        narrower = self.with_widths([width - channels for width in self.widths])
        left, queries = self.kv_heads - kv_groups, self.queries_per_group - fewer
        return narrower.model_copy(
            update={
                "kv_heads": left,
                "attention_heads": left * queries,
                "kv_group_parameters": group,
                "experts": self.experts - experts,
                "layer_parameters": narrower.layer_parameters - per_layer,
                "parameters": narrower.parameters - self.layers * per_layer,
            }
        )
