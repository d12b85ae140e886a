"""Calibration by tensors: what a processor gives to an encoder, from a file or from memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_plugin.calibration.tensor_checks import FORMS, check_fit, check_forms
from slm_plugin.errors import CalibrationError
from slm_plugin.lazy import torch
from slm_plugin.texts import shown, shown_path

if TYPE_CHECKING:
    from torch import Tensor

    from slm_plugin.models.view import DecoderView

GIVEN = "the calibration data"
# What training data hold beside the inputs.
TARGETS = ("labels", "label", "label_ids")


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """Inputs of a model, each by the name of the forward argument; axis 0 is the samples.

    Attributes:
        batches: Mappings of tensors on the CPU; samples of one batch have one padded length.
    """

    batches: tuple[Mapping[str, Tensor], ...]

    def __len__(self) -> int:
        return sum(_samples(batch) for batch in self.batches)

    @property
    def length(self) -> int:
        """Positions of the longest padded sample, before any layer shortens it."""
        return max(tensor.shape[-1] for batch in self.batches for tensor in batch.values())

    def split(self, positions: int) -> Iterator[dict[str, Tensor]]:
        """Batches of at most this many positions, or of one sample each."""
        for batch in self.batches:
            longest = max(tensor.shape[-1] for tensor in batch.values())
            size = max(1, positions // longest)
            for start in range(0, _samples(batch), size):
                yield {name: tensor[start : start + size] for name, tensor in batch.items()}

    def digest(self) -> str:
        """SHA-256 over names, formats, shapes and bytes."""
        found = hashlib.sha256()
        for batch in self.batches:
            for name, tensor in sorted(batch.items()):
                found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        return found.hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; their forms are checked, not whether they fit a model.

    Raises:
        CalibrationError: The file cannot be read, or holds something else.
    """
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except Exception as error:
        # The reader has errors of its own for every way in which a file is damaged.
        raise CalibrationError(
            f"cannot read tensors from {shown_path(path)}: {shown(error, 200)}"
        ) from error
    check_forms(tensors, shown_path(path))
    return tensors


def stored_inputs(path: Path, view: DecoderView) -> Inputs:
    """The tensors of a file, as inputs of a model.

    Raises:
        CalibrationError: The file cannot be read, or what it holds does not fit the model.
    """
    return _fitted([(shown_path(path), read_tensors(path))], view)


def given_inputs(given: object, view: DecoderView) -> Inputs:
    """What a caller has in memory, as inputs of a model.

    Args:
        given: A mapping of tensors, or an iterable of such mappings, as a data loader yields;
            labels among them are left out.
        view: The model.

    Raises:
        CalibrationError: It is something else, or does not fit the model.
    """
    names = " and ".join(f"`{name}`" for name in view.family.inputs[:2])
    hint = f"give a mapping of tensors by their names, as {names}, or an iterable of such mappings"
    if isinstance(given, Mapping):
        listed: list[Any] = [given]
    elif isinstance(given, Iterable) and not isinstance(given, str | bytes | torch.Tensor):
        listed = list(given)
    else:
        raise CalibrationError(f"{GIVEN} is of type {type(given).__name__}", hint=hint)
    if not listed:
        raise CalibrationError(f"{GIVEN} is empty", hint=hint)
    found = []
    for number, batch in enumerate(listed):
        where = GIVEN if isinstance(given, Mapping) else f"batch {number} of {GIVEN}"
        if not isinstance(batch, Mapping):
            raise CalibrationError(f"{where} is of type {type(batch).__name__}", hint=hint)
        tensors = {str(n): _tensor(t, str(n), where) for n, t in batch.items() if n not in TARGETS}
        check_forms(tensors, where)
        found.append((where, tensors))
    return _fitted(found, view)


def _fitted(given: list[tuple[str, dict[str, Tensor]]], view: DecoderView) -> Inputs:
    """What the model reads of it, masks and ids as whole numbers of 64 bits."""
    batches = []
    for where, tensors in given:
        check_fit(tensors, view, where)
        batches.append(
            {
                name: tensor.detach().cpu().to(None if FORMS[name].floating else torch.int64)
                for name, tensor in tensors.items()
                if name in view.family.inputs
            }
        )
    return Inputs(tuple(batches))


def _tensor(value: Any, name: str, where: str) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CalibrationError(
            f"`{name}` of {where} is of type {type(value).__name__}, no tensor",
            hint="call the processor with return_tensors='pt'",
        ) from error


def _samples(batch: Mapping[str, Tensor]) -> int:
    return len(next(iter(batch.values())))
