"""Completeness check of weights: every stored tensor is used, every parameter is stored.

The check does not rely on transformers, whose versions ignore surplus tensors or initialise missing
ones with at most a warning.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from slm_plugin.errors import ModelSourceError

HINT = "the checkpoint is incomplete, or its config does not fit its weights"
SHOWN = 3


def check_complete(
    source: str,
    stored: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    redundant: Collection[str] = (),
) -> None:
    """Compare the tensors of a source with the parameters of its model, by name and shape.

    Args:
        source: Name of the source in messages.
        stored: Names and shapes of the tensors that the source holds.
        wanted: Names and shapes of the parameters that the model has.
        redundant: Stored names that a reader knows to follow from other data; none is wanted.

    Raises:
        ModelSourceError: A parameter is not stored, a stored tensor belongs to none, or two
            shapes differ; the message names the first few and counts them all.
    """
    lost = sorted(wanted.keys() - stored.keys())
    idle = sorted(stored.keys() - wanted.keys() - set(redundant))
    misshapen = sorted(n for n in wanted.keys() & stored.keys() if stored[n] != wanted[n])
    said = []
    if lost:
        said.append(f"lacks {_counted(len(lost), 'weight')} that its config requires: {some(lost)}")
    if idle:
        said.append(
            f"holds {_counted(len(idle), 'weight')} that its config does not account for: "
            f"{some(idle)}"
        )
    if misshapen:
        first = misshapen[0]
        said.append(
            f"holds {_counted(len(misshapen), 'weight')} of another shape than its config asks "
            f"for: {first} is {list(stored[first])} instead of {list(wanted[first])}"
        )
    if said:
        raise ModelSourceError(f"{source} {'; '.join(said)}", hint=HINT)


def some(names: Sequence[str]) -> str:
    """The first few of many names."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
