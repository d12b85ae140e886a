"""The checksum sees what a version counter does not, and what sums alone would not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_plugin.models import state
from slm_plugin.models.state import checksum

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8]


def random(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Random values, as small integers where the format has no fractions."""
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, generator=generator).mul(20).to(dtype)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.sampled_from(DTYPES), st.data())
def test_one_bit_is_seen(count: int, dtype: torch.dtype, data: st.DataObject) -> None:
    """At any place of a tensor of any length and format."""
    tensor = random(count, dtype)
    before = checksum(tensor)
    assert checksum(tensor.clone()) == before
    flat = tensor.view(torch.uint8)
    flat[data.draw(st.integers(0, len(flat) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert checksum(tensor) != before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [6, 64, 4096, 9000])
def test_order_and_signs_are_seen(
    dtype: torch.dtype, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of rows, of whole chunks, and of all signs at once."""
    monkeypatch.setattr(state, "_CHUNK", 1024)
    monkeypatch.setattr(state, "_WIDTH", 32)
    tensor = random(count, dtype)
    table = tensor.view(2, -1)
    others = [-tensor, tensor.flip(0), table.flip(0), table.T, tensor.roll(1), tensor * 0]
    sums = [checksum(other) for other in [tensor, *others]]
    assert len(set(sums)) == len(sums)


def test_views_count_by_their_values() -> None:
    """Strides and offsets into a storage are no part of them; an empty tensor has a checksum."""
    whole = random(4000, torch.bfloat16)
    for view in (whole[3:], whole[::3], whole.view(40, 100).T):
        assert checksum(view) == checksum(view.clone().contiguous())
    assert checksum(torch.empty(0)) == checksum(torch.empty(0))
    assert checksum(torch.tensor(2.0)) != checksum(torch.tensor(3.0))
