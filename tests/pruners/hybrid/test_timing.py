"""Measured times: in turns, remembered, and without a trace on the process or the model."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from slm_plugin import extras
from slm_plugin.errors import MissingExtraError, UserError
from slm_plugin.models.process import same_process
from slm_plugin.models.view import DecoderView
from slm_plugin.pruners.hybrid.shapes import Shape, shapes_to_measure
from slm_plugin.pruners.hybrid.time_model import fit
from slm_plugin.pruners.hybrid.timing import Times, _is_round, measure, steady
from slm_plugin.pruners.hybrid.workload import Workload
from slm_plugin.session import Session
from tests.tiny import make_model

WORKLOAD = Workload(prompt_tokens=6, new_tokens=3, batch_size=2)


class Clock:
    """A timer that takes the times of a plan in place of real ones, and notes what it was asked."""

    def __init__(self, factor: Callable[[int], float] = lambda run: 1.0, most: int = 10**6) -> None:
        self.asked: list[Shape] = []
        self._factor, self._most = factor, most

    def __call__(
        self, model: PreTrainedModel, prompt: torch.Tensor, steps: int
    ) -> tuple[float, float]:
        """Linear times; stops as a kill does behind the last run that is allowed."""
        if len(self.asked) == self._most:
            raise KeyboardInterrupt
        shape = Shape.of(DecoderView.of(model).dimensions())
        runs = self.asked.count(shape)
        self.asked.append(shape)
        seconds = planted(shape) * self._factor(runs)
        return seconds * prompt.numel(), 2 * seconds * steps


def planted(shape: Shape) -> float:
    """Seconds of a token."""
    return 0.01 + shape.layers * (2e-3 + 1e-3 * shape.kv_groups + 1e-4 * shape.mlp_width)


def session(journals: Path | None = None, **settings: Any) -> Session:
    """A tiny model, with a folder for its times."""
    return Session(make_model(**settings), journals=journals)


SHAPES = [Shape(6, 48, 2), Shape(4, 32, 2), Shape(6, 40, 1)]
OTHER = Shape(5, 48, 1)


def test_planted_times_are_predicted() -> None:
    """Of fitted shapes and of others, for both phases."""
    tiny = session()
    fitted = shapes_to_measure(tiny.view.dimensions(), kv_groups=True)
    assert OTHER not in fitted
    found = measure(tiny, WORKLOAD, [*fitted, OTHER], timer=Clock(), repeats=1)
    phases: tuple[tuple[Literal["prefill", "decode"], int], ...] = (("prefill", 12), ("decode", 6))
    for phase, factor in phases:
        model = fit({shape: found[shape].of(phase) for shape in fitted}).model
        assert model.seconds(OTHER) == pytest.approx(found[OTHER].of(phase))
        assert model.seconds(OTHER) == pytest.approx(factor * planted(OTHER))


def test_shapes_take_turns_and_medians_count() -> None:
    """One run of each that does not count, then rounds of all in changing order."""
    # Of the five that count one is slow and one is fast; the first of all is slowest.
    clock = Clock(lambda run: [100.0, 1.0, 9.0, 1.0, 0.1, 1.0][run])
    found = measure(session(), WORKLOAD, SHAPES, timer=clock)
    rounds = [clock.asked[start : start + 3] for start in range(0, len(clock.asked), 3)]
    assert len(rounds) == 6
    assert all(sorted(turn) == sorted(SHAPES) for turn in rounds)
    assert len([turn for turn, _ in groupby(rounds)]) > 3
    for shape, times in found.items():
        assert times == Times(pytest.approx(12 * planted(shape)), pytest.approx(6 * planted(shape)))


def test_what_slows_a_whole_round_is_divided_out() -> None:
    """The ratios of shapes are those within rounds, though most rounds are slow."""
    generator = np.random.default_rng(3)
    truth = generator.uniform(1, 2, (8, 2))
    slower = np.exp(generator.normal(0, 0.5, (5, 1, 1)))
    outliers = np.ones((5, 8, 2))
    outliers[2, 3] = outliers[4, 1] = 7.0
    found = steady(list(truth * slower * outliers))
    assert found / truth == pytest.approx(np.full((8, 2), np.median(slower)))
    assert steady([truth]) == pytest.approx(truth)


def test_the_second_call_measures_nothing(tmp_path: Path) -> None:
    """Nor does another session with the same model; another set of shapes is measured anew."""
    first = measure(session(tmp_path), WORKLOAD, SHAPES, timer=Clock(), repeats=2)
    tiny = session(tmp_path)
    assert measure(tiny, WORKLOAD, SHAPES, timer=Clock(most=0), repeats=2) == first
    more = Clock()
    measure(tiny, WORKLOAD, SHAPES, timer=more, repeats=3)
    assert len(more.asked) == 2 * 3
    other = Clock()
    measure(tiny, WORKLOAD, [*SHAPES, OTHER], timer=other, repeats=2)
    assert len(other.asked) == 3 * 4


@pytest.mark.parametrize("runs", [2, 5, 8, 11])
def test_a_killed_measurement_goes_on(runs: int, tmp_path: Path) -> None:
    """With the whole rounds that it had, and measures the others."""
    tiny, seconds = session(tmp_path), iter(range(1, 100))
    killed = Clock(lambda _: next(seconds), most=runs)
    with pytest.raises(KeyboardInterrupt):
        measure(tiny, WORKLOAD, SHAPES, timer=killed, repeats=3)
    (file,) = tmp_path.iterdir()
    before, whole = file.read_text(), max(0, runs // 3 - 1)
    assert len(before.splitlines()) == whole
    later = Clock()
    found = measure(tiny, WORKLOAD, SHAPES, timer=later, repeats=3)
    assert file.read_text().startswith(before)
    assert len(file.read_text().splitlines()) == 3
    assert len(later.asked) == 3 * (1 + 3 - whole)
    assert measure(tiny, WORKLOAD, SHAPES, timer=Clock(most=0), repeats=3) == found


@pytest.mark.parametrize(
    ("key", "value", "valid"),
    [
        (0, [[0.1, 0.2], [0.3, 0.4]], True),
        (0, [[0.1, 0.2]], False),
        (0, [[0.1, 0.2], [0.3]], False),
        (0, [[0.1, 0.2], [0.3, 0.0]], False),
        (0, [[0.1, 0.2], [0.3, "1"]], False),
        (0, [0.1, 0.2], False),
        (0, "ab", False),
        ([0], [[0.1, 0.2], [0.3, 0.4]], False),
    ],
)
def test_a_line_of_the_journal_is_a_round_of_two_shapes(
    key: object, value: object, valid: bool
) -> None:
    """Anything else is damage."""
    assert _is_round(2, key, value) == valid


def test_other_facts_are_other_times(tmp_path: Path) -> None:
    """Another workload, dtype, model or number of threads is measured anew."""
    measure(session(tmp_path), WORKLOAD, [Shape(6, 48, 2)], timer=Clock(), repeats=1)
    longer = Workload(prompt_tokens=7, new_tokens=3, batch_size=2)
    half = session(tmp_path)
    half.model.bfloat16()
    for tiny, workload in (
        (session(tmp_path), longer),
        (half, WORKLOAD),
        (session(tmp_path, hidden_size=64), WORKLOAD),
        (session(tmp_path, family="qwen2"), WORKLOAD),
    ):
        clock = Clock()
        measure(tiny, workload, [Shape(6, 48, 2)], timer=clock, repeats=1)
        assert len(clock.asked) == 2
    assert len(list(tmp_path.iterdir())) == 5


def test_nothing_else_changes(tmp_path: Path) -> None:
    """Neither generators nor settings of the process, nor the session's model; and it is fast."""
    tiny = session(tmp_path)
    before = [torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()]
    state = tiny._state()
    with same_process(tiny.seed, tiny.model.device) as put_back:
        found = measure(tiny, WORKLOAD, SHAPES[:2], repeats=2)
    assert put_back == []
    assert all(times.prefill > 0 and times.decode > 0 for times in found.values())
    assert tiny._state() == state
    measure(tiny, WORKLOAD, [Shape(5, 40, 1)], repeats=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]
    assert tiny._state() == state


def test_the_prompt_and_the_answer_must_fit() -> None:
    """Into the model's positions, before anything is built."""
    with pytest.raises(UserError, match="timing needs 257 positions and the model has 256"):
        measure(session(), Workload(prompt_tokens=225), [Shape(6, 48, 2)], timer=Clock(most=0))


def test_onnx_runtime_names_the_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hint is the command that installs it."""
    monkeypatch.setattr(extras, "found_version", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'slm-plugin\[onnx\]'"):
        measure(session(), Workload(backend="onnxruntime"), [Shape(6, 48, 2)])
