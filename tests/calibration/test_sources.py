"""Text from files, built-in passages and datasets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slm_plugin.calibration.sources import TextSource, read_documents, read_rows
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
        ("[1]\n", ":1 has no text under 'text'"),
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
    with pytest.raises(CalibrationError, match="No such file"):
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
