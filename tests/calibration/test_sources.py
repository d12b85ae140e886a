"""Text from files, built-in passages and datasets."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from slm_plugin.calibration.sources import TextSource, check_source, read_documents, read_rows
from slm_plugin.errors import CalibrationError

TEXT = "one\ntwo\n\n \nthree\n"


def test_rows_of_a_text_file_are_those_of_the_datasets_library(tmp_path: Path) -> None:
    """Lines keep their newline and a blank line is the empty string, as in WikiText-2."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    rows = read_rows(TextSource(source=str(path)), "evaluation")
    assert rows == ["one\n", "two\n", "", "", "three\n"]


def test_documents_of_a_text_file_are_its_blocks(tmp_path: Path) -> None:
    """Blank lines separate documents; lines inside one stay together."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    assert read_documents(TextSource(source=str(path)), "calibration") == ["one\ntwo", "three"]


def test_jsonl_rows_come_from_the_named_field(tmp_path: Path) -> None:
    """`text_field` picks the key; blank lines are skipped."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"page": "a", "text": "b"}\n\n{"page": "c", "text": "d"}\n')
    assert read_rows(TextSource(source=str(path), text_field="page"), "evaluation") == ["a", "c"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"text": "a"}\n{oops\n', ":2 is not JSON"),
        ('{"page": "a"}\n', r":1 has no text under 'text' \(it has: page\)"),
        ('{"text": 3}\n', ":1 has no text under 'text'"),
        ("[1]\n", ":1 is a list, not a JSON object"),
        ("3\n", ":1 is a number, not a JSON object"),
        ('{"text": null}\n', ":1 has no text under 'text' but null"),
        ('{"text": {"en": "a"}}\n', ":1 has no text under 'text' but a mapping"),
        ('{"text": ["a"]}\n', ":1 has no text under 'text' but a list"),
        ('{"text": true}\n', ":1 has no text under 'text' but true or false"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', ":1 holds a chat under 'messages'"),
        ('{"conversations": [], "id": 3}\n', ":1 holds a chat under 'conversations'"),
        ('{"text": "\\ud800"}\n', ":1 holds half a character under 'text'"),
        ('{"text": ' + "[" * 100_000 + "\n", ":1 is not JSON: it nests too deep"),
        ('{"text": ' + "9" * 5000 + "}\n", ":1 is not JSON: .* a number is too long"),
        ('{"text": "a\x00"}\n', ":1 holds a null byte"),
        ('{"text": " "}\n', "holds no text"),
    ],
)
def test_bad_jsonl_is_told_with_its_line(tmp_path: Path, content: str, told: str) -> None:
    """Broken rows name file and line."""
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(CalibrationError, match=told):
        read_documents(TextSource(source=str(path)), "calibration")


def test_a_missing_or_binary_file_is_told(tmp_path: Path) -> None:
    """The reason is in the sentence, not in a traceback."""
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalibrationError, match="not UTF-8"):
        read_documents(TextSource(source=str(binary)), "calibration")
    with pytest.raises(CalibrationError, match="there is no file"):
        read_documents(TextSource(source=str(tmp_path / "none.txt")), "calibration")


def test_a_dataset_is_read_through_the_datasets_library(tmp_path: Path) -> None:
    """A dataset id (here a local folder, which the library takes too) gives its rows."""
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"page": f"text {i}"} for i in range(3)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = TextSource(source=str(folder), text_field="page", split="train")
    assert read_documents(source, "calibration") == ["text 0", "text 1", "text 2"]
    with pytest.raises(CalibrationError, match="cannot load the dataset"):
        read_documents(TextSource(source="no/such-dataset-anywhere"), "calibration")


def test_a_dataset_that_is_a_script_names_what_works_without_it(tmp_path: Path) -> None:
    """The `datasets` library runs no loading script any more (bookcorpus, ptb): one sentence."""
    pytest.importorskip("datasets")
    folder = tmp_path / "bookcorpus"
    folder.mkdir()
    (folder / "bookcorpus.py").write_text("raise RuntimeError('a script ran')\n")
    with pytest.raises(CalibrationError, match="cannot load the dataset") as caught:
        read_documents(TextSource(source=str(folder)), "calibration")
    assert "a script ran" not in str(caught.value)
    assert "source: builtin" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (b"\xef\xbb\xbf" + b'{"text": "a"}\n', ["a"]),
        (b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n', ["a", "b"]),
        (b'{"text": "' + b"a" * 10_000_000 + b'"}', ["a" * 10_000_000]),
    ],
)
def test_jsonl_of_other_systems_is_read(tmp_path: Path, content: bytes, rows: list[str]) -> None:
    """A byte order mark, line ends of Windows, and one very long line."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert read_rows(TextSource(source=str(path)), "evaluation") == rows


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    """It stands before the first word of a text file and is not part of it."""
    path = tmp_path / "text.txt"
    path.write_text("one\r\n\r\ntwo", encoding="utf-8-sig")
    assert read_documents(TextSource(source=str(path)), "calibration") == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("a".encode("utf-16"), "it is UTF-16, not UTF-8 text"),
        ("ab".encode("utf-16-le"), ":1 holds a null byte"),
        (b"good\nbad \xe9\n", r"not UTF-8 text \(line 2\)"),
        (b"", "holds no text"),
    ],
)
def test_text_that_is_none_is_told(tmp_path: Path, content: bytes, told: str) -> None:
    """Other encodings are named, never guessed."""
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=told):
        read_documents(TextSource(source=str(path)), "calibration")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("data.csv", "is a file of a kind that is not read"),
        ("data.parquet", "is a file of a kind that is not read"),
        ("README.md", "is a file of a kind that is not read"),
        ("data", "is a file of a kind that is not read"),
        ("data.JSON", "holds no plain text"),
        ("pipe.txt", "is a pipe or a device"),
        ("pipe", "is a pipe or a device"),
        ("folder.txt", "is a folder, not a file"),
        ("none.csv", "there is no file or folder"),
        ("none/none/none", "there is no file or folder"),
        ("none.txt", "there is no file"),
    ],
)
def test_files_of_other_kinds_are_told(tmp_path: Path, name: str, told: str) -> None:
    """No local file is taken for a dataset on the Hub, and none is waited for."""
    path = tmp_path / name
    if name.startswith("pipe"):
        os.mkfifo(path)
    elif name.startswith("folder"):
        path.mkdir()
    elif not name.startswith("none"):
        path.write_text("{}")
    with pytest.raises(CalibrationError, match=told):
        read_documents(TextSource(source=str(path)), "calibration")


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("/dev/zero", "is a pipe or a device"),
        ("~nosuchuser/a.txt", "the home directory of '~nosuchuser' is not known"),
        ("a\x00b.txt", "characters that no path should have"),
        ("x" * 5000 + ".txt", "File name too long"),
        ("two words", "there is no file or folder two words"),
        ("./no-data", "there is no file or folder no-data"),
        ("none.csv", "there is no file or folder none.csv"),
    ],
)
def test_names_that_mean_nothing_are_told(source: str, told: str) -> None:
    """Each before any model is loaded."""
    with pytest.raises(CalibrationError, match=told):
        check_source(source)
