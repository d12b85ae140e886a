"""Warnings where a Gram matrix of inputs has more columns than tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from slm_plugin.calibration.held_out import held_out_count

if TYPE_CHECKING:
    from slm_plugin.session import Session


def score_caution(session: Session, score: str, columns: int) -> Iterator[str]:
    """A warning where a score ranks more columns than there are tokens.

    Args:
        session: The session, with a calibration set of token ids.
        score: Name of the score.
        columns: Columns of the widest projection that it ranks.
    """
    tokens = 0 if session.calibration is None else session.calibration.numel()
    if 0 < tokens < columns:
        yield (
            f"`{score}` ranks {columns:,} columns on {tokens:,} tokens, which cannot tell all "
            "columns apart: raise `samples` or `length`"
        )


def fit_caution(session: Session, columns: int) -> Iterator[str]:
    """A warning where a restoration fits more columns than there are tokens to fit on.

    Args:
        session: The session, with a calibration set of token ids.
        columns: Columns of the widest projection that is fitted.
    """
    if session.calibration is None:
        return
    samples, length = session.calibration.shape
    fitted = (samples - held_out_count(samples)) * length
    if fitted < columns:
        yield (
            f"the restoration fits {columns:,} columns on {fitted:,} tokens (every fifth sample is "
            "held out), so it depends on the ridge: raise `samples` or `length`"
        )
