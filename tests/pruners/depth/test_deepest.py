"""The heuristic of the deepest layers."""

from __future__ import annotations

import pytest

from slm_plugin.errors import TargetError
from tests.pruners.depth.strategies import planned, removed
from tests.tiny import make_model


@pytest.mark.parametrize(("wanted", "expected"), [(1, [4]), (3, [4, 3, 2]), (5, [4, 3, 2, 1, 0])])
def test_the_deepest_go_and_the_last_stays(wanted: int, expected: list[int]) -> None:
    """Layers L-n-1 to L-2, the deepest first."""
    assert removed(planned("deepest", make_model(), wanted)) == expected


def test_no_more_than_all_but_the_last_can_go() -> None:
    """The refusal says how many can."""
    with pytest.raises(TargetError, match="the model has 6"):
        planned("deepest", make_model(), 6)
