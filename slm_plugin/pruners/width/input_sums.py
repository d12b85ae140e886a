"""What the projections that read units see on the calibration set, as sums over tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_plugin.calibration.captures import Batch, in_float64, run_layers
from slm_plugin.calibration.held_out import is_held_out
from slm_plugin.lazy import nn, no_grad, torch

if TYPE_CHECKING:
    from torch import Tensor

    from slm_plugin.session import Session


@dataclass(frozen=True, slots=True)
class ReaderInputs:
    """The inputs of one projection of a layer, read batch by batch.

    Attributes:
        layer: The layer's index.
        name: Short name of the projection: ``down_proj`` or ``o_proj``.
        linear: The projection.
    """

    layer: int
    name: str
    linear: nn.Linear
    _module: nn.Module
    _batches: list[Batch]

    @property
    def weight(self) -> Tensor:
        """Its weight, ``(hidden, features)``, float64."""
        return in_float64(self.linear.weight.detach())

    @property
    def count(self) -> int:
        """Number of batches."""
        return len(self._batches)

    @property
    def samples(self) -> int:
        """Number of samples."""
        return sum(len(batch.tokens) for batch in self._batches)

    @no_grad
    def batches(self) -> Iterator[Tensor]:
        """Its inputs on every batch, each ``(samples, length, features)``, float64."""
        seen: list[Tensor] = []
        hook = self.linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            for batch in self._batches:
                hidden = batch.inputs[self.layer]
                run_layers([self._module], hidden, batch.arguments[self.layer])
                # OPT hands the tokens of all samples to its MLP as one list.
                yield in_float64(seen.pop()).reshape(*hidden.shape[:2], -1)
        finally:
            hook.remove()


def reader_inputs(session: Session, name: str) -> Iterator[ReaderInputs]:
    """The inputs of a projection of every layer in turn, in the model as it is.

    Args:
        session: The session.
        name: Short name of the projection.

    Raises:
        CalibrationError: There is no calibration set.
        NumericalError: The model produces NaN or infinity.
    """
    batches = session.captured()
    for index, layer in enumerate(session.view.layers):
        yield ReaderInputs(index, name, session.view.projections(layer)[name], layer, batches)


class InputSums:
    """Sums over the tokens of a projection's inputs, in float64.

    Attributes:
        tokens: Number of tokens.
        total: Sum of the inputs, ``(features,)``.
        squares: Sum of their squares, ``(features,)``.
        sample_means: Sum over samples of the squared mean of their absolute values,
            ``(features,)``.
    """

    def __init__(self, inputs: ReaderInputs) -> None:
        self.tokens = 0
        self.total = self.squares = self.sample_means = torch.zeros((), dtype=torch.float64)
        for batch in inputs.batches():
            self.tokens += batch[..., 0].numel()
            self.total = self.total + batch.sum((0, 1)).cpu()
            self.squares = self.squares + batch.square().sum((0, 1)).cpu()
            self.sample_means = self.sample_means + batch.abs().mean(1).square().sum(0).cpu()

    @property
    def variance(self) -> Tensor:
        """Variance of each input over the tokens, ``(features,)``."""
        mean = self.total / self.tokens
        return (self.squares / self.tokens - mean.square()).clamp(min=0)


def gram(inputs: ReaderInputs) -> tuple[Tensor, Tensor]:
    """Gram matrices of the inputs of the fitted and of the held-out samples.

    Returns:
        Two matrices ``(features, features)``, float64: sums over tokens of the outer product of
        the inputs with themselves.
    """
    start = 0
    sums = [torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)]
    for batch in inputs.batches():
        held_out = is_held_out(torch.arange(start, start + len(batch))).to(batch.device)
        for which, chosen in enumerate((~held_out, held_out)):
            rows = batch[chosen].flatten(0, 1)
            sums[which] = sums[which].to(rows.device) + rows.T @ rows
        start += len(batch)
    return sums[0], sums[1]
