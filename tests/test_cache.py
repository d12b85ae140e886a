"""Files of the cache folder: damaged ones are reported, set aside and computed again."""

from __future__ import annotations

import json
import math
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest

from slm_plugin.cache import Store
from slm_plugin.errors import OutputError

Lines = list[str]
KEYS = ["a", ["b", 1], [["c", None], 2], "d"]


def written(path: Path) -> Lines:
    """The lines of a store of four values."""
    store = Store(path, "about")
    for number, key in enumerate(KEYS):
        store.store(key, [number / 7, 1e-300])
    return path.read_text().splitlines(keepends=True)


def test_values_come_back_to_the_last_digit(tmp_path: Path) -> None:
    """Whatever is plain data; of two values under one key the later."""
    path = tmp_path / "s.jsonl"
    written(path)
    Store(path, "about").store("a", {"x": [1 / 3, math.inf, None]})
    again = Store(path, "about")
    assert again.find("a") == {"x": [1 / 3, math.inf, None]}
    assert again.find(KEYS[2]) == [2 / 7, 1e-300]
    assert again.find("e") is None
    assert [key for key, _ in again.items()] == KEYS


def test_without_a_file_values_are_in_memory() -> None:
    """Nothing is written."""
    store = Store()
    store.store(["a", 1], 2)
    assert store.find(["a", 1]) == 2 and store.path is None


def edited(line: str) -> str:
    """A line whose value was changed by hand."""
    return line.replace("1e-300", "0.9")


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (lambda lines: [edited(lines[0]), *lines[1:]], {1, 2, 3}),
        (lambda lines: [*lines[:3], lines[3][:-9]], {0, 1, 2}),
        (lambda lines: [*lines[:3], lines[3][:-1]], {0, 1, 2}),
        (lambda lines: ["\x00\n", "[1]\n", "null\n", "3\n", *lines], {0, 1, 2, 3}),
        (lambda lines: ["[" * 100_000 + "\n", *lines], {0, 1, 2, 3}),
        (lambda lines: ['{"key": ' + "9" * 5000 + "}\n", *lines], {0, 1, 2, 3}),
        (lambda lines: [json.dumps({**json.loads(lines[0]), "key": "d"}) + "\n"], set()),
        (lambda lines: [lines[0].replace('"sum"', '"old"')], set()),
    ],
)
def test_damage_is_reported_and_set_aside(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Lines], Lines],
    left: set[int],
) -> None:
    """Valid lines are taken and kept; the damaged file lies beside under another name."""
    path = tmp_path / "s.jsonl"
    broken = "".join(damage(written(path)))
    path.write_text(broken)
    store = Store(path, "about")
    assert {n for n, key in enumerate(KEYS) if store.find(key) is not None} == left
    message = capsys.readouterr().err.replace("\n", " ")
    assert "is damaged" in message and "s.jsonl.damaged-1" in message
    assert "computed again" in message
    assert (tmp_path / "s.jsonl.damaged-1").read_text() == broken
    assert len(Store(path, "about").items()) == len(left)
    assert capsys.readouterr().err == ""


def test_lines_swapped_or_given_twice_say_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Values do not depend on one another; what was said already is not said again."""
    path = tmp_path / "s.jsonl"
    lines = written(path)
    path.write_text("".join([*reversed(lines), *lines]))
    store = Store(path, "about")
    assert [store.find(key) for key in KEYS] == [[n / 7, 1e-300] for n in range(4)]
    assert capsys.readouterr().err == ""


def test_lines_of_another_store_are_not_taken(tmp_path: Path) -> None:
    """A file that was copied over another's name holds nothing."""
    path = tmp_path / "s.jsonl"
    written(path)
    assert Store(path, "something else").items() == []


def test_values_of_another_kind_are_damage(tmp_path: Path) -> None:
    """What the owner of the store cannot use is not taken, whatever its check does."""
    path = tmp_path / "s.jsonl"
    written(path)
    assert Store(path, "about", lambda key, value: value[0] > 0.4).items()[0][0] == "d"
    assert (tmp_path / "s.jsonl.damaged-1").exists()
    assert Store(path, "about", lambda key, value: bool(value["x"])).items() == []


def test_a_folder_in_its_place_is_set_aside(tmp_path: Path) -> None:
    """Whatever has the name of a cache file and is none."""
    (tmp_path / "s.jsonl").mkdir()
    store = Store(tmp_path / "s.jsonl", "about")
    store.store("a", [0.5])
    assert (tmp_path / "s.jsonl.damaged-1").is_dir()
    assert Store(tmp_path / "s.jsonl", "about").find("a") == [0.5]


def test_a_link_that_leads_to_itself_is_set_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As anything else that has the file's name; one that leads nowhere yet is followed."""
    for name in ("s.jsonl", "s.jsonl.damaged-1"):
        (tmp_path / name).symlink_to(name)
    Store(tmp_path / "s.jsonl", "x").store("a", 0.5)
    assert (tmp_path / "s.jsonl").is_file()
    assert (tmp_path / "s.jsonl.damaged-2").is_symlink()
    assert "is damaged (it is not a readable file)" in capsys.readouterr().err
    (tmp_path / "k.jsonl").symlink_to("elsewhere.jsonl")
    Store(tmp_path / "k.jsonl", "x").store("a", 0.5)
    assert (tmp_path / "elsewhere.jsonl").read_text()


def test_a_reader_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that will add nothing makes no file, and leaves a damaged one where it is."""
    path = tmp_path / "s.jsonl"
    assert Store(path, "about", writable=False).items() == [] and not path.exists()
    path.write_text("".join([*written(path), "cut"]))
    assert len(Store(path, "about", writable=False).items()) == 4
    assert "is damaged (1 of 5 lines)" in capsys.readouterr().err.replace("\n", " ")
    assert [file.name for file in tmp_path.iterdir()] == ["s.jsonl"]


def test_what_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    """Before anything is computed."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write the cache file"):
        Store(tmp_path / "file" / "s.jsonl", "about")


def _write(path: Path, first: int) -> None:
    store = Store(path, "about")
    for number in range(200):
        store.store([first, number], [number / 7] * 40)


def test_two_processes_write_one_file(tmp_path: Path) -> None:
    """Every line of both is whole."""
    path = tmp_path / "s.jsonl"
    spawn = multiprocessing.get_context("fork")
    both = [spawn.Process(target=_write, args=(path, first)) for first in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert len(Store(path, "about").items()) == 400
    assert [file.name for file in tmp_path.iterdir()] == ["s.jsonl"]
