"""CoMe: merge adjacent layers by concatenating the most important channels of each.

Source: CoMe (arXiv 2510.15304), training-free, without the search over ratios.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from slm_plugin.calibration.captures import Batch, run_batches
from slm_plugin.calibration.spool import Spool
from slm_plugin.errors import NumericalError
from slm_plugin.lazy import inference_mode, torch
from slm_plugin.models.view import DecoderView
from slm_plugin.plans import ConcatLayers, LayerPart, LayerScores, PruningPlan
from slm_plugin.progress import counting
from slm_plugin.pruners import base
from slm_plugin.pruners.depth.angular import block_distances
from slm_plugin.pruners.depth.depth_plan import depth_plan, kinds_of
from slm_plugin.pruners.depth.dropping import lowest
from slm_plugin.pruners.depth.measures.criteria import token_cosine
from slm_plugin.pruners.depth.measures.sensitivity import sensitivities
from slm_plugin.registry import register_pruner
from slm_plugin.surgery.concatenation import concatenated_layer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slm_plugin.models.families.family import Family
    from slm_plugin.session import Session

# Hidden states between two layers, ``(samples, length, hidden)``, by batch index.
States: TypeAlias = "Callable[[int], Tensor]"


@register_pruner("merge_concat")
class MergeConcat(base.Pruner):
    """Merge the two adjacent layers of least angular distance, channel by channel (CoMe)."""

    kind: ClassVar = "depth"
    targets: ClassVar = ("layers_removed", "ratio", "parameters")
    streams: ClassVar = True
    merges: ClassVar = True

    @classmethod
    def unsuited(cls, family: Family, config: Mapping[str, Any]) -> str:
        """Channels and heads of several layers must fit into one."""
        missing = sorted({"channels", "kv_groups"} - set(family.units))
        return family.reason(missing[0]) if missing else ""

    def plan(self, session: Session) -> PruningPlan:
        """Merge pairs one after another, and record the parts of each result.

        Raises:
            TargetError: The target cannot be reached.
            NumericalError: A hidden state is NaN or zero.
        """
        view = session.view
        before = view.dimensions()
        wanted = base.layers_to_remove(self.target, session.original, before)
        kinds = kinds_of(view) or (None,) * before.layers
        most = sum(low == high for low, high in itertools.pairwise(kinds))
        unlike = "layers of different kinds, which never merge,"
        base.refuse_beyond(self.target, wanted, most, before.layers, unlike)
        current = Current(view, session.captured())
        first_scores: list[float] = []
        decided: list[Slot] = []
        notes: list[str] = []
        with counting(f"{self.name}: merges") as count:
            for _ in range(wanted):
                scores = current.distances()
                first_scores = first_scores or scores
                (at,) = lowest(scores, 1, current.alike(kinds))
                low, high = current.slots[at : at + 2]
                share = current.share(at)
                decided = [slot for slot in decided if slot not in (low, high)]
                decided.append(current.merge(at, share))
                notes.append(
                    f"{low.describe()} and {high.describe()}: angular distance {scores[at]:.4f}, "
                    f"shares {share:.1%} and {1 - share:.1%}"
                )
                count()
        meaning = "angular distance over 2 layers, 0 to 1, by the lower, before any merge"
        return depth_plan(
            self,
            session,
            [ConcatLayers(parts=slot.parts) for slot in decided],
            notes,
            layer_scores=LayerScores(meaning=meaning, scores=tuple(first_scores)),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """A layer of the partly merged model.

    Attributes:
        parts: The parts of original layers in it.
        module: The layer.
    """

    parts: tuple[LayerPart, ...]
    module: nn.Module

    @property
    def first(self) -> int:
        """Lowest original layer in it, whose mask and positions it takes."""
        return self.parts[0].layer

    def describe(self) -> str:
        """Its original layers, for notes."""
        last = self.parts[-1].layer
        return f"layer {last}" if last == self.first else f"layers {self.first}-{last}"


class Current:
    """The partly merged model and the hidden states between its layers.

    Attributes:
        slots: Its layers, lowest first.

    Args:
        view: The model before any merge.
        captured: The inputs of its layers.
    """

    def __init__(self, view: DecoderView, captured: Sequence[Batch]) -> None:
        self._view, self._captured = view, captured
        self._dimensions = view.dimensions()
        whole = tuple(range(self._dimensions.intermediate_size))
        groups = tuple(range(self._dimensions.kv_heads))
        self.slots = [
            Slot((LayerPart(layer=i, channels=whole, kv_groups=groups),), layer)
            for i, layer in enumerate(view.layers)
        ]
        # The input of every layer and the output of the last one.
        self._states = [_inputs(captured, index) for index in range(len(self.slots) + 1)]

    def alike(self, kinds: Sequence[object]) -> list[int]:
        """Positions of layers with the same attention type as the next one.

        Args:
            kinds: From `kinds_of`, of the original layers.
        """
        pairs = itertools.pairwise(self.slots)
        return [at for at, (a, b) in enumerate(pairs) if kinds[a.first] == kinds[b.first]]

    @inference_mode
    def distances(self) -> list[float]:
        """Mean angular distance of the last token over every pair of adjacent layers."""
        parts = []
        for number in range(len(self._captured)):
            parts.append(torch.stack([s(number)[:, -1].double().cpu() for s in self._states]))
        return block_distances(torch.cat(parts, dim=1), 2)

    def share(self, at: int) -> float:
        """Share of the lower of two layers in the merged layer, by block influence.

        Raises:
            NumericalError: A hidden state is NaN or zero.
        """
        low, high = self._influence(at), self._influence(at + 1)
        # Two layers of no influence get equal shares.
        return low / (low + high) if low + high > 0 else 0.5

    @inference_mode
    def _influence(self, at: int) -> float:
        total, samples = 0.0, 0
        for number, batch in enumerate(self._captured):
            cosine = token_cosine(self._states[at](number), self._states[at + 1](number))
            total += float(cosine.sum())
            samples += len(batch.tokens)
        if not math.isfinite(total):
            raise NumericalError(
                f"the block influence of {self.slots[at].describe()} is NaN",
                hint="load the model in float32 or bfloat16: float16 overflows",
            )
        # Rounding may give a cosine above 1 for equal states.
        return max(0.0, 1 - total / samples)

    def merge(self, at: int, share: float) -> Slot:
        """Merge a layer with the next one and recompute the inputs of the layers above.

        Args:
            at: Position of the lower layer.
            share: Share of the lower layer.
        """
        sizes = self._dimensions
        channels = split(sizes.intermediate_size, share)
        groups = split(sizes.kv_heads, share)
        parts: list[LayerPart] = []
        for side, part_share in enumerate((share, 1 - share)):
            channel_scores, group_scores = self._sensitivities(at + side)
            parts += narrowed(
                self.slots[at + side].parts,
                top(channel_scores, channels[side]),
                top(group_scores, groups[side]),
                part_share,
            )
        layers = [self._view.layers[part.layer] for part in parts]
        made = Slot(tuple(parts), concatenated_layer(parts, layers, sizes))
        self.slots[at : at + 2] = [made]
        self._run_from(at)
        return made

    @inference_mode
    def _run_from(self, at: int) -> None:
        """Recompute the states above a position."""
        self._states = self._states[: at + 1]
        states = [self._states[at](number) for number in range(len(self._captured))]
        for slot in self.slots[at:]:
            states = run_batches([(slot.first, slot.module)], self._captured, states)
            spool = Spool()
            for state in states:
                spool.append(state)
            self._states.append(spool.__getitem__)

    def _sensitivities(self, at: int) -> tuple[Tensor, Tensor]:
        slot = self.slots[at]
        states = [self._states[at](number) for number in range(len(self._captured))]
        return sensitivities(
            slot.module,
            lambda: run_batches([(slot.first, slot.module)], self._captured, states),
            self._dimensions,
        )


def _inputs(captured: Sequence[Batch], index: int) -> States:
    return lambda number: captured[number].inputs[index]


def split(units: int, share: float) -> tuple[int, int]:
    """Whole numbers of units for two shares of 1; the larger share gets the remainder."""
    low, high = math.floor(units * share), math.floor(units * (1 - share))
    if share >= 0.5:
        return units - high, high
    return low, units - low


def top(scores: Tensor, count: int) -> set[int]:
    """Positions of the highest scores; ties by position."""
    return set(scores.argsort(descending=True, stable=True)[:count].tolist())


def narrowed(
    parts: Sequence[LayerPart], channels: Container[int], groups: Container[int], share: float
) -> list[LayerPart]:
    """The parts of a layer that enter the next merge, as parts of original layers.

    Args:
        parts: The parts of the layer, in order.
        channels: Positions of its MLP channels that remain.
        groups: Positions of its KV groups that remain.
        share: Its share in that merge; norms are shared equally.
    """
    channel, group = itertools.count(), itertools.count()
    return [
        LayerPart(
            layer=part.layer,
            channels=tuple(i for i in part.channels if next(channel) in channels),
            kv_groups=tuple(i for i in part.kv_groups if next(group) in groups),
            norm_share=part.norm_share / 2,
            bias_share=part.bias_share * share,
        )
        for part in parts
    ]
