"""Targets: exactly one way to say how much."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from slm_plugin.target import Target, parse_count


@pytest.mark.parametrize(
    ("text", "count"),
    [("100M", 100_000_000), ("1.2B", 1_200_000_000), ("7k", 7_000), (" 12 ", 12), (5, 5)],
)
def test_parameter_counts_are_read_as_people_write_them(text: object, count: int) -> None:
    """K, M and B scale a number; a plain number stays."""
    assert parse_count(text) == count


def test_exactly_one_kind_is_given() -> None:
    """None, or two, is an error."""
    for fields in ({}, {"ratio": 0.1, "threshold": 0.5}):
        with pytest.raises(ValidationError, match="exactly one"):
            Target(**fields)


@given(ratio=st.floats(0.001, 0.999), original=st.integers(1, 10**12), cut=st.floats(0.1, 1))
def test_a_ratio_counts_the_original_model_unless_told_otherwise(
    ratio: float, original: int, cut: float
) -> None:
    """Two stages with ratios of the original add up; `of: current` takes what is there."""
    current = round(original * cut)
    whole = Target(ratio=ratio).parameters_to_remove(original, current)
    rest = Target(ratio=ratio, of="current").parameters_to_remove(original, current)
    assert whole == round(ratio * original)
    assert rest == round(ratio * current)


def test_parameters_are_what_stays() -> None:
    """`parameters: 100M` removes the difference to the present size."""
    assert Target(parameters=100).parameters_to_remove(1000, 250) == 150


@pytest.mark.parametrize(
    "fields", [{"layers_removed": 0}, {"layers_removed": -1}, {"ratio": 0.0}, {"parameters": 0}]
)
def test_nothing_to_remove_is_no_target(fields: dict[str, float]) -> None:
    """Zero layers would make slices such as [:-0] take everything."""
    with pytest.raises(ValidationError, match="greater than"):
        Target(**fields)


@pytest.mark.parametrize("count", ["9" * 400 + "B", "9" * 5000, "\u0665\u0660K", "1e3K"])
def test_a_count_that_nobody_means_is_no_number(count: str) -> None:
    """Too long for a float, or in other digits."""
    with pytest.raises(ValidationError):
        Target(parameters=count)
