"""Journals of trials: damaged ones are reported, set aside and measured again."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from slm_plugin.pruners.depth.search.journal import Journal
from slm_plugin.pruners.depth.search.runs import Run, Runs

RUNS: list[Runs] = [(Run(n, n + 1, "mean"),) for n in range(4)]


def written(path: Path) -> list[str]:
    """The lines of a journal of four trials."""
    journal = Journal(path, "about")
    for number, runs in enumerate(RUNS):
        journal.store(runs, [number / 7, 1e-300])
    return path.read_text().splitlines(keepends=True)


def test_values_come_back_to_the_last_digit(tmp_path: Path) -> None:
    """All parts of a trial, in their order."""
    path = tmp_path / "j.jsonl"
    written(path)
    Journal(path, "about").store(RUNS[0], [1 / 3])
    again = Journal(path, "about")
    assert again.cached(RUNS[0]) == [[0.0, 1e-300], [1 / 3]]
    assert again.cached(RUNS[3]) == [[3 / 7, 1e-300]]
    assert again.read_from_disk == 4


def edited(line: str) -> str:
    """A line whose value was changed by hand."""
    return line.replace("1e-300", "0.9")


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (lambda lines: [edited(lines[0]), *lines[1:]], {1, 2, 3}),
        (lambda lines: [*lines[:3], lines[3][:-9]], {0, 1, 2}),
        (lambda lines: [*lines[:3], lines[3][:-1]], {0, 1, 2}),
        (
            lambda lines: ["\x00\n", "[1]\n", "null\n", "3\n", *lines],
            {0, 1, 2, 3},
        ),
        (lambda lines: ["[" * 100_000 + "\n", *lines], {0, 1, 2, 3}),
        (lambda lines: ['{"part": ' + "9" * 5000 + "}\n", *lines], {0, 1, 2, 3}),
        (lambda lines: [json.dumps({**json.loads(lines[0]), "part": 1}) + "\n"], set()),
        (lambda lines: [lines[0].replace('"sum"', '"old"')], set()),
    ],
)
def test_damage_is_message_and_set_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: object, left: set[int]
) -> None:
    """Good lines are taken and kept; the damaged file lies beside under another name."""
    path = tmp_path / "j.jsonl"
    lines = written(path)
    broken = "".join(damage(lines))  # type: ignore[operator]
    path.write_text(broken)
    journal = Journal(path, "about")
    assert {n for n, runs in enumerate(RUNS) if journal.cached(runs)} == left
    message = capsys.readouterr().err.replace("\n", " ")
    assert (
        "is damaged" in message and "j.jsonl.damaged-1" in message and "measured again" in message
    )
    assert (tmp_path / "j.jsonl.damaged-1").read_text() == broken
    assert Journal(path, "about").read_from_disk == len(left)
    assert capsys.readouterr().err == ""


def test_lines_swapped_or_given_twice_say_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trials do not depend on one another; what was said already is not said again."""
    path = tmp_path / "j.jsonl"
    lines = written(path)
    path.write_text("".join([*reversed(lines), *lines]))
    journal = Journal(path, "about")
    assert [journal.cached(runs) for runs in RUNS] == [[[n / 7, 1e-300]] for n in range(4)]
    assert capsys.readouterr().err == ""


def test_lines_of_another_search_are_not_taken(tmp_path: Path) -> None:
    """A journal that was copied over another's name holds nothing."""
    path = tmp_path / "j.jsonl"
    written(path)
    assert Journal(path, "something else").read_from_disk == 0


def test_a_folder_in_its_place_is_set_aside(tmp_path: Path) -> None:
    """Whatever has the name of a journal and is none."""
    (tmp_path / "j.jsonl").mkdir()
    journal = Journal(tmp_path / "j.jsonl", "about")
    journal.store(RUNS[0], [0.5])
    assert (tmp_path / "j.jsonl.damaged-1").is_dir()
    assert Journal(tmp_path / "j.jsonl", "about").cached(RUNS[0]) == [[0.5]]


def test_a_link_that_leads_to_itself_is_set_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As anything else that has the journal's name; one that leads nowhere yet is followed."""
    for name in ("j.jsonl", "j.jsonl.damaged-1"):
        (tmp_path / name).symlink_to(name)
    Journal(tmp_path / "j.jsonl", "x").store((), [0.5])
    assert (tmp_path / "j.jsonl").is_file()
    assert (tmp_path / "j.jsonl.damaged-2").is_symlink()
    assert "is damaged (it is not a readable file)" in capsys.readouterr().err
    (tmp_path / "k.jsonl").symlink_to("elsewhere.jsonl")
    Journal(tmp_path / "k.jsonl", "x").store((), [0.5])
    assert (tmp_path / "elsewhere.jsonl").read_text()


def _write(path: Path, first: int) -> None:
    journal = Journal(path, "about")
    for number in range(200):
        journal.store((Run(first, first + 1 + number, "mean"),), [number / 7] * 40)


def test_two_processes_write_one_journal(tmp_path: Path) -> None:
    """Every line of both is whole."""
    path = tmp_path / "j.jsonl"
    spawn = multiprocessing.get_context("fork")
    both = [spawn.Process(target=_write, args=(path, first)) for first in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert Journal(path, "about").read_from_disk == 400
    assert [file.name for file in tmp_path.iterdir()] == ["j.jsonl"]
