"""Damaged inputs of every kind: each is taken or refused in one sentence, in bounded time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.run import fuzz
from tests.fuzz.targets import KINDS, Recipes

# Of each kind; `make fuzz` tries 2000 of them, `python -m tests.fuzz --count 20000` more.
COUNT = 100


@pytest.mark.parametrize("name", KINDS)
def test_no_input_is_an_internal_error(name: str, tmp_path: Path) -> None:
    """Only errors that a user can read, no hang and no growth; the seed and the input are told."""
    count = fuzz(KINDS[name](tmp_path), range(COUNT))
    told = [f"seed {seed}: {content[:500]!r}\n{why}" for seed, content, why in count.failures[:3]]
    assert not count.failures, "\n".join([count.row(), *told])
    assert count.tried == COUNT == count.refused + count.worked
    assert count.refused, "the damage is real"


def test_the_fuzzer_finds_a_fault(tmp_path: Path) -> None:
    """What is no error of ours, and what hangs, is counted with its seed and its input."""

    class Faulty(Recipes):
        """Fails on every input."""

        def use(self, content: bytes) -> bool:
            raise KeyError("a fault")

    count = fuzz(Faulty(tmp_path), range(3))
    assert [seed for seed, _, _ in count.failures] == [0, 1, 2]
    assert "a fault" in count.failures[0][2]
