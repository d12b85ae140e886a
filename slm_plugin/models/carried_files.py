"""Files beside a model's weights that belong into what is made of it: processors and licences.

They are read with the model, so that a damaged one is found before any work, and written beside a
checkpoint. No class reads them here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from slm_plugin.errors import ModelSourceError
from slm_plugin.models.configuration import CODE
from slm_plugin.models.families.family import Family
from slm_plugin.models.json_file import read_object
from slm_plugin.models.weight_files import is_inside
from slm_plugin.progress import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What AutoProcessor and AutoFeatureExtractor read.
PROCESSOR = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "feature_extractor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)
# What AutoTokenizer reads: of encoders, whose tokenizer is not loaded. Weights of language
# adapters are not among them: they belong to layers that may be gone.
TOKENIZER = (
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "normalizer.json",
    "alphabet.json",
)
SETTINGS = ("_config.json", "chat_template.json")
# Licences ask for themselves, or for a notice, to go with whatever is made of a model.
LICENCE = re.compile(
    r"(?!.*\.(py|json|safetensors|bin|gguf|pth?|pkl)$)"
    r".*(licen[cs]e|notice|copying|use_policy|terms|eula).*",
    re.IGNORECASE,
)
_KEPT = "_slm_carried_files"


def read_carried(folder: Path, family: Family) -> dict[str, bytes]:
    """The files to carry over, by name.

    What names code of their own is left out of them: it is never run, and not written.

    Args:
        folder: The folder of the model.
        family: The model's family; processors belong to models that read more than text.

    Raises:
        ModelSourceError: One of them cannot be read, or is malformed.
    """
    names = sorted(file.name for file in folder.iterdir() if LICENCE.fullmatch(file.name))
    if family.by_tensors or family.tower is not None:
        names += PROCESSOR
    if family.by_tensors:
        names += TOKENIZER
    found = {}
    for file in (folder / name for name in names):
        if not file.is_file():
            continue
        if is_inside(file, folder):
            found[file.name] = _content(file)
        else:
            say(f"warning: {file} is a link out of its folder and is not carried over")
    return found


def _content(file: Path) -> bytes:
    if file.name.endswith(SETTINGS):
        settings = {key: value for key, value in read_object(file).items() if key not in CODE}
        return (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    try:
        return file.read_bytes()
    except OSError as error:
        raise ModelSourceError(
            f"cannot read {file}: {error.strerror}", hint="copy or fetch the checkpoint again"
        ) from error


def keep_carried(model: PreTrainedModel, files: Mapping[str, bytes]) -> None:
    """Remember the files with the model that they belong to."""
    model.__dict__[_KEPT] = dict(files)


def save_carried(model: PreTrainedModel, folder: Path) -> None:
    """Write the files that were read with a model; what the tokenizer wrote stays.

    Raises:
        OSError: The disk is full.
    """
    for name, content in model.__dict__.get(_KEPT, {}).items():
        if not (folder / name).exists():
            (folder / name).write_bytes(content)
