"""The loaded model of a run, and the only interface that changes or evaluates it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from slm_plugin.calibration.captures import Batch, capture, first_inputs, projected, split
from slm_plugin.calibration.components import stream_components
from slm_plugin.calibration.samples import digest
from slm_plugin.calibration.tensors import Inputs
from slm_plugin.errors import (
    TELL_ITS_AUTHOR,
    CalibrationError,
    ContractError,
    PlanError,
    UserError,
)
from slm_plugin.evaluation.base import Evaluator, Measurement
from slm_plugin.export.base import Exporter, ExportRecord
from slm_plugin.foreign import undone
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.models.fingerprint import Fingerprint, fingerprint
from slm_plugin.models.operators import operators
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
from slm_plugin.models.view import DecoderView
from slm_plugin.plans import PruningPlan
from slm_plugin.plans.losses import with_losses
from slm_plugin.plans.operations import RotateHidden
from slm_plugin.plans.steps import Step
from slm_plugin.plans.stream import stream_change
from slm_plugin.pruners.base import Pruner, refuse_uneven
from slm_plugin.recovery.base import Recovery, RecoveryRecord
from slm_plugin.recovery.checking import check_repaired
from slm_plugin.registry.contract import tell_put_back
from slm_plugin.restoration.former import on_disk
from slm_plugin.returned import answered, called, returned, several
from slm_plugin.surgery import (
    apply_operations,
    checked_steps,
    refuse_operators,
    refuse_other_model,
    verify,
)
from slm_plugin.surgery.preview import calibration_losses
from slm_plugin.surgery.stream import stream_basis

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Session:
    """State that the stages of a recipe share.

    The model is loaded once and changed in place, only by `apply` and `recover`. `plan`, `measure`
    and `export` call a component and check that it does not change the model. Every component gets
    the model in evaluation mode, with random generators seeded by the session. Modes, gradients and
    process settings that a component changed are restored and reported. Any other change is an
    error, after which the session is unusable.

    Weights may change between two calls, for example by the user's own training: cached values are
    then recomputed, and plans for the former weights are rejected. Layers may not change: create a
    new session instead.

    Attributes:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer; None when only token ids are used.
        calibration: Token ids, ``(samples, length)``; None when no stage needs them.
        inputs: Calibration tensors of an encoder, in place of token ids.
        stack: Which of the model's two stacks of layers, where it has two.
        original: Dimensions of the model as loaded; ratios refer to them.
        sources: For every layer, the lowest and the highest original layer in it.
        reference: The layer inputs when `keep_reference` was called, in the hidden channels that
            the model still has; None before that, and once it has operators of a plan.
        keeps_layers: Whether `apply` stores the layers before it applies width operations.
        former_layers: The layers before the width operations of the last plan, if it had some and
            they were stored; their weights are on disk.
        source: The recipe's model id, for reports.
        seed: Seed of everything random in a run.
        batch_tokens: Largest number of tokens in a calibration batch; 0 depends on the device.
        journals: Folder for the journals of searches; None keeps trials in memory.
        spoiled: Why the session is unusable; empty while it is usable.
        known_trials: Trials that searches have read from journals and that took no time here.
    """

    model: PreTrainedModel = field(repr=False)
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, repr=False)
    calibration: Tensor | None = field(default=None, repr=False)
    source: str = ""
    seed: int = 1234
    batch_tokens: int = 0
    journals: Path | None = None
    inputs: Inputs | None = field(default=None, repr=False)
    stack: str | None = None
    known_trials: int = field(default=0, init=False)
    original: Dimensions = field(init=False)
    sources: tuple[tuple[int, int], ...] = field(init=False)
    reference: list[Batch] | None = field(default=None, init=False, repr=False)
    keeps_layers: bool = field(default=False, init=False, repr=False)
    former_layers: list[nn.Module] | None = field(default=None, init=False, repr=False)
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
        """The model as a decoder view."""
        return DecoderView.of(self.model, self.stack)

    @property
    def samples(self) -> int:
        """Number of calibration samples."""
        if self.inputs is not None:
            return len(self.inputs)
        return 0 if self.calibration is None else len(self.calibration)

    @property
    def digest(self) -> str | None:
        """What names the calibration set; None without one."""
        if self.inputs is not None:
            return self.inputs.digest()
        return None if self.calibration is None else digest(self.calibration)

    def plan(self, pruner: Pruner) -> PruningPlan:
        """The plan of a strategy for the model in its present state.

        Raises:
            TargetError: The target cannot be reached.
            PlanError: The model has operators.
            UnsupportedModelError: Layers differ in width, and the strategy needs equal ones.
            ContractError: The strategy changed the model, or did not return a plan for this model
                and target.
            UserError: Layers changed outside the session.
        """
        # Recorded now, because a strategy may change it. Unregistered classes may have none.
        asked = {"target": pruner.target} if hasattr(pruner, "target") else {}
        with self._untouched(_name(pruner), "planning"):
            refuse_operators(self.model)
            refuse_uneven(pruner, self.view.dimensions())
            made = returned(pruner.plan(self), PruningPlan, pruner)
            model = {"before": self.view.dimensions(), "fingerprint": self.fingerprint()}
            made = answered(made, pruner, {**asked, **model}, self.original)
            return with_losses(made, *self._losses(made, pruner))

    def _losses(self, plan: PruningPlan, pruner: Pruner) -> tuple[float | None, float | None]:
        """The calibration loss before and after a plan; None for a strategy that needs no data.

        It depends on the strategy alone whether they are measured, and not on what other stages
        have captured, so that a plan is the same in every run.

        Raises:
            ContractError: The operations do not fit the model.
        """
        if self.calibration is None or not pruner.needs_calibration:
            return None, None
        stored = self._captured is not None and not self._capture_is_old()
        batches = self.captured() if stored else first_inputs(self.view, self.batches())
        try:
            found = calibration_losses(self.view, plan, batches)
        except PlanError as error:
            raise ContractError(
                f"{called(pruner)} gave back a plan that cannot be applied: {error.message}",
                hint=TELL_ITS_AUTHOR,
            ) from error
        return (None, None) if found is None else (found.before, found.after)

    def apply(self, plan: PruningPlan) -> None:
        """Apply a plan to the model, in place.

        The plan's fingerprint must match the present weights. A plan is therefore rejected after a
        recovery that changed weights, and when it was applied already. It also applies to a copy
        of its model.

        Raises:
            PlanError: The plan was made for another model, its operations contradict one
                another, or it rotates the stream and this is not its calibration set.
            MissingExtraError: The plan removes channels or heads and torch-pruning is not
                installed.
            VerificationError: The result does not have the dimensions in the plan.
            ContractError: The session is unusable.
            UserError: Layers changed outside the session.
        """
        self._refuse_unusable()
        refuse_other_model(plan, self.model, self.fingerprint())
        steps = checked_steps(plan, self.view.dimensions())
        self._refuse_other_set(stream_change(plan.operations).rotation)
        model, before = self.model, self._state()
        self.former_layers = None
        try:
            for step in steps:
                self._take(step)
            verify(plan, self.view.dimensions())
        except BaseException:
            self._spoil_if(model, before, f"the plan by '{plan.pruner}' was applied only in part")
            raise
        finally:
            self.model_changed()
        self._shapes = shapes_of(self.model)

    def _take(self, step: Step) -> None:
        """Carry one step of a plan out."""
        change, hidden = stream_change(step.operations), self.view.dimensions().hidden_size
        basis = None
        if change.rotation is not None:
            kept = hidden if change.kept is None else len(change.kept)
            _, basis = stream_components(self.view, self.captured(), change.rotation.per, kept)
        if self.keeps_layers and step.kind == "width":
            self.former_layers = on_disk(self.view.layers)
        with kept_trainability(lambda: self.model):
            runs = apply_operations(self.model, step.operations, self.stack, basis)
        if operators(self.model):
            # Every block has channels of its own, and nothing is fitted behind operators.
            self.reference = None
        elif change and self.reference is not None:
            left = stream_basis(change, hidden, basis)
            self.reference = [projected(batch, left) for batch in self.reference]
        former = self.sources
        self.sources = tuple((former[first][0], former[last][1]) for first, last in runs)

    def _refuse_other_set(self, rotation: RotateHidden | None) -> None:
        """Check that the calibration set is the one that a rotation follows from."""
        if rotation is not None and self.digest != rotation.calibration:
            found = "none" if self.digest is None else "another one"
            raise PlanError(
                "the plan rotates the residual stream by its principal components on a "
                f"calibration set, and there is {found}",
                hint="run the recipe that it was made with; `apply` has no calibration data",
            )

    def recover(self, recovery: Recovery) -> RecoveryRecord:
        """Repair the model in place: weights change, and nothing else.

        A recovery that fails must leave the model unchanged; otherwise the session becomes
        unusable.

        Raises:
            ContractError: The recovery changed more than weights, or returned another type.
            NumericalError: It left NaN or infinity in a weight.
            UserError: Layers changed outside the session.
            SlmError: The recovery's own errors.
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
            ContractError: The evaluator changed the model, or returned another type.
            UserError: Layers changed outside the session.
            SlmError: The evaluator's own errors.
        """
        with self._untouched(_name(evaluator), "measuring"):
            return several(evaluator.measure(self), Measurement, evaluator)

    def export(self, exporter: Exporter, output: Path) -> ExportRecord:
        """Write the model into a folder, and verify the files.

        Raises:
            ContractError: The exporter changed the model, or returned another type.
            UserError: Layers changed outside the session.
            SlmError: The exporter's own errors.
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

    def _tensor_batches(self) -> Iterator[Mapping[str, Tensor]]:
        """Calibration tensors in batches, on the model's device, sound in its number format."""
        assert self.inputs is not None
        model = self.model
        for batch in self.inputs.split(self.batch_tokens):
            yield {
                name: t.to(model.device, model.dtype if t.is_floating_point() else None)
                for name, t in batch.items()
            }

    def captured(self) -> list[Batch]:
        """Layer inputs of the model in its present state, captured on first use.

        Raises:
            CalibrationError: The session has no calibration set.
            NumericalError: The model produces NaN or infinity.
        """
        if self._captured is None or self._capture_is_old():
            # Released first, so that only one capture is on disk at a time.
            self._captured = None
            self.model.eval()
            self._captured = capture(
                self.view, self.batches() if self.inputs is None else self._tensor_batches()
            )
            self._captured_from = self._read()
        return self._captured

    def _capture_is_old(self) -> bool:
        """Whether what a capture depends on is not what it was."""
        return bool(changes(self._captured_from, self._read()))

    def _read(self) -> State:
        """What a capture depends on."""
        return {**weights_of(self.model), **self._facts()}

    def expect(self, recoveries: Iterable[Recovery]) -> None:
        """Record what recoveries will need of the model before it is pruned.

        Raises:
            CalibrationError: The session has no calibration set.
            NumericalError: The model produces NaN or infinity.
        """
        expected = list(recoveries)
        if any(recovery.reference for recovery in expected):
            self.keep_reference()
        self.keeps_layers = any(recovery.former_layers for recovery in expected)

    def keep_reference(self) -> None:
        """Record the present layer inputs as the reference of recoveries.

        They are stored on disk, with the final state of every batch, and `release` keeps them.

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
        """Delete captured activations; the next use captures them again."""
        self._captured = None

    def model_changed(self) -> None:
        """Clear all values that depend on the model's former state."""
        self._captured = None
        self._fingerprint = None

    def _state(self) -> State:
        """All state that a component must not change."""
        return {**state_of(self.model), **self._facts()}

    def _facts(self) -> State:
        """The same for the session itself."""
        facts: State = {
            ("session's", name): getattr(self, name) for name in ("sources", "batch_tokens", "seed")
        }
        if self.calibration is not None:
            facts["session's", "calibration"] = checksum(self.calibration)
        if self.inputs is not None:
            facts["session's", "inputs"] = self.inputs.digest()
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
        """Run a component that must not change anything.

        Raises:
            ContractError: It did. This replaces an exception of the component.
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
        """The error about a component that broke its contract."""
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
        """Set evaluation mode and seeds for a component, and restore settings afterwards."""
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
        """Check that the model is in a known state.

        Raises:
            ContractError: A component or a failure made the session unusable.
            UserError: Layers changed outside the session.
        """
        if self.spoiled:
            raise ContractError(
                f"the session is unusable: {self.spoiled}",
                hint="load the model again and create a new session",
            )
        now = shapes_of(self.model)
        if now != self._shapes:
            name = min(n for n, _ in now.items() ^ self._shapes.items())
            raise UserError(
                f"the model's layers changed outside the session, first {name}",
                hint="create a new session for the present model",
            )

    def _spoil_if(self, model: PreTrainedModel, before: State, why: str) -> None:
        """Make the session unusable after a failure that changed the model."""
        if self.model is not model or changes(before, self._state()):
            self.model, self.spoiled = model, why


def apply(plan: PruningPlan, session: Session) -> None:
    """Apply a plan to a session's model, in place: `Session.apply`."""
    session.apply(plan)


def _name(component: object) -> str:
    """The name of a component; an unregistered class has none."""
    return str(getattr(component, "name", type(component).__name__))
