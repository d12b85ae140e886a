"""Every encoder with every method: what works is exact, and padding counts nowhere."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from slm_plugin.api import list_pruners, prune
from slm_plugin.calibration.captures import Batch, capture, run_layers
from slm_plugin.calibration.tensors import given_inputs
from slm_plugin.export.checkpoint import CheckpointExporter
from slm_plugin.extras import missing
from slm_plugin.models.families import encoders, family_of
from slm_plugin.models.families.suitability import complaint
from slm_plugin.models.loading import ModelSource, load
from slm_plugin.models.view import DecoderView
from slm_plugin.plans import DropLayers, MergeLayers, PruningPlan
from slm_plugin.pruners.depth.angular import distances
from slm_plugin.pruners.depth.search.runs import DROP
from slm_plugin.pruners.depth.search.trials import Trials
from slm_plugin.pruners.influence import block_influence
from slm_plugin.recipe import Recipe
from slm_plugin.registry import evaluators, exporters, pruners, recoveries
from slm_plugin.session import Session
from slm_plugin.surgery.layers import apply_layers
from slm_plugin.target import Target
from tests.encoders import ENCODERS, make_encoder, make_inputs, stack_of

STRATEGIES: dict[str, dict[str, Any]] = {
    "angular": {},
    "block_influence": {},
    "deepest": {},
    "slm": {"search": "greedy"},
}
# In these the mask lets nothing of the padding through: neither its values nor its length.
TIGHT = [name for name in ENCODERS if "conformer" not in name and name != "whisper_encoder"]


@pytest.fixture(params=sorted(ENCODERS))
def every(request: pytest.FixtureRequest) -> str:
    """Every stack of every family in turn."""
    return str(request.param)


def view_of(name: str, model: PreTrainedModel) -> DecoderView:
    """The view of a stack, of a model in evaluation mode."""
    return DecoderView.of(model.eval(), stack_of(name))


def outputs(model: PreTrainedModel, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What the head puts out."""
    given = {name: tensor.clone() for name, tensor in given.items()}
    if type(model).__name__.startswith("Whisper"):
        given.setdefault("decoder_input_ids", torch.tensor([[3, 7, 9, 11]] * 3))
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**given).logits
    return found


def captured(name: str, model: PreTrainedModel, given: Any, positions: int = 8) -> list[Batch]:
    """What the layers see, in batches of a few positions, so of one sample each by default."""
    view = view_of(name, model)
    return capture(view, given_inputs(given, view).split(positions))


def deleted(name: str, model: PreTrainedModel, removed: tuple[int, ...]) -> PreTrainedModel:
    """The model without some layers, built by transformers alone from a smaller config."""
    family = ENCODERS[name][0]
    number = family.own_name("num_hidden_layers")
    config = copy.deepcopy(model.config)
    kept = [index for index in range(getattr(config, number)) if index not in removed]
    setattr(config, number, len(kept))
    if stack_of(name) != "decoder":
        config.num_hidden_layers = len(kept)
    made: PreTrainedModel = type(model)(config).eval()
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    layers, state = f"{prefix}{family.layers}.", {}
    for place, value in model.state_dict().items():
        index, _, leaf = place.removeprefix(layers).partition(".")
        if not place.startswith(layers):
            state[place] = value
        elif int(index) in kept:
            state[f"{layers}{kept.index(int(index))}.{leaf}"] = value
    made.load_state_dict(state)
    return made


def test_layers_run_one_by_one_are_the_model(every: str) -> None:
    """Captured inputs, masks and positions, and the norm behind, give the hidden states."""
    model, given = make_encoder(every), make_inputs(every)
    view = view_of(every, model)
    (batch,) = captured(every, model, given, 10_000)
    read = {"input_features", "attention_mask"} if stack_of(every) == "encoder" else set(given)
    with torch.no_grad():
        entry = view.decoder.get_submodule(view.family.entry)
        clones = {name: tensor.clone() for name, tensor in given.items() if name in read}
        wanted = entry(**clones).last_hidden_state
        hidden = batch.inputs[0]
        for index, layer in enumerate(view.layers):
            assert torch.allclose(batch.inputs[index], hidden, atol=1e-5)
            hidden = run_layers([layer], hidden, batch.arguments[index])
        assert torch.allclose(view.norm(hidden), wanted, atol=1e-5)
    assert torch.allclose(batch.final, wanted, atol=1e-5)


def test_dimensions_are_those_of_the_config(every: str) -> None:
    """Of its own stack, by its own names."""
    model = make_encoder(every)
    found, family = view_of(every, model).dimensions(), ENCODERS[every][0]
    stated = family.canonical(model.config.to_dict())
    assert found.layers == stated["num_hidden_layers"] == (4 if "decoder" in every else 5)
    assert found.hidden_size == 32 and found.head_dim == 8
    assert found.intermediate_size == stated["intermediate_size"]
    assert found.vocab_size == (40 if every in ("bert", "whisper_decoder") else 0)
    assert found.tied_embeddings == (every in ("bert", "whisper_decoder"))
    outside = found.parameters - found.layers * found.layer_parameters
    assert 0 < outside < sum(p.numel() for p in model.parameters()) == found.parameters


def test_the_norms_of_the_record_are_those_of_the_layer(every: str) -> None:
    """What is merged and what stays the lowest layer's depends on them."""
    view = view_of(every, make_encoder(every))
    layer, norms = view.layers[0], view.family.stream_norms
    found = {n for n, module in layer.named_modules() if isinstance(module, torch.nn.LayerNorm)}
    inner = {"conv_module.layer_norm"} & found
    assert set(norms) == found - inner


def test_the_residual_is_as_the_record_says(every: str) -> None:
    """In a layer without what its blocks put out, a norm changes the stream or none does."""
    view = view_of(every, make_encoder(every))
    (batch,) = captured(every, view.model, make_inputs(every), 10_000)
    layer = copy.deepcopy(view.layers[1])
    with torch.no_grad():
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv1d):
                module.weight.zero_()
                if module.bias is not None:
                    module.bias.zero_()
        found = run_layers([layer], batch.inputs[1], batch.arguments[1])
    kind = view.family.residual_of(view.config.to_dict())
    assert torch.allclose(found, batch.inputs[1], atol=1e-5) == (kind == "pre")
    assert (kind == "pre") == (every in ("wav2vec2_stable", "hubert_stable") or "whis" in every)


@pytest.mark.parametrize("removed", [(1,), (0, 2, 3)])
def test_dropping_layers_is_deletion_by_transformers(every: str, removed: tuple[int, ...]) -> None:
    """The head puts out what a smaller model with the other layers' weights puts out."""
    model, given = make_encoder(every).eval(), make_inputs(every)
    smaller = deleted(every, model, removed)
    whole, expected = outputs(model, given), outputs(smaller, given)
    apply_layers(model, [DropLayers(indices=removed)], stack_of(every))
    assert torch.allclose(outputs(model, given), expected, atol=1e-5)
    assert not torch.allclose(whole, expected, atol=1e-2)
    assert model.config.to_dict() == smaller.config.to_dict()


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_every_strategy_plans_what_it_promises(every: str, name: str) -> None:
    """From a model in training mode, whose layer drop and masking would make it random."""
    plans, cls = [], pruners.get(name)
    for training in (True, False) if name == "block_influence" else (True,):
        model = make_encoder(every).train(training)
        session = Session(model, stack=stack_of(every))
        if name != "deepest":
            session.inputs = given_inputs(make_inputs(every), session.view)
        made = session.plan(cls(cls.Options(**STRATEGIES[name]), Target(layers_removed=2)))
        session.apply(made)
        assert session.view.dimensions() == made.after
        assert made.after.layers == made.before.layers - 2
        assert PruningPlan.parse(made.to_json()) == made
        plans.append(made)
    assert all(plan == plans[0] for plan in plans)


def test_a_pruned_model_survives_the_disk(every: str, tmp_path: Path, reload_here: None) -> None:
    """Saved, verified, read by the stock class and by this package, to the last bit."""
    model, given = make_encoder(every), make_inputs(every)
    apply_layers(model, [DropLayers(indices=(1, 3))], stack_of(every))
    record = Session(model, stack=stack_of(every)).export(
        CheckpointExporter(CheckpointExporter.Options()), tmp_path
    )
    assert {check.value for check in record.checks} == {0}
    folder = tmp_path / "checkpoint"
    expected = outputs(model, given)
    stock = type(model).from_pretrained(folder)
    assert torch.equal(outputs(stock, given), expected)
    ours, tokenizer = load(ModelSource(id=str(folder), device="cpu", stack=stack_of(every)))
    assert torch.equal(outputs(ours, given), expected)
    assert tokenizer is None and not ours.training
    config = transformers.AutoConfig.from_pretrained(folder)
    assert getattr(config, ENCODERS[every][0].own_name("num_hidden_layers")) in (2, 3)
    if "whisper" in every:
        assert (config.encoder_layers, config.decoder_layers) in ((3, 4), (5, 2))
        assert config.num_hidden_layers == config.encoder_layers


HEADS = [
    ("bert", "BertModel", {}),
    ("bert", "BertForPreTraining", {}),
    ("bert", "BertForSequenceClassification", {"num_labels": 3}),
    ("bert", "BertForMultipleChoice", {}),
    ("bert", "BertForQuestionAnswering", {}),
    ("wav2vec2", "Wav2Vec2Model", {"add_adapter": True}),
    ("wav2vec2", "Wav2Vec2ForPreTraining", {}),
    ("wav2vec2_stable", "Wav2Vec2ForSequenceClassification", {"num_labels": 4}),
    ("hubert", "HubertModel", {}),
    ("conformer", "Wav2Vec2ConformerModel", {}),
    ("whisper_encoder", "WhisperModel", {}),
    ("whisper_decoder", "WhisperModel", {}),
]


@pytest.mark.parametrize(("name", "head", "settings"), HEADS, ids=[one[1] for one in HEADS])
def test_a_record_holds_for_every_head(
    name: str, head: str, settings: dict[str, Any], tmp_path: Path, reload_here: None
) -> None:
    """And for none; what a head or an adapter holds stays, and the class reads it again."""
    model = make_encoder(name, head, **settings)
    outside = {n: p.clone() for n, p in model.named_parameters() if ".layer" not in n}
    given = make_inputs(name)
    if stack_of(name) == "encoder":
        given["decoder_input_ids"] = torch.tensor([[3, 7, 9, 11]] * 3)
    found = prune(
        model, None, "block_influence", layers_removed=1, calibration=given, stack=stack_of(name)
    )
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in outside.items())
    found.save(str(tmp_path / "saved"))
    again, _ = load(ModelSource(id=str(tmp_path / "saved"), device="cpu", stack=stack_of(name)))
    assert type(again) is type(model)
    assert again.config.num_labels == model.config.num_labels


def scores(name: str, model: PreTrainedModel, given: Any, positions: int = 8) -> torch.Tensor:
    """What every strategy measures: influences, angles, similarities without each layer."""
    view = view_of(name, model)
    batches = captured(name, model, given, positions)
    found = [*block_influence(view, batches), *distances(batches, 1), *distances(batches, 2)]
    session = Session(model, inputs=given_inputs(given, view), stack=stack_of(name))
    session.batch_tokens = positions
    for criterion in ("flat_cosine", "token_cosine"):
        trials = Trials(session, criterion, DROP)  # type: ignore[arg-type]
        found += [trials(i, i, ()).value for i in range(len(view.layers))]
    return torch.tensor(found, dtype=torch.float64)


@functools.cache
def own_scores(name: str) -> torch.Tensor:
    """Those of the tests' model and inputs."""
    return scores(name, make_encoder(name), make_inputs(name))


def without_masks(given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, as if nothing were padding."""
    return {name: tensor for name, tensor in given.items() if not name.endswith("mask")}


@pytest.mark.parametrize("name", TIGHT)
@pytest.mark.parametrize("padded", [23, 31, 38])
def test_no_score_depends_on_the_padding(name: str, padded: int) -> None:
    """Neither on how much there is nor on what stands there: it is other noise each time."""
    found = scores(name, make_encoder(name), make_inputs(name, padded=padded))
    assert torch.allclose(found, own_scores(name), atol=1e-5)


def test_padded_values_do_not_count(every: str) -> None:
    """As far as the class itself lets them through: Whisper's encoder has no mask."""
    model, given = make_encoder(every), make_inputs(every)
    expected = own_scores(every)
    main = ENCODERS[every][0].inputs[0]
    mask = given.get("attention_mask", given.get("decoder_attention_mask"))
    assert mask is not None
    other = given[main].flip(0) if given[main].is_floating_point() else given[main] * 0 + 6
    shown = mask.bool() if given[main].dim() == 2 else mask.bool().unsqueeze(1)
    changed = given | {main: torch.where(shown, given[main], other)}
    found = scores(every, model, changed)
    if every == "whisper_encoder":
        assert not torch.allclose(found, expected, atol=1e-4)
        return
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_order_and_size_of_batches_do_not_count(every: str) -> None:
    """A mean over samples is one over samples, however they come."""
    model, given = make_encoder(every), make_inputs(every)
    expected = own_scores(every)
    turned = {name: tensor[[2, 0, 1]] for name, tensor in given.items()}
    for other in (turned, [{n: t[i : i + 1] for n, t in turned.items()} for i in range(3)]):
        assert torch.allclose(scores(every, model, other), expected, atol=1e-6)
    assert torch.allclose(scores(every, model, turned, 10_000), expected, atol=1e-5)


def test_padding_would_be_seen(every: str) -> None:
    """Without masks the scores are others, so the tests above can fail."""
    model, given = make_encoder(every), make_inputs(every)
    difference = scores(every, model, without_masks(given)) - own_scores(every)
    assert difference.abs().max() > 1e-3


def test_the_frames_of_whisper_that_are_padding_are_left_out() -> None:
    """By the mask of its feature extractor, of twice as many frames."""
    name, given = "whisper_encoder", make_inputs("whisper_encoder")
    model = make_encoder(name)
    (batch,) = captured(name, model, given, 10_000)
    assert batch.valid is not None and batch.valid.sum(-1).tolist() == [12, 6, 9]
    lengths = torch.tensor([23, 12, 17])
    wanted = model._get_feat_extract_output_lengths(lengths)
    assert batch.valid.sum(-1).tolist() == wanted.tolist()


def test_the_mask_of_frames_is_that_of_the_class() -> None:
    """Of as many frames as the convolutions make of the values that are no padding."""
    for name in ("wav2vec2", "hubert", "conformer"):
        model, given = make_encoder(name), make_inputs(name)
        (batch,) = captured(name, model, given, 10_000)
        assert batch.valid is not None
        assert batch.valid.sum(-1).tolist() == [23, 12, 17]
        assert batch.valid.shape == batch.final.shape[:2]


def test_merging_takes_all_but_the_norms_of_the_stream(every: str) -> None:
    """Two neighbours become one whose weights are the rule's; its norms are the lower one's."""
    model = make_encoder(every)
    view = view_of(every, model)
    lower, upper = (dict(view.layers[i].named_parameters()) for i in (1, 2))
    apply_layers(model, [MergeLayers(first=1, last=2, rule="mean")], stack_of(every))
    for name, value in view.layers[1].named_parameters():
        norm = any(name.startswith(f"{one}.") for one in view.family.stream_norms)
        wanted = lower[name] if norm else (lower[name] + upper[name]) / 2
        assert torch.allclose(value, wanted, atol=1e-6), name


def test_whisper_writes_the_same_text_as_after_a_deletion() -> None:
    """With and without a cache, whose size some releases take from the encoder's layers."""
    for name in ("whisper_encoder", "whisper_decoder"):
        model = make_encoder(name).eval()
        smaller = deleted(name, model, (0, 2))
        apply_layers(model, [DropLayers(indices=(0, 2))], stack_of(name))
        sound = make_inputs(name)["input_features"][:1]
        texts = [
            one.generate(sound, max_new_tokens=6, use_cache=cache, do_sample=False).tolist()
            for one in (model, smaller)
            for cache in (True, False)
        ]
        assert all(text == texts[0] for text in texts)


def test_the_heads_that_time_words_are_renumbered(tmp_path: Path, reload_here: None) -> None:
    """Whisper's `alignment_heads` name layers of the decoder; those of others stay as they are."""
    listed = [[0, 1], [1, 2], [3, 0]]
    for stack, wanted in (("decoder", [[0, 1], [2, 0]]), ("encoder", listed)):
        model = make_encoder("whisper_decoder")
        model.generation_config.alignment_heads = copy.deepcopy(listed)
        apply_layers(model, [DropLayers(indices=(1,))], stack)
        session = Session(model, stack=stack)
        session.export(CheckpointExporter(CheckpointExporter.Options()), tmp_path / stack)
        written = transformers.GenerationConfig.from_pretrained(tmp_path / stack / "checkpoint")
        assert written.alignment_heads == wanted


def test_only_whole_layers_and_hidden_states_are_offered(every: str) -> None:
    """What needs logits, tokens or units is refused with the reason."""
    model = make_encoder(every)
    assert list_pruners(model, stack=stack_of(every)) == sorted(STRATEGIES)
    family, config = view_of(every, model).family, model.config.to_dict()
    for registry in (pruners, recoveries, evaluators, exporters):
        for name in registry.names():
            found = complaint(registry.get(name), family, config)
            if (name in STRATEGIES and registry is pruners) or name == "checkpoint":
                assert not found
            else:
                assert "only whole layers are removed" in found
    cls = pruners.get("slm")
    for criterion, word in (("logit_kl", "logits"), ("loss", "logits"), ("cka", "padding")):
        made = cls(cls.Options(criterion=criterion), Target(layers_removed=1))
        assert word in complaint(made, family, config)
    released = cls(cls.Options(compatibility="released"), Target(threshold=0.5))
    assert "compatibility" in complaint(released, family, config)


@pytest.mark.parametrize("name", ["bert", "whisper_decoder"])
def test_refusals_are_made_when_a_recipe_is_read(name: str, tmp_path: Path) -> None:
    """Before a model is loaded, with the class and the reason."""
    from safetensors.torch import save_file

    make_encoder(name).save_pretrained(tmp_path / "model")
    file = tmp_path / "given.safetensors"
    save_file(make_inputs(name), file)
    stack = {} if stack_of(name) is None else {"stack": stack_of(name)}
    good = {
        "model": {"id": str(tmp_path / "model"), **stack},
        "calibration": {"source": "tensors", "path": str(file)},
        "output": str(tmp_path / "out"),
    }
    for strategy in pruners.names():
        kind = pruners.get(strategy).targets[0]
        amount = 1 if kind == "layers_removed" else 0.3
        data = good | {"stages": [{"prune": strategy, "target": {kind: amount}}]}
        if strategy in STRATEGIES:
            assert Recipe.from_dict(data).stages
            continue
        with pytest.raises(Exception, match="only whole layers are removed"):
            Recipe.from_dict(data)
    for key, names in (("evaluate", evaluators), ("export", exporters)):
        for each in names.names():
            if each == "checkpoint" or ((extra := names.get(each).extra) and missing(extra)):
                continue
            options = {"tasks": ["builtin_continuation"]} if each == "lm_eval" else {}
            with pytest.raises(Exception, match="only whole layers are removed"):
                Recipe.from_dict(good | {key: [{each: options}]})
    stage = {"stages": [{"prune": "deepest", "target": {"layers_removed": 4 + (name == "bert")}}]}
    with pytest.raises(Exception, match="at most"):
        Recipe.from_dict(good | stage)


def test_a_record_knows_its_heads_by_name() -> None:
    """And not the classes of a longer name, nor those that compute something else."""
    assert family_of("Wav2Vec2ForXVector") is encoders.WAV2VEC2
    assert family_of("Wav2Vec2ConformerForXVector") is encoders.CONFORMER
    assert family_of("WhisperModel", "decoder") is encoders.WHISPER_DECODER
    for name in (
        "BertLMHeadModel",
        "BertGenerationEncoder",
        "WhisperForCausalLM",
        "Wav2Vec2BertModel",
    ):
        with pytest.raises(Exception, match="is not supported"):
            family_of(name, "decoder")
