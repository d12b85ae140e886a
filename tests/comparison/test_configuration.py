"""Comparison files: what is accepted, and how every mistake is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from slm_plugin.comparison.configuration import Comparison, read_either
from slm_plugin.errors import RecipeError
from slm_plugin.pruners.depth.slm import SlmOptions
from slm_plugin.recovery.training.lora import LoraOptions

GOOD = """\
version: 1
model: {id: smollm2-135m, dtype: float32}
calibration: {source: builtin, samples: 4, length: 32}
methods:
  - {prune: block_influence}
  - {prune: slm, criterion: loss, search: greedy}
  - {prune: deepest, label: top, recover: [none]}
recover: [none, {recover: lora, epochs: 1}]
targets: [{layers_removed: 2}, {layers_removed: 4}]
evaluate:
  - perplexity: {source: builtin, length: 64}
output: OUTPUT
"""
BAD = [
    ("prune: block_influence", "prune: block_influense", "5:6: methods.0.prune: no pruner is"),
    ("criterion: loss", "criterium: loss", "6:18: methods.1.criterium: unknown key 'criterium'; "
     "did you mean 'criterion'?"),
    ("targets:", "target:", "9:1: target: unknown key 'target'; did you mean 'targets'?"),
    ("{layers_removed: 4}", "{layers_removed: 0}", "9:33: targets.1.layers_removed: should be"),
    ("{layers_removed: 4}", "{layers_removed: 2}", "9:32: targets.1: this target is given twice"),
    ("{layers_removed: 4}", "{threshold: 0.5}", "5:6: methods.0.prune: block_influence takes no "
     "target of kind 'threshold' (targets.1); it takes: layers_removed"),
    ("[{layers_removed: 2}, {layers_removed: 4}]", "[]", "9:1: targets: "),
    ("label: top", "label: block_influence", "7:5: methods.2: another method is called"),
    ("label: top", "label: 3", "7:22: methods.2.label: should be a text"),
    ("label: top", 'label: " block_influence "', "7:5: methods.2: another method is called"),
    ("label: top", r'label: "a\x1b[2J"', "7:22: methods.2.label: has a control character"),
    ("label: top", "target: {ratio: 0.1}", "7:22: methods.2.target: all methods share"),
    ("prune: deepest", "strategy: deepest", "7:5: methods.2: a method is a mapping that begins"),
    ("recover: [none]}", "recover: none}", "7:34: methods.2.recover: should be a list"),
    ("epochs: 1", "epochs: 0", "8:33: recover.1.epochs: should be"),
    ("[none, {", "[none, none, {", "8:17: recover.1: 'none' is given twice"),
    ("{recover: lora, epochs: 1}", "lora", "8:17: recover.1: an entry is `none` or begins"),
    ("perplexity:", "perplexty:", "11:5: evaluate.0.perplexty: no evaluator"),
    ("calibration:", "#", "5:5: methods.0: 'block_influence' needs calibration data"),
    (GOOD, "- a\n", "1:1: a comparison is a mapping"),
]  # fmt: skip


def written(folder: Path, text: str) -> Path:
    """A comparison file."""
    path = folder / "compare.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_good_file_becomes_methods_with_labels(tmp_path: Path) -> None:
    """Labels name the options that are not the default ones; recoveries are shared or own."""
    pytest.importorskip("peft")
    read = Comparison.read(written(tmp_path, GOOD))
    labels = [method.label for method in read.methods]
    assert labels == ["block_influence", "slm (criterion: loss, search: greedy)", "top"]
    assert isinstance(read.methods[1].options, SlmOptions)
    assert [one if one is None else one.options for one in read.methods[0].recoveries] == [
        None,
        LoraOptions(epochs=1),
    ]
    assert read.methods[2].recoveries == (None,)
    assert [target.layers_removed for target in read.targets] == [2, 4]
    assert read.methods[1].at(read.targets[1]).target is read.targets[1]
    assert (read.name, read.output, read.seed) == ("compare", Path("OUTPUT"), 1234)


def test_recoveries_are_none_unless_asked_for(tmp_path: Path) -> None:
    """Every method is measured as pruned."""
    text = GOOD.replace("recover: [none, {recover: lora, epochs: 1}]\n", "")
    methods = Comparison.read(written(tmp_path, text)).methods
    assert {method.recoveries for method in methods} == {(None,)}


@pytest.mark.parametrize(("old", "new", "said"), BAD)
def test_each_mistake_is_told_in_one_line(old: str, new: str, said: str, tmp_path: Path) -> None:
    """With file, line, column, key and remedy."""
    pytest.importorskip("peft")
    assert old in GOOD
    file = written(tmp_path, GOOD.replace(old, new))
    with pytest.raises(RecipeError) as caught:
        Comparison.read(file)
    told = caught.value.message.splitlines()
    assert any(line.startswith(f"{file}:{said}") for line in told), "\n".join(told)
    assert caught.value.exit_code == 2


def test_methods_are_wanted(tmp_path: Path) -> None:
    """A file without any, or with an empty list, says so."""
    for text in ("", "methods: []\n"):
        whole = GOOD[: GOOD.index("methods:")] + text + GOOD[GOOD.index("recover: [none, {") :]
        with pytest.raises(
            RecipeError,
            match=r"methods: (the key|should not be an empty list)",
        ):
            Comparison.read(written(tmp_path, whole))


def test_overrides_reach_methods(tmp_path: Path) -> None:
    """As in a recipe."""
    pytest.importorskip("peft")
    read = Comparison.read(
        written(tmp_path, GOOD), ["targets=[{layers_removed: 1}]", "methods.1.search=sliding"]
    )
    assert [target.layers_removed for target in read.targets] == [1]
    assert read.methods[1].label == "slm (criterion: loss)"


def test_layerwise_refuses_what_needs_the_whole_model(tmp_path: Path) -> None:
    """Recovery by training and gradients: a line each."""
    pytest.importorskip("peft")
    text = GOOD.replace("dtype: float32", "memory: layerwise").replace(
        "prune: deepest", "prune: shortened"
    )
    with pytest.raises(RecipeError) as caught:
        Comparison.read(written(tmp_path, text))
    told = caught.value.message
    assert "'shortened' needs the whole model" in told and "'lora' needs the whole model" in told
    assert len(told.splitlines()) == 2


def test_a_comparison_is_told_from_a_recipe(tmp_path: Path) -> None:
    """By its methods; what is neither is told as a recipe."""
    assert isinstance(read_either(written(tmp_path, GOOD)), Comparison)
    for text in ("stages: []\n", "a: [\n"):
        with pytest.raises(RecipeError) as caught:
            read_either(written(tmp_path, text))
        assert "methods" not in caught.value.message
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        read_either(tmp_path / "none.yaml")


def test_what_follows_is_told_by_its_place(tmp_path: Path) -> None:
    """A recovery of the second method, and one of all methods, each where it stands."""
    text = GOOD.replace("calibration:", "#").replace(
        "{recover: lora, epochs: 1}", "{recover: refit}"
    )
    text = text.replace(
        "{prune: slm, criterion: loss, search: greedy}",
        "{prune: slm, recover: [none, {recover: refit}]}",
    )
    with pytest.raises(RecipeError) as caught:
        Comparison.read(written(tmp_path, text))
    told = [line.split(": ")[1] for line in caught.value.message.splitlines()]
    assert told == ["methods.0", "methods.1", "recover.1", "methods.1.recover.1"]


def test_a_row_of_the_own_recovery_of_a_strategy_runs_it_once(tmp_path: Path) -> None:
    """With the options of both; other recoveries run behind it."""
    width = "{prune: width, recover: [none, {recover: refit, o_proj: true}, {recover: lora}]}"
    text = GOOD.replace("{prune: block_influence}", width)
    text = text.replace("layers_removed: 2", "ratio: 0.1").replace(
        "layers_removed: 4", "ratio: 0.2"
    )
    method = Comparison.read(written(tmp_path, text)).methods[0]
    alone, refitted, trained = (method.behind(recovery) for recovery in method.recoveries)
    assert [[one.name for one in row] for row in (alone, refitted, trained)] == [
        ["refit"],
        ["refit"],
        ["refit", "lora"],
    ]
    assert [row[0].options.o_proj for row in (alone, refitted)] == [False, True]


def test_what_cannot_follow_operators_is_told_once_for_each_recovery(tmp_path: Path) -> None:
    """Two refits are one mistake of a method. LoRA may follow, and other methods be refitted."""
    text = GOOD.replace("layers_removed: 2", "ratio: 0.2").replace(
        "{layers_removed: 4}", "{ratio: 0.3}"
    )
    methods = """\
  - {prune: width, score: flap, restore: none}
  - {prune: width, score: flap, restore: none, hidden_channels: 144, hidden_score: pca_per_block}
recover: [none, {recover: refit}, {recover: refit, o_proj: true}, {recover: lora, epochs: 1}]
"""
    start, end = text.index("  - {prune: block"), text.index("targets:")
    with pytest.raises(RecipeError) as caught:
        Comparison.read(written(tmp_path, text[:start] + methods + text[end:]))
    (line,) = str(caught.value).splitlines()
    assert line.endswith(
        "6:5: methods.1: 'refit' cannot follow 'width', which inserts operators; move it before "
        "'width' or remove one"
    )
