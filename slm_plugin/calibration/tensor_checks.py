"""Checks of calibration tensors: names, number formats, axes, masks, and what a model reads.

Each mistake is one line that names the tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slm_plugin.errors import CalibrationError
from slm_plugin.lazy import torch
from slm_plugin.texts import shown

if TYPE_CHECKING:
    from torch import Tensor

    from slm_plugin.models.view import DecoderView


@dataclass(frozen=True, slots=True)
class Form:
    """What a tensor of a name looks like.

    Attributes:
        axes: Names of its axes.
        floating: It holds sound; else whole numbers.
        masks: Name of the tensor whose padding it tells, the first one of those that is there.
    """

    axes: tuple[str, ...]
    floating: bool = False
    masks: tuple[str, ...] = ()


_TOKENS = ("samples", "tokens")
FORMS: Mapping[str, Form] = {
    "input_ids": Form(_TOKENS),
    "token_type_ids": Form(_TOKENS),
    "decoder_input_ids": Form(_TOKENS),
    "input_values": Form(("samples", "length"), floating=True),
    "input_features": Form(("samples", "mel bins", "frames"), floating=True),
    "attention_mask": Form(
        ("samples", "length"), masks=("input_values", "input_features", "input_ids")
    ),
    "decoder_attention_mask": Form(_TOKENS, masks=("decoder_input_ids",)),
}
SOUND = ("input_values", "input_features")


def check_forms(tensors: Mapping[str, Tensor], where: str) -> None:
    """Check all that can be told without a model.

    Raises:
        CalibrationError: A name is not known, a tensor has other axes or numbers than its name
            says, the numbers of samples differ, or a mask or a length is wrong.
    """
    if not tensors:
        raise CalibrationError(f"{where} holds no tensor", hint=f"known: {', '.join(FORMS)}")
    for name, tensor in tensors.items():
        _check_form(name, tensor, where)
    counts = {name: len(tensor) for name, tensor in tensors.items()}
    (first, samples), *others = counts.items()
    for name, count in others:
        if count != samples:
            raise CalibrationError(
                f"{where} holds {samples} samples of `{first}` and {count} of `{name}`",
                hint="axis 0 of every tensor is the samples",
            )
    for name in tensors:
        masked = next((other for other in FORMS[name].masks if other in tensors), None)
        if masked is not None:
            _check_mask(name, tensors[name], masked, tensors[masked], where)


def check_fit(tensors: Mapping[str, Tensor], view: DecoderView, where: str) -> None:
    """Check that a model reads these tensors.

    Raises:
        CalibrationError: One is missing or is no input of the model, or a size or an id is beyond
            what it reads.
    """
    family = view.family
    # Both stacks of a model may be calibrated from one file.
    foreign = {} if family.stack else {n: t for n, t in tensors.items() if n not in family.inputs}
    for name in foreign:
        raise CalibrationError(
            f"{where} holds `{name}`, which no {family.label} reads",
            hint=f"it reads {', '.join(family.inputs)}",
        )
    for name in family.inputs:
        if name not in tensors and not name.endswith(("mask", "type_ids")):
            raise CalibrationError(
                f"{where} lacks `{name}`, which a {family.label} reads",
                hint=f"it reads {', '.join(family.inputs)}",
            )
    sizes: dict[str, Any] = view.config.to_dict()
    for name, limit in (
        ("input_ids", "vocab_size"),
        ("decoder_input_ids", "vocab_size"),
        ("token_type_ids", "type_vocab_size"),
    ):
        if name in tensors and name in family.inputs:
            _check_ids(name, tensors[name], limit, sizes, where)
    for name, limit in (
        ("input_ids", "max_position_embeddings"),
        ("decoder_input_ids", "max_target_positions"),
    ):
        if name in family.inputs and tensors[name].shape[1] > sizes[limit]:
            raise CalibrationError(
                f"`{name}` of {where} has {tensors[name].shape[1]} tokens; the model has "
                f"{sizes[limit]} positions"
            )
    if "input_features" in family.inputs:
        _check_features(tensors["input_features"], sizes, where)
    if "input_values" in family.inputs:
        _check_waves(tensors, view, where)


def _check_form(name: str, tensor: Tensor, where: str) -> None:
    form = FORMS.get(name)
    if form is None:
        raise CalibrationError(
            f"{where} holds a tensor `{shown(name)}`, which is no input that is read",
            hint=f"known: {', '.join(FORMS)}",
        )
    if tensor.dim() != len(form.axes) or not tensor.numel():
        raise CalibrationError(
            f"`{name}` of {where} has the shape {tuple(tensor.shape)}",
            hint=f"its axes are ({', '.join(form.axes)})",
        )
    if tensor.is_complex() or tensor.is_floating_point() != form.floating:
        kind = "numbers with a fraction" if form.floating else "whole numbers"
        raise CalibrationError(f"`{name}` of {where} holds {tensor.dtype}, not {kind}")
    if form.floating and not torch.isfinite(tensor.float()).all():
        sample = next(n for n, one in enumerate(tensor) if not torch.isfinite(one.float()).all())
        raise CalibrationError(f"`{name}` of {where} holds NaN or infinity in sample {sample}")


def _check_mask(name: str, mask: Tensor, masked: str, tensor: Tensor, where: str) -> None:
    if mask.shape[1] != tensor.shape[-1]:
        raise CalibrationError(
            f"`{name}` of {where} has the length {mask.shape[1]}, `{masked}` has "
            f"{tensor.shape[-1]}",
            hint="a mask has one entry per position, before any layer shortens them",
        )
    if not ((mask == 0) | (mask == 1)).all():
        raise CalibrationError(f"`{name}` of {where} holds other values than 0 and 1")
    for sample, row in enumerate(mask.bool()):
        if not row.any():
            raise CalibrationError(f"sample {sample} of {where} is padding alone, by `{name}`")
        # Classes take the number of ones for the length of the sound.
        if masked in SOUND and not row[: int(row.sum())].all():
            raise CalibrationError(
                f"`{name}` of {where} has padding before or inside of sample {sample}",
                hint="padding stands behind the sound",
            )


def _check_ids(name: str, ids: Tensor, limit: str, sizes: Mapping[str, Any], where: str) -> None:
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= sizes[limit]:
        raise CalibrationError(
            f"`{name}` of {where} holds the id {least if least < 0 else most}; the model's "
            f"{limit} is {sizes[limit]}",
            hint="the ids were made with another tokenizer",
        )


def _check_features(features: Tensor, sizes: Mapping[str, Any], where: str) -> None:
    wanted = (sizes["num_mel_bins"], 2 * sizes["max_source_positions"])
    if tuple(features.shape[1:]) != wanted:
        raise CalibrationError(
            f"`input_features` of {where} has {features.shape[1]} mel bins and "
            f"{features.shape[2]} frames; the model reads {wanted[0]} and {wanted[1]}",
            hint="make them with the model's own feature extractor, padded to its length",
        )


def _check_waves(tensors: Mapping[str, Tensor], view: DecoderView, where: str) -> None:
    values = tensors["input_values"]
    mask = tensors.get("attention_mask")
    lengths = torch.full((len(values),), values.shape[1]) if mask is None else mask.sum(-1)
    made: Any = view.decoder._get_feat_extract_output_lengths
    for sample, frames in enumerate(made(lengths.cpu().long()).tolist()):
        if frames < 1:
            raise CalibrationError(
                f"sample {sample} of {where} has {int(lengths[sample])} values, too few for one "
                "frame",
                hint="leave it out",
            )
