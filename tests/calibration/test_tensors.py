"""Calibration tensors: every mistake is one line that names the tensor, before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from slm_plugin.calibration.tensors import given_inputs, read_tensors, stored_inputs
from slm_plugin.errors import CalibrationError, RecipeError, UserError
from slm_plugin.models.view import DecoderView
from slm_plugin.recipe import Recipe
from tests.encoders import make_encoder, make_inputs, stack_of
from tests.tiny import make_model

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], Any]


def view_of(name: str) -> DecoderView:
    """The view of a tiny encoder."""
    return DecoderView.of(make_encoder(name).eval(), stack_of(name))


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Change one tensor."""
    return lambda tensors: tensors | {name: change(tensors[name].clone())}


def at(place: Any, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Set one entry."""

    def changed(tensor: torch.Tensor) -> torch.Tensor:
        tensor[place] = value
        return tensor

    return changed


def without(name: str) -> Change:
    """Leave one tensor out."""
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


WAVE, MASK, MEL, TEXT = "input_values", "attention_mask", "input_features", "decoder_input_ids"
# Of the tensors of any model, then of one: what is changed, and what is said.
FORMS: list[tuple[str, Change, str]] = [
    ("wav2vec2", lambda t: t | {"speech": t[WAVE] * 2}, "a tensor `speech`"),
    ("wav2vec2", put(WAVE, lambda t: t[0]), r"`input_values`.*shape \(204,\)"),
    ("wav2vec2", put(WAVE, lambda t: t[:, :0]), r"`input_values`.*shape \(3, 0\)"),
    ("wav2vec2", put(WAVE, lambda t: t.long()), "not numbers with a fraction"),
    ("wav2vec2", put(MASK, lambda t: t.float()), "`attention_mask`.*not whole numbers"),
    ("wav2vec2", put(MASK, lambda t: t[:2]), "samples of `.*` and [23] of `"),
    ("wav2vec2", put(MASK, lambda t: t[:, :24]), "length 24, `input_values` has 204"),
    ("wav2vec2", put(MASK, at((0, 0), 2)), "other values than 0 and 1"),
    ("wav2vec2", put(MASK, at((0, 0), 0)), "padding before or inside of sample 0"),
    ("wav2vec2", put(MASK, at(1, 0)), "sample 1 .* is padding alone"),
    ("wav2vec2", put(WAVE, at((2, 5), float("nan"))), "NaN or infinity in sample 2"),
    ("wav2vec2", put(WAVE, at((1, 5), float("inf"))), "NaN or infinity in sample 1"),
    ("bert", put("input_ids", lambda t: t.float()), "`input_ids`.*not whole numbers"),
]
FITS: list[tuple[str, Change, str]] = [
    ("wav2vec2", without(WAVE), "lacks `input_values`, which a wav2vec2 reads"),
    (
        "wav2vec2",
        lambda t: {"input_ids": t[MASK] * 1, MASK: t[MASK]},
        "`input_ids`, which no wav2vec2",
    ),
    ("wav2vec2", lambda t: {WAVE: t[WAVE][:, :9]}, "9 values, too few for one frame"),
    ("wav2vec2", put(MASK, at((1, slice(9, None)), 0)), "sample 1 .* 9 values, too few"),
    ("bert", put("input_ids", at((0, 0), 40)), "the id 40; the model's vocab_size is 40"),
    ("bert", put("input_ids", at((0, 0), -1)), "the id -1"),
    ("bert", lambda t: {"input_ids": t["input_ids"].repeat(1, 3)}, "72 tokens; the model has 64"),
    ("bert", lambda t: t | {"token_type_ids": t["input_ids"] * 1}, "type_vocab_size is 2"),
    ("whisper_encoder", put(MEL, lambda t: t[:, :7]), "7 mel bins and 24 frames; .* 8 and 24"),
    ("whisper_encoder", put(MEL, lambda t: t.repeat(1, 1, 2)[..., :30]), "30"),
    ("whisper_decoder", without(TEXT), r"lacks `decoder_input_ids`, which a whisper \(decoder\)"),
    ("whisper_decoder", without(MEL), "lacks `input_features`"),
    ("whisper_decoder", put(TEXT, at((0, 0), 99)), "the id 99"),
]


def one_line(error: UserError) -> str:
    """What a user reads."""
    assert "\n" not in str(error)
    return str(error)


@pytest.mark.parametrize(("name", "change", "words"), [*FORMS, *FITS])
def test_a_mistake_is_told_in_one_line(
    name: str, change: Change, words: str, tmp_path: Path
) -> None:
    """Whether the tensors are in memory or in a file."""
    tensors, view = change(make_inputs(name)), view_of(name)
    with pytest.raises(CalibrationError, match=words) as caught:
        given_inputs(tensors, view)
    assert "the calibration data" in one_line(caught.value)
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(CalibrationError, match=words) as caught:
        stored_inputs(tmp_path / "a.safetensors", view)
    assert "a.safetensors" in one_line(caught.value)


@pytest.mark.parametrize(("name", "change", "words"), FORMS)
def test_a_file_is_read_before_the_model(
    name: str, change: Change, words: str, tmp_path: Path
) -> None:
    """When the recipe is, whatever can be told without a model."""
    file = tmp_path / "a.safetensors"
    save_file({n: t.contiguous() for n, t in change(make_inputs(name)).items()}, file)
    with pytest.raises(RecipeError, match=words):
        Recipe.from_dict({
            "model": {"id": "some/model"},
            "calibration": {"source": "tensors", "path": str(file)},
            "stages": [{"prune": "angular", "target": {"layers_removed": 1}}],
        })  # fmt: skip


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        ({"source": "tensors"}, "needs `path`"),
        ({"source": "builtin", "path": "a.safetensors"}, "path goes with source: tensors"),
        ({"source": "tensors", "path": "a.pt"}, r"is no \.safetensors file"),
        ({"source": "tensors", "path": "none.safetensors"}, "none.safetensors"),
        ({"source": "tensors", "path": "bad.safetensors"}, "cannot read tensors from"),
        ({"source": "tensors", "path": "a.safetensors", "samples": 2}, "remove `samples`"),
        ({"source": "builtin"}, "a wav2vec2 is calibrated by tensors"),
        ({"source": "a.safetensors"}, "a wav2vec2 is calibrated by tensors"),
        (None, "needs calibration data; add `calibration: {source: tensors"),
    ],
)
def test_a_source_is_checked_when_a_recipe_is_read(
    calibration: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what to write instead."""
    monkeypatch.chdir(tmp_path)
    make_encoder("wav2vec2").save_pretrained("model")
    save_file(make_inputs("wav2vec2"), "a.safetensors")
    Path("bad.safetensors").write_bytes(b"\x80\x04pickle")
    data = {
        "model": {"id": "model"},
        "stages": [{"prune": "angular", "target": {"layers_removed": 1}}],
    }
    with pytest.raises(RecipeError, match=words) as caught:
        Recipe.from_dict(data if calibration is None else data | {"calibration": calibration})
    assert len(str(caught.value).splitlines()) == 1


def test_an_output_does_not_overwrite_the_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are an input, whose name without a slash is a path too."""
    monkeypatch.chdir(tmp_path)
    save_file(make_inputs("bert"), "a.safetensors")
    with pytest.raises(RecipeError, match="the calibration file"):
        Recipe.from_dict({
            "model": {"id": "some/model"},
            "calibration": {"source": "tensors", "path": "a.safetensors"},
            "output": "a.safetensors",
        })  # fmt: skip


def test_tensors_do_not_calibrate_a_decoder(tmp_path: Path) -> None:
    """Which reads token ids."""
    make_model().save_pretrained(tmp_path / "model")
    save_file(make_inputs("bert"), tmp_path / "a.safetensors")
    with pytest.raises(RecipeError, match="LlamaForCausalLM is a decoder"):
        Recipe.from_dict({
            "model": {"id": str(tmp_path / "model")},
            "calibration": {"source": "tensors", "path": str(tmp_path / "a.safetensors")},
            "stages": [{"prune": "angular", "target": {"layers_removed": 1}}],
        })  # fmt: skip


@pytest.mark.parametrize(
    "given", [[], 3, "text", ["text"], torch.zeros(2, 3), {"input_values": "a"}]
)
def test_what_holds_no_tensors_is_refused(given: Any) -> None:
    """By its type, or because it is empty."""
    with pytest.raises(CalibrationError, match=r"is of type|is empty"):
        given_inputs(given, view_of("wav2vec2"))


def test_labels_are_left_out_and_arrays_are_taken() -> None:
    """As a data loader and a processor of NumPy give them; masks may be truth values."""
    given = make_inputs("wav2vec2")
    mixed = {WAVE: given[WAVE].double().numpy(), MASK: given[MASK].bool(), "labels": [1, 2, 3]}
    found = given_inputs([mixed, given], view_of("wav2vec2"))
    assert len(found) == 6 and [set(one) for one in found.batches] == [{WAVE, MASK}] * 2
    assert all(one[MASK].dtype == torch.int64 for one in found.batches)


def test_one_file_serves_both_stacks(tmp_path: Path) -> None:
    """The encoder leaves the text out, whose digest is then another."""
    save_file(make_inputs("whisper_decoder"), tmp_path / "a.safetensors")
    found = [
        stored_inputs(tmp_path / "a.safetensors", view_of(f"whisper_{stack}"))
        for stack in ("encoder", "decoder")
    ]
    assert set(found[0].batches[0]) == {MEL}
    assert set(found[1].batches[0]) == {MEL, TEXT, "decoder_attention_mask"}
    assert found[0].digest() != found[1].digest()


def test_batches_hold_as_many_positions_as_they_may() -> None:
    """At least one sample; together all of them, in order."""
    given = make_inputs("bert")
    found = given_inputs(given, view_of("bert"))
    for positions, sizes in ((1, [1, 1, 1]), (48, [2, 1]), (1000, [3])):
        parts = list(found.split(positions))
        assert [len(part["input_ids"]) for part in parts] == sizes
        assert torch.equal(torch.cat([part["input_ids"] for part in parts]), given["input_ids"])


def test_a_digest_is_of_names_and_values() -> None:
    """One changed value is another set."""
    given = make_inputs("bert")
    first = given_inputs(given, view_of("bert")).digest()
    assert first == given_inputs(dict(reversed(given.items())), view_of("bert")).digest()
    given["input_ids"][0, 0] += 1
    assert first != given_inputs(given, view_of("bert")).digest()


def test_no_pickle_is_read(tmp_path: Path) -> None:
    """Not even under another name."""
    torch.save(make_inputs("bert"), tmp_path / "a.safetensors")
    with pytest.raises(CalibrationError, match="cannot read tensors"):
        read_tensors(tmp_path / "a.safetensors")
