"""lm-eval's results as measurements, on results that are made up."""

from __future__ import annotations

from typing import Any

from slm_plugin.evaluation.lm_eval_scores import scores


def made_up(**changes: Any) -> dict[str, Any]:
    """Results of a group that aggregates, one that does not, and a task without accuracy."""
    results: dict[str, Any] = {
        "results": {
            "easy": {"alias": "easy", "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,none": 0.4},
            "hard": {"acc,none": 0.25, "acc_norm,none": 0.3, "acc_norm_stderr,none": "N/A"},
            "text": {"word_perplexity,none": 12.0, "exact_match,strict-match": 0.1},
            "mean": {"acc,none": 0.4, "acc_stderr,none": 0.05},
            "both": {"alias": "both"},
        },
        "groups": {"mean": {"acc,none": 0.4}},
        "group_subtasks": {"mean": ["easy", "hard"], "both": ["text", "mean"]},
        "versions": {"easy": 1.0, "hard": 2.0, "text": 0.0, "mean": "3"},
        "n-shot": {"easy": 0, "hard": 5, "text": 0},
        "higher_is_better": {
            "easy": {"acc": True, "f1": True},
            "hard": {"acc": True, "acc_norm": True},
            "text": {"word_perplexity": False, "exact_match": True},
            "mean": {"acc": True},
        },
        "n-samples": {
            "easy": {"original": 30, "effective": 20},
            "hard": {"original": 10, "effective": 10},
            "text": {"original": 7, "effective": 7},
        },
        "config": {"limit": 20, "fewshot_seed": 9},
        "lm_eval_version": "0.4.13",
    }
    return {**results, **changes}


def test_accuracy_comes_before_other_metrics() -> None:
    """A task with accuracy gives that alone, with its standard error and protocol."""
    (found,) = scores(made_up(), ["easy"])
    assert (found.name, found.value, found.stderr) == ("easy acc", 0.5, 0.1)
    assert found.better == "higher"
    assert found.protocol == (
        "lm-eval 0.4.13, task version 1.0, 0-shot, 20 of 30 documents, first 20 of each task"
    )


def test_both_accuracies_are_reported() -> None:
    """`acc` and `acc_norm` are two measurements; an unknown error is none."""
    found = scores(made_up(), ["hard"])
    assert [(m.name, m.stderr) for m in found] == [("hard acc", None), ("hard acc_norm", None)]
    assert "5-shot, all 10 documents, few-shot seed 9" in found[0].protocol


def test_tasks_without_accuracy_report_what_they_have() -> None:
    """Other metrics keep their direction, and their filter where there is one."""
    found = scores(made_up(), ["text"])
    assert [(m.name, m.better) for m in found] == [
        ("text word_perplexity", "lower"),
        ("text exact_match strict-match", "higher"),
    ]


def test_groups_that_aggregate_stand_for_themselves() -> None:
    """A group's own accuracy is reported, over the documents of its members."""
    (found,) = scores(made_up(), ["mean"])
    assert (found.name, found.value) == ("mean acc", 0.4)
    assert found.protocol.startswith(
        "lm-eval 0.4.13, task version 3, 0/5-shot, 30 of 40 documents, few-shot seed 9, "
        "aggregate of 2 tasks"
    )


def test_groups_without_aggregate_give_their_members() -> None:
    """Members come in the group's order, groups among them by the same rule."""
    found = scores(made_up(), ["both"])
    assert [m.name for m in found] == [
        "text word_perplexity",
        "text exact_match strict-match",
        "mean acc",
    ]
