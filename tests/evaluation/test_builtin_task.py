"""The built-in task's questions: well-formed, balanced, the same every time."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from dataclasses import astuple

import pytest

from slm_plugin.calibration.sources import passages
from slm_plugin.evaluation.builtin_task import CHOICES, NAME, VERSION, items, task_config

ITEMS = items()


def test_gold_goes_on_where_the_context_ends() -> None:
    """Context and right choice stand together in one passage; wrong choices stand in others."""
    texts = passages("evaluation")
    for item in ITEMS:
        (home,) = [text for text in texts if f"{item.context} {item.choices[item.gold]}" in text]
        wrong = [choice for index, choice in enumerate(item.choices) if index != item.gold]
        assert all(choice not in home for choice in wrong)
        assert all(any(choice in text for text in texts) for choice in wrong)


def test_contexts_are_whole_sentences() -> None:
    """A context of 40 words or somewhat more ends a sentence, and every choice starts one."""
    for item in ITEMS:
        assert 40 <= len(item.context.split()) < 100
        assert item.context.rstrip('"')[-1] in ".!?"
        for opening in (item.context, *item.choices):
            start = opening.lstrip('"')[0]
            assert start.isupper() or start.isdigit()


def test_choices_are_four_and_distinct() -> None:
    """Four different continuations of equally many words."""
    for item in ITEMS:
        assert len(set(item.choices)) == len(item.choices) == CHOICES
        assert len({len(choice.split()) for choice in item.choices}) == 1


def test_gold_positions_are_balanced() -> None:
    """Every position is right equally often: always answering the same one gives a quarter."""
    counts = Counter(item.gold for item in ITEMS)
    assert len(ITEMS) == 2 * len(passages("evaluation"))
    assert set(counts.values()) == {len(ITEMS) // CHOICES}


def test_every_continuation_competes_equally_often() -> None:
    """Each is offered four times and right once, so liking some of them gains nothing."""
    offered = Counter(choice for item in ITEMS for choice in item.choices)
    right = Counter(item.choices[item.gold] for item in ITEMS)
    assert set(offered.values()) == {CHOICES}
    assert set(right.values()) == {1}


def test_blind_preferences_score_a_quarter() -> None:
    """Models that ignore the context get a quarter right on average."""
    generator = random.Random(5)
    shares = []
    for _ in range(400):
        liking = {item.choices[item.gold]: generator.random() for item in ITEMS}
        favourites = [max(item.choices, key=liking.__getitem__) for item in ITEMS]
        hits = [
            item.choices[item.gold] == favourite
            for item, favourite in zip(ITEMS, favourites, strict=True)
        ]
        shares.append(sum(hits) / len(hits))
    assert sum(shares) / len(shares) == pytest.approx(0.25, abs=0.01)


def test_questions_are_the_same_every_time() -> None:
    """Two builds agree, and so do two versions of the package: else VERSION has to rise."""
    assert items() == ITEMS
    digest = hashlib.sha256(repr([astuple(item) for item in ITEMS]).encode()).hexdigest()
    assert (VERSION, digest[:16]) == (1.0, "e63d849cf6c52581")


def test_config_is_a_multiple_choice_task_in_memory() -> None:
    """lm-eval gets the rows from a function, by the split that it evaluates."""
    pytest.importorskip("datasets")
    config = task_config()
    rows = config["custom_dataset"](version=1.0)[config["test_split"]]
    assert config["task"] == NAME
    assert [row["gold"] for row in rows] == [item.gold for item in ITEMS]
    assert tuple(rows[3]["choices"]) == ITEMS[3].choices
