"""Fingerprint of a model: architecture, number format and a hash over all weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from slm_plugin.lazy import torch
from slm_plugin.models.streaming import values
from slm_plugin.models.towers import common_name
from slm_plugin.record import Record

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Fingerprint(Record):
    """Identity of a model in memory; equal fingerprints mean equal bytes."""

    architecture: str
    dtype: str
    weights: str


def fingerprint(
    model: PreTrainedModel, replaced: Mapping[str, Tensor] | None = None
) -> Fingerprint:
    """Hash names, formats, shapes and bytes of all parameters (tied ones once), in name order.

    A vision model that one release has one module further in than another gives the same hash.
    Streamed weights are read one at a time and give the same hash as those in memory.

    Args:
        model: The model.
        replaced: Parameters to hash in place of the model's, by their names in it.
    """
    digest = hashlib.sha256()
    own: dict[str, Tensor] = {**dict(model.named_parameters()), **(replaced or {})}
    named = {common_name(name): parameter for name, parameter in own.items()}
    for name, parameter in sorted(named.items()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        flat = values(parameter).cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return Fingerprint(
        architecture=type(model).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        weights=f"sha256:{digest.hexdigest()}",
    )
