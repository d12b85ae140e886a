"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest

from slm_plugin.report import numbers
from tests.report.samples import typed


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([33.914, 61.7], 2),
        ([0.612, 0.7], 4),
        ([4100.5, 33.9], 0),
        ([3.5, math.inf], 3),
        ([30, 27], 0),
        ([5.9e-5], 6),
        ([], 0),
    ],
)
def test_places_follow_the_largest_value(values: list[float], expected: int) -> None:
    """Values of one row share decimals that give the largest about four digits."""
    assert numbers.places(values) == expected


@pytest.mark.parametrize(
    ("value", "signed", "expected"),
    [
        (1234567.0, False, "1,234,567"),
        (-0.0656, False, "-0.0656"),
        (27.81, True, "+27.81"),
        (0.0, True, "0"),
        (math.inf, False, "∞"),
        (-math.inf, False, "-∞"),
        (math.nan, True, "NaN"),
    ],
)
def test_numbers_read_well(value: float, signed: bool, expected: str) -> None:
    """Thousands are separated, minus is a minus sign, and infinity has a name."""
    assert typed(numbers.number(value, signed=signed)) == expected


def test_a_small_number_never_reads_as_zero() -> None:
    """A difference below the row's last decimal is shown by its exponent."""
    assert typed(numbers.number(0.0004, 2)) == "4.0e-04"
    assert typed(numbers.number(-0.0004, 2)) == "-4.0e-04"


def test_quantities_carry_their_unit() -> None:
    """Bytes get a prefix, other units follow the number, no unit leaves no space."""
    assert typed(numbers.quantity(61.42, "ms")) == "61.42 ms"
    assert numbers.quantity(2_048, "B") == "2.0 kB"
    assert typed(numbers.quantity(-107_177_472, "bytes", signed=True)) == "-107.2 MB"
    assert typed(numbers.quantity(0.5, "")) == "0.5000"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.04, "0.0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (203.6, "3 min 24 s"),
        (7325, "2 h 2 min"),
    ],
)
def test_durations_have_two_units(seconds: float, expected: str) -> None:
    """No duration reads as 60 seconds."""
    assert numbers.duration(seconds) == expected


def test_changes_are_relative_to_the_size_of_the_start() -> None:
    """The sign says the direction even from a negative start; from zero there is no share."""
    assert typed(numbers.change(200, 150)) == "-25.0%"
    assert typed(numbers.change(-2.0, -1.0)) == "+50.0%"
    assert typed(numbers.change(0, 1)) == ""
    assert typed(numbers.change(1, math.inf)) == ""


def test_spans_name_every_index_once() -> None:
    """Runs are drawn together and nothing else is."""
    assert typed(numbers.spans([7, 3, 4, 5, 0, 9, 8])) == "0, 3-5, 7-9"
    assert typed(numbers.spans([])) == ""


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [(960, "960"), (134_515_008, "134.5 M"), (6_738_415_616, "6.74 B")],
)
def test_counts_are_short(parameters: int, expected: str) -> None:
    """Parameter counts read as people say them."""
    assert numbers.count(parameters) == expected
