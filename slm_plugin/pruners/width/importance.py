"""Importance of MLP channels and heads, by weight magnitude or by Taylor expansion."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from slm_plugin.errors import NumericalError
from slm_plugin.lazy import torch
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.models.streaming import values
from slm_plugin.models.view import DecoderView
from slm_plugin.plans import UnitScores
from slm_plugin.pruners.gradients import gradient_moments, loss_gradients
from slm_plugin.pruners.width.heads import HeadUnit, counted_units
from slm_plugin.surgery.groups import axis, members

if TYPE_CHECKING:
    from torch import Tensor

SIGNIFICANT_DIGITS = 6


def magnitude(view: DecoderView, heads: HeadUnit = "kv_group") -> tuple[UnitScores, ...]:
    """Score units by the sum of ``w**2`` over all weights of their group, without biases.

    Needs no data, and ignores how strongly a unit is activated.

    Args:
        view: The model.
        heads: Which heads are scored beside MLP channels.

    Raises:
        NumericalError: A weight is NaN or infinite.

    Source: Li et al. 2017 (arXiv 1608.08710), section 3.1, over the coupled group of Fang et al.
        2023 (arXiv 2301.12900), section 3.3.
    """
    saliences = (
        {name: values(linear.weight).float().square() for name, linear in modules.items()}
        for modules in map(view.projections, view.layers)
    )
    return tuple(_score_layers(saliences, view.dimensions(), heads))


def taylor(
    view: DecoderView, batches: Iterable[Tensor], heads: HeadUnit = "kv_group"
) -> tuple[UnitScores, ...]:
    """Score units by the sum of ``|w * dL/dw|`` over all weights of their group.

    To first order this bounds the change of the loss when the unit is removed: each term is the
    change when one weight becomes zero. The gradient is that of the mean loss over all samples, so
    contributions of different samples may cancel before the absolute value is taken.

    Args:
        view: The model, in evaluation mode.
        batches: Calibration token ids, each ``(samples, length)``.
        heads: Which heads are scored beside MLP channels.

    Raises:
        NumericalError: The loss or a score is NaN or infinite.

    Source: Ma et al. 2023, LLM-Pruner (arXiv 2305.11627), section 3.2, element-wise importance
        of first order (``param_first`` of the released code).
    """
    gradients = loss_gradients(view, batches)
    saliences = (
        {name: (linear.weight.detach() * gradient[name]).abs() for name, linear in modules.items()}
        for modules, gradient in zip(map(view.projections, view.layers), gradients, strict=True)
    )
    return tuple(_score_layers(saliences, view.dimensions(), heads))


def taylor_sum(
    view: DecoderView, batches: Iterable[Tensor], heads: HeadUnit = "kv_group"
) -> tuple[UnitScores, ...]:
    """Score units by ``|sum of w * dL/dw|`` over each row or column of their group.

    The values of one row or column may cancel: it is the change of the loss, to first order, when
    the whole line becomes zero. The lines of a group are added.

    Raises:
        NumericalError: The loss or a score is NaN or infinite.

    Source: LLM-Pruner (arXiv 2305.11627), section 3.2, vector-wise importance (``vectorize``).
    """
    gradients = loss_gradients(view, batches)
    saliences = (
        {name: linear.weight.detach() * gradient[name] for name, linear in modules.items()}
        for modules, gradient in zip(map(view.projections, view.layers), gradients, strict=True)
    )
    return tuple(_score_layers(saliences, view.dimensions(), heads, whole_lines=True))


def taylor_second(
    view: DecoderView,
    batches: Iterable[Tensor],
    heads: HeadUnit = "kv_group",
    *,
    mixed: bool = False,
) -> tuple[UnitScores, ...]:
    """Score units by the second-order term of the loss: the sum of ``w^2 F`` over their weights.

    F is the diagonal of the empirical Fisher matrix, the mean over samples of the squared gradient,
    used in place of the diagonal of the Hessian.

    Args:
        view: The model, in evaluation mode.
        batches: Calibration token ids, each ``(samples, length)``.
        heads: Which heads are scored beside MLP channels.
        mixed: Sum ``|w g - w^2 F / 2|`` instead, with the first-order term.

    Raises:
        NumericalError: The loss or a score is NaN or infinite.

    Source: LLM-Pruner (arXiv 2305.11627), equation 5, element-wise importance of second and of
        mixed order (``param_second`` and ``param_mix`` of the released code).
    """
    means, squares = gradient_moments(view, batches)

    def salience(weight: Tensor, mean: Tensor, square: Tensor) -> Tensor:
        second = weight.float().square() * square
        return (weight.float() * mean - second / 2).abs() if mixed else second

    saliences = (
        {
            name: salience(linear.weight.detach(), mean[name], square[name])
            for name, linear in modules.items()
        }
        for modules, mean, square in zip(
            map(view.projections, view.layers), means, squares, strict=True
        )
    )
    return tuple(_score_layers(saliences, view.dimensions(), heads))


def kept_units(scores: Sequence[float], removed: int) -> tuple[int, ...]:
    """Units that remain when the lowest-scored are removed; ties remove the lowest index first."""
    order = sorted(range(len(scores)), key=scores.__getitem__)
    return tuple(sorted(order[removed:]))


def standardised(scores: Sequence[float]) -> Tensor:
    """The scores moved and scaled to mean 0 and deviation 1, ``(units,)``, float64."""
    values = torch.tensor(scores, dtype=torch.float64)
    deviation = values.std(correction=0)
    # Equal scores stand at their mean.
    return (values - values.mean()) / deviation if deviation > 0 else torch.zeros_like(values)


def _score_layers(
    saliences: Iterable[Mapping[str, Tensor]],
    dimensions: Dimensions,
    heads: HeadUnit,
    *,
    whole_lines: bool = False,
) -> Iterator[UnitScores]:
    for layer, salience in enumerate(saliences):
        here = dimensions.of_layer(layer)
        lines = {name: _per_line(name, value) for name, value in salience.items()}
        if whole_lines:
            lines = {name: line.abs() for name, line in lines.items()}
        size = here.intermediate_size
        every = members("channels", range(size), here)
        of_channels = [lines[name][list(own)].view(-1, size) for name, own in every.items()]
        channels = torch.cat(of_channels).sum(0)
        kind, count, _ = counted_units(heads, here)
        of_heads = torch.stack([_unit_sum(lines, kind, unit, here) for unit in range(count)])
        yield UnitScores(layer=layer, unit="mlp_channel", scores=rounded(channels, layer))
        yield UnitScores(layer=layer, unit=heads, scores=rounded(of_heads, layer))


def _per_line(projection: str, salience: Tensor) -> Tensor:
    """Sum over the other axis: one value per row, or per column of a projection that reads."""
    return salience.float().sum(1 - axis(projection))


def _unit_sum(lines: Mapping[str, Tensor], kind: str, unit: int, dimensions: Dimensions) -> Tensor:
    own = members(kind, (unit,), dimensions)
    return torch.stack([lines[name][list(indices)].sum() for name, indices in own.items()]).sum()


def rounded(
    scores: Tensor, layer: int | None, digits: int = SIGNIFICANT_DIGITS
) -> tuple[float, ...]:
    """Scores for a plan, rounded to be readable and free of rounding noise.

    Args:
        scores: The scores, ``(units,)``.
        layer: Whose they are; None for those of the residual stream.
        digits: Significant digits.

    Raises:
        NumericalError: One is NaN or infinite.
    """
    if not torch.isfinite(scores).all():
        place = "the residual stream" if layer is None else f"layer {layer}"
        raise NumericalError(
            f"{place} has scores that are NaN or infinite",
            hint="check the model's weights, or load it in float32",
        )
    return tuple(float(f"{score:.{digits}g}") for score in scores.tolist())
