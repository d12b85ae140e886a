"""How byte-level vocabularies cut text before merging, by the name in ``tokenizer.ggml.pre``.

A GGUF file names the cut, it does not hold it. Each entry is what the ``tokenizer.json`` of the
models behind the name has, so both lines of transformers cut alike. A name that is not here is
refused: a wrong cut gives other tokens without a word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PUNCTUATION_AND_SPACE = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_PUNCTUATION_AND_SPACE}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_PUNCTUATION_AND_SPACE}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class Cut:
    """One way to cut text.

    Attributes:
        patterns: Regular expressions; each cuts what the one before left.
        digits: Whether digits stand alone, after the patterns.
        gpt2: Whether GPT-2's pattern cuts last.
        nfc: Whether text is brought to Unicode's form NFC first.
        whole_words: Whether a piece that is a token itself is not built from merges.
        begins: Whether the model's first token is put before a text unless the file says not.
    """

    patterns: tuple[str, ...] = ()
    digits: bool = False
    gpt2: bool = False
    nfc: bool = False
    whole_words: bool = False
    begins: bool = False


_GPT2 = Cut(gpt2=True)
_DIGITS = Cut(digits=True, gpt2=True)
_LLAMA_BPE = Cut(patterns=(_LLAMA3,), whole_words=True, begins=True)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥\u0800-一가-\ud7ff]+")
CUTS = {
    "default": _GPT2,
    "deepseek-coder": Cut(patterns=_DEEPSEEK_CODER, digits=True),
    "gpt-2": _GPT2,
    "llama-bpe": _LLAMA_BPE,
    "llama-v3": _LLAMA_BPE,
    "llama3": _LLAMA_BPE,
    "qwen2": Cut(patterns=(_QWEN2,), nfc=True),
    "refact": _DIGITS,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "tekken": Cut(patterns=(_TEKKEN,), whole_words=True, begins=True),
}


def pre_tokenizer(cut: Cut) -> Any:
    """The cut as a pre-tokenizer of the library `tokenizers`, which also maps bytes to letters."""
    from tokenizers import Regex, pre_tokenizers

    steps: list[Any] = [
        pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in cut.patterns
    ]
    if cut.digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut.gpt2)
    return pre_tokenizers.Sequence([*steps, last]) if steps else last
