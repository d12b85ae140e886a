"""Recovery of LLM-Streamline: train the replacement layer of every run of pruned layers.

Source: LLM-Streamline (arXiv 2403.19135) and its released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from slm_plugin.calibration.held_out import is_held_out
from slm_plugin.component import Options
from slm_plugin.counts import Count
from slm_plugin.errors import CalibrationError, UserError
from slm_plugin.lazy import no_grad, torch
from slm_plugin.progress import track
from slm_plugin.pruners.gradients import only_trainable
from slm_plugin.recovery.base import Recovery, RecoveryRecord
from slm_plugin.recovery.training.loop import refuse_non_finite, shuffled, warmup_cosine
from slm_plugin.recovery.training.objectives import Loss, imitation_loss, language_loss
from slm_plugin.registry import register_recovery
from slm_plugin.restoration.boundaries import reference_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slm_plugin.session import Session

# The rate decays to this share of its peak: 2e-4 to 5e-5 in the released code.
LOWEST_RATE = 0.25


class StreamlineOptions(Options):
    """Objective and training settings of the replacement layers."""

    objective: Annotated[
        Literal["mse", "lm"],
        Field(
            description="mse: the hidden state that the original layers gave; "
            "lm: the next token, through the pruned model"
        ),
    ] = "mse"
    learning_rate: Annotated[float, Field(gt=0, description="peak of AdamW's rate")] = 2e-4
    epochs: Annotated[Count, Field(description="passes over the calibration set")] = 10
    batch_size: Annotated[Count, Field(description="samples per step")] = 8
    weight_decay: Annotated[float, Field(ge=0, description="AdamW's weight decay")] = 1e-3
    clip: Annotated[float, Field(gt=0, description="greatest norm of a step's gradient")] = 5.0
    warmup: Annotated[
        float, Field(ge=0, lt=1, description="share of the steps that is linear warm-up")
    ] = 0.01


@dataclass(frozen=True, slots=True)
class Trained:
    """The training result of one replacement layer.

    Attributes:
        losses: Training loss of every step.
        before: Held-out loss of the untrained layer.
        after: Held-out loss of the best state, which is used.
        epoch: The epoch of that state; 0 for the untrained layer.
    """

    losses: tuple[float, ...]
    before: float
    after: float
    epoch: int


@register_recovery("streamline")
class StreamlineRecovery(Recovery):
    """Train every replacement layer to imitate the original layers it replaces (Streamline)."""

    reference: ClassVar[bool] = True
    fewest_samples: ClassVar[int] = 2
    Options: ClassVar[type[StreamlineOptions]] = StreamlineOptions

    def __init__(self, options: StreamlineOptions) -> None:
        super().__init__(options)
        self.options: StreamlineOptions = options

    def recover(self, session: Session) -> RecoveryRecord:
        """Train the replacement layers, lowest first, each on outputs of the trained ones below.

        Raises:
            UserError: The model has no replacement layer.
            CalibrationError: The session has no reference, or fewer than 2 calibration samples.
            UnsupportedModelError: The residual stream and the reference differ in width, or the
                model has operators already.
            NumericalError: A loss is NaN or infinite; the model keeps its former weights.
        """
        merged = {place: run for place, run in enumerate(session.sources) if run[0] != run[1]}
        self._check(session, merged)
        layers = session.view.layers
        trained = [parameter for place in merged for parameter in layers[place].parameters()]
        former = [parameter.detach().clone() for parameter in trained]
        generator = torch.Generator().manual_seed(session.seed)
        results: dict[int, Trained] = {}
        try:
            for place, (_, last) in merged.items():
                loss = self._loss(session, place, last)
                label = f"{self.name}: epochs of layer {place}"
                with only_trainable(session.model, layers[place].parameters()):
                    results[place] = self._train(layers[place], loss, session, generator, label)
        except BaseException:
            _write(trained, former)
            raise
        return RecoveryRecord(
            recovery=self.name,
            options=self.options.model_dump(),
            losses=tuple(loss for made in results.values() for loss in made.losses),
            notes=self._notes(session, merged, results),
        )

    def _check(self, session: Session, merged: dict[int, tuple[int, int]]) -> None:
        if not merged:
            raise UserError(
                f"the model has no replacement layer: {self.name} has nothing to train",
                hint="put it after a stage that merges layers, as `prune: streamline` or `slm`",
            )
        reference_of(session, self.name)
        if session.calibration is None or len(session.calibration) < self.fewest_samples:
            raise CalibrationError(
                f"{self.name} trains on some samples and holds others out; "
                "the calibration set has fewer than 2",
                hint="draw more samples",
            )

    def _loss(self, session: Session, place: int, last: int) -> Loss:
        if self.options.objective == "mse":
            return imitation_loss(session, place, last)
        return language_loss(session, place)

    def _train(
        self,
        layer: nn.Module,
        loss: Loss,
        session: Session,
        generator: torch.Generator,
        label: str,
    ) -> Trained:
        options = self.options
        train, held_out = split_samples(session)
        parameters = list(layer.parameters())
        # A step of 2e-4 is rounded away in half precision, so float32 copies are updated.
        wide = [
            p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for p in parameters
        ]
        optimizer = torch.optim.AdamW(
            wide, lr=options.learning_rate, weight_decay=options.weight_decay
        )
        steps = options.epochs * -(-len(train) // options.batch_size)
        lowest = LOWEST_RATE * options.learning_rate
        schedule = warmup_cosine(optimizer, steps, options.warmup, lowest)
        before = after = self._held_out_loss(loss, held_out)
        best, state = 0, [parameter.detach().clone() for parameter in parameters]
        losses: list[float] = []
        for epoch in track(range(1, options.epochs + 1), label):
            for batch in shuffled(train, options.batch_size, generator):
                value = loss(batch)
                refuse_non_finite(value, self.name)
                value.backward()  # type: ignore[no-untyped-call]
                for copy, parameter in zip(wide, parameters, strict=True):
                    copy.grad = None if parameter.grad is None else parameter.grad.to(copy.dtype)
                    parameter.grad = None
                torch.nn.utils.clip_grad_norm_(wide, options.clip)
                optimizer.step()
                schedule.step()
                _write(parameters, wide)
                losses.append(value.item())
            found = self._held_out_loss(loss, held_out)
            if found < after:
                after, best = found, epoch
                _write(state, parameters)
        _write(parameters, state)
        return Trained(tuple(losses), before, after, best)

    @no_grad
    def _held_out_loss(self, loss: Loss, samples: Tensor) -> float:
        """The mean loss of the held-out samples, checked because comparisons with NaN are false."""
        parts = torch.split(samples, self.options.batch_size)
        mean = sum(loss(part).double() * len(part) for part in parts) / len(samples)
        refuse_non_finite(torch.as_tensor(mean), self.name)
        return float(mean)

    def _notes(
        self, session: Session, merged: dict[int, tuple[int, int]], results: dict[int, Trained]
    ) -> tuple[str, ...]:
        train, held_out = split_samples(session)
        steps = sum(len(made.losses) for made in results.values())
        kind = "mean squared error" if self.options.objective == "mse" else "cross-entropy"
        notes = [f"{steps} steps on {len(train)} samples, {len(held_out)} more held out"]
        for place, made in results.items():
            first, last = merged[place]
            when = (
                f"after epoch {made.epoch}, the best"
                if made.epoch
                else "no improvement, left untrained"
            )
            notes.append(
                f"layer {place} for layers {first} to {last}: held-out {kind} {made.before:.4g} "
                f"before, {made.after:.4g} {when}"
            )
        return tuple(notes)


def split_samples(session: Session) -> tuple[Tensor, Tensor]:
    """Indices of the training samples and of the held-out ones, every fifth."""
    if session.calibration is None:
        raise ValueError("there are no samples to split")
    numbers = torch.arange(len(session.calibration))
    held_out = is_held_out(numbers)
    return numbers[~held_out], numbers[held_out]


@no_grad
def _write(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
