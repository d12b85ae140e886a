"""The rule of completeness itself: used and stored, name by name and shape by shape."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_plugin.errors import ModelSourceError
from slm_plugin.models.completeness import check_complete

SHAPES = st.dictionaries(
    st.sampled_from("abcdef"), st.tuples(st.integers(1, 3), st.integers(1, 3)), max_size=6
)


@given(stored=SHAPES, wanted=SHAPES, redundant=st.sets(st.sampled_from("abcdef")))
def test_only_equal_tables_pass(
    stored: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], redundant: set[str]
) -> None:
    """What remains of the stored names without the redundant ones is exactly what is wanted."""
    counted = {n: shape for n, shape in stored.items() if n in wanted or n not in redundant}
    if counted == wanted:
        check_complete("m", stored, wanted, redundant)
        return
    with pytest.raises(ModelSourceError):
        check_complete("m", stored, wanted, redundant)


def test_all_three_faults_are_told_at_once() -> None:
    """Names, counts and shapes stand in one line with the remedy."""
    stored: dict[str, tuple[int, ...]] = {f"extra.{i}": (1,) for i in range(9)} | {"both": (2, 3)}
    wanted = {"lost": (1,), "both": (3, 2)}
    with pytest.raises(ModelSourceError) as caught:
        check_complete("m", stored, wanted)
    message = caught.value.message
    assert "lacks 1 weight that its config requires: lost" in message
    assert "9 weights that its config does not account for: extra.0, extra.1, extra.2" in message
    assert "and 6 more" in message
    assert "both is [2, 3] instead of [3, 2]" in message
    assert caught.value.hint and "\n" not in message
