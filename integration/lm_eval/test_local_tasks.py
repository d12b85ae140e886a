"""The local lm-eval tasks load, render as the stock tasks do, and run without a network."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest

pytest.importorskip("lm_eval", reason="needs lm-eval")

import lm_eval.tasks
import torch
from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TASKS_DIR = Path(__file__).parent / "tasks"
STOCK_DIR = Path(lm_eval.tasks.__file__).parent
STOCK_FOLDERS = ("piqa", "hellaswag", "winogrande", "arc", "super_glue/boolq", "openbookqa")
ENV_VAR = "SLM_PLUGIN_EVAL_DATA"
# The metric that is usually reported of each task.
METRICS = {
    "local_boolq": "acc",
    "local_piqa": "acc",
    "local_hellaswag": "acc_norm",
    "local_winogrande": "acc",
    "local_arc_easy": "acc",
    "local_arc_challenge": "acc_norm",
    "local_openbookqa": "acc_norm",
}
# Keys that may differ from the stock task: its name, where its data is, and the zero shots.
SOURCE_KEYS = {
    "task",
    "tag",
    "custom_dataset",
    "dataset_path",
    "dataset_name",
    "dataset_kwargs",
    "training_split",
    "validation_split",
    "test_split",
    "num_fewshot",
}


class Rendered(NamedTuple):
    """What the first item of a task must render to."""

    text: str | int
    choices: list[str]
    target: str | int
    requests: list[tuple[str, str]]


ROWS: dict[str, list[dict[str, Any]]] = {
    "piqa": [
        {"idx": 0, "goal": "Dry a cup", "sol1": "Use a towel.", "sol2": "Use soup.", "label": 0},
        {"idx": 1, "goal": "Cut paper", "sol1": "Use milk.", "sol2": "Use scissors.", "label": 1},
        {"idx": 2, "goal": "Boil eggs", "sol1": "Heat water.", "sol2": "Freeze it.", "label": 0},
    ],
    "hellaswag": [
        {
            "idx": 0,
            "activity_label": "Baking",
            "ctx_a": "A man opens an oven.  He",
            "ctx_b": "then",
            "ctx": "A man opens an oven.  He then",
            "endings": [
                "takes out [step] bread.",
                "swims away.",
                "flies [title] home.",
                " reads.",
            ],
            "label": "2",
        },
        {
            "idx": 1,
            "activity_label": "Running",
            "ctx_a": "[header] How to run [title] Put on shoes.",
            "ctx_b": "",
            "ctx": "[header] How to run [title] Put on shoes.",
            "endings": ["Tie them.", "Eat them.", "Paint them.", "Sell them."],
            "label": "0",
        },
    ],
    "winogrande": [
        {
            "idx": 0,
            "sentence": "The cup fell on the rug, so the _ broke.",
            "option1": "rug",
            "option2": "cup",
            "answer": "2",
        },
        {
            "idx": 1,
            "sentence": "The cup fell on the rug, so the _ got wet.",
            "option1": "rug",
            "option2": "cup",
            "answer": "1",
        },
    ],
    "arc_easy": [
        {
            "idx": 0,
            "id": "a",
            "question": "Which is a star?",
            "choices": {"text": ["Moon", "Sun", "Earth"], "label": ["A", "B", "C"]},
            "answerKey": "B",
        },
        {
            "idx": 1,
            "id": "b",
            "question": "Which is wet?",
            "choices": {"text": ["rain", "sand", "fire", "rock"], "label": ["1", "2", "3", "4"]},
            "answerKey": "1",
        },
    ],
    "arc_challenge": [
        {
            "idx": 0,
            "id": "c",
            "question": "What melts ice?",
            "choices": {"text": ["cold", "heat"], "label": ["A", "B"]},
            "answerKey": "B",
        },
        {
            "idx": 1,
            "id": "d",
            "question": "What has a 'core'?",
            "choices": {"text": ["Earth's inside", "a song"], "label": ["A", "B"]},
            "answerKey": "A",
        },
    ],
    "boolq": [
        {"idx": 0, "question": "is ice cold", "passage": "Ice -- Ice is cold.", "label": 1},
        {"idx": 1, "question": "is fire cold", "passage": "Fire -- Fire is hot.", "label": 0},
    ],
    "openbookqa": [
        {
            "idx": 0,
            "id": "e",
            "question_stem": "Plants need",
            "choices": {"text": ["light", "shoes", "cars", "tea"], "label": ["A", "B", "C", "D"]},
            "answerKey": "A",
        },
        {
            "idx": 1,
            "id": "f",
            "question_stem": "Birds may",
            "choices": {"text": ["read", "drive", "fly", "cook"], "label": ["A", "B", "C", "D"]},
            "answerKey": "C",
        },
    ],
}

FIRST_ITEM = {
    "piqa": Rendered(
        "Question: Dry a cup\nAnswer:",
        ["Use a towel.", "Use soup."],
        0,
        [
            ("Question: Dry a cup\nAnswer:", " Use a towel."),
            ("Question: Dry a cup\nAnswer:", " Use soup."),
        ],
    ),
    "hellaswag": Rendered(
        "Baking: A man opens an oven. He Then",
        ["takes out bread.", "swims away.", "flies. home.", "reads."],
        2,
        [
            ("Baking: A man opens an oven. He Then", " takes out bread."),
            ("Baking: A man opens an oven. He Then", " swims away."),
            ("Baking: A man opens an oven. He Then", " flies. home."),
            ("Baking: A man opens an oven. He Then", " reads."),
        ],
    ),
    "winogrande": Rendered(
        1,
        ["The cup fell on the rug, so the rug", "The cup fell on the rug, so the cup"],
        "broke.",
        [
            ("The cup fell on the rug, so the rug", " broke."),
            ("The cup fell on the rug, so the cup", " broke."),
        ],
    ),
    "arc_easy": Rendered(
        "Question: Which is a star?\nAnswer:",
        ["Moon", "Sun", "Earth"],
        1,
        [
            ("Question: Which is a star?\nAnswer:", " Moon"),
            ("Question: Which is a star?\nAnswer:", " Sun"),
            ("Question: Which is a star?\nAnswer:", " Earth"),
        ],
    ),
    "arc_challenge": Rendered(
        "Question: What melts ice?\nAnswer:",
        ["cold", "heat"],
        1,
        [
            ("Question: What melts ice?\nAnswer:", " cold"),
            ("Question: What melts ice?\nAnswer:", " heat"),
        ],
    ),
    "boolq": Rendered(
        "Ice -- Ice is cold.\nQuestion: is ice cold?\nAnswer:",
        ["no", "yes"],
        1,
        [
            ("Ice -- Ice is cold.\nQuestion: is ice cold?\nAnswer:", " no"),
            ("Ice -- Ice is cold.\nQuestion: is ice cold?\nAnswer:", " yes"),
        ],
    ),
    "openbookqa": Rendered(
        "Plants need",
        ["light", "shoes", "cars", "tea"],
        0,
        [
            ("Plants need", " light"),
            ("Plants need", " shoes"),
            ("Plants need", " cars"),
            ("Plants need", " tea"),
        ],
    ),
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every attempt to open a connection fail."""

    def refuse(self: socket.socket, address: object) -> NoReturn:
        raise AssertionError(f"a network connection was attempted: {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny file of every task, named by the environment variable."""
    for name, rows in ROWS.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    monkeypatch.setenv(ENV_VAR, str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    """A task manager that knows only the local tasks."""
    return TaskManager(include_path=str(TASKS_DIR), include_defaults=False)


@pytest.fixture(scope="module")
def stock_manager() -> TaskManager:
    """A task manager that knows only the built-in tasks that have a local twin."""
    folders: list[str | Path] = [STOCK_DIR / folder for folder in STOCK_FOLDERS]
    return TaskManager(include_path=folders, include_defaults=False)


@pytest.fixture(scope="module")
def tiny_lm() -> HFLM:
    """A random Llama with a byte-level BPE tokenizer trained on the rows above."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((json.dumps(rows) for rows in ROWS.values()), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(wrapped),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=256,
        )
    )
    return HFLM(pretrained=model.eval(), tokenizer=wrapped, device="cpu", batch_size=4)


def load_task(manager: TaskManager, name: str) -> ConfigurableTask:
    """Load one task the way lm-eval does."""
    task = manager.load([name])["tasks"][name]
    assert isinstance(task, ConfigurableTask)
    return task


def gold_index(task: ConfigurableTask, doc: dict[str, Any]) -> object:
    """Return the gold index as lm-eval reads it."""
    return task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)


def evaluate(manager: TaskManager, lm: HFLM, tasks: list[str]) -> dict[str, Any]:
    """Run `simple_evaluate` and return its results."""
    results = simple_evaluate(lm, tasks=tasks, task_manager=manager, bootstrap_iters=0)
    assert results is not None
    return dict(results)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_first_item_renders_as_the_stock_task_does(
    data_dir: Path, manager: TaskManager, name: str
) -> None:
    """Prompt, choices, target and scored pairs are the stock ones, letter by letter."""
    task = load_task(manager, f"local_{name}")
    assert len(task.eval_docs) == len(ROWS[name])
    doc = task.eval_docs[0]
    context = task.fewshot_context(doc, num_fewshot=0)
    requests = task.construct_requests(doc, context)
    rendered = Rendered(
        task.doc_to_text(doc),
        task.doc_to_choice(doc),
        task.doc_to_target(doc),
        [request.args for request in requests],
    )
    assert rendered == FIRST_ITEM[name]


@pytest.mark.parametrize(
    ("name", "golds"),
    [
        ("piqa", [0, 1, 0]),
        ("hellaswag", [2, 0]),
        ("winogrande", [1, 0]),
        ("arc_easy", [1, 0]),
        ("arc_challenge", [1, 0]),
        ("boolq", [1, 0]),
        ("openbookqa", [0, 2]),
    ],
)
def test_gold_index_follows_the_label(
    data_dir: Path, manager: TaskManager, name: str, golds: list[int]
) -> None:
    """The gold index of every item is the one that its label names."""
    task = load_task(manager, f"local_{name}")
    assert [gold_index(task, doc) for doc in task.eval_docs] == golds


@pytest.mark.parametrize("name", sorted(ROWS))
def test_config_equals_the_stock_yaml(
    manager: TaskManager, stock_manager: TaskManager, name: str
) -> None:
    """Apart from the data source, the YAML says what the installed lm-eval's YAML says."""
    stock = stock_manager.task_index[name].cfg
    local = manager.task_index[f"local_{name}"].cfg
    assert stock is not None
    assert local is not None
    assert stock.keys() - SOURCE_KEYS == local.keys() - SOURCE_KEYS
    for key in stock.keys() - SOURCE_KEYS:
        expected = stock[key]
        # The index holds a `!function` unresolved, as "folder of the YAML/module.function".
        if str(expected).startswith(str(STOCK_DIR)):
            function = expected.rpartition(".")[2]
            expected = str(TASKS_DIR / f"local_data.{name}_{function}")
        assert local[key] == expected, key


def test_names_do_not_collide_with_built_in_tasks(manager: TaskManager) -> None:
    """The folder adds exactly its seven tasks and the group, none of them a built-in name."""
    assert set(manager.all_tasks) == {*METRICS, "local_zero_shot"}
    assert not set(manager.all_tasks) & set(TaskManager().all_tasks)


def test_missing_variable_is_named(
    data_dir: Path, manager: TaskManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the environment variable the error is one sentence that names it."""
    monkeypatch.delenv(ENV_VAR)
    with pytest.raises(RuntimeError) as caught:
        manager.load(["local_piqa"])
    assert str(caught.value) == (
        "The environment variable SLM_PLUGIN_EVAL_DATA is not set: "
        "point it at the folder that holds piqa.jsonl."
    )


@pytest.mark.parametrize("name", sorted(ROWS))
def test_missing_file_is_named(data_dir: Path, manager: TaskManager, name: str) -> None:
    """Without its file a task raises one sentence that names the file and the variable."""
    path = data_dir / f"{name}.jsonl"
    path.unlink()
    with pytest.raises(FileNotFoundError) as caught:
        manager.load([f"local_{name}"])
    assert str(caught.value) == (
        f"The task data file {path} does not exist (SLM_PLUGIN_EVAL_DATA={data_dir})."
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        ("{not json}\n", "line 1: not valid JSON"),
        ("[1]\n", "line 1: not a JSON object"),
        ('{"goal": "g", "sol1": "a", "sol2": "b"}\n', "line 1: missing field(s) label"),
        (
            '{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}\n'
            '{"goal": "g", "sol1": "a", "sol2": "b", "label": "x"}\n',
            "differ in their types",
        ),
    ],
)
def test_malformed_file_is_named(
    data_dir: Path, manager: TaskManager, content: str, message: str
) -> None:
    """A file with no rows, bad JSON or the wrong fields is refused, and the file is named."""
    path = data_dir / "piqa.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="piqa") as caught:
        manager.load(["local_piqa"])
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_model_arguments_do_not_reach_the_reader(data_dir: Path) -> None:
    """Metadata that lm-eval passes along (model arguments of its CLI) is ignored."""
    metadata: dict[str, Any] = {"pretrained": "some-model", "dtype": "float32"}
    manager = TaskManager(include_path=str(TASKS_DIR), include_defaults=False, metadata=metadata)
    assert len(load_task(manager, "local_piqa").eval_docs) == len(ROWS["piqa"])


def test_simple_evaluate_runs_piqa(data_dir: Path, manager: TaskManager, tiny_lm: HFLM) -> None:
    """A tiny random model is scored on local_piqa end to end."""
    results = evaluate(manager, tiny_lm, ["local_piqa"])["results"]["local_piqa"]
    assert results["acc,none"] in {0.0, 1 / 3, 2 / 3, 1.0}
    assert 0.0 <= results["acc_norm,none"] <= 1.0


def test_simple_evaluate_runs_the_group(
    data_dir: Path, manager: TaskManager, tiny_lm: HFLM
) -> None:
    """The group scores all seven tasks with their usual metrics, zero-shot, unaggregated."""
    report = evaluate(manager, tiny_lm, ["local_zero_shot"])
    assert report["group_subtasks"] == {"local_zero_shot": list(METRICS)}
    assert "groups" not in report
    for task, metric in METRICS.items():
        assert 0.0 <= report["results"][task][f"{metric},none"] <= 1.0
        assert report["n-shot"][task] == 0


@pytest.mark.skipif(not os.environ.get(ENV_VAR), reason=f"{ENV_VAR} is not set")
@pytest.mark.parametrize("task_name", METRICS)
def test_real_files_have_valid_golds(manager: TaskManager, task_name: str) -> None:
    """Every item of the real file has a gold index inside its choices."""
    task = load_task(manager, task_name)
    assert len(task.eval_docs) > 0
    for position, doc in enumerate(task.eval_docs):
        gold = gold_index(task, doc)
        choices = task.doc_to_choice(doc)
        assert isinstance(gold, int), f"{task_name}, item {position}: gold {gold!r}"
        assert 0 <= gold < len(choices), f"{task_name}, item {position}: gold {gold}"
