"""Calibration sets: seeded, exact, never repeated, and honest about too little data."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing

from slm_plugin.calibration.samples import CalibrationSource, digest, draw
from slm_plugin.calibration.sources import passages
from slm_plugin.errors import CalibrationError
from tests.tiny import make_model, make_tokenizer, random_tokens


def words(count: int, start: int = 3) -> str:
    """That many words of the tiny vocabulary."""
    return " ".join(f"w{3 + (start + i) % 125}" for i in range(count))


def sample(source: CalibrationSource, seed: int = 0) -> torch.Tensor:
    """Draw with the tiny model and tokenizer."""
    return draw(source, make_model(num_hidden_layers=1), make_tokenizer(), seed)


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    """Twenty documents of 20 to 39 words, separated by blank lines."""
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(words(20 + i, 7 * i) for i in range(20)) + "\n", encoding="utf-8")
    return str(path)


def test_crops_are_stretches_of_different_documents(text_file: str) -> None:
    """Each sample is a run of words of one document, and no document is drawn twice."""
    tokens = sample(CalibrationSource(source=text_file, samples=20, length=16))
    assert tokens.shape == (20, 16)
    assert ((tokens[:, 1:] - tokens[:, :-1]) % 125 == 1).all()
    assert len({tuple(row.tolist()) for row in tokens}) == 20


def test_the_seed_decides_and_nothing_else(text_file: str) -> None:
    """Same seed, same tokens; another seed, other tokens; the source's own seed wins."""
    source = CalibrationSource(source=text_file, samples=8, length=16)
    assert torch.equal(sample(source, 1), sample(source, 1))
    assert not torch.equal(sample(source, 1), sample(source, 2))
    own = source.model_copy(update={"seed": 2})
    assert torch.equal(sample(own, 1), sample(source, 2))


def test_too_few_long_documents_is_an_error(text_file: str) -> None:
    """Eleven documents have 29 words or more; a twelfth sample is not made up."""
    assert len(sample(CalibrationSource(source=text_file, samples=11, length=29))) == 11
    with pytest.raises(CalibrationError, match=r"gives 11 samples of 29 tokens; 12 .*pack"):
        sample(CalibrationSource(source=text_file, samples=12, length=29))


def test_packing_cuts_the_joined_documents_without_overlap(tmp_path: Path) -> None:
    """Packed samples hold every token of the text once, up to the dropped tail."""
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": words(10, 10 * i)}) + "\n" for i in range(12)))
    tokens = sample(CalibrationSource(source=str(path), samples=7, length=17, sampling="pack"))
    assert len(set(tokens.flatten().tolist())) == 7 * 17
    with pytest.raises(CalibrationError, match="gives 7 samples"):
        sample(CalibrationSource(source=str(path), samples=8, length=17, sampling="pack"))


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_token_files_are_used_as_they_are(tmp_path: Path, suffix: str) -> None:
    """Ids come back bit by bit, so that an experiment can be repeated."""
    tokens = random_tokens(5, 9)
    path = tmp_path / f"ids{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(tokens.tolist()))
    else:
        save_file({"input_ids": tokens}, path)
    assert torch.equal(sample(CalibrationSource(source=str(path))), tokens)
    with pytest.raises(CalibrationError, match="has samples 5, the recipe says 4"):
        sample(CalibrationSource(source=str(path), samples=4))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_token_files_may_hold_unsigned_integers(tmp_path: Path, dtype: torch.dtype) -> None:
    """What is written by way of NumPy; ids of another vocabulary are told all the same."""
    tokens = random_tokens(3, 8)
    save_file({"ids": tokens.to(dtype)}, tmp_path / "ids.safetensors")
    source = CalibrationSource(source=str(tmp_path / "ids.safetensors"))
    source.check()
    assert torch.equal(sample(source), tokens)
    tokens[1, 3] = 200
    save_file({"ids": tokens.to(dtype)}, tmp_path / "ids.safetensors")
    with pytest.raises(CalibrationError, match="token id 200; the vocabulary ends at 127"):
        sample(source)


def test_ids_beyond_63_bits_are_told(tmp_path: Path) -> None:
    """They would be negative numbers where PyTorch computes with them."""
    tokens = torch.tensor([[1, -7]]).view(torch.uint64)
    save_file({"ids": tokens}, tmp_path / "ids.safetensors")
    with pytest.raises(CalibrationError, match=f"holds token id {2**64 - 7} "):
        CalibrationSource(source=str(tmp_path / "ids.safetensors")).check()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[[1, 2], [3]]", "sample 1 has 1 token ids, the first one 2"),
        ("[1, 2, 3]", "whole numbers of shape"),
        ("[[0.5, 1.5]]", "whole numbers of shape"),
        ("[[3, 500]]", "token id 500; the vocabulary ends at 127"),
        ("[[3, -1]]", "sample 0 holds -1, which is no token id"),
        ("[[3], [4]]", "fewer than two tokens"),
        ("{", "cannot read token ids"),
        ("9" * 5000, "a number is too long"),
        ("[" * 100_000, "it nests too deep"),
        ("{}", "sample 0 is no list"),
        ('{"text": "a"}', "sample 0 is no list"),
        ('"abc"', "sample 0 is no list"),
        ("[]", "of shape"),
        ("[[]]", "fewer than two tokens"),
        ("[[1, 2], [true, 3]]", "sample 1 holds true"),
        ("[[1, 2], [1, null]]", "sample 1 holds null"),
        ("[[1, NaN]]", "sample 0 holds NaN"),
        ("[[1, 2.0]]", r"sample 0 holds 2\.0"),
        ("[[1, 9223372036854775808]]", "sample 0 holds 9223372036854775808"),
        ("[[[1, 2]]]", "sample 0 holds"),
        ("\ufeff[[1, 500]]", "token id 500"),
    ],
)
def test_bad_token_files_are_told(tmp_path: Path, content: str, told: str) -> None:
    """Ragged, fractional, foreign or broken ids are one clear error each."""
    path = tmp_path / "ids.json"
    path.write_text(content)
    with pytest.raises(CalibrationError, match=told):
        sample(CalibrationSource(source=str(path)))


def test_the_model_can_write_its_own_calibration_set() -> None:
    """`self` needs no data; it is seeded and follows the model's own distribution."""
    model = make_model(num_hidden_layers=1)
    source = CalibrationSource(source="self", samples=3, length=12)
    first = draw(source, model, None, 5)
    assert first.shape == (3, 12)
    assert torch.equal(first, draw(source, model, None, 5))
    assert not torch.equal(first, draw(source, model, None, 6))
    # A head that wants one token only: all but the random first token are that one.
    model.lm_head = torch.nn.Linear(32, 128)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()[9] = 100
    assert (draw(source, model, None, 5)[:, 1:] == 9).all()


def test_a_model_without_tokenizer_says_what_works() -> None:
    """Text needs a tokenizer; token ids and `self` do not."""
    with pytest.raises(CalibrationError, match="no tokenizer"):
        draw(CalibrationSource(), make_model(num_hidden_layers=1), None, 0)


def test_samples_longer_than_the_model_are_refused() -> None:
    """The tiny model has 256 positions."""
    with pytest.raises(CalibrationError, match="256 positions"):
        sample(CalibrationSource(length=300))


def test_the_built_in_text_is_enough_and_held_out() -> None:
    """64 passages to calibrate on, 40 to evaluate on, none in both, all long enough to crop."""
    calibration, evaluation = passages("calibration"), passages("evaluation")
    assert len(calibration) >= 64 and len(evaluation) >= 32
    assert not set(calibration) & set(evaluation)
    sentences = [
        {s.strip() for p in part for s in p.split(".") if len(s.split()) > 4}
        for part in (calibration, evaluation)
    ]
    assert not sentences[0] & sentences[1]
    assert min(len(p.split()) for p in calibration + evaluation) >= 180


def test_the_digest_names_the_ids() -> None:
    """Equal ids have equal digests whatever their integer type; one other id changes it."""
    tokens = random_tokens()
    assert digest(tokens) == digest(tokens.to(torch.int32))
    changed = tokens.clone()
    changed[0, 0] = 4
    assert digest(changed) != digest(tokens)


@pytest.mark.parametrize("sampling", ["crop", "pack"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_tokenizer_that_pads_puts_no_padding_into_samples(
    text_file: str, sampling: str, side: str
) -> None:
    """Nor does one that truncates shorten documents: samples are those of the plain tokenizer."""
    padding = make_tokenizer()
    padding.padding_side = side
    padding.backend_tokenizer.enable_padding(direction=side, pad_id=2, length=64)
    padding.backend_tokenizer.enable_truncation(8)
    source = CalibrationSource(source=text_file, samples=8, length=16, sampling=sampling)  # type: ignore[arg-type]
    tokens = draw(source, make_model(num_hidden_layers=1), padding, 0)
    assert not tokens.eq(2).any()
    assert torch.equal(tokens, sample(source))


def test_the_draw_neither_reads_nor_moves_the_global_seeds(text_file: str) -> None:
    """Text, and what the model writes, come from generators of their own."""
    model = make_model(num_hidden_layers=1)
    for source in (text_file, "self"):
        asked, found = CalibrationSource(source=source, samples=4, length=8), []
        for seed in (1, 2):
            random.seed(seed)
            torch.manual_seed(seed)
            before = random.getstate(), torch.get_rng_state()
            found.append(draw(asked, model, make_tokenizer(), 0))
            assert random.getstate() == before[0]
            assert torch.equal(torch.get_rng_state(), before[1])
        assert torch.equal(*found)


def test_a_tokenizer_that_adds_tokens_draws_the_same_documents(tmp_path: Path) -> None:
    """Which documents come, and in which order, is the seed's choice where all are long enough."""
    path = tmp_path / "text.txt"
    # Twelve documents of ten words, no word in two of them.
    path.write_text("\n\n".join(words(10, 10 * i) for i in range(12)))
    marking = make_tokenizer()
    marking.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    source = CalibrationSource(source=str(path), samples=6, length=6)
    model = make_model(num_hidden_layers=1)
    documents = [
        [int(row[3] - 6) // 10 for row in draw(source, model, tokenizer, 5)]
        for tokenizer in (make_tokenizer(), marking)
    ]
    assert documents[0] == documents[1]
    assert len(set(documents[0])) == 6
