"""The lm_eval evaluator, end to end on a tiny model and tasks from a folder."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="needs lm-eval")

import lm_eval.tasks
import torch
import torch.nn.functional as F
from lm_eval.models.huggingface import HFLM
from pydantic import ValidationError
from transformers import PreTrainedModel

from slm_plugin.errors import MissingExtraError, UserError
from slm_plugin.evaluation.base import Measurement
from slm_plugin.evaluation.lm_eval import LmEval, LmEvalOptions
from slm_plugin.session import Session
from tests.tiny import make_model, make_tokenizer

DATA = """
import os
import random
import datasets

def rows(seed, count):
    draw = random.Random(seed)
    words = lambda n: " ".join(f"w{draw.randrange(3, 128)}" for _ in range(n))
    return [
        {
            "context": words(draw.randrange(3, 9)),
            "choices": [words(draw.randrange(1, 5)) for _ in range(3)],
            "gold": draw.randrange(3),
        }
        for _ in range(count)
    ]

def few(**_):
    return {"test": datasets.Dataset.from_list(rows(1, 24))}

def many(**_):
    return {"test": datasets.Dataset.from_list(rows(2, 40))}

def absent(**_):
    raise RuntimeError(f"WORDS_DATA is {os.environ.get('WORDS_DATA', 'not set')}\\nsecond line")
"""
TASK = """
task: {name}
custom_dataset: !function data.{source}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 4}}
"""
GROUP = """
group: {name}
task: [words_few, words_many]
{aggregate}
metadata: {{version: 2}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of tasks: two that work, one without data, two groups."""
    path = tmp_path_factory.mktemp("tasks")
    (path / "data.py").write_text(DATA)
    for name, source in (("few", "few"), ("many", "many"), ("absent", "absent")):
        text = TASK.format(name=f"words_{name}", source=source)
        (path / f"{name}.yaml").write_text(text)
    aggregate = "aggregate_metric_list: [{metric: acc, weight_by_size: true}]"
    (path / "mean.yaml").write_text(GROUP.format(name="words_mean", aggregate=aggregate))
    (path / "both.yaml").write_text(GROUP.format(name="words_both", aggregate=""))
    (path / "stock.yaml").write_text("group: words_stock\ntask: [words_few, some_stock_task]\n")
    return str(path)


def rows(folder: str, source: str) -> list[dict[str, Any]]:
    """The rows of a task of the folder."""
    names: dict[str, Any] = {}
    exec(compile(DATA, folder, "exec"), names)
    return names["rows"](*{"few": (1, 24), "many": (2, 40)}[source])


def measure(session: Session, tasks: Sequence[str], **options: Any) -> dict[str, Measurement]:
    """Measurements of an lm_eval evaluator by name."""
    evaluator = LmEval(LmEvalOptions(tasks=tuple(tasks), **options))
    evaluator.check()
    evaluator.load()
    return {found.name: found for found in session.measure(evaluator)}


@torch.no_grad()
def brute_force(model: PreTrainedModel, documents: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Accuracies from the log-likelihood of every choice, one unpadded sequence at a time."""
    hits, hits_norm = 0, 0
    for document in documents:
        context = [int(word[1:]) for word in document["context"].split()]
        scores = []
        for choice in document["choices"]:
            ids = [*context, *(int(word[1:]) for word in choice.split())]
            logs = F.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), dim=-1)
            span = range(len(context), len(ids))
            scores.append(sum(logs[place - 1, ids[place]].item() for place in span))
        norms = [s / len(c) for s, c in zip(scores, document["choices"], strict=True)]
        hits += scores.index(max(scores)) == document["gold"]
        hits_norm += norms.index(max(norms)) == document["gold"]
    return hits / len(documents), hits_norm / len(documents)


def test_scores_equal_brute_force(family: str, folder: str) -> None:
    """Both accuracies are those of scoring every choice by hand."""
    model = make_model(family)
    found = measure(Session(model, make_tokenizer()), ["words_few"], include_path=folder)
    values = (found["words_few acc"].value, found["words_few acc_norm"].value)
    assert values == pytest.approx(brute_force(model, rows(folder, "few")))


def test_batch_size_changes_nothing(session: Session, folder: str) -> None:
    """One sequence at a time scores as eight side by side."""
    alone = measure(session, ["words_few"], include_path=folder, batch_size=1)
    assert alone == measure(session, ["words_few"], include_path=folder, batch_size=8)


def test_limit_takes_the_first_items(session: Session, folder: str) -> None:
    """A limit scores the first items of the task and stands in the protocol."""
    found = measure(session, ["words_few"], include_path=folder, limit=6)["words_few acc"]
    assert found.value == pytest.approx(brute_force(session.model, rows(folder, "few")[:6])[0])
    assert "task version 4, 0-shot, 6 of 24 documents, first 6 of each task" in found.protocol
    assert found.stderr == pytest.approx((found.value * (1 - found.value) / 5) ** 0.5)


def test_groups_report_aggregate_or_members(session: Session, folder: str) -> None:
    """A group with an aggregate is one measurement; one without gives its tasks'."""
    mean = measure(session, ["words_mean"], include_path=folder)
    tasks = measure(session, ["words_both"], include_path=folder)
    assert list(mean) == ["words_mean acc"]
    assert list(tasks) == [
        f"words_{name} {metric}"
        for name, metric in itertools.product(("few", "many"), ("acc", "acc_norm"))
    ]
    weighted = (24 * tasks["words_few acc"].value + 40 * tasks["words_many acc"].value) / 64
    assert mean["words_mean acc"].value == pytest.approx(weighted)
    assert "all 64 documents, aggregate of 2 tasks" in mean["words_mean acc"].protocol


def test_shots_are_those_of_simple_evaluate(
    session: Session, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores with few-shot examples are those of lm-eval's own entry point for the same seed."""
    found = measure(session, ["words_few"], include_path=folder, num_fewshot=3, seed=11)
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "")
    expected = lm_eval.simple_evaluate(
        model=HFLM(pretrained=session.model, tokenizer=session.tokenizer, batch_size=4),
        tasks=["words_few"],
        task_manager=lm_eval.tasks.TaskManager(include_path=folder, include_defaults=False),
        num_fewshot=3,
        fewshot_random_seed=11,
    )
    row = expected["results"]["words_few"]
    assert found["words_few acc"].value == row["acc,none"]
    assert found["words_few acc_norm"].value == row["acc_norm,none"]
    assert found["words_few acc"].stderr == row["acc_stderr,none"]
    without = measure(session, ["words_few"], include_path=folder)["words_few acc"]
    assert "3-shot" in found["words_few acc"].protocol and "0-shot" in without.protocol


def test_measuring_twice_agrees(session: Session, folder: str) -> None:
    """The tasks are loaded once and give the same scores every time, with shots as well."""
    options = {"include_path": folder, "num_fewshot": 2, "limit": 8, "seed": 3}
    evaluator = LmEval(LmEvalOptions(tasks=("words_many", "words_few"), **options))
    loaded = evaluator.loaded
    first = session.measure(evaluator)
    assert session.measure(evaluator) == first
    assert evaluator.loaded is loaded
    assert "2-shot, 8 of 40 documents, few-shot seed 3" in first[0].protocol


def test_builtin_task_runs(session: Session, no_index: None) -> None:
    """The built-in task needs no folder and no index, and gives both accuracies."""
    found = measure(session, ["builtin_continuation"], limit=5)
    assert list(found) == ["builtin_continuation acc", "builtin_continuation acc_norm"]
    assert "task version 1.0, 0-shot, 5 of 80 documents" in next(iter(found.values())).protocol


def test_nothing_is_left_behind(
    session: Session,
    folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """No output, no seed, no variable, no padding token, no other weights."""
    assert session.tokenizer is not None
    session.tokenizer.pad_token = None
    monkeypatch.chdir(tmp_path)
    environment, weights = dict(os.environ), dict(session.model.named_parameters())
    dtype, numbers = session.model.dtype, (random.getstate(), torch.get_rng_state())
    measure(session, ["words_few"], include_path=folder)
    captured = capfd.readouterr()
    assert captured.out == ""
    said = f"lm_eval: running the task code of {folder}/data.py"
    assert "".join(captured.err.split()) == "".join(said.split())
    assert dict(os.environ) == environment
    assert random.getstate() == numbers[0] and torch.equal(torch.get_rng_state(), numbers[1])
    assert session.tokenizer.pad_token is None
    assert session.model.dtype == dtype
    after = dict(session.model.named_parameters())
    assert all(after[name] is parameter for name, parameter in weights.items())


def test_unknown_task_gets_near_names(folder: str, no_index: None) -> None:
    """A misspelt task is refused by `check`, with the names that it may have meant."""
    evaluator = LmEval(LmEvalOptions(tasks=("word_few",), include_path=folder))
    with pytest.raises(UserError, match=r"no task, group or tag 'word_few'.*mean words_few"):
        evaluator.check()


def test_misspelt_builtin_task_is_recognised(no_index: None) -> None:
    """The built-in task is among the names that a misspelt one may have meant."""
    with pytest.raises(UserError, match=r"did you mean builtin_continuation\?"):
        LmEval(LmEvalOptions(tasks=("builtin_continuations",))).check()


def test_known_tasks_spare_the_large_index(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's own index is read only for what the folder does not have, deep inside groups."""
    read: list[bool] = []

    class Noting(lm_eval.tasks.TaskManager):
        def __init__(self, include_path: str | None = None, include_defaults: bool = True) -> None:
            read.append(include_defaults)
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Noting)
    LmEval(LmEvalOptions(tasks=("words_both", "words_mean"), include_path=folder))
    LmEval(LmEvalOptions(tasks=("words_both",), include_path=folder)).check()
    assert read == [False]
    with pytest.raises(UserError, match="'words_stock' names 'some_stock_task'"):
        LmEval(LmEvalOptions(tasks=("words_stock",), include_path=folder)).check()
    assert read == [False, False, True]


def test_task_without_data_is_one_sentence(folder: str) -> None:
    """What a task's data source raises reaches the user as one line that names the task."""
    evaluator = LmEval(LmEvalOptions(tasks=("words_absent",), include_path=folder))
    evaluator.check()
    with pytest.raises(UserError) as caught:
        evaluator.load()
    assert caught.value.message == "lm-eval cannot load 'words_absent': WORDS_DATA is not set"


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    """An include path that is no folder is refused by `check`."""
    evaluator = LmEval(LmEvalOptions(tasks=("piqa",), include_path=str(tmp_path / "no")))
    with pytest.raises(UserError, match="is not a folder"):
        evaluator.check()


def test_task_cannot_come_twice(folder: str) -> None:
    """A task alone and in a group is refused; its name twice is one task."""
    evaluator = LmEval(LmEvalOptions(tasks=("words_few", "words_both"), include_path=folder))
    with pytest.raises(UserError, match="together"):
        evaluator.check()
    twice = LmEval(LmEvalOptions(tasks=("words_few", "words_few"), include_path=folder))
    assert twice.loaded.names == ("words_few",)


def test_extra_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without lm-eval `check` says what to install."""
    monkeypatch.setattr("slm_plugin.extras.found_version", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"slm-plugin\[eval\]"):
        LmEval(LmEvalOptions(tasks=("piqa",))).check()


def test_tokenizer_is_needed(session: Session, folder: str) -> None:
    """A session without a tokenizer is refused."""
    evaluator = LmEval(LmEvalOptions(tasks=("words_few",), include_path=folder))
    with pytest.raises(UserError, match="needs a tokenizer"):
        evaluator.measure(Session(session.model))


def test_at_least_one_task() -> None:
    """An empty list of tasks is a mistake in the recipe."""
    with pytest.raises(ValidationError):
        LmEvalOptions(tasks=())
