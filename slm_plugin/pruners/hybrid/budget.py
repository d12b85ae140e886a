"""What a target allows of a shape: parameters, bytes or seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_plugin.errors import UnsupportedModelError
from slm_plugin.lazy import torch
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.pruners.hybrid.shapes import AnyShape, Shape, shapes_to_measure
from slm_plugin.pruners.hybrid.time_model import fit
from slm_plugin.pruners.hybrid.timing import measure
from slm_plugin.pruners.hybrid.workload import Workload
from slm_plugin.target import Target

if TYPE_CHECKING:
    from slm_plugin.session import Session

# What the time model has no term for.
_UNTIMED = {"hidden_size": "hidden channels", "queries_per_group": "query heads of KV groups"}


@dataclass(frozen=True, slots=True)
class Budget:
    """What a shape costs, and how much it may cost.

    Attributes:
        target: The target.
        dense: What the model costs as it is.
        whole: What a share in the target is a share of: the cost of the original model, or of the
            current one with ``of: current``.
        allowed: What a shape may cost.
        cost: The cost of a shape: parameters, seconds or bytes.
        unit: What it is counted in.
        limit: A shape must not cost more. Otherwise the nearest size is taken, as all strategies
            take the nearest number of parameters.
        notes: How the cost was found.
    """

    target: Target
    dense: float
    whole: float
    allowed: float
    cost: Callable[[AnyShape], float]
    unit: str
    limit: bool
    notes: tuple[str, ...] = ()

    def adherence(self, cost: float) -> float:
        """What is removed against what was asked for: the smaller of the two over the larger."""
        asked, removed = self.dense - self.allowed, self.dense - cost
        return min(asked, removed) / max(asked, removed)

    def said(self, cost: float) -> str:
        """A cost with its unit: whole numbers in full, times with six digits."""
        times = self.target.kind == "latency"
        return f"{cost:.6g} {self.unit}" if times else f"{cost:,.0f} {self.unit}"

    def missed_by(self, chosen: AnyShape, frontier: Iterable[AnyShape]) -> str:
        """Warning about a shape that misses the target, with how many others would be nearer."""
        adherence = self.adherence(self.cost(chosen))
        nearer = sum(self.adherence(self.cost(one)) > adherence for one in frontier)
        return (
            f"adherence {adherence:.3f}: {nearer or 'no'} other shape{'s' * (nearer > 1)} of the "
            "frontier would be nearer to the target"
        )


def parameter_budget(target: Target, original: Dimensions, current: Dimensions) -> Budget:
    """The parameters that a target leaves.

    Args:
        target: A ratio or a number of parameters.
        original: Dimensions of the model as it was loaded.
        current: Dimensions of the model as it is.
    """
    dense = current.parameters
    return Budget(
        target,
        dense=dense,
        whole=original.parameters if target.of == "original" else dense,
        allowed=dense - target.parameters_to_remove(original.parameters, dense),
        cost=lambda shape: shape.of_model(current).parameters,
        unit="parameters",
        limit=False,
    )


def memory_budget(
    target: Target, current: Dimensions, workload: Workload, dtype: torch.dtype
) -> Budget:
    """The bytes of weights and KV cache that a target allows.

    Args:
        target: A number of bytes.
        current: Dimensions of the model as it is.
        workload: Lengths and batch of the cache.
        dtype: Number format of the model.
    """
    assert target.memory is not None
    dense = workload.memory(current, dtype)
    return Budget(
        target,
        dense=dense,
        whole=dense,
        allowed=target.memory,
        cost=lambda shape: workload.memory(shape.of_model(current), dtype),
        unit="bytes",
        limit=True,
    )


def time_budget(session: Session, target: Target, workload: Workload, *, kv_groups: bool) -> Budget:
    """The seconds that a target allows, by a time model of measured shapes.

    The time of the original model is the one that this time model gives for its shape.

    Args:
        session: Holds the model.
        target: A share of its time.
        workload: What is timed.
        kv_groups: KV groups may be removed.

    Raises:
        SlmError: The shapes cannot be timed; see `timing.measure`.
        UnsupportedModelError: The original model differs in more than its shape.
    """
    latency, current = target.latency, session.view.dimensions()
    assert latency is not None
    original = _original_shape(session.original, current)
    shapes = shapes_to_measure(current, kv_groups=kv_groups)
    found = fit(
        {
            shape: times.of(latency.phase)
            for shape, times in measure(session, workload, shapes).items()
        }
    )
    whole = found.model.seconds(original)
    return Budget(
        target,
        dense=found.model.seconds(Shape.of(current)),
        whole=whole,
        allowed=latency.share * whole,
        cost=found.model.seconds,
        unit=f"seconds of {latency.phase}",
        limit=True,
        notes=(
            f"{latency.phase} times by {len(shapes)} measured shapes ({workload.backend}, batch "
            f"{workload.batch_size}, {workload.prompt_tokens} + {workload.new_tokens} tokens), "
            f"largest residual of the time model {found.largest:.1%}",
        ),
    )


def _original_shape(original: Dimensions, current: Dimensions) -> Shape:
    """The shape of the model before earlier stages.

    Raises:
        UnsupportedModelError: They changed more than the shape, so that no time is modelled.
    """
    for name, what in _UNTIMED.items():
        if getattr(original, name) != getattr(current, name):
            raise UnsupportedModelError(
                f"an earlier stage removed {what}, and the time of the original model is known "
                "for models that differ in layers, MLP channels and KV groups alone",
                hint="give a ratio, a number of parameters or the memory as the target",
            )
    return Shape.of(original)
