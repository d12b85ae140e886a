"""A plan in words."""

from __future__ import annotations

import io

from rich.console import Console

from slm_plugin.plans import KeepChannels, LayerScores, PruningPlan
from slm_plugin.report.explain import explain
from tests.report import sample_plans, samples


def printed(plan: PruningPlan) -> str:
    """The explanation as the command prints it."""
    out = io.StringIO()
    Console(width=140, file=out).print(explain(plan))
    return samples.typed(out.getvalue())


def rows(text: str) -> list[list[str]]:
    """Cells of all table rows."""
    return [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in text.splitlines()
        if line.startswith("│")
    ]


def test_every_merge_and_drop_is_told() -> None:
    """Windows with what they become, and dropped layers, in the order of the plan."""
    assert rows(printed(sample_plans.dropping_plan())) == [
        ["merge, rule telescoped", "4-6", "layer 4", "2", ""],
        ["drop", "9, 20", "", "2", ""],
    ]
    assert rows(printed(sample_plans.depth_plan())) == [
        ["merge, rule telescoped", "24-26", "layer 23", "2", "0.9311"],
        ["merge, rule telescoped", "17-18", "layer 17", "1", "0.9158"],
    ]


def test_dropped_layers_are_told_with_their_trial() -> None:
    """One row a layer, with the similarity that the model had without it."""
    assert rows(printed(sample_plans.searching_plan())) == [
        ["drop", "20", "", "1", "-0.1200"],
        ["drop", "9", "", "1", "-0.3100"],
    ]


def test_scores_are_listed_lowest_first() -> None:
    """Every layer with its score, and what a score is."""
    scores = LayerScores(meaning="share of nothing", scores=(0.5, 0.25, 0.75))
    plan = sample_plans.dropping_plan().model_copy(update={"layer_scores": scores})
    text = " ".join(printed(plan).split())
    assert "Scores, lowest first, by layer: 1 (0.25), 0 (0.5), 2 (0.75)." in text
    assert "A score is the share of nothing." in text


def test_every_layer_with_what_it_keeps_is_told() -> None:
    """Channels by number, KV groups by number and index, query heads by number."""
    plan = sample_plans.width_plan()
    found = rows(printed(plan))
    assert [row[0] for row in found] == [str(layer) for layer in range(27)]
    assert {(row[1], row[3]) for row in found} == {("1,360 of 1,536", "6 of 9")}
    assert {row[2] for row in found} <= {"2 of 3: 0-1", "2 of 3: 0, 2", "2 of 3: 1-2"}


def test_layers_that_lose_only_channels_keep_all_heads() -> None:
    """What no operation names stays whole."""
    operations = (KeepChannels(layer=3, indices=(0, 5)),)
    plan = sample_plans.width_plan().model_copy(update={"operations": operations})
    assert rows(printed(plan)) == [["3", "2 of 1,536", "3 of 3: 0-2", "9 of 9"]]


def test_the_effect_is_said_in_layers_and_parameters() -> None:
    """Before, after and ratio, with target, search, threshold, notes and warnings."""
    text = printed(sample_plans.depth_plan())
    for said in (
        "A depth plan by slm with merge_rule telescoped, criterion flat_cosine.",
        "Target: threshold 0.9.",
        "Total: 3 layers and 7.9% of the parameters removed.",
        "30 -> 27",
        "134,515,008 -> 123,894,720 (ratio 0.921)",
        "27 trials, 3 accepted, threshold 0.9; similarities 0.6546 to 0.9756.",
        "the top layer takes no part in the walk",
        "a similarity above 0.9 says little about perplexity on this model",
        "sha256:aaaaaaaaaaaa",
    ):
        assert said in text
    assert "9 -> 6 query, 3 -> 2 key/value" in printed(sample_plans.width_plan())


def test_both_parts_of_a_hybrid_plan_are_told() -> None:
    """Layers as the model before the plan numbers them, in both tables."""
    text = printed(sample_plans.hybrid_plan())
    found = rows(text)
    assert found[:2] == [
        ["merge, rule telescoped", "4-6", "layer 4", "2", ""],
        ["drop", "9", "", "1", ""],
    ]
    assert [row[0] for row in found[2:]] == [str(i) for i in range(30) if i not in (5, 6, 9)]
    assert {row[2] for row in found[2:]} == {"2 of 3: 0, 2"}
    assert "layers by their index before the plan" in text
    assert "A hybrid plan by planner." in text and "30 -> 27" in text
    assert "9 -> 6 query, 3 -> 2 key/value" in text


def test_the_shapes_of_a_planner_are_told() -> None:
    """What was predicted, what was measured, and which one it took."""
    found = rows(printed(sample_plans.planned_shape()))[:3]
    assert found[0] == ["30", "1,200", "2", "85.0%", "0.450", "", ""]
    assert found[1] == ["27", "1,536", "2", "85.0%", "0.450", "0.410", "chosen"]
    plan = sample_plans.planned_shape()
    (first, *_) = plan.frontier
    mixed = first.model_copy(update={"mlp_width": 1536, "widths": (1536, 0, 400)})
    (row, *_) = rows(printed(plan.model_copy(update={"frontier": (mixed,)})))
    assert row[1] == "400 to 1,536"


def test_the_loss_before_and_after_is_told() -> None:
    """Where it was measured; with the repair that follows, if one does."""
    plan = sample_plans.hybrid_plan()
    assert "Calibration loss 3.250 -> 4.125 nats a token." in printed(plan)
    repaired = plan.model_copy(update={"followed_by": {"recover": "refit"}})
    assert "4.125 nats a token, before the repair that follows." in printed(repaired)
    assert "loss" not in printed(sample_plans.dropping_plan())


def test_a_plan_that_does_nothing_is_explained() -> None:
    """No operation, no table."""
    plan = sample_plans.depth_plan(operations=(), after=sample_plans.ORIGINAL)
    assert explain(plan).tables == ()
    assert "Total: 0 layers and 0.0% of the parameters removed." in printed(plan)


def test_markup_in_a_plan_is_text() -> None:
    """Square brackets of a hand-edited plan reach the terminal as they are."""
    plan = sample_plans.depth_plan(pruner="[red]x[/red]", notes=("[/nope]",))
    assert "[red]x[/red]" in printed(plan) and "[/nope]" in printed(plan)
