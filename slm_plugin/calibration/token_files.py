"""Token ids in files, ``(samples, length)``: JSON, or the one tensor of a safetensors file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from slm_plugin.errors import CalibrationError
from slm_plugin.lazy import torch
from slm_plugin.texts import read_text, shown, shown_path

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_JSON = 1 << 32
INTEGERS = ("torch.uint8", "torch.int8", "torch.int16", "torch.int32", "torch.int64")
# PyTorch holds these, and computes nothing with them.
UNSIGNED = ("torch.uint16", "torch.uint32", "torch.uint64")
_WANTED = "token ids are whole numbers of shape (samples, length)"


def stored_ids(path: Path) -> Tensor:
    """The ids as they lie in a ``.json`` or ``.safetensors`` file.

    Raises:
        CalibrationError: The file cannot be read or holds something else.
    """
    return _json_ids(path) if path.suffix.lower() == ".json" else _only_tensor(path)


def _json_ids(path: Path) -> Tensor:
    text = read_text(path, "the token ids", CalibrationError, LARGEST_JSON)
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or "it nests too deep, or a number is too long"
        raise CalibrationError(
            f"cannot read token ids from {shown_path(path)}: {reason}", hint=_WANTED
        ) from error
    for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
        wrong = _wrong_row(row, rows[0] if isinstance(rows, list) else None)
        if wrong:
            raise CalibrationError(f"{shown_path(path)}: sample {number} {wrong}", hint=_WANTED)
    return torch.tensor(rows, dtype=torch.int64)


def _wrong_row(row: object, first: object) -> str:
    """What is wrong with one sample of a JSON file; empty where nothing is."""
    if not isinstance(row, list):
        return "is no list of token ids"
    odd = next((one for one in row if type(one) is not int or not 0 <= one < 2**63), None)
    if odd is not None or None in row:
        return f"holds {shown(json.dumps(odd), 24)}, which is no token id"
    if isinstance(first, list) and len(row) != len(first):
        return f"has {len(row)} token ids, the first one {len(first)}"
    return ""


def _only_tensor(path: Path) -> Tensor:
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except Exception as error:
        # The reader has errors of its own for every way in which a file is damaged.
        raise CalibrationError(
            f"cannot read token ids from {shown_path(path)}: {shown(error, 200)}"
        ) from error
    if "input_ids" not in tensors and len(tensors) != 1:
        raise CalibrationError(
            f"{shown_path(path)} holds {len(tensors)} tensors and none is called 'input_ids'"
        )
    found = tensors.get("input_ids", next(iter(tensors.values())))
    return _signed(found, path) if str(found.dtype) in UNSIGNED else found


def _signed(tokens: Tensor, path: Path) -> Tensor:
    signed = tokens.to(torch.int64)
    if signed.numel() and (least := int(signed.min())) < 0:
        raise CalibrationError(
            f"{shown_path(path)} holds token id {least + 2**64}", hint="no vocabulary is so large"
        )
    return signed


def refuse_ids(tokens: Tensor, source: str) -> None:
    """Refuse what no model takes for token ids.

    Raises:
        CalibrationError: They are of another shape, or no whole numbers from 0 on.
    """
    if tokens.dim() != 2 or str(tokens.dtype) not in INTEGERS:
        raise CalibrationError(
            f"{source} holds {tokens.dtype} of shape {tuple(tokens.shape)}", hint=_WANTED
        )
    if tokens.numel() == 0 or tokens.shape[1] < 2:
        raise CalibrationError(f"{source} gives samples of fewer than two tokens")
    if int(tokens.min()) < 0:
        raise CalibrationError(f"{source} holds token id {int(tokens.min())}", hint=_WANTED)
