"""Which positions of hidden states count, and statistics over those alone.

Samples of sound or text are padded to one length. What a model computes at padding is no part of
any statistic; every strategy takes its means, cosines and angles through the functions here.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from slm_plugin.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from slm_plugin.models.view import DecoderView


def valid_frames(view: DecoderView, given: Mapping[str, Tensor], frames: int) -> Tensor | None:
    """Hidden frames that are no padding, ``(samples, frames)``; None where all count.

    Args:
        view: The model.
        given: Its inputs, on its device.
        frames: Number of frames behind what shortens the input.
    """
    mask = given.get(view.family.inputs[1])
    if mask is None:
        return None
    if view.family.frames == "convolved":
        made: Any = view.decoder._get_feature_vector_attention_mask
        # An adapter behind the layers shortens once more, where a class can have one.
        own = {"add_adapter": False} if "add_adapter" in inspect.signature(made).parameters else {}
        found: Tensor = made(frames, mask, **own)
        return found.bool()
    if view.family.frames == "halved":
        return mask.bool()[:, ::2]
    return mask.bool()


def mean_over(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over the frames of every sample that count.

    Args:
        values: One number per frame, ``(samples, frames)``; at padding it may be NaN.
        valid: ``(samples, frames)``; None for all.

    Returns:
        ``(samples,)``.
    """
    if valid is None:
        return values.mean(-1)
    return torch.where(valid, values, 0).sum(-1) / valid.sum(-1)


def silenced(hidden: Tensor, valid: Tensor | None) -> Tensor:
    """Hidden states with zeros at padding, which add nothing to sums over frames.

    Args:
        hidden: ``(samples, frames, hidden)``.
        valid: ``(samples, frames)``; None for all.
    """
    return hidden if valid is None else torch.where(valid.unsqueeze(-1), hidden, 0)


def attending(
    hidden: Tensor, valid: Tensor | None, *, sees_all: bool
) -> tuple[Tensor, Tensor | None]:
    """The positions that attend to all others of their sample, and which of them count.

    Args:
        hidden: ``(samples, frames, hidden)``.
        valid: ``(samples, frames)``; None for all.
        sees_all: Every position attends to all others; else only the last one that counts.

    Returns:
        ``(samples, positions, hidden)`` and ``(samples, positions)``.
    """
    if sees_all:
        return hidden, valid
    if valid is None:
        return hidden[:, -1:], None
    places = torch.arange(hidden.shape[1], device=hidden.device)
    last = torch.where(valid, places, 0).amax(-1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last].unsqueeze(1), None
