"""The HTML page: whole, self-contained, and the same structure whatever the run's strings hold."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser

import pytest

from slm_plugin.plans import PruningPlan
from slm_plugin.report import before_after, numbers
from slm_plugin.report.page import render_page
from slm_plugin.report.record import RunReport
from tests.report import sample_plans, samples
from tests.report.samples import typed

VOID = {"meta", "br", "hr", "img", "link", "input"}
NASTY = [
    "<script>alert(1)</script>",
    "\"><img src=http://evil.example onerror=x> & 'quoted'",
    "--- : {{ 7 * 7 }} {% raw %}",
    "</style></pre></svg></details>",
]


class Reader(HTMLParser):
    """Collects tags, attributes and text, and checks that tags nest."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag and its attributes."""
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag that closes itself."""
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        """Only the innermost open tag can be closed."""
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Note text."""
        self.text += typed(data)


def read(page: str) -> Reader:
    """Parse a whole page."""
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader._open == []
    return reader


def test_the_page_parses_with_every_part(page: str) -> None:
    """Tags nest, and all sections and pictures are there, each id once."""
    reader = read(page)
    for heading in ("Measurements", "Sizes", "Stages", "Exports", "Load it", "Settings"):
        assert heading in reader.text
    # before/after, mapping, trials, widths
    assert reader.tags.count("svg") == 4
    ids = [value for name, value in reader.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_the_page_asks_for_nothing_from_outside(page: str) -> None:
    """No script, no style sheet, no reference but to the page's own parts."""
    reader = read(page)
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(reader.tags)
    references = [v for n, v in reader.attributes if n in ("src", "href", "xlink:href", "data")]
    assert all(value.startswith("#") for value in references)
    assert all(value.startswith("#") for value in re.findall(r"url\(([^)]*)\)", page))
    assert "@import" not in page


def test_every_reference_inside_the_page_has_its_target(page: str) -> None:
    """Pictures of several stages do not borrow one another's clip paths."""
    reader = read(page)
    ids = {value for name, value in reader.attributes if name == "id"}
    used = [v for n, v in reader.attributes if n in ("href", "xlink:href")]
    used += re.findall(r"url\((#[^)]*)\)", page)
    assert used and all(value[1:] in ids for value in used)


def test_every_measurement_stands_with_its_protocol(page: str, report: RunReport) -> None:
    """Value, standard error and protocol of every figure in every state."""
    text = read(page).text
    for state in report.states:
        assert state.label in text
        for measurement in state.measurements:
            assert measurement.name in text and measurement.protocol in text
            shown = numbers.quantity(
                measurement.value,
                "bytes" if measurement.unit == "bytes" else "",
                numbers.places([measurement.value]),
            )
            assert typed(shown) in text
    assert "+27.81" in text and "x1.820" in text and "worse" in text


def test_stages_exports_and_provenance_are_told(page: str, report: RunReport) -> None:
    """What the record holds about the run can be read on the page."""
    text = read(page).text
    for stage in report.stages:
        assert stage.summary in text
    for export in report.exports:
        for check in export.checks:
            assert check.name in text
    for name, version in report.versions.items():
        assert f"{name} {version}" in text
    assert report.calibration is not None
    for said in (
        report.calibration.sha256,
        report.input.weights,
        report.output.weights,
        report.machine,
        report.created,
        "merge_rule: telescoped",
        "3 layers and 19.9% of the parameters removed",
        "the top layer takes no part in the walk",
        "plans/1-slm.json",
        "5.9e-05",
    ):
        assert said in text


@pytest.mark.usefixtures("no_matplotlib")
@pytest.mark.parametrize("text", NASTY)
def test_strings_of_the_run_cannot_change_the_page(text: str) -> None:
    """The tags are those of a harmless run, and the string is there to read as it is."""
    harmless = read(render_page(*samples.nasty("harmless")))
    poisoned = read(render_page(*samples.nasty(text)))
    assert poisoned.tags == harmless.tags
    assert [name for name, _ in poisoned.attributes] == [name for name, _ in harmless.attributes]
    # YAML may quote and fold the three in the recipe; everywhere else the string stands whole.
    assert poisoned.text.count(text) >= harmless.text.count("harmless") - 3


@pytest.mark.usefixtures("no_matplotlib")
def test_without_matplotlib_the_page_says_which_extra_draws(
    report: RunReport, plans: dict[str, PruningPlan]
) -> None:
    """Every picture's place holds the remedy; the rest of the page is whole."""
    page = render_page(report, plans)
    reader = read(page)
    assert "svg" not in reader.tags
    assert reader.text.count("pip install 'slm-plugin[report]'") == 4
    assert reader.tags.count("figure") == 4
    assert report.states[0].measurements[0].protocol in reader.text


@pytest.mark.usefixtures("no_matplotlib")
def test_a_bare_run_has_a_page_too() -> None:
    """No stages, no measurements, no exports, no calibration, no licence."""
    bare = samples.make_report(
        stages=(),
        states=(),
        exports=(),
        calibration=None,
        license=None,
        after=sample_plans.ORIGINAL,
    )
    text = read(render_page(bare, {})).text
    assert "Nothing was measured" in text and "Nothing was exported" in text
    assert "30 layers and 134.5 M of 134.5 M parameters remain" in text


@pytest.mark.usefixtures("no_matplotlib")
def test_warnings_are_said_once(report: RunReport, plans: dict[str, PruningPlan]) -> None:
    """A warning that both the stage and its plan carry is one warning."""
    found = before_after.warnings(report, plans)
    assert [stage for stage, _ in found] == [1, 2]
    assert len(set(found)) == len(found)
    page = html.unescape(render_page(report, plans))
    for _, text in found:
        assert page.count(text) == 1
