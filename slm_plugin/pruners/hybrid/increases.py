"""What narrowing or removing each layer costs, measured one at a time after its repair."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from slm_plugin.cache import Store
from slm_plugin.calibration.captures import capture, run_batches, split
from slm_plugin.calibration.held_out import held_out
from slm_plugin.lazy import no_grad, torch
from slm_plugin.plans import KeepChannels, UnitScores
from slm_plugin.progress import track
from slm_plugin.pruners.depth.search.repaired_stack import Candidate, RepairedStack
from slm_plugin.pruners.depth.search.runs import DROP, Run
from slm_plugin.pruners.hybrid.divergence import Divergence
from slm_plugin.pruners.hybrid.prediction import by_power
from slm_plugin.pruners.trial_store import tell_read
from slm_plugin.pruners.width.budget import Cut
from slm_plugin.pruners.width.uniform import operations_of
from slm_plugin.surgery.channels import narrowed_copy

if TYPE_CHECKING:
    from torch import nn

    from slm_plugin.session import Session

# Shares of the channels that layers keep in what is measured; other widths lie between or beside.
_MEASURED = (0.75, 0.375)


def layer_increases(
    session: Session,
    widths: Sequence[int],
    removable: Collection[int],
    scores: Sequence[UnitScores],
    repair: str,
    journal: Store,
) -> list[dict[int, float]]:
    """What a layer costs by the width that it keeps alone, of every layer.

    Each is the `Divergence` of the model with that one layer changed and repaired, on the held-out
    samples, in nats a token. Two widths are measured, and the others follow by a power of the
    number of removed channels.

    Args:
        session: Holds the model, which stays as it is.
        widths: Numbers of channels that a layer may keep, most first.
        removable: Layers that may be removed.
        scores: Scores of the units of every layer; none where there is one width.
        repair: Name of one of `repaired_stack.REPAIRS`.
        journal: Where the divergences are stored.

    Returns:
        For every layer the increases by width; width 0 is without the layer.

    Raises:
        CalibrationError: There are fewer than 2 samples.
        NumericalError: A divergence is NaN or infinite.

    Source: Puzzletron scores a replacement by the model with that one alone; the divergence is one
        of its measures, the repair before it is SPRINT's (arXiv 2506.03510).
    """
    whole, layers = widths[0], len(session.view.layers)
    tried = sorted({min(widths, key=lambda w: abs(w - s * whole)) for s in _MEASURED} - {whole})
    asked = [(layer, width) for layer in range(layers) for width in tried]
    asked += [(layer, 0) for layer in sorted(removable)]
    found = dict(_divergences(session, sorted(asked), scores, repair, journal))
    made = []
    for layer in range(layers):
        removed = {whole - width: found[layer, width] for width in tried}
        increases = {width: by_power(removed, whole - width) for width in widths}
        if layer in removable:
            increases[0] = found[layer, 0]
        made.append(increases)
    return made


def _divergences(
    session: Session,
    asked: Sequence[tuple[int, int]],
    scores: Sequence[UnitScores],
    repair: str,
    journal: Store,
) -> Iterator[tuple[tuple[int, int], float]]:
    """The divergence of every layer and width that is asked for, stored as soon as it is known."""
    missing = [key for key in asked if journal.find(key) is None]
    tell_read(session, len(asked) - len(missing), journal)
    if missing:
        trials = _Replacements(session, scores, repair)
        for key in track(missing, "hybrid: replacements", len(missing)):
            journal.store(key, trials.divergence(*key))
    for key in asked:
        yield key, float(journal.find(key))


class _Replacements:
    """Runs the model with one layer narrowed or without it, on the held-out samples."""

    @no_grad
    def __init__(self, session: Session, scores: Sequence[UnitScores], repair: str) -> None:
        self._view = view = session.view
        self._dimensions = view.dimensions()
        self._stack = RepairedStack(session, repair)
        self._channels = {one.layer: one for one in scores if one.unit == "mlp_channel"}
        tokens = torch.cat([*held_out(batch.tokens for batch in session.captured())])
        self._held = capture(view, split(tokens, session.batch_tokens))
        self._divergence = Divergence((batch.final for batch in self._held), view.logits)

    @no_grad
    def divergence(self, index: int, width: int) -> float:
        """KL in nats a token; without the layer where the width is 0."""
        if width:
            changed = self._stack.repaired_layer(index, 1, self._narrowed(index, width))
            return self._behind(index, 1, changed)
        run = Run(index, index, DROP)
        candidate = Candidate(run, index - 1) if index else Candidate(run, 0, replaced=1)
        return self._behind(candidate.at, candidate.replaced, self._stack.repaired(candidate))

    def _narrowed(self, index: int, width: int) -> nn.Module:
        """A copy of a layer with its best channels."""
        before = self._dimensions
        fewer = before.intermediate_size - width
        (kept,) = operations_of(self._channels[index], Cut(fewer, 0), before)
        assert isinstance(kept, KeepChannels)
        removed = {*range(before.intermediate_size)} - {*kept.indices}
        layer, after = self._view.layers[index], before.without_units(channels=fewer)
        return narrowed_copy(layer, {"channels": sorted(removed)}, before, after)

    def _behind(self, at: int, count: int, layer: nn.Module | None) -> float:
        """The divergence with one layer in place of some; with none where it is None."""
        above = list(enumerate(self._view.layers))[at + count :]
        layers = above if layer is None else [(at, layer), *above]
        states = run_batches(layers, self._held, [batch.inputs[at] for batch in self._held])
        return fmean(self._divergence.samples(map(self._view.norm, states)))


def is_divergence(key: Any, value: Any) -> bool:
    """Whether a line of the journal holds a layer, a width and a divergence."""
    numbers = isinstance(key, list) and [type(one) for one in key] == [int, int]
    return numbers and math.isfinite(float(value)) and float(value) >= 0
