"""Load a model and its tokenizer from a bundled alias, a folder, a GGUF file or the Hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from unicodedata import category

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from slm_plugin.errors import ModelSourceError
from slm_plugin.lazy import torch
from slm_plugin.models.bundled import BUNDLED, bundled_folder
from slm_plugin.models.carried_files import keep_carried, read_carried
from slm_plugin.models.checkpoint import read_checkpoint
from slm_plugin.models.encoders import is_encoder, read_encoder
from slm_plugin.models.families import family_of
from slm_plugin.models.families.family import Family
from slm_plugin.models.gguf import is_gguf, read_gguf
from slm_plugin.models.gguf.reading import Accept
from slm_plugin.models.hub import fetched
from slm_plugin.models.layerwise import build
from slm_plugin.models.placement import outgrows, place_layers, places
from slm_plugin.models.streaming import is_streamed, values
from slm_plugin.models.tokenizer import read_tokenizer
from slm_plugin.models.view import DecoderView
from slm_plugin.record import Record
from slm_plugin.texts import expanded, regular_file, shown, shown_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_DEVICE = re.compile(r"auto|cpu|mps|cuda(:[0-9]{1,3})?")
# As huggingface_hub has it, without what only a path could be.
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


def folder_of(source: ModelSource) -> Path | None:
    """The folder that a source means; None for a file.

    Raises:
        ModelSourceError: It cannot be found or fetched.
    """
    path = _path(source.id)
    if source.id in BUNDLED:
        return bundled_folder(source.id)
    if is_gguf(source.id):
        return None
    return path if path.is_dir() else fetched(source.id, source.revision, source.stack)


def check_device(device: str) -> str:
    """Return the name of a device, which this machine may have or not.

    Raises:
        ValueError: There is no such name.
    """
    if _DEVICE.fullmatch(device) is None:
        raise ValueError(f"should be auto, cpu, mps, cuda or as cuda:1, not '{shown(device)}'")
    return device


class ModelSource(Record):
    """Which model to load, and how."""

    id: Annotated[
        str,
        Field(
            min_length=1,
            description="smollm2-135m, gemma3-270m, a checkpoint folder, a .gguf file or a Hub id",
        ),
    ]
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Field(description="number format in memory; auto takes the checkpoint's"),
    ] = "auto"
    device: Annotated[
        str,
        AfterValidator(check_device),
        Field(
            description="auto takes CUDA, then MPS, then the CPU; a model that is larger than "
            "the GPU is spread over further GPUs, memory and disk",
            json_schema_extra={"pattern": f"^({_DEVICE.pattern})$"},
        ),
    ] = "auto"
    revision: Annotated[str | None, Field(description="branch, tag or commit on the Hub")] = None
    memory: Annotated[
        Literal["whole", "layerwise"],
        Field(
            description="whole holds the model in memory; layerwise reads one layer at a time "
            "from its safetensors files"
        ),
    ] = "whole"
    stack: Annotated[
        Literal["encoder", "decoder"] | None,
        Field(description="which stack of layers, where a model has two, as Whisper"),
    ] = None

    @field_validator("id")
    @classmethod
    def _readable(cls, name: str) -> str:
        if any(category(character) in ("Cc", "Cs") for character in name):
            raise ValueError("has characters that no name of a model has")
        return name

    @field_validator("memory")
    @classmethod
    def _streams(cls, memory: str, info: ValidationInfo) -> str:
        if memory == "layerwise" and is_gguf(str(info.data.get("id", ""))):
            raise ValueError("layerwise reads safetensors folders, not GGUF files")
        return memory


def load(
    source: ModelSource, accept: Accept = lambda family, config: None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load model and tokenizer; the model is in evaluation mode and its weights are finite.

    Only safetensors and GGUF are read and no code of the checkpoint is run. The tokenizer is
    None when the checkpoint has none.

    Args:
        source: Which model.
        accept: Called with the family and the content of the config before any weight is read;
            raises for a model that is not wanted.

    Raises:
        ModelSourceError: The model cannot be found, fetched or read, lacks weights, or holds NaN.
        UnsupportedModelError: Its architecture is not supported.
        MissingExtraError: It is a GGUF file and ``gguf`` is not installed.
    """
    device = pick_device(source.device)
    check_name(source.id)
    path = _path(source.id)
    if source.id in BUNDLED:
        model, tokenizer = _from_files(bundled_folder(source.id), source, accept)
    elif is_gguf(source.id):
        model, tokenizer = read_gguf(path, dtype=source.dtype, accept=accept)
    elif path.is_dir():
        model, tokenizer = _from_files(path, source, accept)
    else:
        model, tokenizer = _from_files(
            fetched(source.id, source.revision, source.stack), source, accept
        )
    DecoderView.of(model, source.stack)
    _refuse_non_finite(model, source.id)
    model.eval()
    return model if is_streamed(model) else model.to(device), tokenizer


class _Known(Exception):
    """Ends loading when the config is known."""


def facts_of(source: ModelSource) -> tuple[Family, Mapping[str, Any]]:
    """The family of a model and the content of its config, without reading weights.

    Raises:
        ModelSourceError: The model cannot be found, fetched or read.
        UnsupportedModelError: Its architecture is not supported.
    """
    found: list[tuple[Family, Mapping[str, Any]]] = []

    def accept(family: Family, config: Mapping[str, Any]) -> None:
        found.append((family, config))
        raise _Known

    with suppress(_Known):
        load(source, accept)
    return found[0]


def check_name(name: str) -> None:
    """Refuse the name of a model that is no alias, nothing on this disk and no id of the Hub.

    Raises:
        ModelSourceError: It is none of them.
    """
    path = _path(name)
    if name in BUNDLED or path.is_dir():
        return
    wrong = ""
    if is_gguf(name):
        wrong = regular_file(path)
    elif path.exists():
        wrong = f"{shown_path(path)} is neither a checkpoint folder nor a .gguf file"
    elif _HUB_ID.fullmatch(name) is None:
        wrong = f"there is no folder {shown_path(path)}"
    if wrong:
        raise ModelSourceError(wrong)


def _path(name: str) -> Path:
    """The path that a model's name would be, where it is one."""
    try:
        path = expanded(name)
        path.is_dir()
    except (OSError, ValueError) as error:
        raise ModelSourceError(
            f"cannot look for the model {shown(name)}: {getattr(error, 'strerror', None) or error}",
            hint="give a checkpoint folder, a .gguf file, a Hub id or a bundled alias",
        ) from error
    return path


def pick_device(device: str) -> torch.device:
    """The device that a recipe means.

    Raises:
        ModelSourceError: The device is not there.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    chosen = torch.device(device)
    there = {"cpu": True, "mps": torch.backends.mps.is_available()}.get(
        chosen.type, (chosen.index or 0) < torch.cuda.device_count()
    )
    if not there:
        raise ModelSourceError(f"this machine has no device '{device}'", hint="use device: auto")
    return chosen


def _from_files(
    folder: Path, source: ModelSource, accept: Accept
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    if is_encoder(folder):
        encoder = read_encoder(folder, source.id, source.stack, source.memory, source.dtype, accept)
        return encoder, None
    checkpoint = read_checkpoint(folder, source.id)
    family = family_of(checkpoint.configuration.architecture, source.stack)
    accept(family, checkpoint.config.to_dict())
    config = checkpoint.configuration.config
    tokenizer = read_tokenizer(folder, config, source.id, checkpoint.config.vocab_size)
    carried = read_carried(folder, family)
    device = pick_device(source.device)
    spread = source.memory == "whole" and source.device == "auto" and outgrows(device, checkpoint)
    model = build(checkpoint, source.dtype, device, streamed=source.memory == "layerwise" or spread)
    if spread:
        place_layers(model, places(model))
    keep_carried(model, carried)
    return model, tokenizer


def _refuse_non_finite(model: PreTrainedModel, name: str) -> None:
    for parameter_name, parameter in model.named_parameters():
        # The extremes of a tensor with NaN are NaN, and finding them takes no memory.
        if not torch.isfinite(torch.stack(torch.aminmax(values(parameter)))).all():
            raise ModelSourceError(
                f"{name} holds NaN or infinity in {parameter_name}",
                hint="the checkpoint is damaged or was saved in too narrow a format",
            )
