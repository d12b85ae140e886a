"""Read a checkpoint's tokenizer, written by either line of transformers; its code never runs."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import transformers

from slm_plugin.errors import ModelSourceError
from slm_plugin.models.border import reading
from slm_plugin.models.json_file import read_object
from slm_plugin.progress import say

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# Vocabularies in the formats of the supported families.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
TOKENS = ("*token*", "vocab.*")
# Classes of transformers 5 that 4 lacks; one of them is the class of before under another name.
RENAMED = {"TokenizersBackend": "PreTrainedTokenizerFast"}
FIVE_ONLY = ("SentencePieceBackend", "PythonBackend", "MistralCommonBackend")
HINT = "copy all tokenizer files of the checkpoint again, or remove them to run without one"
PROBE = "The river rose in April."


def read_tokenizer(
    folder: Path, config: PretrainedConfig, name: str
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a folder, None when it has no tokenizer files.

    Args:
        folder: Checkpoint folder; nothing in it is changed.
        config: The model's config, which knows the vocabulary's size.
        name: How messages and the tokenizer name the checkpoint.

    Raises:
        ModelSourceError: It is incomplete or damaged, needs code of its own or another release
            of transformers, or has ids that the model has no embedding for.
    """
    found = [file for pattern in TOKENS for file in folder.glob(pattern)]
    if not found:
        return None
    if not any((folder / vocabulary).is_file() for vocabulary in VOCABULARIES):
        raise ModelSourceError(
            f"{name} has {found[0].name}, but no vocabulary: none of {', '.join(VOCABULARIES)}",
            hint=HINT,
        )
    settings = _settings(folder)
    stated = settings.get("tokenizer_class")
    for kind in (stated, getattr(config, "tokenizer_class", None)):
        _refuse_other(kind, settings, name)
    _refuse_elsewhere(folder, settings, name)
    mended: dict[str, Any] = {}
    if _four() and isinstance(settings.get("extra_special_tokens"), list):
        listed = settings["extra_special_tokens"]
        # The list of transformers 5 is what 4 calls additional; its own word takes names.
        mended = {"extra_special_tokens": {}, "additional_special_tokens": listed}
    with reading(f"cannot read the tokenizer of {name}", hint=HINT):
        if _four() and stated in RENAMED:
            plain = getattr(transformers, RENAMED[stated])
            tokenizer = plain.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, **mended
            )
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, config=config, local_files_only=True, trust_remote_code=False, **mended
            )
        tokenizer.name_or_path = name
        ids = tokenizer(PROBE)["input_ids"]
        vocabulary = dict(tokenizer.get_vocab())
        # What cannot be written is found out now, not when hours of work are to be saved.
        with TemporaryDirectory(prefix="slm-plugin-") as scratch:
            tokenizer.save_pretrained(scratch)
    _check_ids(ids, vocabulary, tokenizer, config.vocab_size, name)
    return tokenizer


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    return read_object(file) if file.is_file() else {}


def _refuse_other(stated: Any, settings: dict[str, Any], name: str) -> None:
    if not isinstance(stated, str | None):
        raise ModelSourceError(
            f"tokenizer_class in tokenizer_config.json of {name} is no name", hint=HINT
        )
    if stated in FIVE_ONLY and _four():
        raise ModelSourceError(
            f"the tokenizer of {name} is a {stated}, which needs transformers 5",
            hint="load and save it there with a `tokenizer.json`, or use transformers 5",
        )
    if stated is None or stated in RENAMED or stated in FIVE_ONLY:
        return
    if not any(_is_tokenizer(kind) for kind in (stated, f"{stated}Fast")):
        own = " and names code of its own, which is never run" if "auto_map" in settings else ""
        raise ModelSourceError(
            f"the tokenizer of {name} is a {stated}, which transformers does not have{own}",
            hint="set tokenizer_class in tokenizer_config.json to PreTrainedTokenizerFast if "
            "there is a tokenizer.json",
        )


def _is_tokenizer(kind: str) -> bool:
    """Whether transformers has a tokenizer of that name; other classes of it would run code."""
    found = getattr(transformers, kind, None)
    return isinstance(found, type) and issubclass(found, transformers.PreTrainedTokenizerBase)


def _refuse_elsewhere(folder: Path, settings: dict[str, Any], name: str) -> None:
    """One line of transformers reads a vocabulary from wherever the settings say, one does not."""
    for key in ("tokenizer_file", "vocab_file", "merges_file"):
        value = settings.get(key)
        if value is not None and (not isinstance(value, str) or Path(value).name != value):
            raise ModelSourceError(
                f"{key} in tokenizer_config.json of {name} names a file outside of the folder",
                hint=f"remove {key}: the files of the folder are read",
            )


def _check_ids(
    ids: list[int],
    vocabulary: dict[str, int],
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    name: str,
) -> None:
    """Every id that text can become needs a row of the embedding.

    Padding and the like that were added without a row are common; they are told, not refused.
    """
    added = set(tokenizer.added_tokens_encoder.values()) if vocabulary else set()
    beyond = sorted(id_ for id_ in {*vocabulary.values(), *ids} if id_ >= rows)
    plain = [id_ for id_ in beyond if id_ not in added]
    if plain or not vocabulary:
        reach = f"reaches id {plain[-1]}" if plain else "is empty"
        raise ModelSourceError(
            f"the vocabulary of {name}'s tokenizer {reach}; the model has {rows} embeddings",
            hint="use the tokenizer that belongs to the model",
        )
    if beyond:
        word = next(word for word, id_ in vocabulary.items() if id_ == beyond[0])
        say(
            f"The tokenizer of {name} has {len(beyond)} added tokens without an embedding, first "
            f"{word[:40]!r}: text that holds one cannot be read"
        )


def _four() -> bool:
    return str(transformers.__version__).startswith("4.")
