"""Load a model and its tokenizer from a bundled alias, a folder, a GGUF file or the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import transformers
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from safetensors import SafetensorError

from slm_plugin.errors import ModelSourceError
from slm_plugin.models.bundled import BUNDLED, bundled_folder
from slm_plugin.models.gguf import is_gguf, read_gguf
from slm_plugin.models.layerwise import build, checkpoint_folder
from slm_plugin.models.placement import outgrows, places, settle
from slm_plugin.models.streaming import is_streamed, values
from slm_plugin.models.view import DecoderView

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class ModelSource(BaseModel):
    """Which model to load, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Annotated[
        str,
        Field(
            min_length=1, description="smollm2-135m, a checkpoint folder, a .gguf file or a Hub id"
        ),
    ]
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Field(description="number format in memory; auto takes the checkpoint's"),
    ] = "auto"
    device: Annotated[
        str,
        Field(
            pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
            description="auto takes CUDA, then MPS, then the CPU; a model that is larger than "
            "the GPU is spread over further GPUs, memory and disk",
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

    @field_validator("memory")
    @classmethod
    def _streams(cls, memory: str, info: ValidationInfo) -> str:
        if memory == "layerwise" and is_gguf(str(info.data.get("id", ""))):
            raise ValueError("layerwise reads safetensors folders, not GGUF files")
        return memory


def load(source: ModelSource) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load model and tokenizer; the model is in evaluation mode and its weights are finite.

    Only safetensors and GGUF are read and no code of the checkpoint is run. The tokenizer is
    None when the checkpoint has none.

    Raises:
        ModelSourceError: The model cannot be found, fetched or read, lacks weights, or holds NaN.
        UnsupportedModelError: Its architecture is not supported.
        MissingExtraError: It is a GGUF file and ``gguf`` is not installed.
    """
    device = pick_device(source.device)
    path = Path(source.id).expanduser()
    if source.id in BUNDLED:
        model, tokenizer = _from_pretrained(str(bundled_folder(source.id)), source)
    elif is_gguf(source.id):
        if not path.is_file():
            raise ModelSourceError(f"there is no file {path}")
        model, tokenizer = read_gguf(path, dtype=source.dtype)
    elif path.is_dir():
        model, tokenizer = _from_pretrained(str(path), source)
    elif source.id.startswith((".", "/", "~")) or source.id.count("/") > 1:
        raise ModelSourceError(f"there is no folder {path}")
    else:
        model, tokenizer = _from_pretrained(source.id, source)
    DecoderView.of(model)
    _refuse_non_finite(model, source.id)
    model.eval()
    return model if is_streamed(model) else model.to(device), tokenizer


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


def _from_pretrained(
    name: str, source: ModelSource
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = {"revision": source.revision} if source.revision else {}
    try:
        config = AutoConfig.from_pretrained(name, **settings)
        _restore_rope(config)
        device = pick_device(source.device)
        if source.memory == "layerwise" or (source.device == "auto" and device.type == "cuda"):
            folder = checkpoint_folder(name, settings)
            spread = source.memory == "whole" and outgrows(device, folder)
            if source.memory == "layerwise" or spread:
                streamed = build(folder, config, source.dtype, device)
                if spread:
                    settle(streamed, places(streamed))
                return streamed, _tokenizer(str(folder), {})
        model, info = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=source.dtype,
            use_safetensors=True,
            output_loading_info=True,
            **settings,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise _explained(name, error) from error
    lost = sorted(info["missing_keys"])
    if lost:
        raise ModelSourceError(
            f"{name} lacks {len(lost)} weights of a {type(model).__name__}, first {lost[0]}",
            hint="the checkpoint is incomplete or its config does not fit its weights",
        )
    return model, _tokenizer(name, settings)


def _tokenizer(name: str, settings: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    from transformers import AutoTokenizer

    folder = Path(name)
    if folder.is_dir() and not any(folder.glob("*token*")) and not any(folder.glob("vocab.*")):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, **settings)
    except (OSError, ValueError, KeyError) as error:
        raise ModelSourceError(
            f"cannot read the tokenizer of {name}: {_first_line(error)}"
        ) from error
    return tokenizer


def _restore_rope(config: PretrainedConfig) -> None:
    """Take ``rope_theta`` from where transformers 5 writes it.

    transformers 4 silently falls back to 10,000 when only ``rope_parameters`` is there.
    """
    written = getattr(config, "rope_parameters", None)
    if transformers.__version__.startswith("4.") and isinstance(written, dict):
        config.rope_theta = written.get("rope_theta", config.rope_theta)
        if written.get("rope_type", "default") != "default":
            config.rope_scaling = {k: v for k, v in written.items() if k != "rope_theta"}


def _explained(name: str, error: Exception) -> ModelSourceError:
    if Path(name).is_dir():
        return ModelSourceError(
            f"cannot load the checkpoint {name}: {_first_line(error)}",
            hint="the folder needs config.json and safetensors weights of one model",
        )
    return ModelSourceError(
        f"cannot fetch '{name}' from the Hugging Face Hub: {_first_line(error)}",
        hint="check the name and the network, or give a local folder, a .gguf file or "
        f"{', '.join(sorted(BUNDLED))}",
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _refuse_non_finite(model: PreTrainedModel, name: str) -> None:
    for parameter_name, parameter in model.named_parameters():
        # The extremes of a tensor with NaN are NaN, and finding them takes no memory.
        if not torch.isfinite(torch.stack(torch.aminmax(values(parameter)))).all():
            raise ModelSourceError(
                f"{name} holds NaN or infinity in {parameter_name}",
                hint="the checkpoint is damaged or was saved in too narrow a format",
            )
