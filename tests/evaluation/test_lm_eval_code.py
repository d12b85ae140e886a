"""Task code of lm-eval: read and checked with the recipe, run with the run and not before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="needs lm-eval")

import lm_eval.tasks

from slm_plugin.errors import RecipeError, UserError
from slm_plugin.evaluation.lm_eval import LmEval, LmEvalOptions
from slm_plugin.evaluation.lm_eval_files import read_task_file
from slm_plugin.recipe import Recipe
from slm_plugin.session import Session
from tests.tiny import command, make_checkpoint, make_model, make_tokenizer

pytestmark = pytest.mark.usefixtures("no_index")

CODE = """
from pathlib import Path
Path({marker!r}).write_text("run")
import datasets

ROWS = [{{"context": "w5 w6", "choices": ["w7", "w8"], "gold": 0}} for _ in range(3)]

def load(**_):
    return {{"test": datasets.Dataset.from_list(ROWS)}}

def choose(doc):
    return doc["choices"]

class Task:
    pass
"""
TASK: dict[str, Any] = {
    "task": "mine",
    "custom_dataset": "!function data.load",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": '"{{context}}"',
    "doc_to_choice": '"{{choices}}"',
    "doc_to_target": '"{{gold}}"',
    "metric_list": "[{metric: acc, aggregation: mean, higher_is_better: true}]",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one task, whose code leaves the file ``marker`` when it is run."""
    path = tmp_path / "tasks"
    path.mkdir()
    (path / "data.py").write_text(CODE.format(marker=str(tmp_path / "marker")))
    write(path)
    return path


def write(folder: Path, name: str = "mine.yaml", **changes: str | None) -> Path:
    """Write a task file; None leaves a key out."""
    keys = {key: value for key, value in {**TASK, **changes}.items() if value is not None}
    file = folder / name
    file.write_text("".join(f"{key}: {value}\n" for key, value in keys.items()))
    return file


def check(folder: Path, *names: str) -> LmEval:
    """Check an evaluator, as reading a recipe does."""
    evaluator = LmEval(LmEvalOptions(tasks=names or ("mine",), include_path=str(folder)))
    evaluator.check()
    return evaluator


def unwrapped(text: str) -> str:
    """Lines of a terminal of any width, without what the width adds."""
    return "".join(text.split())


def session() -> Session:
    """A tiny model with its tokenizer."""
    return Session(make_model(), make_tokenizer())


def test_only_a_run_runs_the_code(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the check; and the line that names the file comes before."""
    evaluator = check(folder)
    assert not (tmp_path / "marker").exists()
    assert capsys.readouterr().err == ""
    evaluator.load()
    assert (tmp_path / "marker").exists()
    said = unwrapped(capsys.readouterr().err)
    assert said == unwrapped(f"lm_eval: running the task code of {folder}/data.py")
    assert [one.name for one in evaluator.measure(session())] == ["mine acc"]


@pytest.mark.process
def test_the_commands_keep_to_it(folder: Path, tmp_path: Path) -> None:
    """`validate` and `plan` run no task code, `run` does and says so."""
    make_checkpoint(tmp_path / "m")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"version: 1\nmodel: {{id: {tmp_path / 'm'}, device: cpu}}\n"
        "stages: [{prune: deepest, target: {layers_removed: 1}}]\n"
        f"evaluate:\n  - lm_eval: {{tasks: [mine], include_path: {folder}}}\n"
        f"output: {tmp_path / 'out'}\n"
    )

    for name in ("validate", "plan"):
        done = command(name, str(recipe))
        assert done.returncode == 0, done.stderr
        assert "task code" not in done.stderr
        assert not (tmp_path / "marker").exists()
    done = subprocess.run(
        [sys.executable, "-m", "slm_plugin", "run", str(recipe)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "marker").exists()
    line = unwrapped(f"lm_eval: running the task code of {folder}/data.py")
    assert unwrapped(done.stderr).startswith(f"{line}load")


WRONG: dict[str, tuple[dict[str, str | None], str]] = {
    "no such file": ({"process_docs": "!function other.f"}, "there is no other.py beside it"),
    "no such function": ({"process_docs": "!function data.lod"}, "data.py defines no such name"),
    "no module": ({"process_docs": "!function load"}, "has no module"),
    "a list for a name": ({"process_docs": "!function [a]"}, "takes one name"),
    "a far file": ({"process_docs": "!function /etc/evil.f"}, "no /etc/evil.py beside it"),
    "deep inside": ({"metric_list": "[{metric: !function data.no}]"}, "defines no such name"),
    "an object": ({"process_docs": "!!python/object/apply:os.system [ls]"}, "could not determine"),
    "a name of Python": ({"process_docs": "!!python/name:os.system"}, "could not determine"),
    "an unknown tag": ({"process_docs": "!thing x"}, "could not determine"),
    "digits": ({"repeats": "9" * 5000}, "digits"),
    "a missing include": ({"include": "base.yaml"}, "which is no file"),
    "an include of another kind": ({"include": "[3]"}, "include names files"),
    "itself": ({"include": "mine.yaml"}, "includes itself"),
    "data that are no code": ({"custom_dataset": "data.load"}, "custom_dataset has to name code"),
    "a class that is none": ({"class": "Task"}, "class has to name code"),
    "remote code": ({"dataset_kwargs": "{trust_remote_code: true}"}, "trust_remote_code"),
    "a script": ({"dataset_path": "my/script.py"}, "loading script"),
    "pickles": ({"dataset_path": "pandas"}, "pickles"),
    "no folder": ({"dataset_path": "/no/such/data"}, "does not exist"),
    "no data file": (
        {"dataset_path": "json", "dataset_kwargs": "{data_files: {test: no.jsonl}}"},
        "the data file no.jsonl does not exist",
    ),
    "none of a list": (
        {"dataset_path": "csv", "dataset_kwargs": "{data_files: [https://x/y.csv, no.csv]}"},
        "the data file no.csv does not exist",
    ),
    "a metric of the Hub": (
        {"metric_list": "[{metric: acc, hf_evaluate: true}]"},
        "no metric 'acc' of its own",
    ),
    "an unknown metric": ({"metric_list": "[{metric: rouge}]"}, "no metric 'rouge' of its own"),
    "programs of the model": ({"unsafe_code": "true"}, "marked unsafe_code"),
}


@pytest.mark.parametrize("case", sorted(WRONG))
def test_what_is_wrong_is_told_and_nothing_is_run(
    folder: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One message that names the file, when the recipe is read."""
    monkeypatch.chdir(tmp_path)
    changes, expected = WRONG[case]
    write(folder, **changes)
    with pytest.raises(UserError) as caught:
        check(folder)
    assert expected in str(caught.value)
    assert "mine.yaml" in str(caught.value)
    assert not (tmp_path / "marker").exists()


RIGHT: dict[str, dict[str, str | None]] = {
    "an installed module": {"process_docs": "!function json.loads"},
    "one of lm-eval's": {"process_docs": "!function lm_eval.tasks.hellaswag.utils.process_docs"},
    "a built-in module": {"process_docs": "!function builtins.list"},
    "a class": {"class": "!function data.Task"},
    "a metric of its own": {"metric_list": "[{metric: !function data.choose}]"},
    "figures of its own": {
        "metric_list": "[{metric: anything}]",
        "process_results": "!function data.choose",
    },
    "no remote code": {"dataset_kwargs": "{trust_remote_code: false}"},
    "fetched files": {
        "custom_dataset": None,
        "dataset_path": "json",
        "dataset_kwargs": "{data_files: {test: 'https://x/y.jsonl', train: 'hf://a/b*'}}",
    },
    "a data set of the Hub": {"custom_dataset": None, "dataset_path": "allenai/ai2_arc"},
}


@pytest.mark.parametrize("case", sorted(RIGHT))
def test_what_may_be_right_is_let_through(folder: Path, tmp_path: Path, case: str) -> None:
    """And not run either; of installed packages not even the folder is imported."""
    write(folder, **RIGHT[case])
    check(folder)
    assert not (tmp_path / "marker").exists()
    assert "lm_eval.tasks.hellaswag.utils" not in sys.modules


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def load(:", "is no Python"),
        ("\0", "is no Python"),
        ("(" * 5000, "is no Python"),
        ("from datasets import load_dataset as other", "defines no such name"),
        ("def outer():\n    load = 1", "defines no such name"),
    ],
)
def test_code_is_read_and_not_run(folder: Path, code: str, expected: str) -> None:
    """A file that cannot be Python, or that has the name only inside of something."""
    (folder / "data.py").write_text(code)
    with pytest.raises(UserError, match=expected):
        check(folder)


@pytest.mark.parametrize(
    "code",
    [
        "from x import load",
        "from x import *",
        "import x.y as load",
        "load = 1",
        "a, (load, b) = 1, (2, 3)",
        "if True:\n    try:\n        def load(): ...\n    except Exception: ...",
        "load: int = 1",
        "def __getattr__(name): ...",
        "async def load(): ...",
    ],
)
def test_a_name_is_found_however_it_is_made(folder: Path, code: str) -> None:
    """By definition, assignment or import, also inside of a condition."""
    (folder / "data.py").write_text(code)
    check(folder)


def test_an_include_may_not_leave_the_folder(folder: Path, tmp_path: Path) -> None:
    """The remedy is a folder that holds both; then it is read."""
    write(tmp_path, "base.yaml", task=None, custom_dataset=None)
    sub = folder / "sub"
    sub.mkdir()
    write(sub, task="inner", include="../mine.yaml", custom_dataset=None)
    check(folder, "inner")
    write(folder, include="../base.yaml")
    with pytest.raises(UserError, match=r"base\.yaml, which lies outside of .* holds both"):
        check(folder)
    check(tmp_path)


def test_an_included_function_counts(folder: Path, tmp_path: Path) -> None:
    """What an included file names is checked, and announced, as if it stood here."""
    write(folder, "base.yaml", task=None, process_docs="!function data.lod")
    write(folder, include="base.yaml", custom_dataset=None)
    with pytest.raises(UserError, match="names the function data"):
        check(folder)
    config = read_task_file(folder / "mine.yaml", folder)
    assert config["custom_dataset"].name == "data.load"


def test_code_outside_of_the_folder_is_not_run(folder: Path, tmp_path: Path) -> None:
    """Through a link that leads out of it."""
    (tmp_path / "far.py").write_text("def load(): ...")
    (folder / "data.py").unlink()
    (folder / "data.py").symlink_to(tmp_path / "far.py")
    with pytest.raises(UserError, match=r"far\.py lies outside of"):
        check(folder)


def test_aliases_do_not_multiply(folder: Path) -> None:
    """A file of one kilobyte that stands for a billion values is read at once."""
    bomb = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    bomb += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    file = write(folder)
    file.write_text(file.read_text() + "metadata:\n  " + "\n  ".join(bomb) + "\n")
    check(folder)


def test_a_file_that_the_index_leaves_out_is_named(folder: Path) -> None:
    """lm-eval skips it without a word; an unknown name may stand in it."""
    (folder / "broken.yaml").write_text("task: other\nx: !!python/object/apply:os.system [ls]\n")
    check(folder)
    with pytest.raises(UserError, match=r"no task, group or tag 'other'; .*broken\.yaml, line 2"):
        check(folder, "other")


GROUPS = {
    "[mine, nowhere]": "names 'nowhere', which is no task",
    "[7]": "has a member '7'",
    "[{alias: x}]": "has a member",
    "[all]": "includes itself",
    "[{group: all}]": "includes itself",
}


@pytest.mark.parametrize("members", sorted(GROUPS))
def test_groups_are_checked_to_the_bottom(folder: Path, members: str) -> None:
    """Members that are unknown, no names, or the group itself."""
    (folder / "all.yaml").write_text(f"group: all\ntask: {members}\n")
    with pytest.raises(UserError, match=GROUPS[members].replace("'", ".")):
        check(folder, "all")


def test_a_function_of_a_group_is_checked(folder: Path) -> None:
    """A member with keys of its own brings code in, too."""
    member = "{task: mine, process_docs: !function data.no}"
    (folder / "all.yaml").write_text(f"group: all\ntask: [{member}]\n")
    with pytest.raises(UserError, match="names the function data"):
        check(folder, "all")


TEMPLATES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch MARKER').read() }}",
    "{{ context.__class__ }}",
)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_is_no_code(folder: Path, tmp_path: Path, template: str) -> None:
    """Jinja's way to all of Python is closed; the message names the task."""
    write(folder, doc_to_text=f'"{template.replace("MARKER", str(tmp_path / "touched"))}"')
    evaluator = check(folder)
    with pytest.raises(UserError, match=r"cannot load 'mine': .*unsafe"):
        evaluator.load()
    assert not (tmp_path / "touched").exists()


def test_lm_eval_is_left_as_it_was(folder: Path) -> None:
    """Its templates, and the way packages are found."""
    before = lm_eval.utils.env, list(sys.meta_path)
    evaluator = check(folder)
    evaluator.load()
    evaluator.measure(session())
    assert (lm_eval.utils.env, sys.meta_path) == before


def test_no_metric_is_fetched(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Task code that asks for one fails to load; a module of that name here is not imported."""
    (tmp_path / "evaluate.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "evaluate", raising=False)
    (folder / "data.py").write_text("import evaluate\ndef load(**_): ...")
    with pytest.raises(UserError, match="cannot load 'mine': the package evaluate runs code"):
        check(folder).load()


@pytest.mark.parametrize("error", ["SystemExit(0)", "GeneratorExit()", "ValueError('no')"])
def test_task_code_cannot_end_the_run(folder: Path, error: str) -> None:
    """Whatever it raises, when it is imported or while answers are worked out."""
    (folder / "data.py").write_text(f"raise {error}\ndef load(**_): ...")
    with pytest.raises(UserError, match="cannot load 'mine': "):
        check(folder).load()


def test_task_code_cannot_end_the_measurement(folder: Path) -> None:
    """An exit in the middle is an error of one line, too."""
    code = (folder / "data.py").read_text()
    (folder / "data.py").write_text(
        code + "\ndef process(doc, results):\n    raise SystemExit(0)\n"
    )
    write(folder, process_results="!function data.process")
    evaluator = check(folder)
    evaluator.load()
    with pytest.raises(UserError, match="cannot run these tasks: SystemExit: 0"):
        evaluator.measure(session())


def test_reading_a_recipe_tells_the_place(folder: Path, tmp_path: Path) -> None:
    """A wrong task file is one problem of the recipe, with its line."""
    write(folder, process_docs="!function data.lod")
    with pytest.raises(RecipeError, match=r"recipe:3:.*evaluate\.0.*defines no such name"):
        Recipe.parse(
            f"version: 1\nmodel: {{id: {tmp_path}}}\n"
            f"evaluate: [lm_eval: {{tasks: [mine], include_path: {folder}}}]\noutput: o\n"
        )
