"""Targets: exactly one way to say how much."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from slm_plugin.target import Target, parse_bytes, parse_count


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


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("300MB", 300_000_000),
        ("7kB", 7_000),
        ("1.5 GiB", 3 << 29),
        ("2mib", 2 << 20),
        ("12", 12),
        (5, 5),
    ],
)
def test_bytes_are_read_as_people_write_them(text: object, size: int) -> None:
    """Decimal units are powers of 1000, binary ones of 1024; a plain number stays."""
    assert parse_bytes(text) == size
    assert Target(memory=text).memory == size


@pytest.mark.parametrize(
    "text", ["300", "300M", "300B", "3 TB", "1e3MB", "-1MB", "0MB", "5\u212aB"]
)
def test_a_size_needs_a_unit_that_is_one(text: str) -> None:
    """Only a number of bytes has none."""
    if text == "300":
        assert Target(memory=text).memory == 300
        return
    with pytest.raises(ValidationError):
        Target(memory=text)


@pytest.mark.parametrize(
    "latency",
    [{}, {"decode": 0.8, "prefill": 0.7}, {"decode": 0}, {"decode": 1}, {"prefill": -0.1}, 0.8],
)
def test_latency_is_a_share_of_one_phase(latency: object) -> None:
    """Exactly one of prefill and decode, above 0 and below 1."""
    with pytest.raises(ValidationError):
        Target(latency=latency)


@pytest.mark.parametrize(
    ("fields", "words", "counts"),
    [
        ({"latency": {"decode": 0.8}}, "80.0% of the original decode time", False),
        ({"latency": {"prefill": 0.7}}, "70.0% of the original prefill time", False),
        ({"memory": "300MB"}, "down to 300,000,000 bytes of weights and KV cache", False),
        ({"threshold": 0.5}, "threshold 0.5", False),
        ({"layers_removed": 1}, "1 layer removed", True),
        ({"ratio": 0.25}, "25.0% of the original parameters", True),
        ({"parameters": "1.5k"}, "down to 1,500 parameters", True),
    ],
)
def test_targets_describe_themselves(fields: dict[str, Any], words: str, counts: bool) -> None:
    """In words, and read again from JSON; only some of them count units of a model."""
    target = Target(**fields)
    assert (target.describe(), target.counts) == (words, counts)
    assert Target.model_validate_json(target.model_dump_json(), strict=True) == target
    if target.kind in ("latency", "memory", "threshold"):
        with pytest.raises(ValueError, match=f"kind {target.kind} does not count"):
            target.parameters_to_remove(10, 10)


@pytest.mark.parametrize("count", ["5\u212a", "9" * 400 + "B", "9" * 5000, "\u0665\u0660K", "1e3K"])
def test_a_count_that_nobody_means_is_no_number(count: str) -> None:
    """Too long for a float, or in other digits."""
    with pytest.raises(ValidationError):
        Target(parameters=count)
