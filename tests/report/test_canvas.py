"""The sheet: same bytes, nobody's settings, ids of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType

import pytest

from slm_plugin.analysis import heatmaps as analysis_heatmaps
from slm_plugin.analysis.heatmaps import heatmaps
from slm_plugin.comparison import plot
from slm_plugin.errors import MissingExtraError
from slm_plugin.report import canvas, pictures
from tests.report import sample_plans, samples
from tests.report.drawing import parse, words

pytest.importorskip("matplotlib")

DRAWINGS: dict[str, Callable[[], str]] = {
    "layer_mapping": lambda: pictures.layer_mapping(sample_plans.dropping_plan()),
    "layer_scores": lambda: pictures.layer_scores(sample_plans.depth_plan()),
    "widths": lambda: pictures.widths(sample_plans.width_plan(5)),
    "before_after": lambda: pictures.before_after(samples.make_report()),
    "heatmaps": lambda: heatmaps({"one": [[0, 1], [1, 0]], "two": [[2, 3], [3, 2]]}, "m"),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_pictures_are_the_same_bytes_every_time(name: str) -> None:
    """Two renders are equal, also under settings that somebody else made, and leave those alone."""
    import matplotlib

    first = DRAWINGS[name]()
    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": "other", "lines.linewidth": 9}):
        assert DRAWINGS[name]() == first
        assert matplotlib.rcParams["font.size"] == 30
    root = parse(first)
    assert root.get("viewBox") and root.get("role") == "img" and root.get("aria-label")
    # Nothing in it dates it, sizes it or leads outside.
    assert root.get("width") is None
    assert not any(part in first for part in ("metadata", "dc:date", "<!DOCTYPE", "<?xml"))
    assert words(first), "text stays text"


def test_pyplot_is_never_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its global state belongs to the user's own session."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert all(draw() for draw in DRAWINGS.values())


@pytest.mark.parametrize("module", [canvas, pictures, plot, analysis_heatmaps])
def test_modules_import_without_matplotlib(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The extra is needed to draw, not to import."""
    for part in ("matplotlib", "matplotlib.figure", "matplotlib.axes"):
        monkeypatch.setitem(sys.modules, part, None)
    spec = spec_from_file_location("fresh", str(module.__file__))
    assert spec is not None and spec.loader is not None
    fresh = module_from_spec(spec)
    # Dataclasses look their own module up while they are made.
    monkeypatch.setitem(sys.modules, "fresh", fresh)
    spec.loader.exec_module(fresh)


def test_names_keep_the_ids_of_pictures_apart() -> None:
    """Two pictures with names of their own share no id."""
    pairs = [pictures.layer_mapping(sample_plans.depth_plan(), name) for name in ("one", "two")]
    ids = [{e.get("id") for e in parse(svg).iter() if e.get("id")} for svg in pairs]
    assert ids[0] and not ids[0] & ids[1]


def test_a_description_is_escaped() -> None:
    """What a picture says about itself cannot leave its attribute."""
    with canvas.sheet("x", 1.0, 'a "quoted" <b> & $x^2$') as sheet:
        sheet.figure.text(0.5, 0.5, "$x^2$ <b> & \N{CJK UNIFIED IDEOGRAPH-4E2D}")
    assert parse(sheet.svg).get("aria-label") == 'a "quoted" <b> & $x^2$'
    assert words(sheet.svg) == ["$x^2$ <b> & \N{CJK UNIFIED IDEOGRAPH-4E2D}"]


@pytest.mark.usefixtures("no_matplotlib")
@pytest.mark.parametrize("name", DRAWINGS)
def test_without_matplotlib_the_extra_is_named(name: str) -> None:
    """Every picture refuses with the remedy."""
    with pytest.raises(MissingExtraError, match=r"slm-plugin\[report\]"):
        DRAWINGS[name]()
