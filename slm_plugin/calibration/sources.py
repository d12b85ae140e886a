"""Where text comes from: the built-in passages, text and JSONL files, Hugging Face datasets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from slm_plugin.errors import CalibrationError
from slm_plugin.extras import require

FILE_SUFFIXES = (".txt", ".jsonl", ".json", ".safetensors")
DATASET_ALIASES = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "c4": ("allenai/c4", "en"),
}
# A streamed corpus has no end worth waiting for; this many rows hold enough to draw from.
STREAMED_ROWS = 20_000


class TextSource(BaseModel):
    """Names a text: ``builtin``, a ``.txt`` or ``.jsonl`` file, or a dataset on the Hub."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Annotated[
        str, Field(min_length=1, description="builtin, a .txt or .jsonl file, or a datasets id")
    ] = "builtin"
    text_field: Annotated[str, Field(description="key of the text in JSONL and dataset rows")] = (
        "text"
    )
    split: Annotated[str | None, Field(description="split of a dataset")] = None
    config: Annotated[str | None, Field(description="configuration name of a dataset")] = None


def is_file(source: str) -> bool:
    """Whether a source names a local file rather than a dataset."""
    return source.endswith(FILE_SUFFIXES)


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
    if text.source.endswith(".txt"):
        blocks = "".join(line if line.strip() else "\n" for line in _lines(text.source))
        documents = [block.strip("\n") for block in blocks.split("\n\n")]
    else:
        documents = list(_rows(text, part))
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise CalibrationError(f"{text.source} holds no text")
    return documents


def read_rows(text: TextSource, part: Literal["calibration", "evaluation"]) -> list[str]:
    """Rows as the `datasets` library yields them.

    The rows of a text file are its lines, each with its newline, a blank line as the empty string.

    Raises:
        CalibrationError: The source is missing, malformed or holds no text.
        MissingExtraError: A dataset is asked for and `datasets` is not installed.
    """
    if text.source.endswith(".txt"):
        rows = [line if line.strip() else "" for line in _lines(text.source)]
    else:
        rows = list(_rows(text, part))
    if not any(row.strip() for row in rows):
        raise CalibrationError(f"{text.source} holds no text")
    return rows


def _rows(text: TextSource, part: Literal["calibration", "evaluation"]) -> Iterator[str]:
    if text.source == "builtin":
        yield from passages(part)
    elif text.source.endswith(".jsonl"):
        yield from _json_lines(text)
    elif is_file(text.source):
        raise CalibrationError(
            f"{text.source} holds no plain text", hint="text comes from .txt or .jsonl files"
        )
    else:
        yield from _dataset(text, part)


def _lines(source: str) -> list[str]:
    try:
        # Universal newlines would keep \x1c and the like apart from file lines; split on \n only.
        content = Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise CalibrationError(f"cannot read {source}: {reason}") from error
    return [line + "\n" for line in content.removesuffix("\n").split("\n")]


def _json_lines(text: TextSource) -> Iterator[str]:
    for number, line in enumerate(_lines(text.source), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CalibrationError(f"{text.source}:{number} is not JSON: {error.msg}") from error
        yield _field(row, text.text_field, f"{text.source}:{number}")


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
            f"cannot load the dataset '{text.source}': {str(error).splitlines()[0]}",
            hint="without network use a .txt or .jsonl file, or source: builtin",
        ) from error


def _field(row: object, name: str, place: str) -> str:
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, str):
        keys = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise CalibrationError(
            f"{place} has no text under '{name}' (it has: {keys})", hint="set `text_field`"
        )
    return value
