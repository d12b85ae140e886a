"""What the cache folder holds is checked when it is read, and set aside where it is damaged."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from pathlib import Path
from typing import Any


def checksum(*parts: Any) -> str:
    """SHA-256 over plain data as JSON."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def set_aside(path: Path) -> Path | None:
    """Rename a damaged file to the first free name as ``NAME.damaged-1``.

    Returns:
        The new name; None where another process was faster.

    Raises:
        OSError: It cannot be renamed.
    """
    names = (path.with_name(f"{path.name}.damaged-{number}") for number in itertools.count(1))
    free = next(name for name in names if not os.path.lexists(name))
    try:
        path.rename(free)
    except FileNotFoundError:
        return None
    return free
