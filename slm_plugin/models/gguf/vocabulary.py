"""What a GGUF file says about its tokens: every key is judged, and nothing is guessed."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, NoReturn

from slm_plugin.errors import ModelSourceError
from slm_plugin.models.gguf.header import shown
from slm_plugin.models.gguf.metadata import refusal
from slm_plugin.models.gguf.parts import GgufModel
from slm_plugin.models.gguf.pretokenizers import CUTS, Cut

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"
_PREFIX = "tokenizer."
_ROLES = {
    "bos": "ggml.bos_token_id",
    "eos": "ggml.eos_token_id",
    "unk": "ggml.unknown_token_id",
    "pad": "ggml.padding_token_id",
}
_READ = {
    "ggml.model",
    "ggml.pre",
    "ggml.tokens",
    "ggml.token_type",
    "ggml.scores",
    "ggml.merges",
    "ggml.add_bos_token",
    "ggml.add_eos_token",
    "ggml.add_space_prefix",
    "chat_template",
    *_ROLES.values(),
}
# Tokens for infilling, turns and classification: named for callers, part of no plain text.
_NAMED_ONLY = ("eot", "eom", "seperator", "sep", "mask", "cls", "prefix", "suffix", "middle")
_HARMLESS = {
    *(f"ggml.{name}_token_id" for name in _NAMED_ONLY),
    *(f"ggml.fim_{name}_token_id" for name in ("pre", "suf", "mid", "pad", "rep", "sep")),
    "ggml.eog_token_ids",
    "chat_templates",
    "huggingface.json",
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "ggml.add_sep_token": (False,),
    "ggml.remove_extra_whitespaces": (False,),
    "ggml.token_type_count": (0, 1),
    "ggml.precompiled_charsmap": ([], ""),
}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens and rules, checked for consistency.

    Attributes:
        model: ``gpt2`` for byte-level merges, ``llama`` for SentencePiece.
        tokens: Token texts in the order of their ids.
        types: What each token is.
        scores: Log-probabilities, of SentencePiece only.
        merges: Pairs in the order of merging, byte-level only.
        cut: How text is cut, byte-level only.
        roles: Ids of the special tokens that are stated, by ``bos``, ``eos``, ``unk``, ``pad``.
        begin: Whether a text begins with BOS.
        end: Whether a text ends with EOS.
        space_prefix: Whether a space is put before the text.
        chat_template: The template of conversations.
    """

    model: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[tuple[str, str]]
    cut: Cut
    roles: dict[str, int]
    begin: bool
    end: bool
    space_prefix: bool
    chat_template: str | None

    def added(self) -> list[tuple[str, bool]]:
        """Tokens that are found in a text before it is cut, and whether each is special."""
        named = set(self.roles.values())
        return [
            (token, kind != USER_DEFINED)
            for index, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if token and (kind in (CONTROL, USER_DEFINED, UNKNOWN) or index in named)
        ]

    def around(self) -> tuple[list[int], list[int]]:
        """Ids put before and after a text."""
        return [self.roles["bos"]] if self.begin else [], [self.roles["eos"]] if self.end else []


def read_vocabulary(model: GgufModel, rows: int) -> Vocabulary | None:
    """The tokens of a file, one for each of the ``rows`` of its embedding; None if it has none.

    Raises:
        ModelSourceError: A key is malformed, contradicts another, or asks for what cannot be
            honoured; the message names it.
    """
    stated = {
        key.removeprefix(_PREFIX): value
        for key, value in model.fields.items()
        if key.startswith(_PREFIX)
    }
    if stated.get("ggml.model", "none") in ("none", "no_vocab") and "ggml.tokens" not in stated:
        return None
    return _Reader(model, stated).vocabulary(rows)


class _Reader:
    """Typed access to the keys of one tokenizer."""

    def __init__(self, model: GgufModel, stated: dict[str, Any]) -> None:
        self.model = model
        self.stated = stated

    def vocabulary(self, rows: int) -> Vocabulary:
        kind = self.stated.get("ggml.model")
        if kind not in (BYTE_LEVEL, SENTENCEPIECE):
            self.fail("ggml.model", f"only {BYTE_LEVEL} and {SENTENCEPIECE} can be read")
        for key, value in self.stated.items():
            if key in _READ or key in _HARMLESS or key.startswith("chat_template."):
                continue
            if value not in _NEUTRAL.get(key, ()):
                self.fail(key, "that cannot be honoured")
        byte_level = kind == BYTE_LEVEL
        cut = self.cut() if byte_level else self.no_cut()
        tokens = self.entries("ggml.tokens", str, rows)
        if len(set(tokens)) != len(tokens):
            twice = Counter(tokens).most_common(1)[0][0]
            raise ModelSourceError(f"{self.model.name} lists the token {shown(twice)} twice")
        types = self.types(rows)
        roles = self.roles(rows, types)
        begin = self.truth("ggml.add_bos_token", cut.begins)
        end = self.truth("ggml.add_eos_token", False)
        for asked, key, role in ((begin, "bos", "bos"), (end, "eos", "eos")):
            if asked and role not in roles:
                self.fail(f"ggml.add_{key}_token", f"no {_PREFIX}ggml.{key}_token_id is stated")
        prefix = self.truth("ggml.add_space_prefix", not byte_level)
        if prefix and byte_level:
            self.fail("ggml.add_space_prefix", "a byte-level vocabulary has no such prefix")
        template = self.stated.get("chat_template")
        if not isinstance(template, str | None):
            self.fail("chat_template", "text is wanted")
        return Vocabulary(
            model=str(kind),
            tokens=tokens,
            types=types,
            scores=[] if byte_level else self.scores(rows),
            merges=self.merges(set(tokens)) if byte_level else [],
            cut=cut,
            roles=roles,
            begin=begin,
            end=end,
            space_prefix=prefix,
            chat_template=template,
        )

    def cut(self) -> Cut:
        name = self.stated.get("ggml.pre")
        if name is None:
            raise ModelSourceError(
                f"{self.model.name} does not say how its vocabulary cuts text (tokenizer.ggml.pre)",
                hint="convert the model again with a current llama.cpp",
            )
        if not isinstance(name, str) or name not in CUTS:
            self.fail("ggml.pre", f"only {', '.join(CUTS)} are known")
        return CUTS[name]

    def no_cut(self) -> Cut:
        if self.stated.get("ggml.pre", "default") != "default":
            self.fail("ggml.pre", "a SentencePiece vocabulary is not cut")
        return Cut(begins=True)

    def entries(self, key: str, kind: type, rows: int | None = None) -> list[Any]:
        value = self.stated.get(key)
        if value is None:
            raise ModelSourceError(f"{self.model.name} states no {_PREFIX}{key}")
        if not isinstance(value, list) or any(type(entry) is not kind for entry in value):
            self.fail(key, f"a list of {kind.__name__} is wanted")
        if rows is not None and len(value) != rows:
            raise ModelSourceError(
                f"{self.model.name} has {len(value)} entries in {_PREFIX}{key}, and "
                f"token_embd.weight has {rows} rows",
                hint="the file was put together wrongly; convert the model again",
            )
        return value

    def types(self, rows: int) -> list[int]:
        if "ggml.token_type" not in self.stated:
            return [NORMAL] * rows
        types = self.entries("ggml.token_type", int, rows)
        if not set(types) <= set(range(NORMAL, BYTE + 1)):
            self.fail("ggml.token_type", f"kinds are {NORMAL} to {BYTE}")
        return types

    def scores(self, rows: int) -> list[float]:
        scores = self.entries("ggml.scores", float, rows)
        if not all(map(math.isfinite, scores)):
            self.fail("ggml.scores", "finite numbers are wanted")
        return scores

    def roles(self, rows: int, types: list[int]) -> dict[str, int]:
        found = {}
        for role, key in _ROLES.items():
            if key in self.stated:
                index = self.stated[key]
                if type(index) is not int or not 0 <= index < rows:
                    self.fail(key, f"tokens are 0 to {rows - 1}")
                found[role] = index
        if "unk" not in found and UNKNOWN in types:
            found["unk"] = types.index(UNKNOWN)
        return found

    def merges(self, tokens: set[str]) -> list[tuple[str, str]]:
        found = []
        for merge in self.entries("ggml.merges", str):
            left, _, right = merge.partition(" ")
            if not left or not right or " " in right:
                self.fail("ggml.merges", f"{shown(merge)} is not two pieces")
            if not {left, right, left + right} <= tokens:
                self.fail("ggml.merges", f"{shown(merge)} uses what is no token")
            found.append((left, right))
        if len(set(found)) != len(found):
            self.fail("ggml.merges", "a pair is listed twice")
        return found

    def truth(self, key: str, default: bool) -> bool:
        value = self.stated.get(key, default)
        if not isinstance(value, bool):
            self.fail(key, "a truth value is wanted")
        return value

    def fail(self, key: str, reason: str) -> NoReturn:
        raise refusal(self.model, f"{_PREFIX}{key}", self.stated.get(key), reason)
