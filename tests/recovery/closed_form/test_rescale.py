"""The stream behind a gap becomes as long as it was, and nobody below notices."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from slm_plugin.errors import NumericalError
from slm_plugin.plans import MergeLayers
from slm_plugin.pruners.depth.repaired import Repaired
from slm_plugin.pruners.depth.repaired_options import RepairedOptions
from slm_plugin.recovery.closed_form.rescale import Rescale
from slm_plugin.target import Target
from tests.pruners.depth.strategies import layer_outputs
from tests.recovery.pruned import TOKENS, drop, join, pruned, recover, seen_by
from tests.tiny import FAMILIES, make_model


def _ratio(target: torch.Tensor, state: torch.Tensor) -> float:
    """Mean over tokens of the lengths' ratio."""
    return float((target.double().norm(dim=-1) / state.double().norm(dim=-1)).mean())


@torch.no_grad()
def _logits(model: PreTrainedModel) -> torch.Tensor:
    found: torch.Tensor = model(TOKENS).logits
    return found


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("operation", "position", "target"),
    [(drop(2, 3), 1, 4), (MergeLayers(first=1, last=3), 1, 4), (join(1), 1, 3)],
)
def test_the_stream_behind_a_gap_gets_its_length_back(
    bias: bool, operation: object, position: int, target: int
) -> None:
    """States up to the gap are the plain ones times the factor; mean lengths then agree."""
    model = make_model(mlp_bias=bias, attention_bias=bias, rms_norm_eps=1e-12)
    wanted = layer_outputs(model, TOKENS)[target]
    session = pruned(model, operation)  # type: ignore[arg-type]
    plain = layer_outputs(model, TOKENS)
    factor = _ratio(wanted, plain[position + 1])
    (note,) = recover("rescale", session).notes
    assert note.startswith(f"layer {position}: length times {factor:.4g}, error ")
    after = layer_outputs(model, TOKENS)
    for depth in range(position + 2):
        torch.testing.assert_close(after[depth], factor * plain[depth], rtol=1e-3, atol=1e-4)
    assert _ratio(wanted, after[position + 1]) == pytest.approx(1, abs=1e-4)
    errors = [float((s - wanted).norm() / wanted.norm()) for s in (plain[2], after[2])]
    assert note.endswith(f"error {errors[0]:.2%} to {errors[1]:.2%}")


def test_layers_below_a_gap_are_blind_to_it(family: str) -> None:
    """What their output projections see is the same as without rescaling."""
    model = make_model(family)
    session = pruned(model, drop(3, 4))
    places = [
        f"model.layers.{i}.{p}" for i in (0, 1, 2) for p in ("self_attn.o_proj", "mlp.down_proj")
    ]
    before = [seen_by(model, place) for place in places]
    recover("rescale", session)
    for place, seen in zip(places, before, strict=True):
        torch.testing.assert_close(seen_by(model, place), seen, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "name", [name for name, (family, _) in FAMILIES.items() if not Rescale.unsuited(family, {})]
)
def test_all_that_enters_is_scaled(name: str) -> None:
    """In every family that is not refused; a stream with a part of the former length is another."""
    session = pruned(make_model(name), drop(3))
    plain = session.captured()
    recover("rescale", session)
    for before, after in zip(plain, session.captured(), strict=True):
        factor = float(after.inputs[0].norm() / before.inputs[0].norm())
        for index in range(4):
            expected = factor * before.inputs[index]
            torch.testing.assert_close(after.inputs[index], expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("name", "said"), [("opt", "learned positions"), ("llava", "images"), ("qwen3_vl", "images")]
)
def test_what_enters_beside_the_embedding_is_refused(name: str, said: str) -> None:
    """By the recovery, and by the search that repairs in this way."""
    family, _ = FAMILIES[name]
    assert said in Rescale.unsuited(family, {})
    search = Repaired(RepairedOptions(repair="rescale"), Target(layers_removed=1))
    assert said in search.unsuited_options(family, {})


def test_two_gaps_compose() -> None:
    """The upper one is measured on the rescaled stream and scales what lies below both again."""
    model = make_model(num_hidden_layers=8, rms_norm_eps=1e-12)
    dense = layer_outputs(model, TOKENS)
    session = pruned(model, drop(2, 5))
    plain = layer_outputs(model, TOKENS)
    recover("rescale", session)
    after = layer_outputs(model, TOKENS)
    assert _ratio(dense[6], after[4]) == pytest.approx(1, abs=1e-4)
    first = _ratio(dense[3], plain[2])
    second = float(after[2].norm() / plain[2].norm()) / first
    torch.testing.assert_close(after[2], first * second * plain[2], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        model.model.layers[3].mlp.down_proj.weight,
        second * make_model(num_hidden_layers=8).model.layers[4].mlp.down_proj.weight,
    )
    assert abs(second - 1) > 1e-3


def test_a_tied_head_does_not_feel_it(family: str) -> None:
    """Logits are those of the same model with a head of its own."""
    found = []
    for tied in (True, False):
        model = make_model(family, tie_word_embeddings=tied)
        with torch.no_grad():
            model.lm_head.weight.copy_(model.model.embed_tokens.weight)
        before = _logits(model)
        recover("rescale", pruned(model, drop(2, 3)))
        found.append(_logits(model))
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert not torch.allclose(before, found[0], atol=1e-2)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_the_top_needs_nothing() -> None:
    """The final norm is blind to length, so the weights stay and the note says why."""
    model = make_model()
    session = pruned(model, drop(5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (note,) = recover("rescale", session).notes
    assert note == "layer 4: left as it is, the final norm cancels any factor"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_layers_missing_at_the_bottom_scale_the_embedding() -> None:
    """The embedding stands before them."""
    model = make_model()
    wanted = layer_outputs(model, TOKENS)[2]
    session = pruned(model, drop(0, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (note,) = recover("rescale", session).notes
    assert note.startswith("the embedding: length times ")
    changed = [n for n, value in model.state_dict().items() if not torch.equal(value, before[n])]
    assert changed == ["model.embed_tokens.weight"]
    assert _ratio(wanted, layer_outputs(model, TOKENS)[0]) == pytest.approx(1, abs=1e-5)


def test_states_without_length_are_one_error() -> None:
    """A token whose state is zero has no ratio; nothing is written."""
    model = make_model()
    session = pruned(model, drop(0))
    with torch.no_grad():
        model.model.embed_tokens.weight[TOKENS[0, 0]] = 0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NumericalError, match="behind the embedding are NaN, infinite or zero"):
        recover("rescale", session)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
