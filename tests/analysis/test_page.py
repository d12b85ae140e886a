"""The page of an analysis: whole, self-contained, and plain about what is an artefact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slm_plugin.analysis.page import layer_table, render_analysis, similarity_table, write_analysis
from slm_plugin.analysis.record import (
    Analysis,
    Figures,
    LayerCka,
    LayerCosine,
    LayerNorms,
    Matrix,
    NoiseCka,
    Outlier,
    TokenNorms,
)
from slm_plugin.calibration.samples import CalibrationRecord
from tests.report.sample_plans import ORIGINAL, identity
from tests.report.samples import typed
from tests.report.test_page import NASTY, read


def band(layers: int, step: float) -> Matrix:
    """1 on the diagonal, less by ``step`` for every layer away from it."""
    return tuple(tuple(1 - step * abs(i - j) for j in range(layers)) for i in range(layers))


def make_analysis(layers: int = 4, **changes: Any) -> Analysis:
    """A small analysis, written by hand."""
    one = (TokenNorms(mean=30.0, median=2.0),) * layers
    cka = LayerCka(
        biased=band(layers, 0.01),
        unbiased=band(layers, 0.2),
        biased_by_chance=band(layers, 0.011),
        directions=tuple(6.5 - layer for layer in range(layers)),
    )
    figures = Figures(
        cka=cka,
        cka_unit_tokens=cka.model_copy(update={"directions": (6.9,) * layers}),
        outliers=(Outlier(sample=5, position=2, share=0.4321),) * layers,
        noise=NoiseCka(biased=0.9876, unbiased=0.0021, scatter=0.0432),
        cosine=LayerCosine(same_token=band(layers, 0.1), other_token=band(layers, 0.15)),
        block_influence=tuple(0.5 / (layer + 1) for layer in range(layers)),
        norms=LayerNorms(output=one, update=one, attention=one, mlp=one),
    )
    fields = {
        "created": "2026-01-02T03:04:05+00:00",
        "model": "smollm2-135m",
        "seed": 1234,
        "calibration": CalibrationRecord(
            source="builtin", samples=8, length=16, seed=1234, sha256="c" * 64
        ),
        "fingerprint": identity("a"),
        "dimensions": ORIGINAL.without_layers(ORIGINAL.layers - layers),
        "figures": figures,
        "versions": {"torch": "2.9", "python": "3.12"},
        "machine": "Linux x86_64, 1 threads",
        "seconds": 4.2,
    }
    return Analysis(**{**fields, **changes})


def test_the_page_shows_every_figure_and_its_floor() -> None:
    """Three pictures and two tables; noise, scatter and features in words; the whole protocol."""
    pytest.importorskip("matplotlib")
    reader = read(render_analysis(make_analysis()))
    assert reader.tags.count("svg") == 3 and reader.tags.count("image") == 11
    for said in (
        "Artefacts",
        "8 samples have 9,216 features each",
        "a CKA of 0.9876",
        "0.002 with a scatter of 0.043",
        "After layer 3 the samples differ in 3.5 effective directions out of 7, and one token "
        "(position 2 of sample 5, counted from 0) makes 43.2% of their differences",
        "sha256:" + "c" * 64,
        identity("a").weights,
        "torch 2.9",
        "layer 3 (0.1250), layer 2 (0.1667), layer 1 (0.2500)",
    ):
        assert typed(said) in " ".join(reader.text.split())
    ids = [value for name, value in reader.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_the_page_asks_for_nothing_from_outside() -> None:
    """Images lie in the page, and its policy allows no others; no script."""
    pytest.importorskip("matplotlib")
    page = render_analysis(make_analysis())
    reader = read(page)
    assert not {"script", "link", "img", "iframe", "object"} & set(reader.tags)
    references = [v for n, v in reader.attributes if n in ("src", "href", "xlink:href", "data")]
    assert references
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in references)
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in page


def test_a_summary_leaves_the_diagonal_out() -> None:
    """Neighbours, all pairs and the lowest of a band of four layers."""
    (row,) = similarity_table({"band": band(4, 0.2)}).rows
    mean = (3 * 0.8 + 2 * 0.6 + 0.4) / 6
    assert [cell.text for cell in row.cells] == ["band", "0.8000", f"{mean:.4f}", "0.4000", "0, 3"]


def test_every_layer_has_its_figures() -> None:
    """Influence, norms and directions, in the order of the layers."""
    found = layer_table(make_analysis().figures)
    assert len(found.columns) == 8 and len(found.rows) == 4
    cells = [cell.text for cell in found.rows[3].cells]
    assert cells == ["3", "0.1250", "2", "30", "2", "2", "3.5", "6.9"]


@pytest.mark.usefixtures("no_matplotlib")
def test_one_layer_has_a_page_and_no_pairs() -> None:
    """Nothing to compare is said in words."""
    assert "there is no pair to compare" in read(render_analysis(make_analysis(1))).text


@pytest.mark.usefixtures("no_matplotlib")
@pytest.mark.parametrize("text", NASTY)
def test_strings_of_the_analysis_cannot_change_the_page(text: str) -> None:
    """A model's name and a source's are shown as they are."""

    def page(name: str) -> str:
        drawn = CalibrationRecord(source=name, samples=8, length=16, seed=1, sha256="c" * 64)
        return render_analysis(make_analysis(model=name, calibration=drawn))

    harmless, poisoned = read(page("harmless")), read(page(text))
    assert poisoned.tags == harmless.tags
    assert poisoned.text.count(text) == harmless.text.count("harmless")


@pytest.mark.usefixtures("no_matplotlib")
def test_two_files_are_written_and_read_back(tmp_path: Path) -> None:
    """The record survives JSON; without matplotlib the page names the extra three times."""
    analysis = make_analysis()
    write_analysis(analysis, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["analysis.html", "analysis.json"]
    text = (tmp_path / "analysis.json").read_text(encoding="utf-8")
    assert Analysis.model_validate_json(text) == analysis
    page = read((tmp_path / "analysis.html").read_text(encoding="utf-8"))
    assert page.text.count("pip install 'slm-plugin[report]'") == 3
