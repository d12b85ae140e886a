"""The arithmetic progression, and the choice of its slope on held-out samples."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from transformers import PreTrainedModel

from slm_plugin.calibration.held_out import is_held_out
from slm_plugin.errors import CalibrationError, NumericalError
from slm_plugin.plans import UnitScores
from slm_plugin.pruners.width.allocation import progression as module
from slm_plugin.pruners.width.allocation.progression import (
    SLOPES,
    atp,
    mean_loss,
    progression,
    silenced,
    slopes,
)
from slm_plugin.pruners.width.allocation.projection import Limits, kept_channels
from slm_plugin.pruners.width.importance import kept_units, magnitude
from slm_plugin.session import Session
from tests.tiny import make_model, random_tokens

TOKENS = random_tokens(7, 10)
LIMITS = Limits((48,) * 6, (8,) * 6, 144, 4)


def model_of_idle_upper_layers() -> PreTrainedModel:
    """The MLP of the upper layers adds next to nothing."""
    model = make_model()
    with torch.no_grad():
        for layer in model.model.layers[3:]:
            layer.mlp.down_proj.weight *= 0.02
    return model


def keep(relative: Sequence[float]) -> tuple[int, ...]:
    """The channels of the tiny model's layers at half its width."""
    return kept_channels(relative, LIMITS)


@pytest.mark.parametrize("sparsity", [0.16, 0.5, 0.7])
@pytest.mark.parametrize("layers", [2, 7, 32])
def test_slopes_keep_the_mean_and_the_bounds(sparsity: float, layers: int) -> None:
    """Constant differences; with the last slope the first or the last layer is at its bound."""
    tried = slopes(sparsity, layers)
    assert tried[0] == 0 and len(tried) == SLOPES
    for slope in tried:
        shares = [sparsity * share for share in progression(slope, sparsity, layers)]
        assert sum(shares) / layers == pytest.approx(sparsity)
        steps = [b - a for a, b in itertools.pairwise(shares)]
        assert steps == pytest.approx([slope] * (layers - 1))
        assert min(shares) >= -1e-12 and max(shares) <= 1 + 1e-12
    assert min(min(shares), 1 - max(shares)) == pytest.approx(0, abs=1e-12)
    assert slopes(sparsity, 1) == [0.0]


def test_the_published_bound_is_the_last_slope() -> None:
    """32 layers at 0.7: nine steps of 0.002 fit below it."""
    assert slopes(0.7, 32)[-1] == pytest.approx(0.01935, abs=1e-5)
    assert int(slopes(0.7, 32)[-1] / 0.002) == 9


def test_the_slope_has_the_least_loss_on_the_held_out_samples() -> None:
    """Against slices of the model for every slope; scores never see these samples."""
    session = Session(model_of_idle_upper_layers(), calibration=TOKENS, batch_tokens=20)
    held_out = is_held_out(torch.arange(len(TOKENS)))
    seen: list[torch.Tensor] = []

    def score(one: Session) -> tuple[UnitScores, ...]:
        assert one.calibration is not None
        seen.append(one.calibration)
        return magnitude(one.view)

    found = atp(session, 0.5, score, keep)
    (given,) = seen
    assert torch.equal(given, TOKENS[~held_out])
    losses = {}
    for slope in slopes(0.5, 6):
        model = model_of_idle_upper_layers()
        ranked = [one for one in magnitude(session.view) if one.unit == "mlp_channel"]
        for layer, one, count in zip(
            model.model.layers, ranked, keep(progression(slope, 0.5, 6)), strict=True
        ):
            gone = set(range(48)) - set(kept_units(one.scores, 48 - count))
            with torch.no_grad():
                layer.mlp.down_proj.weight[:, sorted(gone)] = 0
        with torch.no_grad():
            losses[slope] = float(model(TOKENS[held_out], labels=TOKENS[held_out]).loss)
    best = min(losses, key=losses.__getitem__)
    assert found == progression(best, 0.5, 6)
    assert best > 0


def test_a_slope_chosen_on_the_test_text_looks_better_than_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The published choice: the least of several losses on a text is no estimate for that text.

    On each text its own best slope is at least as good as the one that other samples chose, and on
    some texts better: that difference is the leak.
    """
    session = Session(make_model(), calibration=TOKENS)
    ranked = [one for one in magnitude(session.view) if one.unit == "mlp_channel"]
    tried = slopes(0.5, 6)
    losses = torch.empty(len(tried), 6)
    for row, slope in enumerate(tried):
        counts = keep(progression(slope, 0.5, 6))
        units = [kept_units(o.scores, 48 - c) for o, c in zip(ranked, counts, strict=True)]
        with silenced(session.view, units):
            for text in range(6):
                losses[row, text] = mean_loss(session.view, [TOKENS[text : text + 1]])
    leaked = losses.min(0).values
    for text in range(6):
        others = [other for other in range(6) if other != text]
        honest = losses[losses[:, others].mean(1).argmin(), text]
        assert leaked[text] <= honest
    chosen = [losses[:, [o for o in range(6) if o != t]].mean(1).argmin() for t in range(6)]
    honest_mean = torch.stack([losses[row, text] for text, row in enumerate(chosen)]).mean()
    assert leaked.mean() < honest_mean


def test_nothing_is_left_on_the_model() -> None:
    """Hooks go, also after an error, and weights were never touched."""
    session = Session(make_model(), calibration=TOKENS)
    with pytest.raises(ZeroDivisionError), silenced(session.view, [(0,)] * 6):
        raise ZeroDivisionError
    assert not any(m._forward_pre_hooks for m in session.model.modules())


def test_too_little_and_unusable_data_are_told() -> None:
    """One line each."""
    session = Session(make_model(), calibration=TOKENS[:1])
    with pytest.raises(CalibrationError, match="the set has 1"):
        atp(session, 0.5, lambda one: magnitude(one.view), keep)
    broken = Session(make_model(), calibration=TOKENS)
    broken.model.lm_head.weight.data.fill_(torch.inf)
    with pytest.raises(NumericalError, match="loss on the held-out samples is nan"):
        module.mean_loss(broken.view, [TOKENS])
