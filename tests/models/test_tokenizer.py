"""Tokenizers of both transformers lines are read; broken ones are one line; none runs code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from slm_plugin.errors import ModelSourceError
from slm_plugin.models.tokenizer import read_tokenizer
from tests.tiny import make_model, make_tokenizer

FOUR = transformers.__version__.startswith("4.")
CONFIG = make_model().config


def edit(folder: Path, file: str = "tokenizer_config.json", **fields: Any) -> None:
    """Change fields of a JSON file."""
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the tiny tokenizer."""
    make_tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "fields",
    [
        {"tokenizer_class": "TokenizersBackend"},
        {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "is_local": True},
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        {"extra_special_tokens": ["w9"]},
        {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["w9", "w10"]},
        {"extra_special_tokens": {"image_token": "w9"}},
        {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}},
    ],
)
def test_what_either_line_writes_is_read(folder: Path, fields: dict[str, Any]) -> None:
    """The same ids as before; extra tokens are special; the folder stays as it was."""
    edit(folder, **fields)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    tokenizer = read_tokenizer(folder, CONFIG, "m")
    assert tokenizer is not None and tokenizer.name_or_path == "m"
    assert tokenizer("w3 w4 w9")["input_ids"] == [3, 4, 9]
    extra = fields.get("extra_special_tokens", [])
    names = extra.values() if isinstance(extra, dict) else extra
    assert set(names) <= set(tokenizer.all_special_tokens)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def _cut(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:500])


def _empty(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(b"")


def _no_model(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")


def _gone(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _settings_cut(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"unk_token": ', encoding="utf-8")


def _settings_list(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("[]", encoding="utf-8")


def _unknown_class(folder: Path) -> None:
    edit(folder, tokenizer_class="OddTokenizer", auto_map={"AutoTokenizer": ["odd.Odd", None]})


def _class_number(folder: Path) -> None:
    edit(folder, tokenizer_class=3)


def _unwritable(folder: Path) -> None:
    edit(folder, chat_template={"default": 2.0})


def _larger(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["beyond"] = 128
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_cut, "cannot read the tokenizer of m"),
        (_empty, "cannot read the tokenizer of m"),
        (_no_model, "cannot read the tokenizer of m"),
        (_gone, "but no vocabulary"),
        (_settings_cut, "tokenizer_config.json"),
        (_settings_list, "not an object"),
        (_unknown_class, "OddTokenizer, which transformers does not have and names code"),
        (_class_number, "is no name"),
        (_unwritable, "cannot read the tokenizer of m: write"),
        (_larger, "reaches id 128; the model has 128 embeddings"),
    ],
)
def test_a_broken_tokenizer_is_one_line(
    folder: Path, spoil: Callable[[Path], None], words: str
) -> None:
    """Truncated, absent, of another class or another model: said, with a remedy."""
    spoil(folder)
    with pytest.raises(ModelSourceError, match=words) as caught:
        read_tokenizer(folder, CONFIG, "m")
    assert caught.value.hint and "\n" not in caught.value.message


@pytest.mark.skipif(not FOUR, reason="transformers 5 has the class")
def test_a_class_of_the_other_line_says_so(folder: Path) -> None:
    """Only the renamed one can be read by both."""
    edit(folder, tokenizer_class="SentencePieceBackend")
    with pytest.raises(ModelSourceError, match="needs transformers 5"):
        read_tokenizer(folder, CONFIG, "m")


@pytest.mark.parametrize("number", [2**29, 2**31, 2**32 - 1])
def test_an_id_beyond_any_vocabulary_takes_no_memory(folder: Path, number: int) -> None:
    """It is refused before the file is written anew, which takes room for all smaller ids."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["w7"] = number
    file.write_text(json.dumps(content))
    with pytest.raises(ModelSourceError, match=rf"reaches id {number}; the model has 128"):
        read_tokenizer(folder, CONFIG, "m")


def test_padding_without_an_embedding_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Many checkpoints have it; only text that holds the token is a problem."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    assert read_tokenizer(folder, CONFIG, "m") is not None
    assert "'<pad>'" in capsys.readouterr().err


def test_no_files_no_tokenizer(tmp_path: Path) -> None:
    """A model alone is fine."""
    assert read_tokenizer(tmp_path, CONFIG, "m") is None


def byte_level(folder: Path, **settings: Any) -> None:
    """A byte-level vocabulary that splits digits three by three, as no class does by itself."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d{3}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    built.train_from_iterator(["The river rose in 1984, 1985 and 1986. "] * 20, trainer)
    built.save(str(folder / "tokenizer.json"))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"eos_token": "<|end|>"},
        *(
            {"tokenizer_class": name, "eos_token": "<|end|>"}
            for name in (
                "PreTrainedTokenizerFast",
                "LlamaTokenizer",
                "LlamaTokenizerFast",
                "GPT2Tokenizer",
                "Qwen2Tokenizer",
                "CohereTokenizerFast",
            )
        ),
    ],
)
def test_tokens_are_those_of_the_file(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Whatever class is stated or guessed, and again after it is saved and read as stock does."""
    byte_level(tmp_path, **settings)
    config = make_model(vocab_size=400).config
    tokenizer = read_tokenizer(tmp_path, config, "m")
    assert tokenizer is not None
    plain = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("In 1984567, 3.14159", "a  river\n\n rose", "It's 12 o'clock 河"):
        assert tokenizer(text)["input_ids"] == plain.encode(text).ids
    tokenizer.save_pretrained(tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again", config=config)
    assert again("In 1984567")["input_ids"] == plain.encode("In 1984567").ids


def test_a_start_token_without_an_embedding_is_refused(folder: Path) -> None:
    """It would stand before every text."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    added = {**content["added_tokens"][0], "id": 128, "content": "<start>"}
    content["added_tokens"].append(added)
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<start>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<start>": {"id": "<start>", "ids": [128], "tokens": ["<start>"]}},
    }
    file.write_text(json.dumps(content))
    with pytest.raises(ModelSourceError, match=r"reaches id 128; the model has 128 embeddings"):
        read_tokenizer(folder, CONFIG, "m")
