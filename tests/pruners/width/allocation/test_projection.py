"""From relative sparsities to channels: the budget is exact, and no other counts come nearer."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from slm_plugin.errors import TargetError
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.pruners.width.allocation.limits import channel_limits
from slm_plugin.pruners.width.allocation.projection import Limits, ideal_channels, kept_channels
from slm_plugin.target import Target
from tests.tiny import SMOLLM2

SHARES = st.integers(-50, 400).map(lambda hundredths: hundredths / 100)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[float], Limits]:
    """Layers of any widths, floors and relative sparsities, and a sum that can be met."""
    step = draw(st.sampled_from([1, 3, 8]))
    widths = draw(st.lists(st.integers(step, 90), min_size=1, max_size=6))
    floors = [step * draw(st.integers(1, width // step)) for width in widths]
    most = sum(width - width % step for width in widths)
    kept = step * draw(st.integers(sum(floors) // step, most // step))
    relative = draw(st.lists(SHARES, min_size=len(widths), max_size=len(widths)))
    return relative, Limits(tuple(widths), tuple(floors), kept, step)


@given(problems())
@settings(max_examples=150, deadline=None)
def test_the_budget_is_exact_within_all_bounds(problem: tuple[list[float], Limits]) -> None:
    """Whatever the relative sparsities are, also with layers that should lose nothing."""
    relative, limits = problem
    counts = kept_channels(relative, limits)
    assert sum(counts) == limits.kept
    for count, floor, ceiling in zip(counts, limits.floors, limits.ceilings, strict=True):
        assert floor <= count <= ceiling and count % limits.multiple_of == 0


@given(problems())
@settings(max_examples=80, deadline=None)
def test_a_larger_share_never_keeps_more(problem: tuple[list[float], Limits]) -> None:
    """Of two layers of one width and one floor."""
    relative, limits = problem
    counts = kept_channels(relative, limits)
    for one, other in itertools.permutations(range(len(counts)), 2):
        same = limits.widths[one] == limits.widths[other]
        more = max(relative[one], 0) > max(relative[other], 0)
        if same and limits.floors[one] == limits.floors[other] and more:
            assert counts[one] <= counts[other]


@pytest.mark.parametrize("step", [1, 4])
@pytest.mark.parametrize("kept", [40, 60, 72])
@pytest.mark.parametrize("relative", [(1, 1, 1), (0.5, 1, 1.5), (0, 3, 1), (2, 0.1, 0.1)])
def test_no_other_counts_come_nearer(relative: tuple[float, ...], kept: int, step: int) -> None:
    """Against all counts with this sum, by the squared distance from the ideal ones."""
    limits = Limits((24, 24, 32), (4, 8, 4), kept, step)
    ideal = ideal_channels(relative, limits)

    def far(counts: tuple[int, ...]) -> float:
        return sum((count - wish) ** 2 for count, wish in zip(counts, ideal, strict=True))

    allowed = [range(f, c + 1, step) for f, c in zip(limits.floors, limits.ceilings, strict=True)]
    best = min(far(counts) for counts in itertools.product(*allowed) if sum(counts) == kept)
    assert far(kept_channels(relative, limits)) == pytest.approx(best, abs=1e-6)


def test_ideal_counts_are_proportional_between_the_bounds() -> None:
    """Without a bound in the way eta is what goes over the weighted sum; else by hand."""
    free = Limits((100, 200), (1, 1), 210, 1)
    eta = 90 / (100 * 1 + 200 * 2)
    assert ideal_channels([1, 2], free) == pytest.approx([100 * (1 - eta), 200 * (1 - 2 * eta)])
    # The second layer would keep 40 and stands at 60: the first gives the 20.
    held = Limits((100, 100), (1, 60), 130, 1)
    assert ideal_channels([1, 6], held) == pytest.approx([70, 60])
    # The second layer should lose nothing, and does so until the first is at its floor.
    spared = Limits((100, 100), (10, 10), 90, 1)
    assert ideal_channels([1, 0], spared) == pytest.approx([10, 80], abs=1e-5)


@given(st.integers(1, 9), st.integers(1, 12), st.sampled_from([1, 8]))
@settings(max_examples=40, deadline=None)
def test_equal_shares_give_equal_counts(layers: int, steps: int, step: int) -> None:
    """Where the budget can be divided; else no two layers are more than one step apart."""
    width = step * 12
    even = Limits((width,) * layers, (step,) * layers, layers * steps * step, step)
    assert set(kept_channels([0.7] * layers, even)) == {steps * step}
    assume(steps < 12)
    odd = Limits((width,) * layers, (step,) * layers, (layers * steps + 1) * step, step)
    assert max(kept_channels([2.0] * layers, odd)) - min(kept_channels([2.0] * layers, odd)) in (
        0,
        step,
    )


def limits_of(
    ratio: float, current: Dimensions = SMOLLM2, floor: float = 0.1, multiple_of: int = 8
) -> Limits:
    """Without KV groups."""
    found, groups = channel_limits(
        Target(ratio=ratio),
        SMOLLM2,
        current,
        kv_groups=0,
        multiple_of=multiple_of,
        floor=floor,
    )
    assert groups == 0
    return found


@pytest.mark.parametrize("ratio", [0.01, 0.158, 0.3])
@pytest.mark.parametrize("multiple_of", [1, 8, 64])
def test_the_size_is_met_to_half_a_step_of_one_layer(ratio: float, multiple_of: int) -> None:
    """Finer than with uniform widths, whose step is one in every layer."""
    limits = limits_of(ratio, multiple_of=multiple_of)
    removed = (sum(limits.widths) - limits.kept) * SMOLLM2.channel_parameters
    half = multiple_of * SMOLLM2.channel_parameters / 2
    assert abs(removed - ratio * SMOLLM2.parameters) <= half + 1
    assert limits.sparsity == pytest.approx(removed / (30 * 1536 * 1728))


def test_widths_that_differ_already_are_seen() -> None:
    """The floors are those of each layer."""
    current = SMOLLM2.with_widths([1536] * 10 + [768] * 20)
    limits = limits_of(0.05, current, floor=0.5)
    assert limits.floors == (768,) * 10 + (384,) * 20
    assert limits.widths == current.widths


@pytest.mark.parametrize(
    ("ratio", "floor", "multiple_of", "words"),
    [
        (0.4, 0.5, 8, "keeps about 14,942 of 46,080 MLP channels; floor 0.5 .* at least 23,040"),
        (0.58, 0.1, 8, "keeps about 930 of .* at least 4,800"),
        (0.00001, 0.1, 8, "layers that keep multiples of 8 keep at most 46,079"),
        (0.01, 0.1, 1000, "keep at most 30,000"),
        (0.01, 0.1, 1600, "multiple_of 1600 leaves no size"),
    ],
)
def test_what_cannot_be_met_is_told(
    ratio: float, floor: float, multiple_of: int, words: str
) -> None:
    """With both numbers, before any work."""
    with pytest.raises(TargetError, match=words):
        limits_of(ratio, floor=floor, multiple_of=multiple_of)
