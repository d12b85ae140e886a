"""Files of processors and tokenizers beside an encoder's weights, carried over as they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from slm_plugin.files import write_text
from slm_plugin.models.configuration import CODE
from slm_plugin.models.json_file import read_object

# What AutoProcessor, AutoFeatureExtractor and AutoTokenizer read of these models. Weights of
# language adapters are not among them: they belong to layers that may be gone.
CARRIED = (
    "preprocessor_config.json",
    "processor_config.json",
    "feature_extractor_config.json",
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
_SETTINGS = ("_config.json",)


def carry_over(source: Path, folder: Path) -> None:
    """Copy the files that are there and not yet written; settings lose what names code.

    Args:
        source: The folder of the model that was loaded.
        folder: The checkpoint.

    Raises:
        ModelSourceError: A file of settings is malformed.
    """
    for name in CARRIED:
        file = source / name
        if not file.is_file() or (folder / name).exists():
            continue
        if not name.endswith(_SETTINGS):
            shutil.copyfile(file, folder / name)
            continue
        settings = {key: value for key, value in read_object(file).items() if key not in CODE}
        text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False)
        write_text(folder / name, text + "\n")
