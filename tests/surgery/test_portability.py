"""Tests of slm_plugin.surgery.portability."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoModelForCausalLM

from slm_plugin.errors import PlanError, TargetError
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.models.families import family_of
from slm_plugin.models.view import DecoderView
from slm_plugin.surgery import portability as rules
from slm_plugin.surgery.portability import portability
from tests.tiny import FAMILIES, make_model

MAJOR = int(transformers.__version__.split(".")[0])


def _dimensions(family: str = "llama", **changes: Any) -> Dimensions:
    measured = DecoderView.of(make_model(family, num_key_value_heads=4)).dimensions()
    return measured.model_copy(update=changes)


def _judge(before: Dimensions, after: Dimensions, **config: Any) -> tuple[str, ...]:
    return portability(before, after, make_model(num_key_value_heads=4, **config).config)


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Pretend that another release of transformers is installed."""
    monkeypatch.setattr(rules, "found_version", lambda _: request.param)
    return str(request.param)


def test_unchanged_model_is_fine() -> None:
    """No change, no warning."""
    assert _judge(_dimensions(), _dimensions()) == ()


@pytest.mark.parametrize(
    ("unit", "field"),
    [
        ("layer", "layers"),
        ("MLP channel", "intermediate_size"),
        ("KV group", "kv_heads"),
    ],
)
def test_last_unit_of_a_kind_must_stay(unit: str, field: str) -> None:
    """A plan that leaves no layer, channel or KV group is refused by name."""
    with pytest.raises(PlanError, match=f"leaves no {unit}"):
        _judge(_dimensions(), _dimensions(**{field: 0}))


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 2), (3, 4), (4, 2)])
def test_heads_stay_in_whole_groups(heads: int, kv_heads: int) -> None:
    """Query heads that are not all those of the key heads that stay are refused."""
    with pytest.raises(PlanError, match="not whole KV groups"):
        _judge(_dimensions(), _dimensions(attention_heads=heads, kv_heads=kv_heads))


def test_tied_embeddings_stay_tied() -> None:
    """A plan cannot promise to tie what differs."""
    with pytest.raises(PlanError, match="share their weights"):
        _judge(_dimensions(), _dimensions(tied_embeddings=True))


@pytest.mark.parametrize("release", ["5.0.0", "5.23.0"], indirect=True)
def test_uneven_heads_of_llama_are_refused_under_transformers_5(release: str) -> None:
    """What this installation could not load is refused, with the counts that it could."""
    with pytest.raises(TargetError, match=f"transformers {release} refuses") as refused:
        _judge(_dimensions(), _dimensions(attention_heads=3, kv_heads=3))
    assert refused.value.hint == "the KV groups removed may be 0, 2, 3"


@pytest.mark.parametrize("release", ["5.23.0"], indirect=True)
def test_the_query_heads_that_could_go_are_named(release: str) -> None:
    """Where the key/value heads stay, the way out is another number of query heads."""
    before = _dimensions(attention_heads=8, kv_heads=2)
    for fewer, loads in ((1, False), (2, True), (3, True)):
        after = before.without_units(query_heads=2 * fewer)
        assert after.kv_heads == 2
        if loads:
            _judge(before, after)
            continue
        with pytest.raises(TargetError, match="with 6 heads") as refused:
            _judge(before, after)
        assert refused.value.hint == "the query heads of each KV group removed may be 0, 2, 3"


@pytest.mark.parametrize("release", ["4.57.6"], indirect=True)
def test_uneven_heads_of_llama_are_warned_of_under_transformers_4(release: str) -> None:
    """What this installation loads but the next major would not is a warning."""
    warnings = _judge(_dimensions(), _dimensions(attention_heads=3, kv_heads=3))
    assert any("transformers 5 refuses to load LlamaForCausalLM" in w for w in warnings)


@pytest.mark.parametrize("release", ["5.23.0"], indirect=True)
def test_uneven_heads_of_other_families_pass(release: str) -> None:
    """Only some families check the head count."""
    before = _dimensions("mistral")
    warnings = portability(
        before,
        before.without_units(kv_groups=1),
        make_model("mistral", num_key_value_heads=4).config,
    )
    assert not any("refuses" in warning for warning in warnings)


def test_rule_for_uneven_heads_is_that_of_the_installed_transformers(
    family: str, tmp_path: Path
) -> None:
    """Saving and loading 3 heads of a hidden size of 32 fails exactly where the rule says so."""
    model_class = getattr(transformers, FAMILIES[family][0].architecture)
    architecture = model_class.__name__
    assert family_of(architecture).architecture == architecture

    def round_trip() -> None:
        model = make_model(family, num_attention_heads=3, num_key_value_heads=3)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert loaded.model.layers[0].self_attn.q_proj.out_features == 24

    if MAJOR >= 5 and family_of(architecture).even_split:
        with pytest.raises(Exception, match="multiple of the number of attention heads"):
            round_trip()
    else:
        round_trip()


def test_head_dim_that_can_no_longer_be_derived_is_warned_of() -> None:
    """The warning comes with the change, not with a model that was so before."""
    half = _dimensions().without_units(kv_groups=2)
    assert any("head_dim stays 8" in warning for warning in _judge(_dimensions(), half))
    assert not any("head_dim" in warning for warning in _judge(half, half))


@pytest.mark.parametrize(
    ("before", "after", "lost"),
    [(48, 40, None), (48, 36, 8), (128, 72, 64), (128, 100, 8), (36, 20, None), (128, 64, None)],
)
def test_channel_counts_that_lose_a_round_multiple_are_warned_of(
    before: int, after: int, lost: int | None
) -> None:
    """Multiples of 8 and 64 are to be kept where they were."""
    warnings = _judge(_dimensions(intermediate_size=before), _dimensions(intermediate_size=after))
    assert len(warnings) == (lost is not None)
    if lost:
        assert f"intermediate_size {after} is no longer a multiple of {lost}:" in warnings[0]


def test_heads_of_phi3_with_longrope_stay() -> None:
    """Its config counts the factors by hidden_size / heads."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = {"type": "longrope", **factors}
    model = make_model("phi3", rope_scaling=rope, original_max_position_embeddings=64)
    before = DecoderView.of(model).dimensions()
    with pytest.raises(TargetError, match="longrope loads only where"):
        portability(before, before.without_units(kv_groups=1), model.config)
    assert portability(before, before.without_units(channels=16), model.config) == ()
    # transformers itself, with the heads that would remain.
    fewer = {**model.config.to_dict(), "num_attention_heads": 2, "num_key_value_heads": 1}
    with pytest.raises(Exception, match="short_factor"):
        type(model.config)(**fewer)


def test_per_layer_lists_that_are_cut_are_warned_of() -> None:
    """Lists with differing entries are named when layers go, and only then."""
    kinds = ["full_attention", "sliding_attention"] * 3
    model = make_model("qwen3", num_key_value_heads=4, layer_types=kinds, use_sliding_window=True)
    before = DecoderView.of(model).dimensions()
    (warning,) = portability(before, before.without_layers(2), model.config)
    assert warning.startswith("layer_types of the config")
    assert portability(before, before, model.config) == ()
    uniform = make_model("qwen3", num_key_value_heads=4)
    assert portability(before, before.without_layers(2), uniform.config) == ()
