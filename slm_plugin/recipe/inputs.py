"""Files and folders that a recipe reads, which its output must not overwrite."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from slm_plugin.errors import SlmError
from slm_plugin.export.base import Exporter
from slm_plugin.models.bundled import BUNDLED, default_cache
from slm_plugin.outputs.place import Input, local, located, resolve_output
from slm_plugin.recipe.mistakes import Mistakes, Place, Placed, Problem

# Keys whose texts may be paths without a slash; other texts have to look like a path.
_KEYS = ("id", "source", "path", "include_path")
_NAMES = {
    "model.id": "the model",
    "calibration.source": "the calibration file",
    "calibration.path": "the calibration file",
}


def inputs_of(data: dict[str, Any], file: Path | None) -> tuple[Input, ...]:
    """The files and folders that a recipe or a comparison reads, the file itself and the cache.

    Args:
        data: The recipe as plain data. Every text that is an existing path counts, because plugins
            have their own options.
        file: The recipe file.
    """
    found = [] if file is None else [Input("the recipe", file)]
    with suppress(SlmError):
        # Errors of the cache folder are reported where it is used.
        cache = default_cache()
        found += [] if cache is None else [Input("the cache of slm-plugin", cache)]
    for place, text in _texts(data, (), set()):
        if place[0] == "output" or (place == ("model", "id") and text in BUNDLED):
            continue
        if len(text) < 4096 and (place[-1] in _KEYS or os.sep in text or "/" in text):
            key = ".".join(map(str, place))
            what = _NAMES.get(key, f"`{key}`")
            found += local(what, text, roomy=key != "model.id")
    return tuple(found)


def output_of(text: str, inputs: tuple[Input, ...], mistakes: Mistakes) -> Path | None:
    """The output folder, or None and a mistake with the reason why it cannot be one."""
    with mistakes.caught("output"):
        folder = located(text)
        resolve_output(folder, inputs)
        return folder
    return None


def refuse_twice(exporters: Sequence[Placed[Exporter]]) -> Iterator[Problem]:
    """Check that no exporter is named twice, because both would write one folder."""
    seen: set[str] = set()
    for place, exporter in ((one.place, one.component) for one in exporters):
        if exporter.name in seen:
            yield Problem(place, f"'{exporter.name}' is given twice; it writes one folder")
        seen.add(exporter.name)


def _texts(data: Any, place: Place, seen: set[int]) -> Iterator[tuple[Place, str]]:
    if isinstance(data, str):
        yield place, data
        return
    # What YAML aliases repeat is looked at once.
    if not isinstance(data, dict | list) or id(data) in seen:
        return
    seen.add(id(data))
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        yield from _texts(value, (*place, key), seen)
