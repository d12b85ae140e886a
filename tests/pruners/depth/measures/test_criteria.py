"""Criteria against definitions written out with torch's own losses and plain loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm_plugin.models.head import Head
from slm_plugin.pruners.depth.measures.criteria import CRITERIA, flat_cosine, token_cosine

VOCABULARY = 11


def states(seed: int, *shape: int) -> Tensor:
    """Random hidden states; 5 samples, 6 tokens, 8 features unless told otherwise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (5, 6, 8), generator=generator)


@pytest.fixture(params=[{}, {"divisor": 0.4}, {"softcap": 1.5}], ids=["plain", "divided", "bound"])
def head(request: pytest.FixtureRequest) -> Head:
    """A small head, as it is in most families, in Granite and in Gemma 2."""
    torch.manual_seed(3)
    return Head(nn.Linear(8, VOCABULARY, bias=False).requires_grad_(False), **request.param)


@pytest.fixture
def tokens() -> Tensor:
    """Token ids."""
    return torch.randint(VOCABULARY, (5, 6), generator=torch.Generator().manual_seed(4))


def value(name: str, reference: Tensor, hidden: Tensor, tokens: Tensor, head: Head) -> Tensor:
    """What a criterion says of two states."""
    criterion = CRITERIA[name]
    return criterion.compare(criterion.prepare(reference, tokens, head), hidden, head)


@pytest.mark.parametrize("name", CRITERIA)
def test_an_unchanged_model_has_the_value_of_itself(name: str, head: Head, tokens: Tensor) -> None:
    """1 for cosines and CKA, 0 for divergence and loss."""
    same = states(0)
    found = value(name, same, same.clone(), tokens, head)
    expected = torch.full_like(found, CRITERIA[name].same)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", CRITERIA)
def test_no_value_exceeds_the_greatest(name: str, head: Head, tokens: Tensor) -> None:
    """The bound that searches give up by holds for anything."""
    criterion = CRITERIA[name]
    prepared = criterion.prepare(states(0), tokens, head)
    for seed in range(1, 30):
        found = criterion.compare(prepared, 5 * states(seed), head)
        assert float(found.max()) <= criterion.greatest(prepared) + 1e-6


@pytest.mark.parametrize("name", [n for n, c in CRITERIA.items() if not c.pooled])
def test_samples_are_judged_one_by_one(name: str, head: Head, tokens: Tensor) -> None:
    """A sample's value does not depend on its batch."""
    reference, hidden = states(0), states(1)
    together = value(name, reference, hidden, tokens, head)
    apart = [
        value(name, reference[i : i + 1], hidden[i : i + 1], tokens[i : i + 1], head)
        for i in range(5)
    ]
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-6, rtol=1e-6)


def test_flat_and_token_cosine_differ_where_lengths_do() -> None:
    """A long token decides the flat cosine and counts like any other in the token cosine."""
    reference = torch.tensor([[[100.0, 0.0], [0.0, 1.0]]])
    hidden = torch.tensor([[[100.0, 0.0], [0.0, -1.0]]])
    assert flat_cosine(reference, hidden).item() == pytest.approx(9999 / 10001)
    assert token_cosine(reference, hidden).item() == pytest.approx(0.0)


def test_token_cosine_runs_along_the_features() -> None:
    """Scaling a token changes nothing; scaling a feature does."""
    reference, hidden = states(0), states(1)
    scale = torch.rand(1, 6, 1) + 0.5
    torch.testing.assert_close(
        token_cosine(reference, hidden * scale), token_cosine(reference, hidden)
    )
    stretched = hidden * torch.linspace(0.1, 3, 8)
    assert not torch.allclose(token_cosine(reference, stretched), token_cosine(reference, hidden))


def test_divergence_is_that_of_the_distributions(head: Head, tokens: Tensor) -> None:
    """Equal to KL(original || changed) by torch, mean over a sample's tokens."""
    reference, hidden = states(0), states(1)
    log_p, log_q = head(reference).log_softmax(-1), head(hidden).log_softmax(-1)
    expected = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean(-1)
    found = value("logit_kl", reference, hidden, tokens, head)
    torch.testing.assert_close(found, -expected.double(), atol=1e-5, rtol=1e-5)


def test_loss_is_the_increase_of_cross_entropy(head: Head, tokens: Tensor) -> None:
    """Position t is asked for token t+1; the last position is asked for nothing."""
    reference, hidden = states(0), states(1)
    found = value("loss", reference, hidden, tokens, head)
    for sample in range(5):
        before, after = (
            F.cross_entropy(head(h[sample, :-1]), tokens[sample, 1:]) for h in (reference, hidden)
        )
        assert found[sample].item() == pytest.approx((before - after).item(), abs=1e-5)


def test_cka_looks_at_all_samples_together(head: Head, tokens: Tensor) -> None:
    """One number; unrelated states are alike only to the biased estimator."""
    wide = [states(seed, 8, 16, 64) for seed in (0, 1)]
    many = torch.zeros(8, 16, dtype=torch.long)
    biased = value("cka", *wide, many, head)
    unbiased = value("cka_unbiased", *wide, many, head)
    assert biased.numel() == unbiased.numel() == 1
    assert biased.item() > 0.9
    assert abs(unbiased.item()) < 0.3


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_wide_numbers(
    name: str, dtype: torch.dtype, head: Head, tokens: Tensor
) -> None:
    """States whose squares overflow float16 give what the same numbers give in float64."""
    loud = torch.ones(8)
    loud[0] = 2000.0
    reference, hidden = ((states(seed) * loud).to(dtype) for seed in (1, 2))
    head.linear.weight[:, 0] *= 0.001
    narrow = replace(head, linear=head.linear.to(dtype))
    wide = replace(head, linear=nn.Linear(8, VOCABULARY, bias=False, dtype=torch.float64))
    wide.linear.requires_grad_(False).weight.copy_(narrow.linear.weight)
    found = value(name, reference, hidden, tokens, narrow)
    expected = value(name, reference.double(), hidden.double(), tokens, wide)
    assert found.dtype == torch.float64
    # Logits leave the head in the narrow format; nothing else may be rounded to it.
    rounding = 0.02 if name in ("logit_kl", "loss") else 1e-9
    torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding)
