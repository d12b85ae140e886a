"""A comparison from beginning to end, on tiny models and through the public interface."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slm_plugin import cli
from slm_plugin.cache import Store
from slm_plugin.cli import writing
from slm_plugin.comparison.configuration import Comparison
from slm_plugin.comparison.record import Cell, ComparisonReport
from slm_plugin.comparison.run import compare
from slm_plugin.errors import NumericalError, OutputError, TargetError, UserError
from slm_plugin.evaluation.perplexity import Perplexity, PerplexityOptions
from slm_plugin.models.loading import ModelSource, load
from slm_plugin.outputs.marker import MARKER
from slm_plugin.plans import PruningPlan
from slm_plugin.pruners.base import Pruner
from slm_plugin.pruners.depth.block_influence import BlockInfluence
from slm_plugin.pruners.depth.deepest import Deepest
from slm_plugin.recovery.closed_form.rescale import Rescale
from slm_plugin.session import Session
from slm_plugin.target import Target
from tests.tiny import make_checkpoint

# Where the search, which takes longest, shows nothing more.
TWO = "methods=[{prune: block_influence}, {prune: deepest}]"
pytestmark = pytest.mark.usefixtures("no_matplotlib")


@pytest.fixture
def file(tmp_path: Path, tokens: Path) -> Path:
    """Three methods at two targets on a tiny Llama of six layers."""
    make_checkpoint(tmp_path / "model")
    text = tmp_path / "text.txt"
    lines = (" ".join(f"w{3 + (7 * i + j) % 125}" for j in range(40)) for i in range(4))
    text.write_text("\n".join(lines))
    path = tmp_path / "contest.yaml"
    path.write_text(
        f"""\
version: 1
model: {{id: {tmp_path / "model"}, dtype: float32, device: cpu}}
calibration: {{source: {tokens}}}
methods:
  - {{prune: block_influence}}
  - {{prune: deepest, label: "<b>top</b> | _x_"}}
  - {{prune: slm, criterion: loss, search: greedy}}
targets: [{{layers_removed: 1}}, {{layers_removed: 2}}]
evaluate:
  - perplexity: {{source: {text}, length: 16}}
output: {tmp_path / "out"}
"""
    )
    return path


@pytest.fixture(autouse=True)
def no_collecting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collecting garbage and drawing, tested elsewhere, would take most of the time here."""
    monkeypatch.setattr("gc.collect", lambda: 0)
    monkeypatch.setattr("slm_plugin.comparison.page.pareto_pictures", lambda *_: [])


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the name and target of every plan that is made."""
    made: list[str] = []

    def counted(plan: Callable[[Any, Session], PruningPlan]) -> Any:
        def one(self: Pruner, session: Session) -> PruningPlan:
            made.append(f"{self.name} {self.target.layers_removed}")
            return plan(self, session)

        return one

    for strategy in (BlockInfluence, Deepest):
        monkeypatch.setattr(strategy, "plan", counted(strategy.plan))
    return made


def ask(file: Path, *overrides: str, **options: Any) -> ComparisonReport:
    """Run a comparison with overrides, over what an earlier one wrote."""
    return compare(Comparison.read(file, overrides), overwrite=True, **options)


def figures(report: ComparisonReport) -> dict[tuple[str, int], float]:
    """The perplexity of every cell, by label and layers removed."""
    return {
        (cell.label, cell.target.layers_removed or 0 if cell.target else 0): cell.measured[
            "perplexity"
        ][0].value
        for cell in report.cells
    }


def by_hand(file: Path, strategy: type[Pruner] | None, removed: int) -> float:
    """The perplexity of one method without any comparison."""
    model, tokenizer = load(
        ModelSource(id=str(file.parent / "model"), dtype="float32", device="cpu")
    )
    read = Comparison.read(file)
    from slm_plugin.calibration.samples import draw

    assert read.calibration is not None
    session = Session(model, tokenizer, draw(read.calibration, model, tokenizer, read.seed))
    if strategy is not None:
        pruner = strategy(strategy.Options(), Target(layers_removed=removed))
        session.apply(session.plan(pruner))
    options = PerplexityOptions(source=str(file.parent / "text.txt"), length=16)
    return session.measure(Perplexity(options))[0].value


def test_every_cell_is_there_and_is_what_the_method_alone_gives(file: Path) -> None:
    """The dense model, then target by target; figures, layers and parameters are the model's."""
    report = compare(file)
    found = [(cell.label, cell.target and cell.target.layers_removed) for cell in report.cells]
    labels = ["block_influence", "<b>top</b> | _x_", "slm (criterion: loss, search: greedy)"]
    assert found == [("dense", None), *((label, n) for n in (1, 2) for label in labels)]
    assert not any(cell.error for cell in report.cells)
    layers = [cell.after.layers for cell in report.cells if cell.after]
    assert layers == [6, 5, 5, 5, 4, 4, 4]
    measured = figures(report)
    assert measured["dense", 0] == by_hand(file, None, 0)
    assert measured["block_influence", 2] == by_hand(file, BlockInfluence, 2)
    assert measured["<b>top</b> | _x_", 1] == by_hand(file, Deepest, 1)
    assert all(cell.seconds and cell.seconds > 0 for cell in report.cells[1:])


def test_files_hold_every_row(file: Path, tmp_path: Path) -> None:
    """JSON reads back, the table of page and Markdown is whole, and no label is markup."""
    report = compare(file)
    out = tmp_path / "out"
    names = [MARKER, "comparison.html", "comparison.json", "comparison.md"]
    assert sorted(path.name for path in out.iterdir()) == names
    text = (out / "comparison.json").read_text(encoding="utf-8")
    assert ComparisonReport.model_validate_json(text) == report
    table = (out / "comparison.md").read_text(encoding="utf-8")
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(report.cells)
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    assert "<b>" not in table
    page = (out / "comparison.html").read_text(encoding="utf-8")
    assert "<b>" not in page and page.count("<th scope=row") == len(report.cells)


def test_no_cell_depends_on_those_before_it(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another order, or fewer methods, gives the same figures, also of the dense model."""
    first = figures(compare(file))
    read = Comparison.read(file)
    for order in ([2, 1, 0], [1]):
        monkeypatch.setenv("SLM_PLUGIN_CACHE", str(tmp_path / f"other-{len(order)}"))
        chosen = [dict(read.data["methods"][number]) for number in order]
        second = figures(ask(file, f"methods={chosen}"))
        assert len(second) == 1 + 2 * len(chosen)
        assert second == {key: first[key] for key in second}


def test_the_model_is_as_loaded_after_all_cells(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training and surgery work on copies: the loaded weights never change."""
    pytest.importorskip("peft")
    loaded: list[Any] = []

    def remembered(source: ModelSource, accept: Any) -> Any:
        loaded.append(load(source, accept))
        return loaded[-1]

    monkeypatch.setattr("slm_plugin.preparation.load", remembered)
    report = ask(file, TWO, "recover=[none, {recover: lora, epochs: 1}]")
    ((model, _),) = loaded
    assert Session(model).fingerprint() == report.fingerprint
    assert model.config.num_hidden_layers == len(model.model.layers) == 6


def test_recoveries_share_one_plan_and_are_rows_of_their_own(file: Path, plans: list[str]) -> None:
    """As pruned, and trained: different figures from one plan, the training timed too."""
    pytest.importorskip("peft")
    report = ask(
        file,
        "methods=[{prune: deepest}, {prune: block_influence, recover: [none]}]",
        "recover=[none, {recover: lora, epochs: 3, learning_rate: 0.01}]",
        "targets=[{layers_removed: 2}]",
    )
    assert plans == ["deepest 2", "block_influence 2"]
    _, bare, trained, _ = report.cells
    assert (bare.recovered, bare.recovering) == ("", None)
    assert trained.recovered == "lora (learning_rate: 0.01, epochs: 3)"
    assert trained.recovering is not None and trained.planning == bare.planning
    assert trained.measured != bare.measured


def test_a_killed_comparison_goes_on(
    file: Path, plans: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was finished is taken from disk, labels may change, and the result is the same."""
    with monkeypatch.context() as patched:
        written: list[object] = []
        store = Store.store

        def dying(self: Store, key: object, value: object) -> None:
            # Journals of trials are stores too.
            if isinstance(value, dict):
                if len(written) == 5:
                    raise KeyboardInterrupt
                written.append(key)
            store(self, key, value)

        patched.setattr(Store, "store", dying)
        with pytest.raises(KeyboardInterrupt):
            ask(file)
    # Dense, two plans, two cells; the third method was planned when the process died.
    assert plans == ["block_influence 1", "deepest 1"]
    assert not (file.parent / "out").exists()
    shown = ask(file, known=True)
    assert len(plans) == 2
    assert [bool(cell.measured) for cell in shown.cells] == [True] * 3 + [False] * 4
    assert [cell.error for cell in shown.cells] == [""] * 3 + ["not measured yet"] * 4
    whole = ask(file)
    assert shown.cells[:3] == whole.cells[:3]
    assert plans == ["block_influence 1", "deepest 1", "block_influence 2", "deepest 2"]
    again = ask(file, "methods.0.label=renamed")
    assert len(plans) == 4
    assert [cell.label for cell in again.cells].count("renamed") == 2
    nameless = {"label": ""}
    assert [cell.model_copy(update=nameless) for cell in again.cells] == [
        cell.model_copy(update=nameless) for cell in whole.cells
    ]


def test_fresh_does_all_again_and_seeds_count(file: Path, plans: list[str]) -> None:
    """--fresh ignores the cache; another seed or evaluator is another cell of the same plan."""
    ask(file, TWO)
    assert len(plans) == 4
    ask(file, TWO, "evaluate.0.perplexity.length=8")
    assert len(plans) == 4
    ask(file, TWO, fresh=True)
    assert len(plans) == 8
    ask(file, TWO, "seed=5")
    assert len(plans) == 12


def test_known_of_nothing_is_a_table_of_what_is_missing(file: Path, plans: list[str]) -> None:
    """Neither the dense model nor a method is measured; with --fresh the question has no sense."""
    report = ask(file, known=True)
    assert {cell.error for cell in report.cells} == {"not measured yet"} and plans == []
    assert "not measured yet" in (file.parent / "out" / "comparison.md").read_text()
    with pytest.raises(UserError, match="--fresh and --known exclude each other"):
        ask(file, known=True, fresh=True)


def test_a_search_that_knew_trials_says_so(file: Path) -> None:
    """The second target of a search goes on from the first: its time is a lower bound."""
    chosen = ("methods=[{prune: slm, criterion: loss, search: greedy}]",)
    _, one, two = ask(file, *chosen).cells
    assert one.planning and one.planning.known_trials == 0
    assert two.planning and two.planning.known_trials > 0
    _, one, two = ask(file, *chosen, fresh=True).cells
    assert one.planning and two.planning
    assert one.planning.known_trials == two.planning.known_trials == 0


def test_a_failing_method_is_a_row(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says why in one line, the others go on, and the next start tries it again."""

    def fail(_self: Pruner, _session: Session) -> PruningPlan:
        raise NumericalError("the score of layer 3 is NaN", hint="load it in\nfloat32")

    with monkeypatch.context() as patched:
        patched.setattr(Deepest, "plan", fail)
        report = ask(file, TWO)
    failed = [cell for cell in report.cells if cell.error]
    assert [cell.method for cell in failed] == ["deepest", "deepest"]
    assert failed[0].error == "the score of layer 3 is NaN (load it in float32)"
    assert (failed[0].after, failed[0].measured) == (None, {})
    assert sum("perplexity" in cell.measured for cell in report.cells) == 3
    page = (file.parent / "out" / "comparison.html").read_text(encoding="utf-8")
    assert failed[0].error in page
    assert not any(cell.error for cell in ask(file, TWO).cells)


@pytest.mark.parametrize("fails", [False, True])
def test_a_strategy_that_changes_the_model_ends_the_comparison(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fails: bool
) -> None:
    """All other rows would use that model; finished cells stay cached for the next run."""
    plan = Deepest.plan

    def prune_at_once(self: Deepest, session: Session) -> PruningPlan:
        made = plan(self, session)
        session.model.model.layers[0].mlp.up_proj.weight.data.mul_(2)
        if fails:
            raise NumericalError("no")
        return made

    expected = figures(ask(file, TWO))
    with monkeypatch.context() as patched:
        patched.setattr(Deepest, "plan", prune_at_once)
        assert call(patched, "compare", file, "--overwrite", "--fresh", "--set", TWO) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "'deepest' changed the model" in said and "while planning" in said
    assert figures(ask(file, TWO)) == expected


def test_what_a_recovery_must_not_do_is_a_row(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a copy of its own, of the calibration set too: the others are as without it."""

    def hook_and_edit(_self: Rescale, session: Session) -> None:
        session.model.model.norm.register_forward_hook(lambda *_: None)
        session.calibration[0, 0] += 1  # type: ignore[index]

    expected = figures(ask(file, "methods=[{prune: block_influence}]"))
    monkeypatch.setattr(Rescale, "recover", hook_and_edit)
    repaired = "{prune: deepest, recover: [none, {recover: rescale}]}"
    cells = ask(file, f"methods=[{repaired}, {{prune: block_influence}}]", fresh=True).cells
    errors = [cell.error for cell in cells]
    assert [bool(error) for error in errors] == [False, False, True, False, False, True, False]
    assert "'rescale' " in str(errors[2])
    for cell in cells:
        if cell.method == "block_influence" and cell.target is not None:
            removed = cell.target.layers_removed or 0
            assert cell.measured["perplexity"][0].value == expected[cell.label, removed]


def test_a_full_disk_is_no_row(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no method is at fault for ends the comparison."""

    def full(_self: Pruner, _session: Session) -> PruningPlan:
        raise OutputError("cannot write the journal")

    monkeypatch.setattr(Deepest, "plan", full)
    with pytest.raises(OutputError):
        ask(file)


def test_targets_out_of_reach_are_told_together_before_any_work(
    file: Path, plans: list[str]
) -> None:
    """A line for every method and target; nothing is planned or written."""
    with pytest.raises(TargetError) as caught:
        ask(file, "targets=[{layers_removed: 1}, {ratio: 0.97}, {ratio: 0.99}]")
    told = caught.value.message.splitlines()
    assert len(told) == 6
    assert told[0].startswith("methods.0 (block_influence), targets.1: the target (97.0% of")
    assert plans == [] and not (file.parent / "out").exists()


def test_layerwise_models_compare_too(file: Path) -> None:
    """Streamed layers give the figures of the whole model."""
    chosen = "methods=[{prune: block_influence}]"
    whole = figures(ask(file, chosen))
    assert figures(ask(file, chosen, "model.memory=layerwise", fresh=True)) == pytest.approx(whole)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command line here; its exit code."""
    monkeypatch.setattr(sys, "argv", ["slm-plugin", *map(str, arguments)])
    monkeypatch.setattr(writing, "quiet_libraries", lambda: None)
    with pytest.raises(SystemExit) as exited:
        cli.main()
    assert isinstance(exited.value.code, int)
    return exited.value.code


def test_the_command_prints_the_table_and_where_it_lies(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Results on standard output; a second call needs --overwrite."""
    chosen = ("--set", TWO)
    assert call(monkeypatch, "compare", file, *chosen) == 0
    shown = capsys.readouterr().out
    assert "block_influence" in shown and "perplexity" in shown
    assert str(file.parent / "out" / "comparison.html") in shown
    assert call(monkeypatch, "compare", file, *chosen) == 2
    assert call(monkeypatch, "compare", file, *chosen, "--overwrite") == 0


def test_a_bad_file_is_told_by_every_command(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and one line; validate reads comparisons too."""
    assert call(monkeypatch, "validate", file) == 0
    assert "is a valid comparison: block_influence" in capsys.readouterr().out
    for command in ("compare", "validate"):
        setting = "methods=[{prune: deepst}]"
        assert call(monkeypatch, command, file, "--set", setting) == 2
        shown = capsys.readouterr()
        assert "no pruner is called 'deepst'" in shown.err and not shown.out
        assert shown.err.count("error:") == 1


def test_cells_know_what_they_took() -> None:
    """Time adds up, memory is the larger peak, and unknown memory stays unknown."""
    from slm_plugin.comparison.record import Cost

    both = Cell(
        label="x",
        planning=Cost(seconds=2.0, memory=10),
        recovering=Cost(seconds=3.0, memory=7),
    )
    assert (both.seconds, both.memory) == (5.0, 10)
    blind = both.model_copy(update={"recovering": Cost(seconds=3.0)})
    assert (blind.seconds, blind.memory) == (5.0, None)
    assert (Cell(label="dense").seconds, Cell(label="dense").memory) == (None, None)
