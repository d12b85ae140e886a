"""Config files of a checkpoint that transformers 4.57 and 5 both read as they were meant.

transformers 5 names some settings anew. An older one ignores the new names without a word (the
base of the rotary embedding falls back to 10,000) or refuses them (the tokenizer class), so the
old names are written beside or instead of the new ones; transformers 5 reads those as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from slm_plugin.files import write_text
from slm_plugin.models.configuration import CODE
from slm_plugin.models.families.family import FULL, SLIDING

# What a model read from a GGUF file remembers of that file.
GGUF_LEFTOVERS = ("_model_name_or_path", "_name_or_path")


def mend_config(
    folder: Path,
    synonyms: Iterable[tuple[str, str]] = (),
    *,
    nested: str | None = None,
    tied: bool | None = None,
) -> None:
    """Make ``config.json`` readable by both.

    Writes what stands under one of two synonyms under the other as well, because a release that
    knows the other name alone takes its default. Keeps ``rope_theta`` and ``rope_scaling`` beside
    ``rope_parameters``, from which transformers 5 replaced them, and drops what only described the
    file that the model was read from, and what names code: a stock class needs none, and the files
    that it names are not written.

    Args:
        folder: The checkpoint.
        synonyms: Pairs of fields that two releases call by different names.
        nested: Name of the object in it that describes the decoder; None for the whole.
        tied: Whether the head is the embedding. Where there is an object, 4.57 reads this inside
            of it and 5 beside it, and each leaves out its own default.
    """
    file = folder / "config.json"
    config = _read(file)
    for name in (*GGUF_LEFTOVERS, *CODE):
        config.pop(name, None)
    decoder = config if nested is None else config[nested]
    for one, other in synonyms:
        stated = decoder.get(one, decoder.get(other))
        if stated is not None:
            decoder |= {one: stated, other: stated}
    _mend_rope(decoder)
    if nested is not None:
        config["tie_word_embeddings"] = decoder["tie_word_embeddings"] = tied
    _write(file, config)


def _mend_rope(decoder: dict[str, Any]) -> None:
    rope = decoder.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    full, sliding = rope.get(FULL, rope), rope.get(SLIDING, rope)
    if "rope_theta" not in full:
        return
    decoder["rope_theta"] = full["rope_theta"]
    # A table of their own for layers with windows.
    if sliding.get("rope_theta", full["rope_theta"]) != full["rope_theta"]:
        decoder["rope_local_base_freq"] = sliding["rope_theta"]
    scaling = {name: value for name, value in full.items() if name != "rope_theta"}
    if scaling.get("rope_type", "default") != "default" or "mrope_section" in scaling:
        decoder["rope_scaling"] = scaling


def mend_tokenizer_config(folder: Path) -> None:
    """Make ``tokenizer_config.json`` readable by both; without a tokenizer do nothing.

    ``TokenizersBackend`` is transformers 5's name of ``PreTrainedTokenizerFast``, and its list of
    ``extra_special_tokens`` is the ``additional_special_tokens`` of before.
    """
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return
    config = _read(file)
    config.pop("auto_map", None)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    _write(file, config)


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def _write(file: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    write_text(file, text + "\n")
