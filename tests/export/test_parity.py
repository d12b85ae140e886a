"""Tests of slm_plugin.export.parity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slm_plugin.errors import VerificationError
from slm_plugin.export import parity
from slm_plugin.export.base import Check
from slm_plugin.export.parity import (
    NEW_TOKENS,
    Departure,
    Reference,
    continue_greedily,
    departure,
    prompts,
    prove,
    reference,
)
from slm_plugin.session import Session
from tests.tiny import make_model, make_tokenizer, random_tokens


@torch.no_grad()
def most_likely(model: Any, ids: Tensor) -> Tensor:
    """Greedy continuation by brute force: the whole text through the model for every token."""
    for _ in range(NEW_TOKENS):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[:, -NEW_TOKENS:]


def test_greedy_continuation_takes_the_most_likely_token(family: str) -> None:
    """`generate` with a cache finds what argmax over full passes finds."""
    model = make_model(family, num_hidden_layers=3)
    prompt = random_tokens(1, 9)
    assert torch.equal(continue_greedily(model, prompt), most_likely(model, prompt))


def test_generation_settings_do_not_blur_the_comparison() -> None:
    """Penalties, sampling and end tokens of the model are neither used nor lost."""
    model = make_model()
    expected = most_likely(model, random_tokens(1, 5))
    own = model.generation_config
    own.update(do_sample=True, repetition_penalty=50.0, eos_token_id=expected[0, 1].item())
    assert torch.equal(continue_greedily(model, random_tokens(1, 5)), expected)
    assert model.generation_config is own
    assert own.repetition_penalty == 50.0


def test_prompts_have_several_lengths_and_come_back_with_the_seed() -> None:
    """The same session asks the same; lengths range from one token up."""
    session = Session(make_model())
    lengths = [prompt.shape[1] for prompt in prompts(session)]
    assert min(lengths) == 1
    assert len(set(lengths)) >= 4
    for first, second in zip(prompts(session), prompts(session), strict=True):
        assert torch.equal(first, second)


def test_prompts_use_the_tokenizer_and_random_ids() -> None:
    """Sentences alone would be one repeated unknown token for a tokenizer of another language."""
    found = prompts(Session(make_model(), make_tokenizer()))
    assert sum(bool((prompt == 0).all()) for prompt in found) == 3
    assert any(len(prompt.unique()) > 10 for prompt in found)


def test_a_doubled_head_differs_by_the_scale_and_chooses_alike() -> None:
    """Twice the head gives twice the logits: the largest moves by itself, the order stays."""
    model = make_model()
    expected = reference(Session(model))
    assert departure(model, expected, 0.0) == Departure(0.0, 0, 0)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    found = departure(model, expected, 0.0)
    assert found.logits == pytest.approx(expected.scale, rel=1e-6)
    assert (found.with_cache, found.without_cache) == (0, 0)


def test_every_other_continuation_is_counted() -> None:
    """A negated head prefers other tokens on every prompt."""
    model = make_model()
    expected = reference(Session(model))
    with torch.no_grad():
        model.lm_head.weight.neg_()
    found = departure(model, expected, 0.0)
    assert found.with_cache == found.without_cache == len(expected.prompts)


def test_a_broken_cache_shows_only_with_cache() -> None:
    """A model that errs when it reads one token after others computes every whole pass right."""
    model = make_model()
    expected = reference(Session(model))

    def err(_: Any, __: Any, kwargs: dict[str, Any], output: Any) -> None:
        if kwargs["input_ids"].shape[1] == 1:
            output.logits.neg_()

    model.register_forward_hook(err, with_kwargs=True)
    found = departure(model, expected, 1e-4)
    assert (found.logits, found.without_cache) == (0, 0)
    assert found.with_cache == len(expected.prompts)


@pytest.mark.parametrize(("gap", "counted"), [(0.0, 0), (0.19, 0), (0.21, 1), (-0.21, 1)])
def test_a_tie_may_fall_either_way(
    monkeypatch: pytest.MonkeyPatch, gap: float, counted: int
) -> None:
    """Another token counts only where the reference's logits are further apart than rounding."""
    logits = torch.zeros(1, 5, 4)
    logits[0, 3, 2] = gap
    expected = Reference((torch.tensor([[0, 1, 0]]),), (torch.tensor([[0, 2]]),), (logits,))
    computed = logits.clone()
    computed[0, 3, 3] = 1
    monkeypatch.setattr(parity, "continue_greedily", lambda *_: torch.tensor([[0, 3]]))
    monkeypatch.setattr(parity, "logits_of", lambda *_: computed)
    found = departure(None, expected, 0.1)
    assert (found.with_cache, found.without_cache) == (counted, counted)


def test_full_precision_computes_with_the_same_weights_in_float32() -> None:
    """The reference of a bfloat16 model is that of its weights, widened; the model stays."""
    narrow, wide = make_model(), make_model()
    for model in (narrow, wide):
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    for parameter in wide.parameters():
        parameter.data = parameter.data.float()
    found = reference(Session(narrow), full_precision=True)
    assert narrow.dtype == torch.bfloat16
    assert departure(wide, found, 0.0).logits == 0
    assert departure(narrow, found, 0.0).logits > 0


def test_a_written_reference_reads_back(tmp_path: Path) -> None:
    """Tensors and facts survive the file."""
    expected = reference(Session(make_model()))
    expected.write(tmp_path / "r.safetensors", {"tolerance": "0.5"})
    found, facts = Reference.read(tmp_path / "r.safetensors")
    assert facts == {"tolerance": "0.5"}
    assert len(found.prompts) == len(expected.prompts)
    for name in Reference.__slots__:
        for mine, theirs in zip(getattr(found, name), getattr(expected, name), strict=True):
            assert torch.equal(mine, theirs)


def test_prove_names_every_figure_that_fails() -> None:
    """Passing checks come back; failing ones are named with value and allowance."""
    good = Check(name="good", value=0.5, tolerance=0.5)
    assert prove("it", [good]) == (good,)
    bad = Check(name="bad", value=0.75, tolerance=0.5)
    worse = Check(name="worse", value=float("nan"), tolerance=0.5)
    with pytest.raises(VerificationError, match=r"bad 0\.75, allowed 0\.5; worse nan") as caught:
        prove("it", [good, bad, worse])
    assert "good" not in str(caught.value)
