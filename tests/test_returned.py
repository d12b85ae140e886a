"""What components give back: plans and records are read anew, and plans held to their targets."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel

from slm_plugin.component import Options
from slm_plugin.errors import ContractError
from slm_plugin.evaluation.base import Evaluator, Measurement
from slm_plugin.export.base import Check, Exporter, ExportRecord
from slm_plugin.plans import DropLayers, KeepHeads, PruningPlan, Trial
from slm_plugin.pruners.base import Pruner
from slm_plugin.pruners.depth.deepest import Deepest
from slm_plugin.recovery.base import Recovery, RecoveryRecord
from slm_plugin.returned import several
from slm_plugin.session import Session
from slm_plugin.target import Target
from tests.tiny import make_model

Edit = Callable[[PruningPlan], PruningPlan]


class Planning(Pruner):
    """Somebody else's strategy: the deepest layers go, and the plan is edited."""

    name = "planning"
    kind: ClassVar = "depth"
    targets: ClassVar = ("layers_removed", "ratio")
    edit: Edit
    removed = 0

    def plan(self, session: Session) -> PruningPlan:
        """Drop so many layers as it likes."""
        target = Target(layers_removed=self.removed) if self.removed else self.target
        made = Deepest(Deepest.Options(), target).plan(session)
        return type(self).edit(made.model_copy(update={"target": self.target}))


class Repairing(Recovery):
    """Does nothing and gives back what it was made with."""

    name = "repairing"
    record: Any

    def recover(self, session: Session) -> RecoveryRecord:
        """Give it back."""
        return self.record  # type: ignore[no-any-return]


class Measuring(Evaluator):
    """Gives back what it was made with."""

    name = "measuring"
    records: Any

    def measure(self, session: Session) -> list[Measurement]:
        """Give it back."""
        return self.records  # type: ignore[no-any-return]


class Exporting(Exporter):
    """Gives back what it was made with."""

    name = "exporting"
    record: Any

    def export(self, session: Session, output: Path) -> ExportRecord:
        """Give it back."""
        return self.record  # type: ignore[no-any-return]


def planned(
    edit: Edit = lambda plan: plan, target: Target | None = None, removed: int = 0
) -> PruningPlan:
    """The plan of such a strategy for a model of six layers, as a session gives it."""
    kind = type("Planning", (Planning,), {"edit": staticmethod(edit), "removed": removed})
    return Session(make_model()).plan(kind(Options(), target or Target(layers_removed=2)))


def updated(**fields: Any) -> Edit:
    """An edit that nothing validates."""
    return lambda plan: plan.model_copy(update=fields)


def with_options(value: object) -> Edit:
    """A plan that has one option of that value."""
    return updated(options={"fine": 1, "odd": value})


class Own(PruningPlan):
    """A class of the plugin's own, which writes what it likes."""

    more: int = 3

    def to_json(self) -> str:
        """No plan."""
        return "{}"


def loop() -> list[Any]:
    """A list that holds itself."""
    made: list[Any] = []
    made.append(made)
    return made


class Stubborn:
    """Nothing can be said of it."""

    def __repr__(self) -> str:
        raise SystemExit(0)


DEEP: list[Any] = []
for _ in range(5000):
    DEEP = [DEEP]
# An edit of a plan that is right, and what the one line says.
BROKEN: dict[str, tuple[Edit, str]] = {
    "object": (with_options(object()), "options.odd: "),
    "function": (with_options(len), "options.odd: "),
    "stubborn": (with_options(Stubborn()), "options.odd: "),
    "bytes": (with_options(b"\xff"), "options.odd: "),
    "loop": (with_options(loop()), "options.odd: "),
    "deep": (with_options(DEEP), "options.odd: "),
    "NaN option": (with_options([1.0, math.nan]), "options.odd.1: it is nan"),
    "surrogate": (with_options("a\ud800"), "options.odd: it holds half a character"),
    "surrogate key": (updated(options={"a\ud800": 1}), r"options.a\ud800: it holds half"),
    "huge": (with_options(10**5000), "options.odd: the number is too large"),
    "no options": (updated(options=None), "options: Input should be"),
    "no fingerprint": (updated(fingerprint=None), "fingerprint: Input should be"),
    "no model": (updated(before=None), "before: Input should be"),
    "no target": (updated(target=None), "target: Input should be"),
    "two targets": (
        updated(target=Target.model_construct(layers_removed=2, ratio=0.5)),
        "target: Value error, give exactly one",
    ),
    "text for operations": (updated(operations="drop"), "operations: Input should be"),
    "text for an index": (
        updated(operations=(DropLayers.model_construct(indices=("3", 4)),)),
        "operations.0.drop_layers.indices.0: Input should be",
    ),
    "negative": (
        updated(operations=(DropLayers.model_construct(indices=(-1, 4)),)),
        "operations.0.drop_layers.indices.0: Input should be greater",
    ),
    "beyond": (updated(operations=(DropLayers(indices=(4, 6)),)), "names layer 6; the model has"),
    "twice": (updated(operations=(DropLayers(indices=(4, 4)),)), "names layer 4 twice"),
    "of another kind": (
        updated(operations=(KeepHeads(layer=0, kv_groups=(0,)),)),
        "keep_heads is no operation of a depth plan",
    ),
    "false promise": (updated(operations=(DropLayers(indices=(4,)),)), "after.layers: promises 4"),
    "NaN similarity": (
        updated(trials=(Trial(first=1, last=2, similarity=math.nan, accepted=False),)),
        "trials.0.similarity: it is nan",
    ),
    "infinite threshold": (updated(threshold=-math.inf), "threshold: it is -inf"),
    "notes are no texts": (updated(notes=(1, 2)), "notes.0: Input should be a valid string"),
    "surrogate note": (updated(notes=("fine", "\udfff")), "notes.1: it holds half a character"),
    "nothing": (lambda _: PruningPlan.model_construct(), "pruner: Field required"),
    "another target's": (
        updated(target=Target(threshold=0.5)),
        "gave back a plan for another target: its target differs",
    ),
    "another model's": (
        lambda plan: plan.model_copy(
            update={"fingerprint": plan.fingerprint.model_copy(update={"weights": "sha256:0"})}
        ),
        "gave back a plan for another model: its fingerprint",
    ),
    "of a larger model": (
        lambda plan: plan.model_copy(
            update={
                "before": plan.before.without_layers(-3),
                "after": plan.after.without_layers(-3),
            }
        ),
        "gave back a plan for another model: its before",
    ),
}


@pytest.mark.parametrize("case", sorted(BROKEN))
def test_a_plan_that_no_file_could_hold_is_one_line(case: str) -> None:
    """With who made it and the field; the session goes on, as its model is untouched."""
    edit, said = BROKEN[case]
    with pytest.raises(ContractError) as caught:
        planned(edit)
    assert caught.value.message.startswith("'planning' gave back a ")
    assert said in caught.value.message
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 500


@pytest.mark.parametrize(
    "edit",
    [
        lambda plan: plan,
        lambda plan: Own(**dict(plan)),
        with_options(Path("a") / "b"),
        with_options({"of": ("many", 1.5, None, "ä\U0001f600")}),
        updated(notes=["a list"], options={1: 2}),
    ],
)
def test_what_a_file_can_hold_is_read_as_from_one(edit: Edit) -> None:
    """The plan is of the package's own class, and plain."""
    made = planned(edit)
    assert type(made) is PruningPlan
    assert PruningPlan.parse(made.to_json()) == made
    assert made.layers_removed == 2


@pytest.mark.parametrize(
    "target",
    [Target(layers_removed=4), Target(layers_removed=1)],
    ids=Target.describe,
)
def test_another_number_of_layers_is_refused(target: Target) -> None:
    """Fewer or more: who asks for a number gets that or an error."""
    said = f"'planning' missed its target: asked to remove {target.layers_removed} layers, its "
    with pytest.raises(ContractError, match=f"{said}plan removes 2"):
        planned(target=target, removed=2)


# Six layers, 14.16 % of the parameters each.
@pytest.mark.parametrize(
    ("target", "missed"),
    [
        (Target(ratio=0.283), False),
        (Target(ratio=0.22), False),
        (Target(ratio=0.35), False),
        (Target(ratio=0.2), True),
        (Target(ratio=0.6), True),
        (Target(parameters=39_000), False),
        (Target(parameters=25_000), True),
        (Target(threshold=0.1), False),
    ],
    ids=str,
)
def test_a_size_that_is_missed_by_more_than_half_a_layer_is_told(
    target: Target, missed: bool
) -> None:
    """As a warning of the plan's: a nearer one was possible, but the size may not matter."""
    made = planned(target=target, removed=2)
    found = [said for said in made.warnings if said.startswith("target missed: ")]
    assert bool(found) == missed
    assert not found or f"the plan removes {made.parameters_removed:,}" in found[0]


def measurement(**fields: Any) -> Measurement:
    """A figure that nothing validated."""
    good = {"name": "n", "value": 1.0, "protocol": "p", "better": "lower"}
    return Measurement.model_construct(**{**good, **fields})


RECORDS: dict[str, tuple[BaseModel, str]] = {
    "no options": (RecoveryRecord.model_construct(recovery="r"), "options: Field required"),
    "odd option": (RecoveryRecord(recovery="r", options={"f": object()}), "options.f: "),
    "NaN loss": (
        RecoveryRecord(recovery="r", options={}, losses=(1.0, math.nan)),
        "losses.1: it is nan",
    ),
    "surrogate note": (
        RecoveryRecord(recovery="r", options={}, notes=("\ud800",)),
        "notes.0: it holds half a character",
    ),
    "text for a figure": (measurement(value="1"), "value: Input should be a valid number"),
    "no figure": (measurement(value=None), "value: Input should be a valid number"),
    "no direction": (measurement(better="up"), "better: Input should be"),
    "no name": (measurement(name=None), "name: Input should be a valid string"),
    "surrogate unit": (measurement(unit="\udc80"), "unit: it holds half a character"),
    "no checks": (
        ExportRecord.model_construct(exporter="e", folder="f", size_bytes=1),
        "checks: Field required",
    ),
    "NaN check": (
        ExportRecord(
            exporter="e",
            folder="f",
            size_bytes=1,
            checks=(Check(name="c", value=math.nan, tolerance=1),),
        ),
        "checks.0.value: it is nan",
    ),
    "a path for a folder": (
        ExportRecord.model_construct(exporter="e", folder=3, size_bytes=1, checks=()),
        "folder: Input should be a valid string",
    ),
}


@pytest.mark.parametrize("case", sorted(RECORDS))
def test_a_record_that_no_report_could_hold_is_one_line(case: str) -> None:
    """Of a recovery, an evaluator and an exporter."""
    record, said = RECORDS[case]
    session = Session(make_model(num_hidden_layers=2))
    with pytest.raises(ContractError) as caught:
        if isinstance(record, RecoveryRecord):
            session.recover(type("R", (Repairing,), {"record": record})(Options()))
        elif isinstance(record, Measurement):
            session.measure(type("M", (Measuring,), {"records": [record]})(Measuring.Options()))
        else:
            session.export(type("E", (Exporting,), {"record": record})(Options()), Path())
    assert f"gave back a{'n' * isinstance(record, ExportRecord)} {type(record).__name__}" in str(
        caught.value
    )
    assert said in caught.value.message


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 0, 3])
def test_a_figure_may_be_infinite(value: float) -> None:
    """A perplexity may overflow, and reports have words for it."""
    (found,) = several((measurement(value=value),), Measurement, Measuring(Measuring.Options()))
    assert found.value == value or math.isnan(found.value)
    assert type(found.value) is float
