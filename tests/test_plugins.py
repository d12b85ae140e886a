"""Distributions of somebody else's: what is wrong with one is one line, and harms nobody else."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from slm_plugin import registry
from slm_plugin.errors import SlmError, UserError
from slm_plugin.evaluation.base import Measurement
from slm_plugin.foreign import is_ours
from slm_plugin.inspection import components, doctor_report
from slm_plugin.pipeline import run
from slm_plugin.recipe import Recipe
from slm_plugin.recipe.schema import schema
from slm_plugin.registry import evaluators, exporters, installed, pruners, recoveries
from slm_plugin.registry.contract import Contract
from slm_plugin.session import Session
from tests.tiny import make_checkpoint, make_model

REGISTRIES = {"pruner": pruners, "evaluator": evaluators, "exporter": exporters}
GOOD = """
from typing import ClassVar
from pydantic import BaseModel, ConfigDict
from slm_plugin import Options, Pruner, PruningPlan
from slm_plugin.evaluation.base import Evaluator, EvaluatorOptions, Measurement
from slm_plugin.export.base import Exporter, ExportRecord
from slm_plugin.recovery.base import Recovery, RecoveryRecord

class Thing(Pruner):
    "Does nothing in particular."
    kind = "depth"
    targets = ("layers_removed",)
    needs_calibration = False
    def plan(self, session):
        raise RuntimeError("no plan")
"""
Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put distributions on the path; what they registered is forgotten afterwards."""
    before = {one: set(one._classes) for one in (*REGISTRIES.values(), recoveries)}
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    modules = set(sys.modules)

    def put(
        code: str,
        name: str = "thing",
        *,
        group: str = "pruners",
        dist: str = "other",
        cls: str = "",
    ) -> Path:
        module = f"plugin_of_{dist}"
        (site / f"{module}.py").write_text(GOOD + code)
        info = site / f"{dist}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\n")
        text = f"[slm_plugin.{group}]\n{name} = {module}:{cls or 'Thing'}\n"
        (info / "entry_points.txt").write_text(text)
        return site

    yield put
    for one, names in before.items():
        one._told.clear()
        for name in set(one._classes) - names:
            if not is_ours(one._classes[name]):
                del one._classes[name]
    for module in set(sys.modules) - modules:
        if module.startswith("plugin_of_"):
            del sys.modules[module]


def recipe(tmp_path: Path, stages: str = "[]", evaluate: str = "[]", export: str = "[]") -> Recipe:
    """A recipe on a tiny model."""
    if not (tmp_path / "m").exists():
        make_checkpoint(tmp_path / "m")
    return Recipe.parse(
        f"version: 1\nmodel: {{id: {tmp_path / 'm'}, device: cpu}}\nstages: {stages}\n"
        f"evaluate: {evaluate}\nexport: {export}\noutput: {tmp_path / 'out'}\n"
    )


USE = "[{prune: thing, target: {layers_removed: 1}}]"
# What the module does beside the good class, and what the one line says.
BROKEN = {
    "raise SystemExit(0)": "cannot be imported: SystemExit: 0",
    "raise SystemExit": "cannot be imported: SystemExit",
    "raise GeneratorExit('x')": "cannot be imported: GeneratorExit: x",
    "class Own(BaseException): ...\nraise Own('mine')": "cannot be imported: Own: mine",
    "import no_such_module": "cannot be imported: ModuleNotFoundError",
    "def (": "cannot be imported: SyntaxError",
    "raise ValueError('one\\ntwo')": "cannot be imported: ValueError: one",
    "class Bad(Exception):\n    def __str__(self): raise TypeError\nraise Bad": "imported: Bad",
    "from slm_plugin import SlmError\nraise SlmError('mine', hint='so')": "imported: mine",
    "class Zero(Exception):\n    exit_code = 0\nraise Zero": "cannot be imported: Zero",
    "raise MemoryError": "cannot be imported: MemoryError",
    "raise MemoryError('12 GB')": "cannot be imported: MemoryError: 12 GB",
    "raise RuntimeError('cannot allocate memory')": "imported: RuntimeError: cannot allocate",
    "raise RecursionError": "cannot be imported: RecursionError",
    "class Bad(Exception):\n    def __str__(self): raise SystemExit(0)\nraise Bad": "imported: Bad",
    "raise ValueError('\\x1b[31mred')": r"cannot be imported: ValueError: \x1b[31mred",
    "from slm_plugin import SlmError\nraise SlmError(None)": "cannot be imported: SlmError (update",
    "from slm_plugin import SlmError\nraise SlmError('')": "cannot be imported: SlmError",
    "from slm_plugin import SlmError\nraise SlmError('one\\ntwo\\x1b[2J')": r"one two\x1b[2J",
    "from slm_plugin import SlmError\nraise SlmError('a', hint=7)": "imported: SlmError: a",
    "from slm_plugin import SlmError\nclass E(SlmError):\n    exit_code = property(lambda s: 1/0)\n"
    "raise E('mine')": "cannot be imported: E: mine",
    "class O(Options):\n    @classmethod\n    def model_json_schema(cls, **k): raise MemoryError\n"
    "Thing.Options = O": "its Options cannot be shown: MemoryError",
    "del Thing": "cannot be imported: AttributeError",
    "Thing = 3": "it is an int, and no class",
    "Thing = Thing.plan": "it is a function, and no class",
    "class Thing: 'Doc.'": "Thing is no subclass of slm_plugin.pruners.base.Pruner",
    "Thing = Options": "Options is no subclass of",
    "from slm_plugin.pruners.depth.deepest import Deepest as Thing": "it is the pruner 'deepest'",
    "class Thing(Pruner):\n    'Doc.'": "Thing does not implement plan",
    "Thing.kind = 'height'": "its kind is 'height', and none of",
    "Thing.kind = None": "its kind is None",
    "Thing.targets = ()": "its targets are ()",
    "Thing.targets = ('weight',)": "its targets are ('weight',)",
    "Thing.targets = 7": "its targets are 7",
    "Thing.targets = ([],)": "cannot be looked at: TypeError",
    "Thing.Options = dict": "its Options are no subclass of pydantic",
    "Thing.Options = None": "its Options are no subclass of pydantic",
    "class O(BaseModel): ...\nThing.Options = O": "its Options take unknown keys",
    "class O(Options):\n    target: int = 1\nThing.Options = O": "its option 'target' is a key",
    "class O(Options):\n    model_config = ConfigDict(arbitrary_types_allowed=True)\n"
    "    x: type(len)\nThing.Options = O": "its Options cannot be shown",
    "Thing.extra = 3": "its extra is 3, and no name",
    "Thing.__doc__ = 3": "its docstring is no text",
    "class Meta(type(Pruner)):\n    def __setattr__(self, n, v):\n"
    "        if n == 'plan': raise SystemExit(0)\n"
    "class Thing(Thing, metaclass=Meta):\n    'Doc.'\n    def plan(self, session): ...":
        "cannot be looked at: SystemExit: 0",
}  # fmt: skip


@pytest.mark.parametrize("code", sorted(BROKEN))
def test_a_broken_plugin_is_one_line_and_harms_nobody_else(
    install: Install, tmp_path: Path, code: str
) -> None:
    """Who needs it is refused; lists and other recipes go on and tell of it."""
    install(code)
    rows = components()
    (row,) = [row for row in rows if row["name"] == "thing"]
    said = row["summary"]
    assert said.startswith("the pruner plugin 'thing' of other 1.0 ")
    assert BROKEN[code] in said
    assert "\n" not in said
    assert not row["ready"]
    assert any(row["name"] == "slm" and row["ready"] for row in rows)
    assert recipe(tmp_path, "[{prune: deepest, target: {layers_removed: 1}}]")
    with pytest.raises(UserError) as caught:
        recipe(tmp_path, USE)
    assert BROKEN[code] in str(caught.value)
    assert caught.value.exit_code == 2


# One that fails at its import, one that is no class, and those without a schema.
SOME_BROKEN = ["raise SystemExit(0)", "Thing = 3"]
SOME_BROKEN += [code for code, said in BROKEN.items() if "cannot be shown" in said]


@pytest.mark.parametrize("code", SOME_BROKEN)
def test_doctor_and_schema_do_not_stop_for_a_broken_plugin(
    install: Install, code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One tells of it, the other leaves it out with a warning."""
    install(code)
    (row,) = [row for row in components() if row["name"] == "thing"]
    assert row["summary"] in doctor_report()["problems"]
    assert '"thing"' not in json.dumps(schema())
    assert capsys.readouterr().err.replace("\n", "").count("warning: ") == 1


@pytest.mark.parametrize("name", ["a b", "../x", "1st", "a-b", "a.b", "x/y"])
def test_a_name_that_is_no_identifier_is_refused(install: Install, name: str) -> None:
    """It would be a file's name, and a place in a recipe."""
    install("", name=name)
    (fault,) = pruners.faults()
    assert fault.name == name
    assert "of other 1.0 has a name that no recipe can use" in fault.message
    with pytest.raises(UserError):
        pruners.get(name)


def test_a_name_that_means_something_else_is_refused(install: Install) -> None:
    """In a comparison `none` is no recovery."""
    code = "class Thing(Recovery):\n    'Doc.'\n    def recover(self, session): ..."
    install(code, name="none", group="recoveries")
    (fault,) = recoveries.faults()
    assert "a name that no recipe can use" in fault.message


def test_two_distributions_of_one_name_are_both_named(install: Install, tmp_path: Path) -> None:
    """Neither is taken; others go on."""
    install("", dist="first")
    install("", dist="second")
    expected = "the pruner plugin 'thing' is offered by first 1.0 and by second 1.0"
    (said,) = (row["summary"] for row in components() if row["name"] == "thing")
    assert said.startswith(expected)
    with pytest.raises(UserError, match=expected):
        recipe(tmp_path, USE)
    assert recipe(tmp_path)


def test_a_plugin_cannot_take_a_built_in_name(
    install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The built-in one is used, and it is said each time somebody may mean the other."""
    install("", name="deepest")
    said = "the pruner plugin 'deepest' of other 1.0 is ignored: the name is that of a built-in one"
    assert pruners.get("deepest").__module__ == "slm_plugin.pruners.depth.deepest"
    found = [row for row in components() if row["name"] == "deepest"]
    assert [row["ready"] for row in found] == [True, False]
    assert found[1]["summary"] == said
    assert said in doctor_report()["problems"]
    assert "warning" not in capsys.readouterr().err
    stage = "{prune: deepest, target: {layers_removed: 1}}"
    recipe(tmp_path, f"[{stage}, {stage}]")
    # transformers 5 draws a bar there while the fixture saves its model.
    assert " ".join(capsys.readouterr().err.split()).count(f"warning: {said}") == 1


def test_a_plugin_without_docstring_works(install: Install, tmp_path: Path) -> None:
    """Its row is empty, and doctor tells of it."""
    install("Thing.__doc__ = None")
    said = "the pruner plugin 'thing' of other 1.0 has no docstring that says what it does"
    first, second = [row for row in components() if row["name"] == "thing"]
    assert (first["summary"], first["ready"]) == ("", True)
    assert second["summary"] == said
    assert said in doctor_report()["problems"]
    assert '"thing"' in json.dumps(schema())
    assert recipe(tmp_path, USE)


CALLS = {
    "raise RuntimeError('no plan')": "failed in plan: RuntimeError: no plan",
    "raise SystemExit(0)": "failed in plan: SystemExit: 0",
    "from slm_plugin import SlmError; e = SlmError('hi'); e.exit_code = 0; raise e": (
        "failed in plan: SlmError: hi"
    ),
    "raise SlmError(None)": "failed in plan: SlmError (",
    "raise SlmError(b'x', hint=3)": "failed in plan: SlmError: b'x'",
    "raise RuntimeError('\\x1b]0;title\\x07')": r"failed in plan: RuntimeError: \x1b]0;title\x07",
    "raise OSError(28, 'full')": "failed in plan: OSError: [Errno 28] full",
    "return None": "gave back a NoneType, not PruningPlan",
    "return {}": "gave back a dict, not PruningPlan",
    "class Zero(SlmError):\n            exit_code = 0\n        raise Zero('fine')":
        "failed in plan: Zero: fine",
}  # fmt: skip


@pytest.mark.parametrize("code", sorted(CALLS))
def test_what_planning_raises_is_one_line(install: Install, tmp_path: Path, code: str) -> None:
    """The run ends with code 1, and nothing is at the output's place."""
    install(
        "from slm_plugin import SlmError\nclass Thing(Thing):\n    'Doc.'\n"
        f"    def plan(self, session):\n        {code}\n"
    )
    with pytest.raises(SlmError) as caught:
        run(recipe(tmp_path, USE))
    assert caught.value.exit_code == 1
    assert f"the pruner plugin 'thing' of other 1.0 {CALLS[code]}" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_error_of_several_lines_is_told_in_one(install: Install, tmp_path: Path) -> None:
    """Its class and its exit code stay; what a terminal would obey is written out."""
    install(
        "from slm_plugin.errors import TargetError\nclass Thing(Thing):\n    'Doc.'\n"
        "    def plan(self, s): raise TargetError('a\\nb\\x1b[2J', hint='c\\rd')\n"
    )
    with pytest.raises(UserError) as caught:
        run(recipe(tmp_path, USE))
    assert str(caught.value) == r"a b\x1b[2J (c d)"


# What stands in a class where a function should, and what planning then gives.
ODD = {
    "plan = staticmethod(lambda session: 1 / 0)": "failed in plan: ZeroDivisionError",
    "plan = classmethod(lambda cls, session: 1 / 0)": "failed in plan: ZeroDivisionError",
    "plan = functools.partialmethod(lambda self, x, s: 1 / 0, 3)": "in plan: ZeroDivisionError",
    "plan = functools.partial(lambda s: 1 / 0)": "failed in plan: ZeroDivisionError",
    "plan = property(lambda self: 1 / 0)": "failed in plan: ZeroDivisionError",
    "plan = None": "failed in plan: TypeError",
    "needs_calibration = functools.cached_property(lambda self: 1 / 0)": "calibration: Zero",
}


@pytest.mark.parametrize("code", sorted(ODD))
def test_whatever_stands_for_a_method_is_guarded(
    install: Install, tmp_path: Path, code: str
) -> None:
    """Not only plain functions."""
    install(f"import functools\nclass Thing(Thing):\n    'Doc.'\n    {code}\n")
    with pytest.raises(SlmError, match=rf"of other 1\.0 .*{ODD[code]}"):
        run(recipe(tmp_path, USE))


def test_what_a_plugin_does_to_the_process_is_undone(
    install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At its import and in every call; relative paths of a recipe mean what they meant."""
    deed = "import os, signal, sys; os.chdir('/'); sys.stdin = None"
    install(
        f"{deed}\nclass Thing(Thing):\n    'Doc.'\n    def __init__(self, *a):\n        {deed}\n"
        "        signal.signal(signal.SIGTERM, signal.SIG_IGN)\n        super().__init__(*a)"
    )
    before = (Path.cwd(), sys.stdin, signal.getsignal(signal.SIGTERM))
    pruners.get("thing")
    said = "warning: the pruner plugin 'thing' of other 1.0 left changed, and it was put back: "
    assert f"{said}working directory, standard input\n" in capsys.readouterr().err
    recipe(tmp_path, USE)
    told = f"{said}working directory, standard input, handler of SIGTERM\n"
    assert told in capsys.readouterr().err
    assert before == (Path.cwd(), sys.stdin, signal.getsignal(signal.SIGTERM))


def test_a_constructor_that_fails_is_one_line(install: Install, tmp_path: Path) -> None:
    """And so is a property that the recipe is checked by."""
    install("class Thing(Thing):\n    'Doc.'\n    def __init__(self, *a): raise SystemExit(0)")
    with pytest.raises(SlmError, match=r"of other 1\.0 failed in init: SystemExit"):
        recipe(tmp_path, USE)


def test_a_constructor_that_forgets_its_base_is_one_line(install: Install, tmp_path: Path) -> None:
    """Recipes are checked by what the base class keeps."""
    install("class Thing(Thing):\n    'Doc.'\n    def __init__(self, options, target): pass")
    with pytest.raises(SlmError, match="failed in init: AttributeError: it sets no `options`"):
        recipe(tmp_path, USE)


def test_a_property_that_fails_is_one_line(install: Install, tmp_path: Path) -> None:
    """The recipe is checked by whether calibration is needed."""
    install("class Thing(Thing):\n    'Doc.'\n    needs_calibration = property(lambda self: 1 / 0)")
    with pytest.raises(SlmError, match="failed in needs_calibration: ZeroDivisionError"):
        recipe(tmp_path, USE)


def test_options_that_raise_are_a_problem_of_the_recipe(install: Install, tmp_path: Path) -> None:
    """A validator may raise what pydantic does not expect."""
    install(
        "from pydantic import field_validator\nclass O(Options):\n    x: int = 1\n"
        "    @field_validator('x')\n    @classmethod\n    def check(cls, v): raise SystemExit(0)\n"
        "Thing.Options = O"
    )
    with pytest.raises(UserError, match=r"plugin_of_other\.O failed: SystemExit: 0"):
        recipe(tmp_path, "[{prune: thing, target: {layers_removed: 1}, x: 2}]")


EVALUATOR = "class Thing(Evaluator):\n    'Doc.'\n    def {name}(self, *a): {code}\n"


@pytest.mark.parametrize("name", ["check", "load", "check_model", "measure"])
def test_every_call_of_an_evaluator_is_guarded(install: Install, tmp_path: Path, name: str) -> None:
    """From reading the recipe to measuring."""
    code = EVALUATOR.format(name=name, code="raise SystemExit(0)")
    code += "" if name == "measure" else "    def measure(self, session): return []\n"
    install(code, group="evaluators")
    with pytest.raises(SlmError, match=rf"evaluator plugin .* failed in {name}: SystemExit: 0"):
        run(recipe(tmp_path, evaluate="[thing]"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("own", [True, False])
def test_the_former_name_of_a_method_is_reported(install: Install, own: bool) -> None:
    """An evaluator that checks models in `fit` is told the new name; one with both is fine."""
    code = EVALUATOR.format(name="measure", code="return []") + "    def fit(self, session): pass\n"
    code += "    def check_model(self, session): pass\n" * own
    install(code, group="evaluators")
    if own:
        assert evaluators.get("thing").name == "thing"
        return
    with pytest.raises(UserError, match=r"Thing\.fit is not called any more; name it check_model"):
        evaluators.get("thing")


@pytest.mark.parametrize("code", ["None", "3", "[3]", "'ab'", "[None]", "{}"])
def test_measurements_have_to_be_some(install: Install, code: str) -> None:
    """A list of anything else is the plugin's fault, not the report's."""
    install(EVALUATOR.format(name="measure", code=f"return {code}"), group="evaluators")
    cls = evaluators.get("thing")
    with pytest.raises(SlmError, match=r"not (a list of )?Measurement"):
        Session(make_model()).measure(cls(cls.Options()))


def test_a_tuple_of_measurements_is_as_good_as_a_list(install: Install) -> None:
    """Nobody is refused for a detail."""
    made = "(Measurement(name='n', value=1, protocol='p', better='lower'),)"
    install(EVALUATOR.format(name="measure", code=f"return {made}"), group="evaluators")
    cls = evaluators.get("thing")
    (found,) = Session(make_model()).measure(cls(cls.Options()))
    assert isinstance(found, Measurement)


def test_an_exporter_and_a_recovery_are_guarded(install: Install, tmp_path: Path) -> None:
    """Their calls as those of all others."""
    install("class Thing(Exporter):\n    'Doc.'\n    def export(self, s, o): return 1",
            group="exporters")  # fmt: skip
    install("class Thing(Recovery):\n    'Doc.'\n    needs_calibration = False\n"
            "    def recover(self, s): raise SystemExit(0)",
            name="mend", group="recoveries", dist="more")  # fmt: skip
    with pytest.raises(SlmError, match="gave back an int, not ExportRecord"):
        run(recipe(tmp_path, export="[thing]"))
    with pytest.raises(SlmError, match=r"recovery plugin 'mend' of more 1\.0 failed in recover"):
        run(recipe(tmp_path, "[{recover: mend}]"))


def test_an_interruption_and_the_end_of_memory_pass(install: Install) -> None:
    """They are nobody's fault, and the command line has words of its own for them."""
    install("class Thing(Thing):\n    'Doc.'\n    def plan(self, s): raise s")
    cls = pruners.get("thing")
    one = cls(cls.Options(), None)  # type: ignore[arg-type]
    for error in (KeyboardInterrupt(), MemoryError(), torch.OutOfMemoryError("x")):
        with pytest.raises(type(error)):
            one.plan(error)  # type: ignore[arg-type]


def test_what_a_plugin_prints_is_no_result(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    """`list --json` stays JSON."""
    install("print('hello')")
    components()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "hello" in captured.err


def test_damaged_metadata_of_anybody_are_told(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A distribution whose entry points no reader understands hides no other one's."""
    site = install("")
    info = site / "broken-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 2.0\n")
    (info / "entry_points.txt").write_bytes(b"[slm_plugin.pruners]\nx = \xff\xfe\n")
    assert "thing" in pruners.names()
    assert [said for said in installed.broken_metadata() if "broken" in said]
    assert any("broken" in problem for problem in doctor_report()["problems"])


def test_what_is_installed_meanwhile_is_found(install: Install) -> None:
    """In a notebook, say: what distributions offer is read again when one was added."""
    site = install("")
    os.utime(site, ns=(0, 0))
    before = installed.points("slm_plugin.pruners")
    assert installed.points("slm_plugin.pruners") == before
    info = site / "later-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: later\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[slm_plugin.pruners]\nlater = elsewhere:Thing\n")
    assert {p.name for p in installed.points("slm_plugin.pruners")} - {p.name for p in before} == {
        "later"
    }


ENDS = {
    "raise SystemExit(0)": "SystemExit: 0",
    "raise KeyboardInterrupt": "KeyboardInterrupt",
    "class Mine(KeyboardInterrupt): ...\nraise Mine('now')": "Mine: now",
    "from slm_plugin.interruption import Interrupted\nraise Interrupted(2)": "Interrupted: ",
    "raise MemoryError": "MemoryError",
    "import sys; sys.stdout.close(); sys.stderr.close(); raise SystemExit(0)": "SystemExit: 0",
}


def command_line(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with the distributions of a folder."""
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "slm_plugin", *arguments],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.process
@pytest.mark.parametrize(
    ("code", "command"),
    [
        *(("raise SystemExit(0)", command) for command in ("schema", "doctor", "validate")),
        *(("raise KeyboardInterrupt", command) for command in ("schema", "doctor", "validate")),
        *((code, "list") for code in sorted(ENDS)),
    ],
)
def test_no_command_ends_because_a_plugin_ended_it(
    install: Install, tmp_path: Path, code: str, command: str
) -> None:
    """Whatever it raises at import: everybody gets what was asked for, and the line."""
    site = install(code)
    arguments = [command]
    if command == "validate":
        make_checkpoint(tmp_path / "m")
        (tmp_path / "r.yaml").write_text(
            f"version: 1\nmodel: {{id: {tmp_path / 'm'}}}\nstages: {USE}\noutput: o\n"
        )
        arguments.append(str(tmp_path / "r.yaml"))
    done = command_line(site, *arguments)
    said = " ".join((done.stdout + done.stderr).split())
    assert ENDS[code] in said
    assert "Traceback" not in said
    assert done.returncode == {"list": 0, "schema": 0, "doctor": 1, "validate": 2}[command]
    assert command == "validate" or done.stdout


def test_a_signal_at_the_import_of_a_plugin_still_interrupts(install: Install) -> None:
    """Unlike what it raises by itself."""
    site = install("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    done = command_line(site, "list")
    assert done.returncode == 130
    assert "plugin" not in done.stderr


def test_a_decorated_class_is_held_to_the_same(tmp_path: Path) -> None:
    """A class that a script registers by itself has no distribution; the line names the rest."""
    with pytest.raises(UserError, match=r"the pruner 'mine' cannot be used: .*no subclass"):
        registry.register_pruner("mine")(type("Mine", (), {"__module__": "script"}))
    with pytest.raises(UserError, match="a name that no recipe can use"):
        registry.register_pruner("my own")(type("Mine", (), {"__module__": "script"}))
    with contextlib.suppress(KeyError):
        del pruners._classes["mine"]


def test_the_contract_names_what_exists() -> None:
    """Every method and class that a contract speaks of is there under that name."""
    for one in (*REGISTRIES.values(), recoveries):
        contract = one._contract
        assert isinstance(contract, Contract)
        for name in contract.calls:
            assert hasattr(registry_base(contract), name)


def registry_base(contract: Contract) -> type:
    """The base class of a contract."""
    from importlib import import_module

    module, _, name = contract.base.partition(":")
    found: type = getattr(import_module(module), name)
    return found
