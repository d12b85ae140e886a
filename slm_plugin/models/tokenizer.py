"""Read a checkpoint's tokenizer, written by either line of transformers; its code never runs."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from slm_plugin.errors import ModelSourceError
from slm_plugin.lazy import transformers
from slm_plugin.models.border import is_transformers_four, reading
from slm_plugin.models.json_file import read_object
from slm_plugin.progress import say

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# Vocabularies in the formats of the supported families.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
TOKENS = ("*token*", "vocab.*")
# Classes of transformers 5 that 4 lacks; one of them is PreTrainedTokenizerFast by another name.
RENAMED = ("TokenizersBackend",)
FIVE_ONLY = ("SentencePieceBackend", "PythonBackend", "MistralCommonBackend")
HINT = "copy all tokenizer files of the checkpoint again, or remove them to run without one"
PROBE = "The river rose in April."
# What classes split, normalise or prefix differently: spaces, digits, accents, scripts, code.
TEXTS = (
    PROBE,
    "  Two  spaces\n\n\tand a tab",
    "In 1984, 3.14159 x 2 = 6.28318",
    "na\u00efve caf\u00e9 \u2014 it's we'll",
    "\u6cb3\u6c34\u4e0a\u6da8 \u0440\u0435\u043a\u0430 \u0645\u0631\u062d\u0628\u0627",
    "def f(x):\n    return x**2  # e\u0301 \U0001f600",
)


def read_tokenizer(
    folder: Path, config: PretrainedConfig, name: str, rows: int | None = None
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a folder, None when it has no tokenizer files.

    Args:
        folder: Checkpoint folder; nothing in it is changed.
        config: The model's config.
        name: How messages and the tokenizer name the checkpoint.
        rows: Rows of the embedding; None for the ``vocab_size`` of the config.

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
    for kind in (settings.get("tokenizer_class"), getattr(config, "tokenizer_class", None)):
        _refuse_other(kind, settings, name)
    _refuse_elsewhere(folder, settings, name)
    with reading(f"cannot read the tokenizer of {name}", hint=HINT):
        tokenizer = _as_the_file_says(folder, config, settings, name)
        tokenizer.name_or_path = name
        ids = tokenizer(PROBE)["input_ids"]
        vocabulary = dict(tokenizer.get_vocab())
    _check_ids(ids, vocabulary, tokenizer, config.vocab_size if rows is None else rows, name)
    # What cannot be written is found out now, not when hours of work are to be saved. The ids are
    # checked before: writing takes memory for every number up to the greatest id.
    with (
        reading(f"cannot read the tokenizer of {name}", hint=HINT),
        TemporaryDirectory(prefix="slm-plugin-") as scratch,
    ):
        tokenizer.save_pretrained(scratch)
    return tokenizer


def _as_the_file_says(
    folder: Path, config: PretrainedConfig, settings: dict[str, Any], name: str
) -> Any:
    """The tokenizer that a class of transformers makes, or ``tokenizer.json`` where they differ."""
    release = f"transformers {transformers.__version__}"
    backend = transformers.PreTrainedTokenizerFast
    mended: dict[str, Any] = {}
    if is_transformers_four() and isinstance(settings.get("extra_special_tokens"), list):
        listed = settings["extra_special_tokens"]
        # The list of transformers 5 is what 4 calls additional; its own word takes names.
        mended = {"extra_special_tokens": {}, "additional_special_tokens": listed}
    stated = settings.get("tokenizer_class") or getattr(config, "tokenizer_class", None)
    # A class that nobody stated would be guessed from the model's, and bring tokens of its own.
    whole = (folder / "tokenizer.json").is_file() and stated is None
    if whole or (is_transformers_four() and stated in RENAMED):
        tokenizer = _from_folder(backend, folder, **mended)
    else:
        tokenizer = _from_folder(transformers.AutoTokenizer, folder, config=config, **mended)
    other = _other_tokens(folder, tokenizer)
    if other is None:
        return tokenizer
    say(
        f"{type(tokenizer).__name__} of {release} reads {other!r} otherwise than tokenizer.json "
        f"of {name} says: the file is used as it is"
    )
    tokenizer = _from_folder(backend, folder, **mended)
    other = _other_tokens(folder, tokenizer)
    if other is not None:
        raise ModelSourceError(
            f"{release} reads {other!r} otherwise than tokenizer.json of {name} says",
            hint="use the release that wrote it, and save the tokenizer again there",
        )
    return tokenizer


def _from_folder(kind: Any, folder: Path, **named: Any) -> Any:
    """A tokenizer from local files alone, without any code of theirs."""
    return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **named)


def _other_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A text that becomes other tokens than by ``tokenizer.json`` alone, or ones it does not have.

    Some classes build pre-tokenizer and normaliser anew instead of reading them, and some put a
    token of their own before every text.
    """
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    plain = Tokenizer.from_file(str(file))
    plain.no_truncation()
    plain.no_padding()
    for text in TEXTS:
        wanted = plain.encode(text, add_special_tokens=False).ids
        if tokenizer(text, add_special_tokens=False)["input_ids"] != wanted:
            return text
    known = set(plain.get_vocab(with_added_tokens=True).values())
    return None if known.issuperset(tokenizer(PROBE)["input_ids"]) else PROBE


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    return read_object(file) if file.is_file() else {}


def _refuse_other(stated: Any, settings: dict[str, Any], name: str) -> None:
    if not isinstance(stated, str | None):
        raise ModelSourceError(
            f"tokenizer_class in tokenizer_config.json of {name} is no name", hint=HINT
        )
    if stated in FIVE_ONLY and is_transformers_four():
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

    Padding and the like, which no plain text becomes, are often added without a row: they are
    told, not refused.
    """
    added = set(tokenizer.added_tokens_encoder.values()) if vocabulary else set()
    beyond = sorted(id_ for id_ in {*vocabulary.values(), *ids} if id_ >= rows)
    # What stands around every text must have a row, added or not.
    plain = [id_ for id_ in beyond if id_ not in added or id_ in ids]
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
