"""Where text comes from: the built-in passages, text and JSONL files, Hugging Face datasets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib import resources
from itertools import islice
from typing import Annotated, Literal

from pydantic import Field

from slm_plugin.errors import CalibrationError
from slm_plugin.extras import require
from slm_plugin.record import Record
from slm_plugin.texts import expanded, read_text, regular_file, shown, shown_path

FILE_SUFFIXES = (".txt", ".jsonl", ".json", ".safetensors")
# Files that people have text in and that are not read: none of them is the name of a dataset.
OTHER_SUFFIXES = (
    *(".csv", ".tsv", ".parquet", ".arrow", ".md", ".html", ".xml", ".pdf", ".docx", ".yaml"),
    *(".yml", ".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".npy", ".npz", ".pt", ".bin", ".log"),
)
WHAT_IS_READ = "text comes from .txt or .jsonl files, token ids from .json or .safetensors files"
# Bytes of a text file; it is read whole.
LARGEST_TEXT = 1 << 33
CHATS = ("messages", "conversations", "conversation", "chat", "dialog", "dialogue")
_DATASET = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)
_KINDS = {dict: "a mapping", list: "a list", bool: "true or false", type(None): "null"}
DATASET_ALIASES = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "c4": ("allenai/c4", "en"),
}
# A streamed corpus has no end worth waiting for; this many rows hold enough to draw from.
STREAMED_ROWS = 20_000


class TextSource(Record):
    """Names a text: ``builtin``, a ``.txt`` or ``.jsonl`` file, or a dataset on the Hub."""

    source: Annotated[
        str, Field(min_length=1, description="builtin, a .txt or .jsonl file, or a datasets id")
    ] = "builtin"
    text_field: Annotated[str, Field(description="key of the text in JSONL and dataset rows")] = (
        "text"
    )
    split: Annotated[str | None, Field(description="split of a dataset")] = None
    config: Annotated[str | None, Field(description="configuration name of a dataset")] = None


def is_file(source: str) -> bool:
    """Whether a source names a local file that can be read, rather than a dataset."""
    return source.lower().endswith(FILE_SUFFIXES)


def check_source(source: str) -> None:
    """Refuse a name that is neither a file, nor a folder or the id of a dataset.

    Raises:
        CalibrationError: It is a file that is missing or of another kind, or no name at all.
        MissingExtraError: It is a dataset and `datasets` is not installed.
    """
    if source == "builtin":
        return
    if source == "self":
        raise CalibrationError(
            "text that the model writes itself only calibrates", hint="name another source"
        )
    try:
        path = expanded(source)
        there = path.exists()
    except (OSError, ValueError) as error:
        raise CalibrationError(f"cannot read '{shown(source)}': {error}") from error
    if is_file(source):
        if wrong := regular_file(path):
            raise CalibrationError(wrong)
        return
    if there and not path.is_dir():
        wrong = regular_file(path) or f"{shown_path(path)} is a file of a kind that is not read"
        raise CalibrationError(wrong, hint=WHAT_IS_READ)
    if not there and (source.lower().endswith(OTHER_SUFFIXES) or _is_path(source)):
        raise CalibrationError(
            f"there is no file or folder {shown_path(path)}",
            hint=f"{WHAT_IS_READ}; a dataset is named as `owner/name`",
        )
    require("data", f"the text source '{shown(source)}'")


def _is_path(source: str) -> bool:
    return _DATASET.fullmatch(source) is None


def passages(part: Literal["calibration", "evaluation"]) -> list[str]:
    """Built-in English prose, one passage a string; the two parts share no passage."""
    file = resources.files("slm_plugin.calibration") / "passages" / f"{part}.txt"
    return [" ".join(p.split()) for p in file.read_text(encoding="utf-8").split("\n\n")]


def read_documents(text: TextSource, part: Literal["calibration", "evaluation"]) -> list[str]:
    """Texts to draw samples from: passages, blank-line separated blocks, JSONL or dataset rows.

    Args:
        text: Where to read.
        part: Which built-in passages, and by default which split of a dataset.

    Raises:
        CalibrationError: The source is missing, malformed or holds no text.
        MissingExtraError: A dataset is asked for and `datasets` is not installed.
    """
    check_source(text.source)
    if _is_text(text.source):
        blocks = "".join(line if line.strip() else "\n" for line in _lines(text.source))
        documents = [block.strip("\n") for block in blocks.split("\n\n")]
    else:
        documents = list(_rows(text, part))
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise CalibrationError(f"{shown_path(text.source)} holds no text")
    return documents


def read_rows(text: TextSource, part: Literal["calibration", "evaluation"]) -> list[str]:
    """Rows as the `datasets` library yields them.

    The rows of a text file are its lines, each with its newline, a blank line as the empty string.

    Raises:
        CalibrationError: The source is missing, malformed or holds no text.
        MissingExtraError: A dataset is asked for and `datasets` is not installed.
    """
    check_source(text.source)
    if _is_text(text.source):
        rows = [line if line.strip() else "" for line in _lines(text.source)]
    else:
        rows = list(_rows(text, part))
    if not any(row.strip() for row in rows):
        raise CalibrationError(f"{shown_path(text.source)} holds no text")
    return rows


def read_whole(source: str) -> str:
    """A text file as it is, without a byte order mark.

    Raises:
        CalibrationError: It is missing or no UTF-8 text.
    """
    check_source(source)
    content = read_text(expanded(source), "the text", CalibrationError, LARGEST_TEXT)
    null = content.find("\x00")
    if null >= 0:
        line = content.count("\n", 0, null) + 1
        raise CalibrationError(
            f"{shown_path(source)}:{line} holds a null byte: it is no text", hint="save it as UTF-8"
        )
    return content


def _is_text(source: str) -> bool:
    return source.lower().endswith(".txt")


def _rows(text: TextSource, part: Literal["calibration", "evaluation"]) -> Iterator[str]:
    if text.source == "builtin":
        yield from passages(part)
    elif text.source.lower().endswith(".jsonl"):
        yield from _json_lines(text)
    elif is_file(text.source):
        raise CalibrationError(
            f"{shown_path(text.source)} holds no plain text",
            hint="text comes from .txt or .jsonl files",
        )
    else:
        yield from _dataset(text, part)


def _lines(source: str) -> list[str]:
    content = read_whole(source).replace("\r\n", "\n").replace("\r", "\n")
    # splitlines would also cut at \x1c and the like.
    return [line + "\n" for line in content.removesuffix("\n").split("\n")]


def _json_lines(text: TextSource) -> Iterator[str]:
    for number, line in enumerate(_lines(text.source), start=1):
        if not line.strip():
            continue
        place = f"{shown_path(text.source)}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            # Beside what is no JSON: numbers of thousands of digits, and thousands of brackets.
            reason = getattr(error, "msg", None) or "it nests too deep, or a number is too long"
            raise CalibrationError(
                f"{place} is not JSON: {reason}", hint="a .jsonl file has one JSON object a line"
            ) from error
        yield _field(row, text.text_field, place)


def _dataset(text: TextSource, part: Literal["calibration", "evaluation"]) -> Iterator[str]:
    require("data", f"the text source '{text.source}'")
    from datasets import load_dataset

    path, config = DATASET_ALIASES.get(text.source, (text.source, text.config))
    split = text.split or ("train" if part == "calibration" else "test")
    try:
        rows = load_dataset(path, text.config or config, split=split, streaming=True)
        for row in islice(rows, STREAMED_ROWS):
            yield _field(row, text.text_field, f"a row of {text.source}")
    except CalibrationError:
        raise
    except Exception as error:
        raise CalibrationError(
            f"cannot load the dataset '{shown(text.source)}': {_reason(error)}",
            hint="without network use a .txt or .jsonl file, or source: builtin",
        ) from error


def _reason(error: Exception) -> str:
    return shown((str(error).strip().splitlines() or [type(error).__name__])[0], 300)


def _field(row: object, name: str, place: str) -> str:
    value = row.get(name) if isinstance(row, dict) else None
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise CalibrationError(f"{place} holds half a character under '{shown(name)}'")
        return value
    chat = next((key for key in CHATS if isinstance(row, dict) and key in row), None)
    if chat is not None and name in (chat, "text"):
        raise CalibrationError(
            f"{place} holds a chat under '{chat}'; chats are not read",
            hint="write each one as a text, by the model's chat template, under `text`",
        )
    if not isinstance(row, dict):
        raise CalibrationError(
            f"{place} is {_kind(row)}, not a JSON object", hint='a line is as {"text": "…"}'
        )
    if name in row:
        raise CalibrationError(
            f"{place} has no text under '{shown(name)}' but {_kind(value)}",
            hint="set `text_field`, or leave such rows out",
        )
    keys = shown(", ".join(map(str, row)))
    raise CalibrationError(
        f"{place} has no text under '{shown(name)}' (it has: {keys or 'nothing'})",
        hint="set `text_field`",
    )


def _kind(value: object) -> str:
    return _KINDS.get(type(value), "a text" if isinstance(value, str) else "a number")
