"""Files of a processor, which prepares images for a model: read with it, written beside it.

No class reads them here, because nothing is measured on images; a damaged one is found all the
same, when the model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from slm_plugin.errors import ModelSourceError
from slm_plugin.files import write_text
from slm_plugin.models.configuration import CODE
from slm_plugin.models.json_file import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SETTINGS = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
TEMPLATE = "chat_template.jinja"
_KEPT = "_slm_processor"


def read_processor(folder: Path) -> dict[str, str]:
    """The text of a processor's files by name; empty where there are none.

    What names code of their own is left out of them: it is never run, and not written.

    Raises:
        ModelSourceError: One of them cannot be read or is damaged.
    """
    found = {}
    for name in SETTINGS:
        file = folder / name
        if file.is_file():
            content = {key: value for key, value in read_object(file).items() if key not in CODE}
            found[name] = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    template = folder / TEMPLATE
    if template.is_file():
        try:
            found[TEMPLATE] = template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelSourceError(
                f"cannot read {template}: {error}", hint="copy or fetch the checkpoint again"
            ) from error
    return found


def keep_processor(model: PreTrainedModel, files: Mapping[str, str]) -> None:
    """Remember files of a processor with the model that it belongs to."""
    if files:
        model.__dict__[_KEPT] = dict(files)


def save_processor(model: PreTrainedModel, folder: Path) -> None:
    """Write the files that were read with a model; what the tokenizer wrote stays."""
    for name, text in model.__dict__.get(_KEPT, {}).items():
        if not (folder / name).exists():
            write_text(folder / name, text)
