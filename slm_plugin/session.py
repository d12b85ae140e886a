"""The one loaded model of a run, and the only ways in which it changes or is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from slm_plugin.calibration.captures import Batch, capture, split
from slm_plugin.errors import (
    TELL_ITS_AUTHOR,
    CalibrationError,
    ContractError,
    UserError,
)
from slm_plugin.evaluation.base import Evaluator, Measurement
from slm_plugin.export.base import Exporter, ExportRecord
from slm_plugin.foreign import undone
from slm_plugin.models.fingerprint import Fingerprint, fingerprint
from slm_plugin.models.process import same_process
from slm_plugin.models.state import (
    State,
    changes,
    checksum,
    in_words,
    kept_trainability,
    shapes_of,
    state_of,
    weights_of,
)
from slm_plugin.models.view import DecoderView, Dimensions
from slm_plugin.plans import PruningPlan
from slm_plugin.pruners.base import Pruner
from slm_plugin.recovery.base import Recovery, RecoveryRecord
from slm_plugin.recovery.checking import check_repaired
from slm_plugin.registry.contract import tell_put_back
from slm_plugin.returned import answered, returned, several
from slm_plugin.surgery import apply_operations, refuse_other_model, verify

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Session:
    """State that the stages of a recipe share.

    The model is loaded once and changed in place, by `apply` and `recover` alone. `plan`,
    `measure` and `export` call a component and make sure that it leaves the model as it is. Every
    component finds the model in evaluation mode, which it is set to here, and random generators
    that start from the session's seed. Modes, gradients and settings of the process that a
    component leaves behind are put back and told; any other change is an error, and the session
    is of no more use.

    Weights may change between two calls (a training of the user's own): what was derived from the
    former ones is then derived anew, and plans for them are refused. Layers may not: make a new
    session.

    Attributes:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer; None when only token ids are used.
        calibration: Token ids, ``(samples, length)``; None when no stage needs them.
        original: Dimensions of the model as it was loaded: what ratios are a share of.
        sources: For every layer of the model the lowest and the highest layer that it is made of,
            of those that were loaded.
        reference: What the layers saw when `keep_reference` was called; None before that.
        source: The recipe's model id, for reports.
        seed: Seed of everything random in a run.
        batch_tokens: Tokens that one calibration batch holds at most; 0 takes what suits the
            model's device.
        journals: Folder where searches keep their trials over the end of the process; None keeps
            them in memory.
        spoiled: Why the session is of no more use; empty as long as it is of use.
        known_trials: Trials that searches have found in those journals: they took no time here.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None = None
    calibration: Tensor | None = None
    source: str = ""
    seed: int = 1234
    batch_tokens: int = 0
    journals: Path | None = None
    known_trials: int = field(default=0, init=False)
    original: Dimensions = field(init=False)
    sources: tuple[tuple[int, int], ...] = field(init=False)
    reference: list[Batch] | None = field(default=None, init=False, repr=False)
    _captured: list[Batch] | None = field(default=None, init=False, repr=False)
    _captured_from: State = field(default_factory=dict, init=False, repr=False)
    _fingerprint: Fingerprint | None = field(default=None, init=False, repr=False)
    _fingerprint_of: State = field(default_factory=dict, init=False, repr=False)
    _shapes: dict[str, tuple[int, ...]] = field(init=False, repr=False)
    spoiled: str = field(default="", init=False, repr=False)

    def __post_init__(self) -> None:
        self.model.eval()
        self.original = self.view.dimensions()
        self.sources = tuple((index, index) for index in range(self.original.layers))
        self._shapes = shapes_of(self.model)
        if not self.batch_tokens:
            # A CPU is as fast on small batches, which need less memory and let a search stop a
            # trial sooner; a GPU is not (benchmarks/slm_search.py --batch-tokens).
            self.batch_tokens = 256 if self.model.device.type == "cpu" else 8192

    @property
    def view(self) -> DecoderView:
        """The model seen as a decoder."""
        return DecoderView.of(self.model)

    def plan(self, pruner: Pruner) -> PruningPlan:
        """What a strategy decides for the model in its present state.

        Raises:
            TargetError: The target cannot be reached.
            ContractError: The strategy changed the model, or gave back something else, or a plan
                that is not for this model or not what was asked for.
            UserError: Layers changed outside the session.
        """
        # Noted now: a strategy may change it. Classes that no recipe names may have none.
        asked = {"target": pruner.target} if hasattr(pruner, "target") else {}
        with self._untouched(_name(pruner), "planning"):
            made = returned(pruner.plan(self), PruningPlan, pruner)
            model = {"before": self.view.dimensions(), "fingerprint": self.fingerprint()}
            return answered(made, pruner, {**asked, **model}, self.original)

    def apply(self, plan: PruningPlan) -> None:
        """Carry a plan out on the model, in place.

        The fingerprint that must agree is that of the weights as they are now, whoever changed
        them. So a plan is refused after any recovery that changed a bit, and when it was carried
        out already; it fits a copy of its model as well as the model itself.

        Raises:
            PlanError: The plan was made for another model, or its operations contradict one
                another.
            MissingExtraError: The plan cuts width and torch-pruning is not installed.
            VerificationError: The result does not measure what the plan promises.
            ContractError: The session is of no more use.
            UserError: Layers changed outside the session.
        """
        self._refuse_unusable()
        refuse_other_model(plan, self.model, self.fingerprint())
        model, before = self.model, self._state()
        try:
            with kept_trainability(lambda: model):
                runs = apply_operations(self.model, plan.operations)
            verify(plan, self.view.dimensions())
        except BaseException:
            self._spoil_if(model, before, f"the plan by '{plan.pruner}' was carried out in part")
            raise
        finally:
            self.model_changed()
        former = self.sources
        self.sources = tuple((former[first][0], former[last][1]) for first, last in runs)
        self._shapes = shapes_of(self.model)

    def recover(self, recovery: Recovery) -> RecoveryRecord:
        """Repair the model in place: weights change, and nothing else.

        A recovery that fails must leave the model as it was; otherwise the session is of no more
        use.

        Raises:
            ContractError: The recovery changed more than weights, or gave back something else.
            NumericalError: It left NaN or infinity in a weight.
            UserError: Layers changed outside the session.
            SlmError: What the recovery itself refuses.
        """
        name = _name(recovery)
        self._refuse_unusable()
        model, before = self.model, self._state()
        try:
            with self._same_start(name):
                record = returned(recovery.recover(self), RecoveryRecord, recovery)
            check_repaired(recovery, model, self.model, before, self._state)
        except BaseException:
            self._spoil_if(model, before, f"'{name}' failed and left the model changed")
            raise
        finally:
            self.model_changed()
        self._shapes = shapes_of(self.model)
        return record

    def measure(self, evaluator: Evaluator) -> list[Measurement]:
        """Measure the model in its present state.

        Raises:
            ContractError: The evaluator changed the model, or gave back something else.
            UserError: Layers changed outside the session.
            SlmError: What the evaluator itself refuses.
        """
        with self._untouched(_name(evaluator), "measuring"):
            return several(evaluator.measure(self), Measurement, evaluator)

    def export(self, exporter: Exporter, output: Path) -> ExportRecord:
        """Write the model below a folder, and prove what was written.

        Raises:
            ContractError: The exporter changed the model, or gave back something else.
            UserError: Layers changed outside the session.
            SlmError: What the exporter itself refuses.
        """
        with self._untouched(_name(exporter), "exporting"):
            return returned(exporter.export(self, output), ExportRecord, exporter)

    def batches(self) -> Iterator[Tensor]:
        """Calibration token ids in batches, on the model's device.

        Raises:
            CalibrationError: The session has no calibration set.
        """
        if self.calibration is None:
            raise CalibrationError(
                "this stage needs calibration data and the recipe has none",
                hint="add a `calibration:` section",
            )
        for tokens in split(self.calibration, self.batch_tokens):
            yield tokens.to(self.model.device)

    def captured(self) -> list[Batch]:
        """Layer inputs of the model in its present state, captured at the first request.

        Raises:
            CalibrationError: The session has no calibration set.
            NumericalError: The model produces NaN or infinity.
        """
        state = {**weights_of(self.model), **self._facts()}
        if self._captured is None or changes(self._captured_from, state):
            # Given up first: two captures need not lie on disk at once.
            self._captured = None
            self.model.eval()
            self._captured = capture(self.view, self.batches())
            self._captured_from = state
        return self._captured

    def keep_reference(self) -> None:
        """Keep what the layers see now, for recoveries that lead a pruned model back to it.

        The states lie on disk, beside the final one of every batch, and outlive `release`.

        Raises:
            CalibrationError: The session has no calibration set.
            NumericalError: The model produces NaN or infinity.
        """
        self.reference = self.captured()

    def fingerprint(self) -> Fingerprint:
        """Identity of the model in its present state."""
        state = weights_of(self.model)
        if self._fingerprint is None or changes(self._fingerprint_of, state):
            self._fingerprint = fingerprint(self.model)
            self._fingerprint_of = state
        return self._fingerprint

    def release(self) -> None:
        """Give up captured activations; the next request captures anew."""
        self._captured = None

    def model_changed(self) -> None:
        """Forget everything that was derived from the model's former state."""
        self._captured = None
        self._fingerprint = None

    def _state(self) -> State:
        """Everything that a component must leave as it is."""
        return {**state_of(self.model), **self._facts()}

    def _facts(self) -> State:
        """The same of the session itself."""
        facts: State = {
            ("session's", name): getattr(self, name) for name in ("sources", "batch_tokens", "seed")
        }
        if self.calibration is not None:
            facts["session's", "calibration"] = checksum(self.calibration)
        if self.tokenizer is not None:
            facts["session's", "tokenizer"] = (
                type(self.tokenizer).__name__,
                len(self.tokenizer),
                self.tokenizer.padding_side,
                self.tokenizer.truncation_side,
                str(self.tokenizer.special_tokens_map),
            )
        return facts

    @contextmanager
    def _untouched(self, name: str, doing: str) -> Iterator[None]:
        """Let a component work that may change nothing.

        Raises:
            ContractError: It did. An error of the component's own gives way: what it says is of a
                model that is no more.
        """
        self._refuse_unusable()
        model, before = self.model, self._state()
        try:
            with self._same_start(name):
                yield
        except BaseException as error:
            found = self._broken(model, before, name, doing)
            if found is not None and isinstance(error, Exception):
                raise found from error
            raise
        found = self._broken(model, before, name, doing)
        if found is not None:
            raise found

    def _broken(
        self, model: PreTrainedModel, before: State, name: str, doing: str
    ) -> ContractError | None:
        """What a component did that it may not, once the session knows of it."""
        if self.model is not model:
            self.model, what = model, "put another model in place of the session's"
        else:
            found = changes(before, self._state())
            if not found:
                return None
            what = f"changed the model ({in_words(found)})"
        self.spoiled = f"'{name}' {what} while {doing}"
        return ContractError(self.spoiled, hint=TELL_ITS_AUTHOR)

    @contextmanager
    def _same_start(self, name: str) -> Iterator[None]:
        """Evaluation mode and seeded generators for a component; what it leaves is put back."""
        model = self.model

        def present() -> PreTrainedModel:
            return self.model if type(self.model) is type(model) else model

        with (
            undone() as process,
            same_process(self.seed, model.device) as settings,
            kept_trainability(present) as modes,
        ):
            yield
        tell_put_back(f"'{name}'", [*modes, *settings, *process])

    def _refuse_unusable(self) -> None:
        """Refuse to go on with a model of which nobody knows what it is.

        Raises:
            ContractError: A component or a failure left it so.
            UserError: Layers changed outside the session.
        """
        if self.spoiled:
            raise ContractError(
                f"the session is of no more use: {self.spoiled}",
                hint="load the model anew and make a new session",
            )
        now = shapes_of(self.model)
        if now != self._shapes:
            name = min(n for n, _ in now.items() ^ self._shapes.items())
            raise UserError(
                f"the model's layers changed outside the session, first {name}",
                hint="make a new session for the model as it is now",
            )

    def _spoil_if(self, model: PreTrainedModel, before: State, why: str) -> None:
        """Nothing more is done with a model that a failure left changed."""
        if self.model is not model or changes(before, self._state()):
            self.model, self.spoiled = model, why


def apply(plan: PruningPlan, session: Session) -> None:
    """Carry a plan out on a session's model, in place: `Session.apply`."""
    session.apply(plan)


def _name(component: object) -> str:
    """What a component is called; a class that was never registered has no name."""
    return str(getattr(component, "name", type(component).__name__))
