"""Perplexity: the published protocol, against a loop over single tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from slm_plugin.errors import CalibrationError, MissingExtraError, NumericalError, UserError
from slm_plugin.evaluation import perplexity
from slm_plugin.evaluation.base import Measurement
from slm_plugin.evaluation.perplexity import Perplexity, PerplexityOptions, cut, token_ids
from slm_plugin.models import head
from slm_plugin.session import Session
from tests.tiny import VOCABULARY, make_model, make_tokenizer, random_tokens


def write_words(path: Path, ids: Sequence[int]) -> str:
    """Write the words of token ids into a text file, seven on a line."""
    lines = [ids[start : start + 7] for start in range(0, len(ids), 7)]
    path.write_text("".join(" ".join(f"w{i}" for i in line) + "\n" for line in lines))
    return str(path)


def measure(session: Session, **options: object) -> Measurement:
    """The one measurement of a perplexity evaluator."""
    (found,) = Perplexity(PerplexityOptions.model_validate(options)).measure(session)
    return found


@torch.no_grad()
def token_by_token(model: PreTrainedModel, ids: Sequence[int], length: int) -> float:
    """Perplexity from one forward pass for every single token, in float64."""
    total, scored = 0.0, 0
    for start in range(0, len(ids) - length + 1, length):
        for end in range(start + 1, start + length):
            logits = model(input_ids=torch.tensor([ids[start:end]])).logits[0, -1]
            total -= F.log_softmax(logits.double(), dim=-1)[ids[end]].item()
            scored += 1
    return math.exp(total / scored)


def with_markers() -> PreTrainedTokenizerFast:
    """A tokenizer that puts ``<s>`` before a text and ``</s>`` behind it."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def test_equals_a_loop_over_single_tokens(family: str, tmp_path: Path) -> None:
    """Every architecture gets the perplexity that scoring one token at a time gives."""
    ids = random_tokens(1, 50)[0].tolist()
    source = write_words(tmp_path / "text.txt", ids)
    model = make_model(family)
    found = measure(Session(model, make_tokenizer()), source=source, length=12)
    assert found.value == pytest.approx(token_by_token(model, ids, 12), rel=1e-5)


def test_uniform_model_scores_its_vocabulary(session: Session, tmp_path: Path) -> None:
    """A model that finds every token equally likely has the vocabulary's size as perplexity."""
    session.view.head.weight.data.zero_()
    source = write_words(tmp_path / "text.txt", random_tokens(1, 40)[0].tolist())
    assert measure(session, source=source, length=10).value == pytest.approx(VOCABULARY, rel=1e-6)


def test_batching_changes_nothing(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One piece at a time and a few positions at a time give what all at once gives."""
    source = write_words(tmp_path / "text.txt", random_tokens(1, 96)[0].tolist())
    together = measure(session, source=source, length=16)
    monkeypatch.setattr(perplexity, "BATCH_TOKENS", 1)
    monkeypatch.setattr(head, "POSITIONS", 4)
    apart = measure(session, source=source, length=16)
    assert apart.value == pytest.approx(together.value, rel=1e-6)
    assert apart.protocol == together.protocol


def test_tail_is_dropped(session: Session, tmp_path: Path) -> None:
    """Tokens behind the last whole piece do not count."""
    ids = random_tokens(1, 39)[0].tolist()
    long = measure(session, source=write_words(tmp_path / "long.txt", ids), length=16)
    even = measure(session, source=write_words(tmp_path / "even.txt", ids[:32]), length=16)
    assert long.value == even.value
    assert "2 non-overlapping pieces of 16 tokens, 30 scored positions (15 a piece)" in (
        long.protocol
    )


def test_limit_takes_the_first_pieces(session: Session, tmp_path: Path) -> None:
    """A limit of two scores what a text of two pieces scores, and the protocol tells."""
    ids = random_tokens(1, 64)[0].tolist()
    source = write_words(tmp_path / "text.txt", ids)
    limited = measure(session, source=source, length=16, limit=2)
    short = measure(session, source=write_words(tmp_path / "short.txt", ids[:32]), length=16)
    assert limited.value == short.value
    assert "first 2 non-overlapping pieces" in limited.protocol
    assert limited.value != measure(session, source=source, length=16).value


def test_special_tokens_stand_at_the_start_only() -> None:
    """The start token comes once, the end token not at all."""
    ids, special = token_ids(with_markers(), "w7 w8 w9")
    assert (ids.tolist(), special) == ([1, 7, 8, 9], 1)
    ids, special = token_ids(make_tokenizer(), "w7 w8 w9")
    assert (ids.tolist(), special) == ([7, 8, 9], 0)
    several = make_tokenizer()
    several.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s> </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    ids, special = token_ids(several, "w7 w8 w9")
    assert (ids.tolist(), special) == ([1, 7, 8, 9], 1)


def test_start_token_belongs_to_the_first_piece_alone(tmp_path: Path) -> None:
    """With a start token the pieces are those of the text shifted by one."""
    ids = random_tokens(1, 32)[0].tolist()
    source = write_words(tmp_path / "text.txt", ids)
    model = make_model()
    found = measure(Session(model, with_markers()), source=source, length=16)
    assert found.value == pytest.approx(token_by_token(model, [1, *ids], 16), rel=1e-5)
    assert "special tokens at the start: 1," in found.protocol


def test_rows_are_joined_by_two_newlines(tmp_path: Path) -> None:
    """Lines keep their newline and blank lines are empty rows, as `datasets` has WikiText-2."""
    path = tmp_path / "wiki.txt"
    path.write_text(" = Title = \n \n One line . \n")
    rows = Perplexity(PerplexityOptions(source=str(path)))
    whole = Perplexity(PerplexityOptions(source=str(path), join="none"))
    assert rows.text == " = Title = \n\n\n\n\n One line . \n"
    assert whole.text == path.read_text()


def test_name_and_protocol_tell_texts_apart(session: Session, tmp_path: Path) -> None:
    """The name has the file's stem and the length; another content is another protocol."""
    path = tmp_path / "some_text.txt"
    first = measure(session, source=write_words(path, random_tokens(1, 32)[0].tolist()), length=8)
    other = random_tokens(1, 32, seed=8)[0].tolist()
    second = measure(session, source=write_words(path, other), length=8)
    assert first.name == second.name == "perplexity some_text 8"
    assert first.protocol != second.protocol


def test_builtin_text_is_the_default() -> None:
    """Without a source the built-in evaluation passages are scored."""
    evaluator = Perplexity(PerplexityOptions())
    evaluator.check()
    assert len(evaluator.text.split("\n\n")) == 40


def test_too_little_text_names_a_fitting_length(session: Session, tmp_path: Path) -> None:
    """A text shorter than one piece is refused with its length and one that would do."""
    source = write_words(tmp_path / "text.txt", random_tokens(1, 21)[0].tolist())
    with pytest.raises(CalibrationError, match=r"has 21 tokens.*takes 32.*`length: 16`"):
        measure(session, source=source, length=32)


def test_one_token_fits_no_length() -> None:
    """A text of one token gets no length proposed."""
    with pytest.raises(CalibrationError, match="use a longer text"):
        cut(torch.tensor([5]), 2, None)


def test_pieces_beyond_the_positions_are_refused(session: Session) -> None:
    """A piece longer than the model's positions is refused before anything is scored."""
    with pytest.raises(UserError, match="needs 257 positions and the model has 256"):
        measure(session, length=257)


def test_missing_file_is_refused_by_check(tmp_path: Path) -> None:
    """`check` finds a missing file, however the text is joined."""
    for join in ("rows", "none"):
        options = PerplexityOptions(source=str(tmp_path / "no.txt"), join=join)
        with pytest.raises(CalibrationError, match="there is no file"):
            Perplexity(options).check()


def test_dataset_without_its_extra_is_refused_by_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """`check` says which extra a dataset needs when it is missing."""
    monkeypatch.setattr("slm_plugin.extras.found_version", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"slm-plugin\[data\]"):
        Perplexity(PerplexityOptions(source="wikitext2")).check()


def test_only_a_text_file_is_taken_as_it_is() -> None:
    """`join: none` makes sense for a .txt file alone."""
    with pytest.raises(ValidationError, match=r"only for \.txt files"):
        PerplexityOptions(source="builtin", join="none")


def test_nan_is_an_error(session: Session, tmp_path: Path) -> None:
    """A model that yields NaN has no perplexity."""
    session.view.norm.weight.data[0] = torch.nan
    source = write_words(tmp_path / "text.txt", random_tokens(1, 32)[0].tolist())
    with pytest.raises(NumericalError, match="NaN"):
        measure(session, source=source, length=16)


def test_ruined_model_is_infinitely_perplexed(session: Session, tmp_path: Path) -> None:
    """A cross entropy whose exponential is beyond float64 is reported as infinity."""
    session.view.head.weight.data.mul_(1e5)
    source = write_words(tmp_path / "text.txt", random_tokens(1, 32)[0].tolist())
    assert measure(session, source=source, length=16).value == math.inf


def test_tokenizer_is_needed(session: Session) -> None:
    """A session without a tokenizer is refused."""
    with pytest.raises(CalibrationError, match="needs a tokenizer"):
        measure(Session(session.model), length=16)
