"""Heatmaps: the right value at the right place, and one scale for all maps."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from numpy.typing import NDArray

from slm_plugin.analysis.heatmaps import heatmaps
from tests.report.drawing import by_id, words

pytest.importorskip("matplotlib")

RAMP = [[0.1, 0.5, 0.9], [0.2, 0.6, 1.0], [0.0, 0.3, 0.7]]


def lightness(svg: str, name: str) -> NDArray[np.float64]:
    """Lightness of every cell as it is seen: row 0 lowest, column 0 leftmost."""
    from PIL import Image

    (image,) = by_id(svg, name).values()
    data = image.get("{http://www.w3.org/1999/xlink}href", "").removeprefix(
        "data:image/png;base64,"
    )
    cells = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("L"), dtype=float)
    numbers = image.get("transform", "").removeprefix("matrix(").rstrip(")").split()
    upwards = float(numbers[3]) < 0
    return cells if upwards else cells[::-1]


def test_every_cell_shows_its_value() -> None:
    """Lightness ranks the cells as their values do, row 0 lowest and column 0 leftmost."""
    shown = lightness(heatmaps({"ramp": RAMP}, "maps"), "maps-map-1")
    assert shown.shape == (3, 3)
    assert shown.flatten().argsort().tolist() == np.array(RAMP).flatten().argsort().tolist()


def test_maps_share_one_scale() -> None:
    """Equal values look equal in every map: nothing is stretched to its own range."""
    narrow = [[0.6, 0.7], [0.7, 0.6]]
    svg = heatmaps({"wide": RAMP, "narrow": narrow}, "maps")
    wide, alone = lightness(svg, "maps-map-1"), lightness(svg, "maps-map-2")
    assert alone[0, 0] == wide[1, 1] and alone[0, 1] == wide[2, 2]
    assert {"wide", "narrow", "1.0", "0.0"} <= set(words(svg))


def test_equal_values_can_be_drawn() -> None:
    """A model of one layer, or identity layers only, has nothing to scale by."""
    assert by_id(heatmaps({"one": [[1.0]]}, "maps"), "maps-map-1")
