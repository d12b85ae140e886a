"""The lm-eval task `builtin_continuation`, built from the built-in evaluation passages."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from slm_plugin.calibration.sources import passages

NAME = "builtin_continuation"
VERSION = 1.0
SPLITS = (1 / 3, 2 / 3)
CHOICES = 4
# Longer contexts make the questions easier and the run slower.
CONTEXT_WORDS = 40
CONTINUATION_WORDS = 25
SHUFFLE_SEED = 1234
_ENDS_SENTENCE = re.compile(r'[.!?]"?$')
_STARTS_SENTENCE = re.compile(r'"?[A-Z0-9]')


@dataclass(frozen=True, slots=True)
class Item:
    """One question: which choice continues the context?"""

    context: str
    choices: tuple[str, ...]
    gold: int


def items(texts: Sequence[str] | None = None) -> list[Item]:
    """Build the questions, deterministically.

    A passage is split at the sentence boundary nearest to a third and to two thirds of it. The
    words that follow compete with those at the same split of three other passages, behind the last
    few sentences before the split. In a shuffled circle each passage meets the next three, so that
    every continuation is on offer four times and is right once: liking some of them gains nothing.

    Args:
        texts: Passages; the built-in evaluation passages by default.
    """
    generator = random.Random(SHUFFLE_SEED)
    texts = passages("evaluation") if texts is None else texts
    found: list[Item] = []
    for share in SPLITS:
        circle = [_split(text, share) for text in texts]
        generator.shuffle(circle)
        places = [index % CHOICES for index in range(len(circle))]
        generator.shuffle(places)
        for index, (context, true) in enumerate(circle):
            following = [circle[(index + step) % len(circle)][1] for step in range(1, CHOICES)]
            gold = places[index]
            found.append(Item(context, (*following[:gold], true, *following[gold:]), gold))
    return found


def _split(text: str, share: float) -> tuple[str, str]:
    """Context and continuation, split at the sentence boundary nearest to a share of the text."""
    words = text.split()
    starts = [
        index
        for index in range(1, len(words) - CONTINUATION_WORDS + 1)
        if _ENDS_SENTENCE.search(words[index - 1]) and _STARTS_SENTENCE.match(words[index])
    ]
    middle = min(starts, key=lambda index: abs(index - share * len(words)))
    first = max([0, *(index for index in starts if middle - index >= CONTEXT_WORDS)])
    return " ".join(words[first:middle]), " ".join(words[middle : middle + CONTINUATION_WORDS])


def task_config() -> dict[str, Any]:
    """The task for lm-eval's task manager, with the rows in memory."""
    return {
        "task": NAME,
        "custom_dataset": _dataset,
        "output_type": "multiple_choice",
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in ("acc", "acc_norm")
        ],
        "metadata": {"version": VERSION},
    }


def _dataset(**_metadata: object) -> dict[str, Any]:
    """Rows by split, in the form of an lm-eval custom data set."""
    from datasets import Dataset

    return {"test": Dataset.from_list([asdict(item) for item in items()])}
