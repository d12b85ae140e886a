"""The tokenizer of a GGUF file cuts and merges as the file says, or the file is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from slm_plugin.errors import ModelSourceError
from slm_plugin.models.gguf import read_gguf
from slm_plugin.models.gguf.pretokenizers import CUTS, pre_tokenizer
from slm_plugin.models.gguf.verification import TEXTS
from tests.models.gguf_files import (
    CORPUS,
    VOCABULARY,
    byte_level,
    make_gguf_model,
    split_cut,
    token_fields,
    write_gguf,
)

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
DIGITS = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
)


def tokenizer_of(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a file."""
    tokenizer = read_gguf(path)[1]
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize(
    ("pre", "cut"),
    [
        ("llama-bpe", split_cut(LLAMA3)),
        ("llama3", split_cut(LLAMA3)),
        ("qwen2", split_cut(QWEN2)),
        ("gpt-2", None),
        ("default", None),
        ("smollm", DIGITS),
        ("refact", DIGITS),
    ],
)
def test_text_is_cut_as_the_original_cuts_it(pre: str, cut: Any, tmp_path: Path) -> None:
    """Same tokens as the tokenizer that the file was made of, also after saving."""
    original = byte_level(cut)
    if pre == "qwen2":
        original.normalizer = normalizers.NFC()
    fields = {**token_fields(original, pre), "tokenizer.ggml.add_bos_token": False}
    tokenizer = tokenizer_of(write_gguf(tmp_path / "m.gguf", tokenizer=fields))
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in (*TEXTS, *CORPUS[:3]):
        wanted = original.encode(text).ids
        assert tokenizer(text)["input_ids"] == wanted
        assert saved(text)["input_ids"] == wanted
        assert tokenizer.decode(wanted) == original.decode(wanted)


@pytest.mark.parametrize("pre", sorted(CUTS))
def test_every_cut_keeps_all_of_a_text(pre: str) -> None:
    """No pattern loses a character or fails to compile."""
    for text in (*TEXTS, *CORPUS[:3]):
        pieces = [piece for piece, _ in pre_tokenizer(CUTS[pre]).pre_tokenize_str(text)]
        bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        assert "".join(pieces) == bytes_of.pre_tokenize_str(text)[0][0]


@pytest.mark.parametrize(("begin", "end"), [(True, False), (False, True), (True, True)])
def test_first_and_last_token_are_added_as_stated(begin: bool, end: bool, tmp_path: Path) -> None:
    """BOS and EOS by their own keys, to both texts of a pair, also after saving."""
    fields = {
        **token_fields(byte_level(), "gpt-2"),
        "tokenizer.ggml.add_bos_token": begin,
        "tokenizer.ggml.add_eos_token": end,
    }
    tokenizer = tokenizer_of(write_gguf(tmp_path / "m.gguf", tokenizer=fields))
    tokenizer.save_pretrained(tmp_path / "saved")
    for known in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        plain = known("the river", add_special_tokens=False)["input_ids"]
        framed = [1] * begin + plain + [2] * end
        assert known("the river")["input_ids"] == framed
        assert known("the river", "the river")["input_ids"] == framed * 2
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


@pytest.mark.parametrize(("pre", "begins"), [("llama-bpe", True), ("smollm", False)])
def test_an_unstated_first_token_follows_the_family(pre: str, begins: bool, tmp_path: Path) -> None:
    """Llama 3 begins every text with BOS unless the file says not."""
    fields = {**token_fields(byte_level(), pre), "tokenizer.ggml.add_bos_token": None}
    tokenizer = tokenizer_of(write_gguf(tmp_path / "m.gguf", tokenizer=fields))
    assert (tokenizer("river")["input_ids"][0] == 1) is begins


def test_special_and_user_defined_tokens_are_found_in_text(tmp_path: Path) -> None:
    """A control token is special, a user-defined one is not and stays when decoding."""
    fields = token_fields(byte_level(), "llama-bpe")
    tokens = list(fields["tokenizer.ggml.tokens"])
    types = list(fields["tokenizer.ggml.token_type"])
    used = {piece for merge in fields["tokenizer.ggml.merges"] for piece in merge.split(" ")}
    free = [i for i in range(VOCABULARY - 1, 0, -1) if tokens[i] not in used][:2]
    merged = {tokens[i] for i in free}
    for index, text, kind in zip(free, ("<|turn|>", "<tool x>"), (3, 4), strict=True):
        tokens[index], types[index] = text, kind
    merges = [m for m in fields["tokenizer.ggml.merges"] if m.replace(" ", "") not in merged]
    fields |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    fields |= {"tokenizer.ggml.merges": merges}
    tokenizer = tokenizer_of(write_gguf(tmp_path / "m.gguf", tokenizer=fields))
    found = tokenizer("a<|turn|>b<tool x>c", add_special_tokens=False)["input_ids"]
    assert found[1] == free[0]
    assert found[3] == free[1]
    assert tokenizer.decode(found, skip_special_tokens=True) == "ab<tool x>c"


def test_template_and_length_come_through(tmp_path: Path) -> None:
    """The chat template, and the context as the longest text."""
    fields = {
        **token_fields(byte_level(), "gpt-2"),
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
        "tokenizer.ggml.eot_token_id": 2,
    }
    tokenizer = tokenizer_of(write_gguf(tmp_path / "m.gguf", tokenizer=fields))
    said = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert said == "hi"
    assert tokenizer.model_max_length == 256
    assert tokenizer.pad_token is None


def test_a_file_without_tokens_has_no_tokenizer(tmp_path: Path) -> None:
    """The network can be pruned on token ids."""
    model, tokenizer = read_gguf(write_gguf(tmp_path / "m.gguf", tokenizer={}))
    assert tokenizer is None
    assert model.config.vocab_size == VOCABULARY


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("ggml.model", "bert", "only gpt2 and llama"),
        ("ggml.model", None, "ggml.model"),
        ("ggml.pre", "kimi-k2", "'kimi-k2'"),
        ("ggml.pre", None, "does not say how"),
        ("ggml.pre", 3, "ggml.pre"),
        ("ggml.tokens", None, "states no tokenizer.ggml.tokens"),
        ("ggml.tokens", ["a", "b"], "has 2 entries in tokenizer.ggml.tokens"),
        ("ggml.tokens", [1.5] * VOCABULARY, "list of str"),
        ("ggml.tokens", ["a"] * VOCABULARY, "'a' twice"),
        ("ggml.token_type", [1, 2], "has 2 entries"),
        ("ggml.token_type", [9] * VOCABULARY, "ggml.token_type"),
        ("ggml.merges", None, "states no tokenizer.ggml.merges"),
        ("ggml.merges", ["a"], "not two pieces"),
        ("ggml.merges", ["a b c"], "not two pieces"),
        ("ggml.merges", ["no-token x"], "is no token"),
        ("ggml.bos_token_id", VOCABULARY, "tokenizer.ggml.bos_token_id"),
        ("ggml.eos_token_id", -1, "tokenizer.ggml.eos_token_id"),
        ("ggml.padding_token_id", 4294967295, "tokenizer.ggml.padding_token_id"),
        ("ggml.unknown_token_id", "0", "tokenizer.ggml.unknown_token_id"),
        ("ggml.add_bos_token", 1, "tokenizer.ggml.add_bos_token"),
        ("ggml.add_space_prefix", True, "tokenizer.ggml.add_space_prefix"),
        ("ggml.add_sep_token", True, "tokenizer.ggml.add_sep_token"),
        ("ggml.something_new", 1, "tokenizer.ggml.something_new"),
        ("chat_template", 5, "tokenizer.chat_template"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_key(
    key: str, value: Any, message: str, tmp_path: Path
) -> None:
    """One line, with the key or the entry."""
    fields = {**token_fields(byte_level(), "gpt-2"), f"tokenizer.{key}": value}
    with pytest.raises(ModelSourceError, match=message) as caught:
        read_gguf(write_gguf(tmp_path / "m.gguf", tokenizer=fields))
    assert "\n" not in caught.value.message


def test_adding_a_token_that_is_not_stated_is_refused(tmp_path: Path) -> None:
    """Llama 3 without a BOS id cannot begin with it."""
    fields = {**token_fields(byte_level(), "gpt-2"), "tokenizer.ggml.bos_token_id": None}
    fields |= {"tokenizer.ggml.add_bos_token": True}
    with pytest.raises(ModelSourceError, match="add_bos_token"):
        read_gguf(write_gguf(tmp_path / "m.gguf", tokenizer=fields))


def test_tokens_that_differ_from_a_plain_search_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer that does not obey the merges is noticed."""
    from slm_plugin.models.gguf import tokenizer as module

    made = module._byte_level

    def careless(vocabulary: Any) -> Any:
        backend = made(vocabulary)
        backend.pre_tokenizer = split_cut(r"\s+")
        return backend

    monkeypatch.setattr(module, "_byte_level", careless)
    with pytest.raises(ModelSourceError, match="differ in the tokens of"):
        read_gguf(write_gguf(tmp_path / "m.gguf"))


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
WORDS = ["▁the", "▁river", "▁miller", "▁moved", "▁grain", "ing", "▁loft", "er", "▁wait", "ed"]


def sentencepiece_fields() -> dict[str, Any]:
    """A vocabulary as SentencePiece trains it: every piece is reached by merges."""
    pieces: dict[str, float] = {}
    for word in WORDS:
        for end in range(2, len(word) + 1):
            pieces.setdefault(word[:end], -float(len(pieces)))
    letters = sorted({letter for word in WORDS for letter in word} | set("xyzX.,'0"))
    pieces |= {letter: -float(len(pieces) + i) for i, letter in enumerate(letters)}
    tokens = PIECES + list(pieces)
    tokens += [f"[PAD{i}]" for i in range(VOCABULARY - len(tokens))]
    scores = [0.0] * len(PIECES) + list(pieces.values())
    types = [2, 3, 3] + [6] * 256 + [1] * len(pieces)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores + [-1000.0] * (len(tokens) - len(scores)),
        "tokenizer.ggml.token_type": types + [5] * (len(tokens) - len(types)),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def test_pieces_are_merged_by_score(tmp_path: Path) -> None:
    """A SentencePiece vocabulary: BOS and a space first, bytes for what has no piece."""
    tokenizer = tokenizer_of(write_gguf(tmp_path / "m.gguf", tokenizer=sentencepiece_fields()))
    tokenizer.save_pretrained(tmp_path / "saved")
    for known in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        found = known("the river é")["input_ids"]
        assert known.convert_ids_to_tokens(found) == [
            *("<s>", "▁the", "▁river", "▁", "<0xC3>", "<0xA9>")
        ]
        assert known.decode(found, skip_special_tokens=True) == "the river é"


def test_a_vocabulary_without_prefix_adds_no_space(tmp_path: Path) -> None:
    """add_space_prefix and add_bos_token are obeyed by pieces, too."""
    fields = {
        **sentencepiece_fields(),
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": False,
    }
    tokenizer = tokenizer_of(write_gguf(tmp_path / "m.gguf", tokenizer=fields))
    assert tokenizer.tokenize("er the") == ["er", "▁the"]
    assert tokenizer.decode(tokenizer("er the")["input_ids"]) == "er the"


def gemma_fields() -> dict[str, Any]:
    """A vocabulary as Gemma's: other special tokens, runs of blanks whole, a turn, no prefix."""
    fields = sentencepiece_fields()
    tokens, types = (list(fields[f"tokenizer.ggml.{key}"]) for key in ("tokens", "token_type"))
    tokens[:3], types[:3] = ["<pad>", "<eos>", "<bos>"], [3, 3, 3]
    extra = {"<unk>": 3, "<turn>": 3, "\n": 4, "\n\n": 4, "  ": 4, "   ": 4}
    for index, (token, kind) in enumerate(extra.items(), VOCABULARY - len(extra)):
        tokens[index], types[index] = token, kind
    return {
        **fields,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.unknown_token_id": tokens.index("<unk>"),
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_sep_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": "<turn>{{ messages[0]['content'] }}",
    }


def test_a_vocabulary_as_gemmas_is_read(tmp_path: Path) -> None:
    """BOS first, no space before the text, runs of blanks and turns found whole, also saved."""
    path = write_gguf(
        tmp_path / "m.gguf", make_gguf_model("gemma3"), "gemma3", tokenizer=gemma_fields()
    )
    tokenizer = tokenizer_of(path)
    tokenizer.save_pretrained(tmp_path / "saved")
    text = "er the<turn>\n\n   river é"
    for known in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        found = known(text)["input_ids"]
        assert known.convert_ids_to_tokens(found) == [
            *("<bos>", "er", "▁the", "<turn>", "\n\n", "   ", "r", "i", "v", "er"),
            *("▁", "<0xC3>", "<0xA9>"),
        ]
        assert known.decode(found) == f"<bos>{text}"
        assert known.decode(found, skip_special_tokens=True) == text.replace("<turn>", "")
        assert known.apply_chat_template([{"content": "x"}], tokenize=False) == "<turn>x"
        named = (known.bos_token, known.eos_token, known.pad_token, known.unk_token)
        assert named == ("<bos>", "<eos>", "<pad>", "<unk>")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("scores", None, "states no tokenizer.ggml.scores"),
        ("scores", [float("nan")] * VOCABULARY, "finite"),
        ("scores", [0.0], "has 1 entries"),
        ("pre", "llama-bpe", "is not cut"),
        ("precompiled_charsmap", [1, 2, 3], "precompiled_charsmap"),
        ("remove_extra_whitespaces", True, "remove_extra_whitespaces"),
    ],
)
def test_pieces_that_cannot_be_honoured_are_refused(
    key: str, value: Any, message: str, tmp_path: Path
) -> None:
    """Scores that are missing or no numbers, and rules of other vocabularies."""
    fields = {**sentencepiece_fields(), f"tokenizer.ggml.{key}": value}
    with pytest.raises(ModelSourceError, match=message):
        read_gguf(write_gguf(tmp_path / "m.gguf", tokenizer=fields))


def test_a_vocabulary_of_few_bytes_drops_what_it_lacks(tmp_path: Path) -> None:
    """As its original does: a byte-level vocabulary may lack bytes that training never saw."""
    original = byte_level()
    fields = token_fields(original, "gpt-2")
    letter = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("\x07")[0][0]
    tokens = ["<unused>" if token == letter else token for token in fields["tokenizer.ggml.tokens"]]
    fields["tokenizer.ggml.tokens"] = tokens
    tokenizer = tokenizer_of(write_gguf(tmp_path / "m.gguf", tokenizer=fields))
    assert tokenizer("a\x07b")["input_ids"] == original.encode("a").ids + original.encode("b").ids


def test_the_factory_makes_what_the_names_say() -> None:
    """The original tokenizers of these tests differ where the cuts differ."""
    text = "x 2024\n\n5 don't"
    cuts: list[Tokenizer] = [byte_level(cut) for cut in (None, DIGITS, split_cut(LLAMA3))]
    assert len({tuple(t.encode(text).tokens) for t in cuts}) == 3
    assert make_gguf_model().config.vocab_size == VOCABULARY
