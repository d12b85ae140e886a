"""JSON that means different things to different readers is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from slm_plugin.errors import ModelSourceError
from slm_plugin.models.json_file import read_object


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "Expecting value"),
        (b"[1]", "JSON list, not an object"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"a": -Infinity}', "-Infinity is no JSON number"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": 1, "a": 2}', "'a' stands there twice"),
        (b'{"x": {"a": 1, "a": 2}}', "'a' stands there twice"),
        (b'\xef\xbb\xbf{"a": 1}', "byte order mark"),
        (b'{"a": "\xff"}', "utf-8"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": ' + b"9" * 5_000 + b"}", "digits"),
        (b'{"a": 1} {"b": 2}', "Extra data"),
    ],
)
def test_ambiguous_json_is_refused(tmp_path: Path, data: bytes, words: str) -> None:
    """The file and the reason stand in one line."""
    file = tmp_path / "config.json"
    file.write_bytes(data)
    with pytest.raises(ModelSourceError, match=words) as caught:
        read_object(file)
    assert str(file) in caught.value.message and "\n" not in caught.value.message


def test_plain_objects_are_read(tmp_path: Path) -> None:
    """Everything that JSON has is kept as it is."""
    file = tmp_path / "config.json"
    file.write_text('{"a": [1, 2.5, null, true, "\\u00e9"], "b": {}}', encoding="utf-8")
    assert read_object(file) == {"a": [1, 2.5, None, True, "é"], "b": {}}


def test_a_missing_or_huge_file_is_named(tmp_path: Path) -> None:
    """Neither is read into memory."""
    with pytest.raises(ModelSourceError, match="cannot read"):
        read_object(tmp_path / "nothing.json")
    huge = tmp_path / "huge.json"
    with huge.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ModelSourceError, match="larger than 16 MiB"):
        read_object(huge)
