"""Footprint: closed forms, and a peak that follows what is allocated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slm_plugin.errors import UserError
from slm_plugin.evaluation import footprint
from slm_plugin.evaluation.footprint import (
    Footprint,
    FootprintOptions,
    added_memory,
    cache_bytes_per_token,
    weight_bytes,
)
from slm_plugin.evaluation.prefill import prefill
from slm_plugin.models.view import DecoderView
from slm_plugin.session import Session
from tests.tiny import make_model, random_tokens

HIDDEN, MLP, LAYERS, QUERIES, GROUPS, HEAD, VOCABULARY = 32, 48, 6, 4, 2, 8, 128
LAYER = 2 * HIDDEN * HEAD * (QUERIES + GROUPS) + 3 * HIDDEN * MLP + 2 * HIDDEN
CPU = torch.device("cpu")
needs_proc = pytest.mark.skipif(
    not footprint.RESET.exists(), reason="the resident set's peak is a matter of Linux"
)


def measure(session: Session, **options: object) -> dict[str, float]:
    """Values of a footprint evaluator by name."""
    evaluator = Footprint(FootprintOptions.model_validate(options))
    return {found.name: found.value for found in session.measure(evaluator)}


@pytest.mark.parametrize("tied", [False, True])
def test_counts_are_closed_forms(tied: bool) -> None:
    """Parameters and weight bytes follow from the sizes, with tied embeddings once."""
    found = measure(Session(make_model(tie_word_embeddings=tied)), tokens=8)
    expected = LAYERS * LAYER + HIDDEN + VOCABULARY * HIDDEN * (1 if tied else 2)
    assert found["parameters"] == expected
    assert found["weights"] * 1e6 == pytest.approx(4 * expected)


def test_half_precision_halves_the_bytes() -> None:
    """Bytes follow the number format, parameters do not."""
    model = make_model()
    sizes, whole = DecoderView.of(model).dimensions(), weight_bytes(model)
    assert weight_bytes(model.to(torch.bfloat16)) == whole / 2
    assert cache_bytes_per_token(sizes, torch.bfloat16) == 2 * LAYERS * GROUPS * HEAD * 2


def test_cache_bytes_are_those_of_a_real_cache(family: str) -> None:
    """A filled cache holds exactly the bytes per token that are reported."""
    model = make_model(family)
    with torch.inference_mode():
        cache = prefill(model, random_tokens(3, 10)).past_key_values
    held = sum(
        tensor.numel() * tensor.element_size()
        for layer in cache.layers
        for tensor in (layer.keys, layer.values)
    )
    found = measure(Session(model), tokens=8)
    assert held == 3 * 10 * found["KV cache per token"]


@needs_proc
def test_what_the_work_touches_is_seen_and_nothing_else() -> None:
    """64 MB that live only while the work runs are found, beside 64 MB that are there anyway."""

    def work(size: int) -> int:
        found = added_memory(CPU, lambda: torch.ones(size, dtype=torch.uint8))
        assert found is not None
        return found[1]

    there = torch.ones(64 * 2**20, dtype=torch.uint8)
    assert work(1) < 8 * 2**20
    assert 60 * 2**20 < work(64 * 2**20) < 72 * 2**20
    assert there.all()


@needs_proc
def test_memory_in_reserve_does_not_hide_the_work() -> None:
    """Small blocks that were freed before the measurement are not taken for room already held."""
    blocks = [torch.ones(2**14, dtype=torch.uint8) for _ in range(2**11)]
    del blocks
    found = added_memory(CPU, lambda: [torch.ones(2**14, dtype=torch.uint8) for _ in range(2**11)])
    assert found is not None
    # Of 32 MiB; small holes that other tests left in the heap take a part of it.
    assert found[1] > 16 * 2**20


@needs_proc
def test_peak_is_the_weights_and_what_the_prefill_adds() -> None:
    """A model with larger weights has a peak that is larger by those weights."""
    little, much = (
        measure(Session(make_model(intermediate_size=size)), tokens=64) for size in (48, 24_000)
    )
    grown = much["weights"] - little["weights"]
    assert grown > 50
    # What a prefill adds to a process depends on memory that was freed before; here it is small.
    assert much["peak memory"] - little["peak memory"] > grown - 1
    assert little["peak memory"] < 40


def test_unmeasurable_peak_is_left_out(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a way to reset the peak the other figures stand alone."""
    monkeypatch.setattr(footprint, "RESET", tmp_path / "no" / "clear_refs")
    assert list(measure(session, tokens=8)) == ["parameters", "weights", "KV cache per token"]


def test_all_figures_are_better_low(session: Session) -> None:
    """Less is better throughout, and units are named."""
    found = Footprint(FootprintOptions(tokens=8)).measure(session)
    assert {m.better for m in found} == {"lower"}
    assert [m.unit for m in found][:3] == ["", "MB", "bytes"]


def test_prompt_beyond_the_positions_is_refused(session: Session) -> None:
    """The peak's prompt has to fit the model."""
    with pytest.raises(UserError, match="needs 257 positions"):
        measure(session, tokens=257)
