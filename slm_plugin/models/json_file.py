"""JSON files of a checkpoint, read more strictly than Python's ``json`` does by itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from slm_plugin.errors import ModelSourceError
from slm_plugin.models.border import reason

# Far above any config; a larger one is no config.
LARGEST = 16 * 2**20


def read_object(file: Path) -> dict[str, Any]:
    """The one JSON object in a file.

    Python's reader takes NaN, keeps the last of two equal keys and turns 1e999 into infinity;
    other readers do not agree, so that such a file means different things to different programs.

    Raises:
        ModelSourceError: The file cannot be read, or is not UTF-8, JSON, or one plain object.
    """
    try:
        with file.open("rb") as opened:
            data = opened.read(LARGEST + 1)
    except OSError as error:
        raise ModelSourceError(f"cannot read {file}: {error.strerror or error}") from error
    if len(data) > LARGEST:
        raise ModelSourceError(f"{file} is larger than {LARGEST >> 20} MiB")
    try:
        return parse_object(data)
    except (ValueError, RecursionError) as error:
        raise ModelSourceError(
            f"cannot read {file}: {reason(error)}", hint="it must be one JSON object in UTF-8"
        ) from error


def parse_object(data: bytes) -> dict[str, Any]:
    """The one JSON object in bytes.

    Raises:
        ValueError: It is not that; duplicate keys and numbers without a value included.
        RecursionError: It is nested too deeply.
    """
    if data.startswith(b"\xef\xbb\xbf"):
        raise ValueError("it begins with a byte order mark")
    found = json.loads(
        data.decode("utf-8"),
        object_pairs_hook=_unique,
        parse_constant=_no_number,
        parse_float=_finite,
    )
    if not isinstance(found, dict):
        raise ValueError(f"it holds a JSON {type(found).__name__}, not an object")
    # A lone surrogate could not be written again.
    json.dumps(found, ensure_ascii=False).encode("utf-8")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:40]!r} stands there twice")
        found[key] = value
    return found


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value
