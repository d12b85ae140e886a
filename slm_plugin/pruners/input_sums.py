"""What the projections that read units see on the calibration set, as sums over tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from slm_plugin.calibration.captures import in_float64, layer_runs, projection_inputs
from slm_plugin.calibration.held_out import is_held_out
from slm_plugin.lazy import no_grad, torch
from slm_plugin.models.streaming import held

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slm_plugin.session import Session


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """What one layer sees on the calibration set.

    Attributes:
        index: The layer's index.
        layer: The layer.
        projections: Its linear maps by their short names.
        samples: Number of samples.
        count: Number of batches.
        runs: The layer's input and arguments for every batch.
    """

    index: int
    layer: nn.Module
    projections: Mapping[str, nn.Linear]
    samples: int
    count: int
    runs: Callable[[], Iterator[tuple[Tensor, dict[str, Any]]]]

    def read_by(self, name: str) -> ReaderInputs:
        """The inputs of one of its projections."""
        return ReaderInputs(self, name, self.projections[name])


@dataclass(frozen=True, slots=True)
class ReaderInputs:
    """The inputs of one projection of a layer, read batch by batch.

    Attributes:
        name: Short name of the projection: ``down_proj`` or ``o_proj``.
        linear: The projection.
    """

    _of: LayerInputs
    name: str
    linear: nn.Linear

    @property
    def layer(self) -> int:
        """The layer's index."""
        return self._of.index

    @property
    def weight(self) -> Tensor:
        """Its weight, ``(hidden, features)``, float64."""
        return in_float64(self.linear.weight.detach())

    @property
    def count(self) -> int:
        """Number of batches."""
        return self._of.count

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self._of.samples

    @no_grad
    def batches(self) -> Iterator[Tensor]:
        """Its inputs on every batch, each ``(samples, length, features)``, float64."""
        for seen, _ in projection_inputs(self._of.layer, self.linear, self._of.runs()):
            yield in_float64(seen)


def layer_inputs(session: Session) -> Iterator[LayerInputs]:
    """The inputs of every layer in turn, in the model as it is.

    Weights that are streamed are in memory until the next layer is asked for.

    Args:
        session: The session.

    Raises:
        CalibrationError: There is no calibration set.
        NumericalError: The model produces NaN or infinity.
    """
    batches, view = session.captured(), session.view
    for index, layer in enumerate(view.layers):
        with held(layer):
            yield LayerInputs(
                index,
                layer,
                view.projections(layer),
                session.samples,
                len(batches),
                partial(layer_runs, batches, index),
            )


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
