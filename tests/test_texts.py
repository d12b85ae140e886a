"""Text that a user names: read within bounds, told in one line."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from slm_plugin import texts
from slm_plugin.comparison.configuration import read_either
from slm_plugin.errors import RecipeError
from slm_plugin.recipe import Recipe
from slm_plugin.texts import expanded, read_text, regular_file, shown
from tests.recipe.bad_recipes import GOOD

ODD_FILES = [
    (b"\xff\xfeG\x00", "it is UTF-16, not UTF-8 text"),
    (b"version: 1\n# caf\xe9\n", r"it is not UTF-8 text \(line 2\)"),
    (b"#" * (1 << 20) + b"\n", "it is larger than 1 MB"),
    (GOOD.encode() + b"# \xed\xa0\x80\n", "it is not UTF-8 text"),
]


@pytest.mark.parametrize(("content", "words"), ODD_FILES)
def test_a_recipe_that_is_no_text_is_told(tmp_path: Path, content: bytes, words: str) -> None:
    """The encoding, or the size, with the line where it ends."""
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    with pytest.raises(RecipeError, match=words):
        Recipe.read(file)


@pytest.mark.parametrize(
    "content", [GOOD.encode("utf-8-sig"), GOOD.replace("\n", "\r\n").encode(), GOOD[:-1].encode()]
)
def test_texts_of_other_systems_are_read(tmp_path: Path, content: bytes) -> None:
    """A byte order mark, line ends of Windows, and no end of the last line."""
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    assert len(Recipe.read(file).stages) == 2


def test_a_pipe_is_read_once_and_whole(tmp_path: Path) -> None:
    """As ``validate <(cat recipe)`` gives one, written in pieces."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def write() -> None:
        with pipe.open("w", encoding="utf-8") as file:
            for piece in (GOOD[:50], GOOD[50:]):
                file.write(piece)
                file.flush()
                time.sleep(0.05)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        read = read_either(pipe)
        assert isinstance(read, Recipe) and len(read.stages) == 2
    finally:
        writer.join()


def test_no_text_is_waited_for_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe that nobody writes into, and a device that never ends."""
    monkeypatch.setattr(texts, "PATIENCE", 0.1)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RecipeError, match=r"nothing came from it for 0\.1 seconds"):
        Recipe.read(tmp_path / "pipe")
    with pytest.raises(RecipeError, match="it is larger than 1 MB"):
        Recipe.read("/dev/zero")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("none.yaml", "No such file"),
        (".", "Is a directory"),
        ("a\x00b", "characters that no file name can have"),
        ("x" * 5000, "File name too long"),
    ],
)
def test_a_path_that_cannot_be_read_is_told(path: str, words: str) -> None:
    """One line without control characters."""
    with pytest.raises(RecipeError, match=words) as caught:
        read_text(Path(path), "the recipe", RecipeError, 100)
    assert caught.value.message.isprintable()


def test_what_is_no_regular_file_is_said(tmp_path: Path) -> None:
    """A missing one, a folder and a device; a file is fine."""
    (tmp_path / "file").write_text("x")
    assert regular_file(tmp_path / "file") == ""
    assert "there is no file" in regular_file(tmp_path / "none")
    assert "is a folder" in regular_file(tmp_path)
    assert "is a pipe or a device" in regular_file(Path("/dev/zero"))


def test_home_directories_are_known_or_named() -> None:
    """``~`` is expanded; a user whom nobody knows is told."""
    assert expanded("~/a") == Path.home() / "a"
    assert expanded("a/~") == Path("a/~")
    with pytest.raises(ValueError, match="'~nosuchuser' is not known"):
        expanded("~nosuchuser/a")
    with pytest.raises(RecipeError, match=r"recipe:14:1: output: .* there is no home folder"):
        Recipe.parse(GOOD.replace("OUTPUT", "~nosuchuser/out"))


def test_a_text_is_shown_in_one_line() -> None:
    """Control characters, line ends and halves of characters as escapes, and an end."""
    assert shown("a\nb\x1b[1m\ud800") == "a\\nb\\x1b[1m\\ud800"
    assert shown("x" * 100, 10) == "x" * 9 + "…"
