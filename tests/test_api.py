"""The front door: a model in memory, by one strategy or by stages, on data of any kind."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, PreTrainedModel

from slm_plugin import (
    Comparison,
    Recipe,
    Session,
    Target,
    compare,
    get_pruner,
    list_pruners,
    load_model,
    prune,
    run,
)
from slm_plugin.errors import (
    CalibrationError,
    OutputError,
    RecipeError,
    SlmError,
    TargetError,
    UserError,
)
from slm_plugin.models.border import is_transformers_four
from slm_plugin.models.loading import ModelSource, load
from slm_plugin.registry import recoveries
from slm_plugin.result import RunResult
from tests.tiny import make_checkpoint, make_model, make_tokenizer, random_tokens

TOKENS = random_tokens(6, 12)
TEXTS = [" ".join(f"w{3 + (7 * i + j) % 120}" for j in range(60)) for i in range(8)]


def pruned(model: PreTrainedModel | None = None, **named: Any) -> RunResult:
    """Two layers of a tiny model removed, by default on token ids."""
    named = {"calibration": TOKENS, **named}
    if "stages" not in named:
        named = {"stages": "block_influence", "layers_removed": 2, **named}
    return prune(make_model() if model is None else model, make_tokenizer(), **named)


def test_the_model_that_is_passed_gets_smaller_and_is_as_the_strategy_plans() -> None:
    """In place, in evaluation mode; the plan is that of a session."""
    model = make_model()
    session = Session(copy.deepcopy(model), None, TOKENS)
    strategy = get_pruner("block_influence")
    plan = session.plan(strategy(strategy.Options(), Target(layers_removed=2)))
    result = pruned(model.train())
    assert result.model is model and not model.training
    assert model.config.num_hidden_layers == len(model.model.layers) == 4
    assert result.plan.operations == plan.operations
    assert "2 layers and 28.3% of the parameters removed" in result.summary()
    assert str(result.plan) in result.plan._repr_html_().replace("&quot;", '"')
    assert result.output is None and result.report.calibration is not None


@pytest.mark.parametrize(
    "given",
    [
        TOKENS,
        TOKENS.numpy(),
        TOKENS.to(torch.int32),
        TOKENS.tolist(),
        list(TOKENS),
        [TOKENS[:4], TOKENS[4:]],
        [{"input_ids": TOKENS[:4], "attention_mask": torch.ones(4, 12)}, {"input_ids": TOKENS[4:]}],
        [{"input_ids": row.tolist()} for row in TOKENS],
        tuple(np.asarray(row) for row in TOKENS),
        {"input_ids": TOKENS},
    ],
    ids=lambda given: type(given).__name__,
)
def test_token_ids_of_every_kind_are_the_same_calibration_set(given: Any) -> None:
    """Tensors, arrays, lists, batches with and without a mapping."""
    result = pruned(calibration=given)
    assert result.session.calibration is not None
    assert torch.equal(result.session.calibration, TOKENS)


def test_a_data_loader_and_a_generator_are_read_once() -> None:
    """Whatever yields batches."""

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        yield from ({"input_ids": rows} for rows in TOKENS.split(2))

    loader = DataLoader(TensorDataset(TOKENS), batch_size=4, collate_fn=lambda rows: rows)
    collated = ({"input_ids": torch.stack([row for (row,) in rows])} for rows in loader)
    for given in (batches(), collated):
        found = pruned(calibration=given).session.calibration
        assert found is not None and torch.equal(found, TOKENS)


def test_texts_are_joined_and_cut(tmp_path: Path) -> None:
    """All of them are used, but for the last incomplete sample."""
    found = pruned(make_model(max_position_embeddings=64), calibration=TEXTS).session.calibration
    assert found is not None
    assert found.shape[1] == 64 and found.numel() > 60 * 8 - 64
    short = pruned(calibration=["w3 w4 w5 w6"]).session.calibration
    assert short is not None and short.shape == (1, 4)
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(TEXTS))
    for source in (str(file), {"source": str(file)}):
        given = (
            {"source": source, "samples": 3, "length": 16}
            if isinstance(source, str)
            else {**source, "samples": 3, "length": 16}
        )
        drawn = pruned(calibration=given).session.calibration
        assert drawn is not None and drawn.shape == (3, 16)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "'block_influence' needs calibration data"),
        ([], "is empty"),
        (["w3"], "fewer than two tokens"),
        (b"text", "of type bytes"),
        (7, "of type int"),
        ([{"ids": [1, 2]}], "batch 0 of the calibration data has no `input_ids`; it has ids"),
        ([object()], "batch 0 of the calibration data is of type object"),
        (["w3", [1, 2]], "item 1 of the calibration data is of type list, others are texts"),
        ([[1, 2, 3], [1, 2]], "samples of 2 tokens, the first one of 3"),
        ([{"input_ids": [[5, 0]], "attention_mask": [[1, 0]]}], "is padded"),
        ([[5, 128]], "holds token id 128; the vocabulary ends at 127"),
        ([[5, -1]], "holds token id -1"),
        (torch.rand(2, 8), "torch.float32"),
        (torch.ones(2, 2, 4, dtype=torch.int64), r"shape \(2, 2, 4\)"),
        ([1.5, 2.5], r"of type float of shape \(\)"),
    ],
)
def test_other_calibration_data_is_one_line(given: Any, words: str) -> None:
    """And the model stays as it was."""
    model = make_model()
    with pytest.raises(CalibrationError, match=words) as caught:
        pruned(model, calibration=given)
    assert "\n" not in str(caught.value) and len(model.model.layers) == 6


def test_stages_are_mappings_or_objects_and_recoveries_follow() -> None:
    """As in a recipe; the report holds what they stand for."""
    sleb = get_pruner("sleb")
    kind = recoveries.get("refit")
    refit = kind(kind.Options.model_validate({"layers": "boundaries"}))
    result = pruned(
        stages=[sleb(sleb.Options(), Target(layers_removed=1)), {"recover": "rescale"}],
        recover=["fold_linear", {"recover": "refit", "o_proj": True}, refit],
        evaluate=[
            {"footprint": {"tokens": 8}},
            {"latency": {"repeats": 1, "prompt_tokens": 4, "new_tokens": 2}},
        ],
    )
    names = [stage.name for stage in result.report.stages]
    assert names == ["sleb", "rescale", "fold_linear", "refit", "refit"]
    assert result.report.recipe["stages"][0]["target"] == {"layers_removed": 1}
    assert result.report.recipe["stages"][-1]["layers"] == "boundaries"
    assert "latency" in result.summary() or "decode" in result.summary()
    (plan,) = result.plans.values()
    assert plan == result.plan


@pytest.mark.parametrize(
    ("named", "error", "words"),
    [
        ({"layers_removed": None}, TargetError, "say how much to prune: one of layers_removed="),
        ({"ratio": 0.2}, TargetError, "one target, not layers_removed= and ratio="),
        (
            {"layers_removed": None, "layer_removed": 2},
            TargetError,
            "layer_removed= is no target; did you mean layers_removed=?",
        ),
        ({"layers_removed": 6}, TargetError, "the model has 6"),
        ({"target": {"layers_removed": 2}}, TargetError, "target= belongs into a stage"),
        ({"stages": [], "layers_removed": None}, UserError, "there is no stage"),
        (
            {"stages": "refit"},
            RecipeError,
            r"no pruner is called 'refit' \(it is the name of a rec",
        ),
        ({"layers_removed": 1.5}, RecipeError, "prune: stages.0.target"),
        ({"protect_frist": 1}, RecipeError, "unknown key 'protect_frist'; did you mean"),
        ({"stages": "block_influnce"}, RecipeError, "did you mean 'block_influence'"),
        ({"recover": "refitt"}, RecipeError, "did you mean 'refit'"),
        ({"evaluate": [{"perplexity": {"lenght": 8}}]}, RecipeError, "did you mean 'length'"),
        ({"calibration": {"sourc": "builtin"}}, RecipeError, "did you mean 'source'"),
        ({"calibration": "nowhere.txt"}, SlmError, "nowhere.txt"),
        ({"threshold": 0.5, "layers_removed": None}, RecipeError, "takes no target of kind"),
        (
            {"memory": "3MB", "layers_removed": None},
            RecipeError,
            "takes no target of kind 'memory'",
        ),
        (
            {"latency": {"decode": 0.8}, "layers_removed": None},
            RecipeError,
            "takes no target of kind 'latency'",
        ),
        ({"latency": 0.8, "layers_removed": None}, RecipeError, "latency: should be a mapping"),
        ({"memory": "3MB"}, TargetError, "one target, not layers_removed= and memory="),
    ],
)
def test_mistakes_are_one_line(named: dict[str, Any], error: type[SlmError], words: str) -> None:
    """Nothing is changed before they are found."""
    model = make_model()
    with pytest.raises(error, match=words):
        pruned(model, **{"stages": "block_influence", "layers_removed": 2, **named})
    assert len(model.model.layers) == 6


def test_targets_belong_to_one_strategy_by_name() -> None:
    """In a list each stage has its own."""
    with pytest.raises(UserError, match="ratio= goes with the name of one strategy"):
        pruned(stages=[{"prune": "deepest", "target": {"ratio": 0.2}}], ratio=0.2)
    both = [{"prune": "deepest", "target": {"layers_removed": 1}} for _ in range(2)]
    result = pruned(stages=both, calibration=None)
    assert len(result.plans) == 2
    with pytest.raises(UserError, match="has 2 plans"):
        _ = result.plan


@pytest.mark.process
def test_what_is_saved_loads_with_stock_transformers(tmp_path: Path) -> None:
    """With the same logits; an existing folder stays."""
    result = pruned(recover="refit")
    folder = result.save(tmp_path / "shallower")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        assert torch.equal(loaded(TOKENS).logits, result.model(TOKENS).logits)
    assert (folder / "plan-01-block_influence.json").is_file()
    with pytest.raises(OutputError, match="exists"):
        result.save(folder)
    assert result.save(str(folder), overwrite=True) == folder


def test_a_recipe_is_data_and_its_model_may_be_in_memory(tmp_path: Path, reload_here: None) -> None:
    """`version`, `model` and `output` may be left out; with an output all is written."""
    stages = [{"prune": "deepest", "target": {"layers_removed": 2}}]
    result = run(Recipe.from_dict({"stages": stages}), model=make_model())
    assert result.model.config.num_hidden_layers == 4
    with pytest.raises(UserError, match="no model is named"):
        run(Recipe.from_dict({"stages": stages}))
    with pytest.raises(UserError, match="need a model"):
        run(Recipe.from_dict({"stages": stages}), calibration=TOKENS)
    with pytest.raises(RecipeError, match=r"recipe: export: .* add `output`"):
        Recipe.from_dict({"stages": stages, "export": [{"checkpoint": {}}]})
    with pytest.raises(RecipeError, match="recipe: a recipe is a mapping"):
        Recipe.from_dict([])  # type: ignore[arg-type]
    output = str(tmp_path / "out")
    data = {"stages": stages, "export": ["checkpoint"], "output": output}
    written = run(Recipe.from_dict(data), model=make_model(), tokenizer=make_tokenizer())
    assert written.output == tmp_path / "out"
    assert (tmp_path / "out" / "checkpoint" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "report.html").is_file()


def test_methods_are_compared_on_a_model_in_memory() -> None:
    """It stays as it is."""
    model = make_model()
    before = Session(model).fingerprint()
    data = {
        "methods": [{"prune": "deepest"}, {"prune": "block_influence", "recover": ["none"]}],
        "targets": [{"layers_removed": 1}, {"layers_removed": 2}],
        "evaluate": [{"footprint": {"tokens": 8}}],
    }
    report = compare(Comparison.from_dict(data), model=model, calibration=TOKENS)
    assert [cell.after.layers for cell in report.cells if cell.after] == [6, 5, 5, 4, 4]
    assert Session(model).fingerprint() == before


def test_numbers_of_numpy_and_paths_are_taken(tmp_path: Path) -> None:
    """As users have them: a count from an array, a file by its path."""
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join([" ".join(TEXTS)] * 12), encoding="utf-8")
    result = pruned(layers_removed=np.int64(2), calibration=file)
    assert result.plan.layers_removed == 2
    assert pruned(layers_removed=None, ratio=np.float32(0.3)).plan.layers_removed == 2


def test_a_model_is_loaded_by_what_recipes_call_it(tmp_path: Path) -> None:
    """A folder here; a mistake is one line."""
    folder = make_checkpoint(tmp_path / "model")
    model, tokenizer = load_model(str(folder), device="cpu")
    assert tokenizer is not None
    assert prune(model, tokenizer, "deepest", layers_removed=2).plan.layers_removed == 2
    for named, words in (
        ({"name": str(tmp_path / "none")}, "none"),
        ({"name": str(folder), "dtype": "int4"}, "dtype"),
        ({"name": str(folder), "device": "gpu"}, "device"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            load_model(**named)
        assert "\n" not in str(caught.value)


def test_recipes_and_comparisons_may_be_data() -> None:
    """Without `from_dict`."""
    stages = [{"prune": "deepest", "target": {"layers_removed": 2}}]
    model = make_model()
    assert run({"stages": stages}, model=model).plan.layers_removed == 2
    cells = compare(
        {"methods": [{"prune": "deepest"}], "targets": [{"layers_removed": 1}]}, model=model
    ).cells
    assert len(cells) == 2


class Odd(torch.nn.Linear):
    """A linear map of another class, as adapters and quantisation put in place."""


def with_odd(path: str) -> PreTrainedModel:
    """A model in which one module was replaced."""
    model = make_model()
    owner, _, name = path.rpartition(".")
    linear = model.get_submodule(path)
    other = Odd(linear.in_features, linear.out_features, bias=False)
    setattr(model.get_submodule(owner), name, other)
    return model


def on_meta() -> PreTrainedModel:
    """A model without values."""
    return make_model().to("meta")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: "smollm2-135m", "the model is of type str, not a model of transformers"),
        (make_tokenizer, "the model is of type (PreTrainedTokenizerFast|TokenizersBackend)"),
        (on_meta, "on the meta device"),
        (lambda: with_odd("model.layers.3.self_attn.q_proj"), r"q_proj of layer 3 is a .*\.Odd"),
        (lambda: with_odd("lm_head"), "the language-modelling head is a"),
        (
            lambda: torch.nn.utils.parametrizations.weight_norm(
                make_model().model.layers[1].mlp.down_proj
            ),
            "of type Parametrized",
        ),
    ],
)
def test_what_is_no_plain_model_is_refused(model: Any, words: str) -> None:
    """One line, and no strategy is offered for it."""
    made = model()
    with pytest.raises(UserError, match=words) as caught:
        prune(made, None, "deepest", layers_removed=1)
    assert "\n" not in str(caught.value) and list_pruners(made) == []


def test_a_model_that_is_read_layer_by_layer_is_offered_what_streams(tmp_path: Path) -> None:
    """Its weights have no memory of their own, and are no less there."""
    folder = make_checkpoint(tmp_path / "model")
    model, _ = load(ModelSource(id=str(folder), memory="layerwise", device="cpu"))
    assert {"slm", "deepest"} <= set(list_pruners(model))
    assert "torch_pruning" not in list_pruners(model)
    assert prune(model, None, "deepest", layers_removed=1).plan.layers_removed == 1


def test_adapters_are_refused_wherever_they_are() -> None:
    """Around the model, or in it; the merged model is pruned."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    around = peft.get_peft_model(make_model(), config)
    for model in (around, around.base_model.model):
        with pytest.raises(UserError, match="merge_and_unload"):
            prune(model, None, "deepest", layers_removed=1)
    merged = around.merge_and_unload()
    assert prune(merged, None, "deepest", layers_removed=1).plan.layers_removed == 1


def test_a_tokenizer_is_one() -> None:
    """Its name is not enough."""
    with pytest.raises(UserError, match="the tokenizer is of type str"):
        prune(make_model(), "gpt2", "deepest", layers_removed=1)  # type: ignore[arg-type]


def test_a_result_is_saved_while_it_is_the_last(tmp_path: Path, reload_here: None) -> None:
    """The plan beside the weights is that of the weights."""
    model = make_model()
    first, last = pruned(model, layers_removed=1), pruned(model, layers_removed=1)
    with pytest.raises(UserError, match="pruned again"):
        first.save(tmp_path / "first")
    assert not (tmp_path / "first").exists()
    last.save(tmp_path / "last")
    assert len(repr(last)) < 300 and "1. block_influence: 5 to 4 layers" in last.summary()
    assert len(repr(last.session)) < 600
    assert "experts" not in repr(last.session)


def test_strategies_are_listed_for_a_model() -> None:
    """All that suit a supported class, none for another."""
    assert list_pruners(make_model("qwen3")) == [n for n in list_pruners() if n != "experts"]
    assert "experts" in list_pruners(make_model("mixtral"))
    assert list_pruners(torch.nn.Linear(2, 2)) == []  # type: ignore[arg-type]
    with pytest.raises(UserError, match="did you mean 'sleb'"):
        get_pruner("slebb")


def test_every_family_is_pruned_and_saved(family: str, tmp_path: Path, reload_here: None) -> None:
    """The README's lines; the folder loads with stock transformers."""
    model = make_model(family)
    # Transformers 5 loads its Qwen2Tokenizer for a qwen2 model whatever tokenizer the folder
    # holds, so that saving the word-level one is refused there (tests/export/test_checkpoint.py).
    replaced = family == "qwen2" and not is_transformers_four()
    result = prune(
        model,
        None if replaced else make_tokenizer(),
        "block_influence",
        layers_removed=2,
        calibration=TOKENS if replaced else TEXTS,
        recover="refit",
    )
    assert result.plan.layers_removed == 2 and "parameters" in result.summary()
    loaded = AutoModelForCausalLM.from_pretrained(result.save(tmp_path / "shallower"))
    assert type(loaded) is type(model) and loaded.config.num_hidden_layers == 4
