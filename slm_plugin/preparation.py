"""Preparation of every command: load the model, check it, draw calibration data."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from slm_plugin.calibration.given import token_ids
from slm_plugin.calibration.samples import CalibrationRecord, CalibrationSource, digest, draw
from slm_plugin.calibration.tensors import given_inputs, stored_inputs
from slm_plugin.errors import CalibrationError, ModelSourceError, UserError
from slm_plugin.evaluation.base import Evaluator
from slm_plugin.export.base import Exporter
from slm_plugin.lazy import torch
from slm_plugin.models.bundled import cache_folder, trials_folder
from slm_plugin.models.families.suitability import refuse_unsuited
from slm_plugin.models.in_memory import check_given
from slm_plugin.models.loading import ModelSource, load
from slm_plugin.models.streaming import is_streamed
from slm_plugin.models.view import DecoderView
from slm_plugin.progress import timed
from slm_plugin.recovery.base import Recovery
from slm_plugin.session import Session
from slm_plugin.texts import expanded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class InMemory:
    """A model that the caller holds, in place of one to load.

    Attributes:
        model: A decoder of a supported class; it is changed in place.
        tokenizer: Its tokenizer, where text is read.
        calibration: Texts, token ids or batches (`token_ids`), or an encoder's tensors
            (`given_inputs`); None for the recipe's own source.
        stack: Which of its two stacks of layers, where it has two.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None = None
    calibration: object = None
    stack: str | None = None

    @property
    def has_data(self) -> bool:
        """Whether calibration data came with the model."""
        return self.calibration is not None

    @property
    def name(self) -> str:
        """Name of the model in reports."""
        return str(getattr(self.model.config, "_name_or_path", "")) or type(self.model).__name__


def prepare(
    source: ModelSource | InMemory,
    *,
    calibration: CalibrationSource | None = None,
    seed: int = 1234,
    components: Sequence[Any] = (),
    check_targets: Callable[[Session], None] | None = None,
    trials: bool = True,
) -> Session:
    """Load the model, check it against components and targets, and draw the calibration set.

    Args:
        source: What to load, or a model in memory.
        calibration: What to draw from; None for no calibration set, or for the caller's data.
        seed: Seed of everything random.
        components: Pruners, recoveries, evaluators and exporters that will be used.
        check_targets: Raises for targets that the model cannot reach.
        trials: Store the trials of searches in the cache folder.

    Raises:
        SlmError: The model or the calibration set cannot be had, or a component or a target does
            not suit the model.
    """
    random.seed(seed)
    torch.manual_seed(seed)
    journals = None
    if trials:
        # Fail before loading if a search could not write its journal later.
        wanted = any(getattr(component, "keeps_trials", False) for component in components)
        journals = trials_folder() if wanted else cache_folder() / "trials"
    if isinstance(source, InMemory):
        model, tokenizer, name = source.model, source.tokenizer, source.name
        view = DecoderView.of(model, source.stack)
        refuse_unsuited(components, view.family, view.config.to_dict())
    else:
        name = source.id
        with timed(f"load {name}"):
            model, tokenizer = load(source, partial(refuse_unsuited, components))
    session = Session(
        model, tokenizer, source=name, seed=seed, journals=journals, stack=source.stack
    )
    _refuse_unstreamable(components, session)
    if check_targets is not None:
        check_targets(session)
    for component in components:
        if isinstance(component, Evaluator | Exporter):
            component.check_model(session)
    if isinstance(source, InMemory) and source.has_data:
        if session.view.family.by_tensors:
            session.inputs = given_inputs(source.calibration, session.view)
        else:
            session.calibration = token_ids(source.calibration, model, tokenizer)
    elif calibration is not None:
        with timed(f"calibration from {calibration.path or calibration.source}"):
            _draw(calibration, session)
    _refuse_missing_samples(components, session)
    return session


def _draw(source: CalibrationSource, session: Session) -> None:
    """Draw the calibration set of a session from a recipe's source.

    Raises:
        CalibrationError: It cannot be had, or is of a kind that does not calibrate the model.
    """
    wrong = source.unsuited(session.view.family)
    if wrong:
        raise CalibrationError(wrong)
    if source.path is not None:
        session.inputs = stored_inputs(expanded(source.path), session.view)
    else:
        session.calibration = draw(source, session.model, session.tokenizer, session.seed)


def model_source(
    named: ModelSource | None,
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    calibration: object,
    stack: str | None = None,
) -> ModelSource | InMemory:
    """The caller's model, or the one that a file names.

    Raises:
        UserError: There is neither, a tokenizer or data are passed without a model, or the model or
            the tokenizer is of another type.
        UnsupportedModelError: The model's class or a module in it is not supported.
    """
    if model is not None:
        check_given(model, tokenizer, stack)
        return InMemory(model, tokenizer, calibration, stack)
    if tokenizer is not None or calibration is not None or stack is not None:
        raise UserError(
            "a tokenizer, calibration data or a stack need a model", hint="pass `model=`"
        )
    if named is None:
        raise UserError("no model is named", hint="add `model`, or pass `model=`")
    return named


def calibration_record(
    source: ModelSource | InMemory, drawn_from: CalibrationSource | None, session: Session
) -> CalibrationRecord | None:
    """The calibration data of a session, for reports; None where there is none."""
    if session.inputs is not None and session.digest is not None:
        return CalibrationRecord(
            source="tensors" if drawn_from is None else drawn_from.path or drawn_from.source,
            samples=len(session.inputs),
            length=session.inputs.length,
            seed=session.seed,
            sha256=session.digest,
            unit="positions",
        )
    tokens = session.calibration
    if tokens is None:
        return None
    if drawn_from is not None and not (isinstance(source, InMemory) and source.has_data):
        return CalibrationRecord.of(drawn_from, tokens, session.seed)
    samples, length = tokens.shape
    return CalibrationRecord(
        source="data in memory",
        samples=samples,
        length=length,
        seed=session.seed,
        sha256=digest(tokens),
    )


def _refuse_unstreamable(components: Iterable[Any], session: Session) -> None:
    """Check that all components support streaming if the model exceeds the GPU.

    Raises:
        ModelSourceError: A component needs the whole model.
    """
    if not is_streamed(session.model):
        return
    for component in components:
        if not component.streams or component.whole_model:
            reason = f": {component.whole_model}" if component.whole_model else ""
            raise ModelSourceError(
                f"{session.source} is larger than the GPU, and '{component.name}' needs it whole"
                f"{reason}",
                hint=f"set `device: cpu`, or remove '{component.name}'",
            )


def _refuse_missing_samples(components: Iterable[Any], session: Session) -> None:
    """Check that the calibration set exists and is large enough.

    Raises:
        CalibrationError: It does not exist, or is too small.
    """
    samples = session.samples
    by_tensors = session.view.family.by_tensors
    usual = "{'source': 'tensors', 'path': FILE}" if by_tensors else "{'source': 'builtin'}"
    for component in components:
        if not samples and getattr(component, "needs_calibration", False):
            other = component.without_calibration
            raise CalibrationError(
                f"'{component.name}' needs calibration data",
                hint=f"pass `calibration`, as {usual}" + (f", or {other}" if other else ""),
            )
        if isinstance(component, Recovery) and 0 < samples < component.fewest_samples:
            raise CalibrationError(
                f"'{component.name}' needs {component.fewest_samples} calibration samples or "
                f"more; the set has {samples}",
                hint="raise `samples`",
            )
