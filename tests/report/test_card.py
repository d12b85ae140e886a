"""The model card: valid front matter, honest words, one structure whatever the strings hold."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id
from markdown_it import MarkdownIt
from markdown_it.token import Token

from slm_plugin.plans import PruningPlan
from slm_plugin.report.card import hub_id, render_card
from slm_plugin.report.record import RunReport
from tests.report import samples
from tests.report.samples import typed

PARSER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
NASTY = [
    "<script>alert(1)</script>",
    "---",
    "\n---\nlicense: mit",
    "key: 'value' # \"no comment\"",
    "a | b `c` ```d``` [e](http://evil.example)",
    "{{ 7 * 7 }} *x* _y_",
    "&amp; null ~ true 1e3 @at !tag",
]


def split(card: str) -> tuple[dict[str, Any], str]:
    """Front matter as the Hub reads it, and the body."""
    read = ModelCard(card)
    return read.data.to_dict(), typed(read.text)


def flat(tokens: list[Token]) -> list[str]:
    """Kinds of all tokens, inner ones too."""
    kinds = []
    for token in tokens:
        kinds += [token.type, *flat(token.children or [])]
    return kinds


def text_of(tokens: list[Token]) -> str:
    """What a reader of the rendered card sees."""
    return "\n".join(
        "".join(c.content for c in token.children) if token.children else token.content
        for token in tokens
    )


def test_the_front_matter_is_what_the_hub_wants(
    report: RunReport, plans: dict[str, PruningPlan]
) -> None:
    """Library, task, tags, base model and licence, as plain YAML."""
    found, _ = split(render_card(report, plans))
    assert found == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruning", "depth-pruning", "width-pruning", "slm-plugin"],
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "license": "apache-2.0",
    }


@pytest.mark.parametrize("text", NASTY)
def test_strings_of_the_run_cannot_change_the_card(text: str) -> None:
    """Front matter keeps its keys and values, the body the structure of a harmless card."""
    found, body = split(render_card(*samples.nasty(text)))
    harmless, harmless_body = split(render_card(*samples.nasty("Some Words")))
    assert found == {**harmless, "license_name": text}
    tokens = PARSER.parse(body)
    assert flat(tokens) == flat(PARSER.parse(harmless_body))
    shown = text_of(tokens)
    assert " ".join(text.split()) in shown
    recipe = next(t.content for t in tokens if t.type == "fence" and t.info == "yaml")
    assert yaml.safe_load(recipe) == {"model": {"id": text}, text: text}


def test_every_measurement_stands_with_its_protocol(
    report: RunReport, plans: dict[str, PruningPlan]
) -> None:
    """The number in a row's note column leads to the protocol."""
    _, body = split(render_card(report, plans))
    rows = [line.strip("| ").split(" | ") for line in body.splitlines() if line.startswith("| ")]
    cells = {row[0]: row for row in rows}
    for measurement in report.states[0].measurements:
        unit = f" ({measurement.unit})" if measurement.unit not in ("", "bytes") else ""
        number = cells[f"{measurement.name}{unit}"][1]
        assert f"\n{number}. {measurement.protocol}\n" in body
    assert cells["perplexity wikitext2 2048"][2:] == [
        *("33.91", "52.91", "98.35", "61.72"),
        *("+27.81", "x1.820", "worse"),
    ]
    assert cells["piqa acc"][2] == "0.6850 ± 0.0329"


def test_the_card_says_how_to_use_and_what_not_to_expect(
    report: RunReport, plans: dict[str, PruningPlan]
) -> None:
    """Usage, limits, the run's warnings, recipe and versions are there."""
    _, body = split(render_card(report, plans))
    for said in (
        'folder = "checkpoint"',
        "AutoModelForCausalLM.from_pretrained(folder)",
        "Not evaluated for bias",
        "6 attention heads do not divide hidden size 576",
        "prune: torch_pruning",
        "Target: threshold 0.9.",
        "slm-plugin 0.1.0, python 3.11.9, torch 2.13.0",
        "largest logit difference 5.9e-05 (allowed 0.001); differing",
        "repaired (lora)",
    ):
        assert said in body


def test_a_bare_run_has_an_honest_card() -> None:
    """Nothing measured, nothing exported, licence unknown: the card says so."""
    bare = samples.make_report(
        model="smollm2-135m", stages=(), states=(), exports=(), calibration=None, license=None
    )
    found, body = split(render_card(bare, {}))
    assert "base_model" not in found and "license" not in found
    assert "Nothing was measured." in body
    assert "not trained after pruning" in body
    assert "licence is not known" in body
    assert "No stage changed the model." in body


@pytest.mark.parametrize(
    "model",
    [
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "a/b",
        "meta-llama/Llama-3.2-1B",
        "o/x--y",
        "o/x..y",
        "-o/x",
        "o/x-",
        "o/x y",
        "o/" + "x" * 100,
        "o/x\n",
        "o/é",
    ],
)
def test_hub_ids_are_those_that_the_hub_takes(model: str) -> None:
    """A base model is named exactly when huggingface_hub accepts it as owner/name."""
    try:
        validate_repo_id(model)
        valid = model.isascii() and "\n" not in model
    except HFValidationError:
        valid = False
    assert (hub_id(model) == model) is valid


@pytest.mark.parametrize("model", ["smollm2-135m", "./runs/x", "/models/x", "a/b/c", "o/m.gguf"])
def test_paths_and_aliases_are_no_base_model(model: str) -> None:
    """Only owner/name can be linked."""
    assert hub_id(model) is None


def test_a_local_folder_is_no_base_model(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder named like a hub id is the folder."""
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id("owner/name") is None
    assert hub_id("owner/other") == "owner/other"
