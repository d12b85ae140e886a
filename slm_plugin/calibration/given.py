"""Calibration data that a caller has in memory: texts, token ids, or batches of a data loader."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from slm_plugin.calibration.samples import DEFAULT_LENGTH, check_ids
from slm_plugin.errors import CalibrationError
from slm_plugin.lazy import torch
from slm_plugin.models.view import DecoderView

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GIVEN = "the calibration data"
HINT = (
    "give a list of texts, token ids of shape (samples, length), an iterable of batches with "
    "`input_ids`, or a source as in a recipe, such as {'source': 'builtin'}"
)

# Beginnings of the names of inputs that hold images.
PIXELS = ("pixel_", "image")


def token_ids(
    given: object, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> Tensor:
    """Token ids, ``(samples, length)``, on the CPU, of data that is in memory.

    Args:
        given: Texts, which are joined by blank lines and cut into samples of 128 tokens (of fewer
            when there are fewer); or token ids of shape ``(samples, length)`` as a tensor, an
            array or lists; or an iterable of batches, each such ids or a mapping with
            ``input_ids``, as a data loader yields; or one such mapping. All of it is used.
        model: Bounds the ids and the length.
        tokenizer: Needed for texts.

    Raises:
        CalibrationError: It is something else, empty, padded, or does not fit the model.
    """
    if isinstance(given, torch.Tensor):
        tokens = given
    elif hasattr(given, "__array__"):
        tokens = torch.as_tensor(given)
    elif isinstance(given, Mapping) and "input_ids" in given:
        tokens = _batch(given, 0)
    elif isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping):
        tokens = _listed(list(given), model, tokenizer)
    else:
        raise CalibrationError(f"{GIVEN} is {_kind(given)}", hint=HINT)
    tokens = tokens.detach().cpu()
    check_ids(tokens, GIVEN, model)
    return tokens.to(torch.int64)


def _listed(
    given: list[Any], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> Tensor:
    if not given:
        raise CalibrationError(f"{GIVEN} is empty", hint=HINT)
    if all(isinstance(one, str) for one in given):
        return _from_texts(given, model, tokenizer)
    if any(isinstance(one, str) for one in given):
        number, other = next((n, x) for n, x in enumerate(given) if not isinstance(x, str))
        raise CalibrationError(f"item {number} of {GIVEN} is {_kind(other)}, others are texts")
    batches = [_batch(one, number) for number, one in enumerate(given)]
    length = batches[0].shape[-1]
    for number, batch in enumerate(batches):
        if batch.shape[-1] != length:
            raise CalibrationError(
                f"batch {number} of {GIVEN} has samples of {batch.shape[-1]} tokens, the first "
                f"one of {length}",
                hint="all samples need one length; texts are cut into such samples",
            )
    return torch.cat(batches)


def _from_texts(
    texts: list[str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> Tensor:
    if tokenizer is None:
        raise CalibrationError(
            f"{GIVEN} is text, and there is no tokenizer", hint="pass the model's tokenizer"
        )
    ids = tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"]
    length = min(DEFAULT_LENGTH, DecoderView.of(model).config.max_position_embeddings, len(ids))
    if length < 2:
        raise CalibrationError(f"{GIVEN} has fewer than two tokens", hint="give more text")
    samples = len(ids) // length
    return torch.tensor(ids[: samples * length]).reshape(samples, length)


def _batch(one: Any, number: int) -> Tensor:
    """Token ids of one batch, ``(samples, length)``; one sample may come without its first axis."""
    where = f"batch {number} of {GIVEN}"
    mask = None
    if isinstance(one, Mapping):
        if "input_ids" not in one:
            raise CalibrationError(
                f"{where} has no `input_ids`; it has {', '.join(map(str, one)) or 'nothing'}",
                hint=HINT,
            )
        seen = [str(name) for name in one if str(name).startswith(PIXELS)]
        if seen:
            raise CalibrationError(
                f"{where} holds `{seen[0]}`, and text alone calibrates",
                hint="leave out images, and samples whose text refers to them",
            )
        one, mask = one["input_ids"], one.get("attention_mask")
    try:
        ids = torch.as_tensor(one)
        padded = mask is not None and not bool(torch.as_tensor(mask).all())
    except (TypeError, ValueError, RuntimeError) as error:
        raise CalibrationError(f"{where} is {_kind(one)}", hint=HINT) from error
    if ids.dim() not in (1, 2):
        raise CalibrationError(f"{where} is {_kind(one)} of shape {tuple(ids.shape)}", hint=HINT)
    if padded:
        raise CalibrationError(
            f"{where} is padded, and padding would count as text",
            hint="give samples of one length, or texts, which are cut into such samples",
        )
    return ids.unsqueeze(0) if ids.dim() == 1 else ids


def _kind(value: object) -> str:
    return f"of type {type(value).__name__}"
