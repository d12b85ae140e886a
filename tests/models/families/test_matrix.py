"""Every family with every method: what works is exact, what does not is refused by name."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from slm_plugin.analysis.observation import observe, token_norms
from slm_plugin.calibration.captures import capture, run_layers
from slm_plugin.calibration.components import stream_components
from slm_plugin.errors import ModelSourceError, TargetError, UnsupportedModelError
from slm_plugin.export.checkpoint import CheckpointExporter, save_checkpoint
from slm_plugin.models.families.suitability import complaint, refuse_unsuited
from slm_plugin.models.loading import ModelSource, load
from slm_plugin.models.operators import operators
from slm_plugin.models.streaming import is_streamed
from slm_plugin.models.view import DecoderView, layer_kinds
from slm_plugin.plans import DropLayers, MergeLayers, PruningPlan
from slm_plugin.plans.operations import by_kind
from slm_plugin.plans.stream import StreamChange, stream_change
from slm_plugin.pruners.width.hidden_scores import ROTATIONS
from slm_plugin.pruners.width.masked_losses import masked_loss
from slm_plugin.registry import evaluators, pruners, recoveries
from slm_plugin.session import Session
from slm_plugin.surgery.channels import apply_channels
from slm_plugin.surgery.groups import members
from slm_plugin.surgery.layers import apply_layers
from slm_plugin.surgery.stream import change_stream
from slm_plugin.target import Target
from tests.recovery.pruned import remove
from tests.tiny import AROUND, FAMILIES, make_image, make_model, make_tokenizer, random_tokens

TOKENS = random_tokens(3, 24)
# A strategy, by the first word, with options that keep a search on a tiny model short.
STRATEGIES: dict[str, dict[str, Any]] = {
    "angular": {},
    "block_influence": {},
    "deepest": {},
    "experts": {},
    "hybrid": {"multiple_of": 4, "screen": 2, "verify": 2},
    "hybrid of different widths": {"search": "integer", "multiple_of": 4, "verify": 2},
    "laco": {"layers_per_merge": 2, "lowest": 0},
    "layer_sparsity": {"by": "owl"},
    "merge_concat": {},
    "repaired": {"screen": 2, "polish": 2},
    "shapley": {"samples": 12},
    "shortened": {"score": "taylor", "keep_list": False},
    "sleb": {},
    "slm": {"search": "greedy", "criterion": "logit_kl"},
    "streamline": {},
    "sublayer": {},
    "torch_pruning": {"importance": "magnitude", "multiple_of": 4},
    "width": {"score": "obs", "allocation": "owl", "multiple_of": 4},
}
# An expert is a larger part of a tiny model than other units.
RATIOS = {"experts": 0.2}
RECOVERIES: dict[str, dict[str, Any]] = {
    "fold_linear": {},
    "ghost": {},
    "linear_patch": {},
    "refit": {"o_proj": True},
    "rescale": {},
}
# Those that add modules, which a cache has to pass.
ADDED = ("ghost", "linear_patch")
# Those whose operations another one has on the disk and with a cache.
SEEN = ("laco", "streamline", "torch_pruning")


@pytest.fixture(params=sorted(FAMILIES))
def every(request: pytest.FixtureRequest) -> str:
    """Every family in turn."""
    return str(request.param)


def small(every: str, **settings: Any) -> PreTrainedModel:
    """A model with four layers above those that have to stay."""
    fixed = len(AROUND.get(every, {}).get("vision_config", {}).get("deepstack_visual_indexes", ()))
    return make_model(every, num_hidden_layers=4 + fixed, **settings)


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits of the class's own forward pass."""
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS, use_cache=False).logits
    return found


def computed(model: PreTrainedModel) -> torch.Tensor:
    """Logits of text, and of text with an image where the class takes one, in a row."""
    found = [logits(model)]
    if DecoderView.of(model).family.tower is not None:
        with torch.no_grad():
            found.append(model(**make_image(model), use_cache=False).logits)
    return torch.cat([one.flatten() for one in found])


def free(model: PreTrainedModel, layers: tuple[int, ...]) -> tuple[int, ...]:
    """Those of some layers that may go; another one where none may."""
    fixed = DecoderView.of(model).fixed_layers
    return tuple(index for index in layers if index >= fixed) or (fixed + 1,)


def reloaded(folder: Path, model: PreTrainedModel) -> PreTrainedModel:
    """The stock class, with the attention of the model that was saved."""
    attention = model.config._attn_implementation
    auto_class = getattr(transformers, DecoderView.of(model).family.auto_class)
    found: PreTrainedModel = auto_class.from_pretrained(folder, attn_implementation=attention)
    return found.eval()


def generated(model: PreTrainedModel, use_cache: bool) -> list[int]:
    """Greedy tokens behind a prompt that is longer than every window."""
    prompt = random_tokens(1, 12, seed=3)
    settings = {"do_sample": False, "max_new_tokens": 3, "min_new_tokens": 3, "pad_token_id": 2}
    found: list[int] = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), use_cache=use_cache, **settings
    )[0].tolist()
    return found


def continues(model: PreTrainedModel, whole: torch.Tensor) -> bool:
    """Whether tokens read in two parts, the second with a cache, have the logits of the whole.

    The first part is longer than every window.
    """
    places = torch.arange(12, 24).expand(len(TOKENS), -1)
    with torch.no_grad():
        first = model(TOKENS[:, :12], use_cache=True)
        cache = first.past_key_values
        second = model(TOKENS[:, 12:], position_ids=places, past_key_values=cache)
    return torch.allclose(torch.cat([first.logits, second.logits], 1), whole, atol=1e-4)


def deleted(model: PreTrainedModel, removed: tuple[int, ...]) -> PreTrainedModel:
    """The model without some layers, built by transformers alone from a smaller config."""
    family, config = DecoderView.of(model).family, model.config.to_dict()
    text = config if family.tower is None else config["text_config"]
    number = family.own_name("num_hidden_layers")
    kept = [index for index in range(text[number]) if index not in removed]
    for name, values in text.items():
        if name in ("layer_types", "no_rope_layers") and values is not None:
            text[name] = [values[index] for index in kept]
    text[number] = len(kept)
    smaller = type(model.config).from_dict(config)
    smaller._attn_implementation = model.config._attn_implementation
    made: PreTrainedModel = type(model)(smaller).eval()
    state = {}
    for name, value in model.state_dict().items():
        layers = f"{family.decoder}.{family.layers}."
        index, _, leaf = name.removeprefix(layers).partition(".")
        if not name.startswith(layers):
            state[name] = value
        elif int(index) in kept:
            state[f"{layers}{kept.index(int(index))}.{leaf}"] = value
    made.load_state_dict(state)
    return made


def test_layers_run_one_by_one_are_the_model(every: str) -> None:
    """Captured inputs, masks and positions, and the head with its factors, give its logits."""
    model = make_model(every)
    view = DecoderView.of(model)
    (batch,) = capture(view, [TOKENS])
    with torch.no_grad():
        hidden = batch.inputs[0]
        for index, layer in enumerate(view.layers):
            hidden = run_layers([layer], hidden, batch.arguments[index])
        assert torch.allclose(view.logits(view.norm(hidden)), logits(model), atol=1e-5)
        assert torch.allclose(view.logits(batch.final), logits(model), atol=1e-5)


def test_dimensions_are_those_of_the_config(every: str) -> None:
    """Measured on modules, whatever a family's projections are called or fused."""
    model = make_model(every)
    found, config = DecoderView.of(model).dimensions(), DecoderView.of(model).config
    assert found.layers == config.num_hidden_layers == 6
    assert found.attention_heads == config.num_attention_heads == 4
    assert found.head_dim == 8
    kv_heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", 4)
    old_falcon = every == "falcon_sequential"
    assert found.kv_heads == (1 if old_falcon else kv_heads)
    assert found.intermediate_size == (24 if every in ("qwen2_moe", "qwen3_moe") else 48)
    outside = sum(p.numel() for p in model.parameters()) - found.layers * found.layer_parameters
    assert 0 < outside < found.parameters


def test_layers_of_one_kind_differ_in_weights_alone(every: str) -> None:
    """With another's weights a layer is that other one, exactly where the two are of one kind."""
    view = DecoderView.of(make_model(every))
    (batch,) = capture(view, [TOKENS])
    kinds, hidden = layer_kinds(view), batch.inputs[0]
    for low, high in itertools.combinations(range(6), 2):
        copied = copy.deepcopy(view.layers[low])
        copied.load_state_dict(view.layers[high].state_dict())
        with torch.no_grad():
            found = run_layers([copied], hidden, batch.arguments[low])
            wanted = run_layers([view.layers[high]], hidden, batch.arguments[high])
        assert torch.equal(found, wanted) == (kinds[low] == kinds[high]), (low, high)


def outputs(
    layer: torch.nn.Module, paths: list[str], hidden: torch.Tensor, arguments: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """What modules of a layer put out, and the layer itself by the name ""."""
    seen: dict[str, torch.Tensor] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, given: Any, output: Any) -> None:
            found = output[0] if isinstance(output, tuple) else output
            # A copy: Falcon adds to what its MLP puts out in place.
            seen[path] = found.reshape(hidden.shape).clone()

        return hook

    hooks = [layer.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    with torch.no_grad():
        seen[""] = run_layers([layer], hidden, arguments)
    for hook in hooks:
        hook.remove()
    return seen


def test_the_stream_gains_what_the_blocks_put_out(every: str) -> None:
    """Behind the norms where the record has some, times its factor; from one input or in turn."""
    view = DecoderView.of(make_model(every))
    family, layer = view.family, view.layers[2]
    (batch,) = capture(view, [TOKENS])
    hidden, arguments = batch.inputs[2], batch.arguments[2]
    linear = [family.projections.get(name) for name in ("o_proj", "down_proj")]
    paths = [*family.writers, *(path for path in linear if path)]
    seen = outputs(layer, paths, hidden, arguments)
    attention, mlp = (seen[path] for path in family.writers)
    gained = view.residual_multiplier * (attention + mlp)
    assert torch.allclose(hidden + gained, seen[""], atol=1e-5)
    for path, writer in zip(linear, family.writers, strict=True):
        if path is not None:
            assert torch.equal(seen[path], seen[writer]) != family.norm_behind
    # An MLP that reads what the attention reads does not see what that puts out.
    silent = layer.get_submodule(family.writers[0]).register_forward_hook(
        lambda module, given, output: (
            (0 * output[0], *output[1:]) if isinstance(output, tuple) else 0 * output
        )
    )
    alone = outputs(layer, paths, hidden, arguments)[family.writers[1]]
    silent.remove()
    assert torch.equal(alone, mlp) == family.is_parallel(view.config.to_dict())


@pytest.mark.parametrize("removed", [(0, 2, 5), (1, 2, 3, 4)])
def test_dropping_layers_is_deletion_by_transformers(every: str, removed: tuple[int, ...]) -> None:
    """Logits of the pruned model are those of a smaller model with the other layers' weights."""
    model = make_model(every)
    removed = free(model, removed)
    expected = computed(deleted(model, removed))
    whole = computed(model)
    apply_layers(model, [DropLayers(indices=removed)])
    assert torch.allclose(computed(model), expected, atol=1e-5)
    assert not torch.allclose(whole, expected, atol=1e-2)
    assert generated(model, use_cache=True) == generated(model, use_cache=False)


def test_a_pruned_model_survives_the_disk(every: str, tmp_path: Path, reload_here: None) -> None:
    """Saved, verified, read by the stock class and by this package; streamed as well.

    With the head tied to the embedding where the family's models have it so.
    """
    record, _ = FAMILIES[every]
    usual = getattr(transformers, record.architecture).config_class()
    tied = usual.tie_word_embeddings
    model = small(every, tie_word_embeddings=tied)
    # Not the upper ones: without them each layer that stays has the kind that it has by default.
    apply_layers(model, [DropLayers(indices=free(model, (0, 1)))])
    session = Session(model)
    session.export(CheckpointExporter(CheckpointExporter.Options()), tmp_path)
    expected = computed(session.model)
    folder = tmp_path / "checkpoint"
    stock = reloaded(folder, model)
    assert torch.equal(computed(stock), expected)
    ours, _ = load(ModelSource(id=str(folder)))
    assert torch.equal(computed(ours), expected)
    assert ours.config.to_dict().get("layer_types") == stock.config.to_dict().get("layer_types")
    if DecoderView.of(model).family.experts:
        with pytest.raises(ModelSourceError, match="cannot be read one at a time"):
            load(ModelSource(id=str(folder), memory="layerwise"))
        return
    streamed, _ = load(ModelSource(id=str(folder), memory="layerwise"))
    assert is_streamed(streamed)
    assert torch.equal(computed(streamed), expected)


@pytest.mark.parametrize("heads", ["kv_groups", "query_heads"])
def test_width_pruning_is_silencing(every: str, heads: str, tmp_path: Path) -> None:
    """Removing units is the same as zeroing the columns that read them, and the disk holds it.

    The same as multiplying what these columns read by 0, too.
    """
    model = make_model(every, num_hidden_layers=3)
    session = Session(model)
    units = {*DecoderView.of(model).family.units}
    if not units - {"experts"} or (heads == "query_heads" and "kv_groups" not in units):
        return
    cls = pruners.get("width")
    chosen = {heads: 1} if "kv_groups" in units else {}
    options = cls.Options(score="magnitude", restore="none", multiple_of=4, **chosen)
    made = session.plan(cls(options, Target(ratio=0.25)))
    assert {operation.unit for operation in made.operations} == {"channels", *chosen}
    silent = copy.deepcopy(model)
    before = DecoderView.of(silent).dimensions()
    readers, masks = [], []
    for operation in made.operations:
        modules = DecoderView.of(silent).projections(DecoderView.of(silent).layers[operation.layer])
        removed = sorted(set(range(before.units[operation.unit])) - set(operation.kept))
        reader = "down_proj" if operation.unit == "channels" else "o_proj"
        columns = list(members(operation.unit, removed, before)[reader])
        with torch.no_grad():
            modules[reader].weight[:, columns] = 0
        readers.append(session.view.projections(session.view.layers[operation.layer])[reader])
        masks.append(torch.ones(before.units[operation.unit]))
        masks[-1][removed] = 0
    (batch,) = capture(session.view, [TOKENS])
    masked = masked_loss(session.view, batch, readers, masks)
    session.apply(made)
    assert session.view.dimensions() == made.after
    assert masked == pytest.approx(masked_loss(session.view, batch, [], []), abs=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.allclose(computed(reloaded(tmp_path, model)), computed(model), atol=1e-6)
    assert generated(model, use_cache=True) == generated(model, use_cache=False)
    assert torch.allclose(computed(model.double()), computed(silent.double()), atol=1e-9)


@pytest.mark.parametrize("score", ["magnitude", *ROTATIONS])
def test_removing_hidden_channels_is_silencing(every: str, score: str, tmp_path: Path) -> None:
    """The same as writing 0 to them everywhere, of a rotated stream too; or refused."""
    model = make_model(every)
    session, cls = Session(model, calibration=TOKENS), pruners.get("width")
    family, before = session.view.family, session.view.dimensions()
    given = {"hidden_channels": 8, "hidden_score": score, "restore": "none"}
    options = cls.Options(score="magnitude", multiple_of=4, **given)
    pruner = cls(options, Target(ratio=0.35))
    if not family.hidden_channels:
        said = complaint(pruner, family, model.config.to_dict())
        assert said and before.hidden_parameters == 0
        return
    made = session.plan(pruner)
    silent = copy.deepcopy(model)
    removed = sorted({*range(32)} - {*(stream_change(made.operations).kept or ())})
    narrow = DecoderView.of(silent)
    if turned := stream_change(made.operations).rotation:
        kept = 32 - len(removed)
        _, basis = stream_components(narrow, session.captured(), turned.per, kept)
        change_stream(narrow, StreamChange(rotation=turned), basis, before)
        assert torch.allclose(computed(silent), computed(model), atol=1e-4)
    with torch.no_grad():
        narrow.embedding.weight[:, removed] = 0
        for layer in narrow.layers:
            for name in ("o_proj", "down_proj"):
                for parameter in narrow.projections(layer)[name].parameters():
                    parameter[removed] = 0
        for operator in operators(silent).values():
            operator.weight[removed] = 0
    apply_channels(silent, by_kind(made.operations)[1])
    session.apply(made)
    assert session.view.dimensions() == made.after
    assert torch.allclose(computed(model), computed(silent), atol=1e-4)
    assert generated(model, use_cache=True) == generated(model, use_cache=False)
    if operators(model):
        # No stock class holds them.
        assert score == "pca_per_block"
        return
    model.save_pretrained(tmp_path)
    assert torch.equal(computed(reloaded(tmp_path, model)), computed(model))


def test_a_merge_of_equal_kinds_keeps_the_kind(every: str) -> None:
    """Two neighbours alike become one whose weights are the rule's, at the lower one's place."""
    model = make_model(every)
    view = DecoderView.of(model)
    kinds = layer_kinds(view)
    alike = [i for i in range(view.fixed_layers, 5) if kinds[i] == kinds[i + 1]]
    if not alike:
        assert every in ("gemma2", "gpt_oss")
        return
    low = alike[0]
    norms = view.family.stream_norms
    lower, upper = (dict(view.layers[i].named_parameters()) for i in (low, low + 1))
    apply_layers(model, [MergeLayers(first=low, last=low + 1, rule="mean")])
    for name, value in view.layers[low].named_parameters():
        mean = (lower[name] + upper[name]) / 2
        wanted = lower[name] if name.partition(".")[0] in norms else mean
        assert torch.allclose(value, wanted, atol=1e-6), name
    assert layer_kinds(view) == [*kinds[: low + 1], *kinds[low + 2 :]]
    assert continues(model, logits(model))


def plan(name: str, session: Session) -> PruningPlan:
    """A small plan of a strategy."""
    cls = pruners.get(name.split()[0])
    ratio = RATIOS.get(name, 0.1)
    target = Target(layers_removed=1) if cls.kind == "depth" else Target(ratio=ratio)
    return session.plan(cls(cls.Options(**STRATEGIES[name]), target))


@pytest.mark.parametrize("name", sorted({*pruners.names(), *STRATEGIES}))
def test_every_strategy_plans_what_it_promises(every: str, name: str, tmp_path: Path) -> None:
    """Its plan applies, leaves the promised parameters, and the cache agrees; or it is refused."""
    model = small(every)
    session = Session(model, calibration=TOKENS, journals=tmp_path)
    cls = pruners.get(name.split()[0])
    pruner = cls(cls.Options(**STRATEGIES[name]), Target(ratio=0.1))
    config = model.config.to_dict()
    if complaint(pruner, session.view.family, config):
        with pytest.raises(UnsupportedModelError, match=cls.name):
            refuse_unsuited([pruner], session.view.family, config)
        return
    kinds = layer_kinds(session.view)
    merges = name in ("laco", "merge_concat", "slm", "streamline")
    if merges and all(low != high for low, high in itertools.pairwise(kinds)):
        with pytest.raises(TargetError, match=r"never merge|of one kind"):
            plan(name, session)
        return
    made = plan(name, session)
    assert PruningPlan.parse(made.to_json()) == made
    session.apply(made)
    measured = session.view.dimensions()
    assert measured == made.after
    assert measured.parameters < made.before.parameters
    if cls.unlisted or name in SEEN:
        # What drops layers alone was seen on the disk and with a cache by the tests above.
        return
    whole = logits(model)
    assert continues(model, whole)
    if measured.layer_widths:
        (tmp_path / "saved").mkdir()
        save_checkpoint(session, tmp_path / "saved")
    else:
        model.save_pretrained(tmp_path / "saved")
    stock = reloaded(tmp_path / "saved", model)
    assert torch.allclose(logits(stock), whole, atol=1e-5)


@pytest.mark.parametrize("restore", ["dense", "own"])
def test_restored_widths_are_planned_on_what_they_compute(
    every: str, restore: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer is scored on the states that the pruned and restored model later has there."""
    model = small(every)
    session = Session(model, calibration=random_tokens(5, 16))
    cls = pruners.get("width")
    if complaint(cls, session.view.family, model.config.to_dict()):
        return
    groups = "kv_groups" in session.view.family.units
    # Either target with the one and the other kind of heads would take twice the time.
    heads = {"kv_groups" if restore == "dense" else "query_heads": int(groups)}
    options = cls.Options(score="obs", multiple_of=4, restore=restore, **heads)
    pruner = cls(options, Target(ratio=0.2))
    seen, score = [], cls._of_layer

    def listening(self: Any, inputs: Any, **said: Any) -> Any:
        seen.append(torch.cat([hidden for hidden, _ in inputs.runs()]))
        return score(self, inputs, **said)

    monkeypatch.setattr(cls, "_of_layer", listening)
    made = session.plan(pruner)
    refit = recoveries.get("refit")
    recovery = refit(refit.Options(o_proj=groups, toward=restore))
    session.expect([recovery])
    session.apply(made)
    session.recover(recovery)
    now = [
        torch.cat([b.inputs[index] for b in session.captured()])
        for index in range(session.original.layers)
    ]
    assert all(torch.equal(one, other) for one, other in zip(seen, now, strict=True))


@pytest.mark.parametrize("name", sorted(RECOVERIES))
def test_every_repair_runs_and_a_fit_lowers_the_error(every: str, name: str) -> None:
    """What is fitted to the dense stream brings the stream behind the last layer nearer to it."""
    model = small(every)
    session = Session(model, calibration=random_tokens(10, 24))
    cls = recoveries.get(name)
    if complaint(cls, session.view.family, model.config.to_dict()):
        pytest.skip("refused, as the test of recipes shows")
    session.keep_reference()
    assert session.reference is not None
    wanted = torch.cat([batch.inputs[len(batch.inputs) - 1] for batch in session.reference])
    remove(session, DropLayers(indices=free(model, (2,))))

    def error() -> float:
        found = [batch.inputs[len(batch.inputs) - 1] for batch in session.captured()]
        return float((torch.cat(found) - wanted).norm() / wanted.norm())

    before = error()
    session.recover(cls(cls.Options(**RECOVERIES[name])))
    session.release()
    after = error()
    assert after < before or (name in ("linear_patch", "rescale") and math.isfinite(after))
    if name in ADDED:
        assert continues(model, logits(model))


def test_every_family_is_analysed(every: str) -> None:
    """What the blocks add, layer by layer, adds up to what the layer changes."""
    view = DecoderView.of(make_model(every))
    (batch,) = capture(view, [TOKENS])
    seen = observe(view, batch)
    changes = [token_norms(b - a) for a, b in itertools.pairwise(seen.states)]
    assert torch.stack(changes).le(seen.attention + seen.mlp + 1e-4).all()
    assert seen.attention.min() > 0 and seen.mlp.min() > 0


def test_every_evaluator_measures(every: str, tmp_path: Path) -> None:
    """Perplexity is that of the class's own loss; memory is measured."""
    model = make_model(every, num_hidden_layers=2)
    session = Session(model, make_tokenizer())
    file = tmp_path / "text.txt"
    ids = random_tokens(4, 16)
    file.write_text(" ".join(f"w{number}" for number in ids.flatten().tolist()))
    cls = evaluators.get("perplexity")
    found = session.measure(cls(cls.Options(source=str(file), length=16)))
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
    assert math.exp(loss) in [pytest.approx(one.value, rel=1e-4) for one in found]
    footprint = evaluators.get("footprint")
    assert session.measure(footprint(footprint.Options(tokens=16)))


def test_refusals_are_made_when_a_recipe_is_read(every: str, tmp_path: Path) -> None:
    """Before a model is loaded, with the class and the reason."""
    from slm_plugin.recipe import Recipe

    model = make_model(every, num_hidden_layers=3)
    model.save_pretrained(tmp_path)
    family, config = DecoderView.of(model).family, model.config.to_dict()
    for registry, verb in ((pruners, "prune"), (recoveries, "recover")):
        for name in registry.names():
            stage: dict[str, Any] = {verb: name}
            cls: Any = registry.get(name)
            component = cls(cls.Options(), *[Target(ratio=0.1)] * (verb == "prune"))
            if verb == "prune":
                stage["target"] = {"ratio": 0.1}
            data = {
                "model": {"id": str(tmp_path)},
                "calibration": {"source": "builtin"},
                "stages": [stage],
            }
            if not complaint(component, family, config):
                Recipe.from_dict(data)
                continue
            with pytest.raises(Exception, match=family.architecture):
                Recipe.from_dict(data)
