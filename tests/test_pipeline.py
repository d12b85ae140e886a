"""A recipe from beginning to end, on tiny models and through the public interface."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import slm_plugin
from slm_plugin import PruningPlan, Recipe, Session, apply, run
from slm_plugin.errors import (
    OutputError,
    PlanError,
    TargetError,
    UserError,
    VerificationError,
)
from slm_plugin.evaluation.perplexity import Perplexity, PerplexityOptions
from slm_plugin.models.loading import ModelSource, load
from slm_plugin.outputs.marker import MARKER
from tests.tiny import command, make_checkpoint, make_model

pytestmark = pytest.mark.usefixtures("no_matplotlib")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny Llama with its tokenizer, on disk."""
    return make_checkpoint(tmp_path / "model", num_hidden_layers=8)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text in the words of the tiny tokenizer."""
    path = tmp_path / "text.txt"
    path.write_text(
        "\n".join(" ".join(f"w{3 + (7 * i + j) % 125}" for j in range(40)) for i in range(8))
    )
    return path


@pytest.fixture
def recipe_file(
    tmp_path: Path, checkpoint: Path, tokens: Path, text: Path, reload_here: None
) -> Path:
    """Depth, then width, measured at every stage."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""\
version: 1
model: {{id: {checkpoint}, dtype: float32, device: cpu}}
calibration: {{source: {tokens}}}
stages:
  - prune: slm
    target: {{layers_removed: 3}}
  - prune: torch_pruning
    target: {{ratio: 0.1}}
    multiple_of: 1
evaluate:
  - perplexity: {{source: {text}, length: 16, every_stage: true}}
  - footprint: {{tokens: 16}}
export:
  - checkpoint: {{}}
output: {tmp_path / "out"}
"""
    )
    return path


def files_below(folder: Path) -> list[str]:
    """Everything in a folder, hidden or not."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_run_leaves_plans_report_and_a_stock_checkpoint(
    recipe_file: Path, tmp_path: Path
) -> None:
    """Everything promised is there, and the checkpoint is the model that the plans promise."""
    result = run(recipe_file)
    out = tmp_path / "out"
    assert result.output == out
    names = {p.name for p in out.iterdir()}
    assert names == {
        "checkpoint", "plan-01-slm.json", "plan-02-torch_pruning.json",
        "report.json", "report.html", "README.md", MARKER,
    }  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(out / "checkpoint")
    promised = result.plans["plan-02-torch_pruning.json"].after
    assert sum(p.numel() for p in loaded.parameters()) == promised.parameters
    assert loaded.config.num_hidden_layers == promised.layers == 5
    report = json.loads((out / "report.json").read_text())
    assert [state["stage"] for state in report["states"]] == [0, 1, 2]
    assert report["input"] != report["output"]


def test_ratios_of_later_stages_count_the_original_model(recipe_file: Path) -> None:
    """The width stage removes a tenth of the original, not of what depth left."""
    result = run(recipe_file)
    width = result.plans["plan-02-torch_pruning.json"]
    original = result.report.before.parameters
    assert width.before.parameters < 0.75 * original
    unit = width.before.layers * width.before.channel_parameters
    assert abs(width.parameters_removed - 0.1 * original) <= unit


def test_the_same_recipe_gives_the_same_bytes(recipe_file: Path, tmp_path: Path) -> None:
    """Two runs write equal plans and equal weights."""
    first = run(Recipe.read(recipe_file, [f"output={tmp_path / 'a'}"]))
    second = run(Recipe.read(recipe_file, [f"output={tmp_path / 'b'}"]))
    assert first.report.output == second.report.output
    for name in first.plans:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    weights = "checkpoint/model.safetensors"
    assert (tmp_path / "a" / weights).read_bytes() == (tmp_path / "b" / weights).read_bytes()


def test_plans_apply_later_with_the_same_result(recipe_file: Path, checkpoint: Path) -> None:
    """Reading the plans back and applying them one by one gives the run's model bit by bit."""
    result = run(recipe_file)
    model, tokenizer = load(ModelSource(id=str(checkpoint), dtype="float32", device="cpu"))
    session = Session(model, tokenizer)
    for name in sorted(result.plans):
        apply(PruningPlan.read(result.output / name), session)
    assert session.fingerprint() == result.report.output


def test_planning_alone_writes_nothing(recipe_file: Path, tmp_path: Path) -> None:
    """`plan` gives the plans of a run and leaves the disk alone."""
    before = files_below(tmp_path)
    plans = slm_plugin.plan(recipe_file)
    assert files_below(tmp_path) == before
    assert plans == run(recipe_file).plans


def test_planning_trains_nothing_behind_the_last_plan(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recovery that no plan follows does not run."""
    pytest.importorskip("peft")
    text = recipe_file.read_text().replace("evaluate:", "  - {recover: lora, epochs: 1}\nevaluate:")
    monkeypatch.setattr(
        "slm_plugin.recovery.training.lora.LoraRecovery.recover",
        lambda *_: pytest.fail("trained in vain"),
    )
    assert len(slm_plugin.plan(Recipe.parse(text))) == 2


def test_width_then_depth_works_too(recipe_file: Path) -> None:
    """The stages may come in the other order; captures are those of the narrowed model."""
    stages = (
        "stages=[{prune: torch_pruning, target: {ratio: 0.1}, multiple_of: 1}, "
        "{prune: slm, target: {layers_removed: 3}}]"
    )
    result = run(Recipe.read(recipe_file, [stages]))
    assert result.report.after.layers == 5
    assert result.report.after.intermediate_size < 48
    AutoModelForCausalLM.from_pretrained(result.output / "checkpoint")


def test_a_plan_for_another_model_is_refused(recipe_file: Path) -> None:
    """A plan names the weights that it was made for."""
    plan = next(iter(slm_plugin.plan(recipe_file).values()))
    other = Session(make_model(num_hidden_layers=8, seed=1))
    with pytest.raises(PlanError, match="made for another model: weights differ"):
        apply(plan, other)
    assert len(other.model.model.layers) == 8


def test_a_broken_promise_is_a_failure(recipe_file: Path, checkpoint: Path) -> None:
    """A plan that was edited without its `after` does not pass unnoticed."""
    plan = next(iter(slm_plugin.plan(recipe_file).values()))
    edited = plan.model_copy(update={"operations": plan.operations[:0]})
    model, _ = load(ModelSource(id=str(checkpoint), dtype="float32", device="cpu"))
    with pytest.raises(VerificationError, match="layers is 8, the plan states 5"):
        apply(edited, Session(model))


@pytest.mark.parametrize("content", ["{", "{}", '{"format": 1, "operations": [{"op": "x"}]}', ""])
def test_a_malformed_plan_is_one_line(tmp_path: Path, content: str) -> None:
    """A file that is no plan names itself and the place."""
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(PlanError, match=r"plan\.json is not a valid plan") as caught:
        PruningPlan.read(path)
    assert "\n" not in str(caught.value)


def test_impossible_targets_fail_before_any_work(recipe_file: Path, tmp_path: Path) -> None:
    """The second stage's target is checked before the first stage runs."""
    before = files_below(tmp_path)
    with pytest.raises(TargetError):
        run(
            Recipe.read(
                recipe_file, ["stages.1.target.ratio=0.99", "stages.0.target={threshold: 0.5}"]
            )
        )
    assert files_below(tmp_path) == before


def test_a_threshold_that_removes_nothing_is_a_warning(
    recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the plan and on standard error: the run does nothing where it seems to do something."""
    made = slm_plugin.plan(Recipe.read(recipe_file, ["stages.0.target={threshold: 1}"]))
    plan = next(iter(made.values()))
    assert plan.operations == ()
    assert plan.warnings[0].startswith("the target (threshold 1) removes nothing")
    assert "warning: the target (threshold 1) removes nothing" in capsys.readouterr().err


@pytest.mark.process
def test_a_recipe_may_be_a_pipe(recipe_file: Path) -> None:
    """``validate <(cat recipe)``: it is read once."""
    command = f"{shlex.quote(sys.executable)} -m slm_plugin validate <(cat {recipe_file})"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "is a valid recipe: slm, torch_pruning" in done.stdout


def test_an_existing_output_is_kept(recipe_file: Path, tmp_path: Path) -> None:
    """A former result is overwritten when asked for; what is not ours makes the recipe wrong."""
    recipe = Recipe.read(recipe_file, ["stages=[]", "export=[]", "evaluate=[]"])
    first = run(recipe)
    with pytest.raises(OutputError, match="exists"):
        run(recipe)
    assert run(recipe, overwrite=True).report.created >= first.report.created
    (tmp_path / "out" / "mine").write_text("x")
    for refused in (lambda: run(recipe, overwrite=True), lambda: Recipe.read(recipe_file)):
        with pytest.raises(UserError, match="no part of a former result: mine"):
            refused()
    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_lora_recovers_a_pruned_model(recipe_file: Path) -> None:
    """After pruning, training on the calibration set lowers the loss and leaves a stock model."""
    pytest.importorskip("peft")
    stages = (
        "stages=[{prune: slm, target: {layers_removed: 3}}, "
        "{recover: lora, epochs: 15, learning_rate: 0.01, batch_size: 3}]"
    )
    result = run(Recipe.read(recipe_file, [stages]))
    recovery = result.report.stages[1].recovery
    assert recovery is not None
    assert len(recovery.losses) == 30
    assert recovery.losses[-1] < recovery.losses[0]
    loaded, info = AutoModelForCausalLM.from_pretrained(
        result.output / "checkpoint", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not any("lora" in name for name, _ in loaded.named_modules())


@pytest.mark.parametrize("stage", ["{recover: lora, learning_rate: 0.01}", "{recover: refit}"])
def test_the_last_figures_are_those_of_the_recovered_model(
    recipe_file: Path, text: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was trained is what is measured and exported, not what was there before."""
    # The checkpoint is read below; a process of its own takes most of the time.
    monkeypatch.setattr("slm_plugin.export.checkpoint.verify_checkpoint", lambda *_: ())
    if "lora" in stage:
        pytest.importorskip("peft")
    stages = f"stages=[{{prune: slm, target: {{layers_removed: 3}}}}, {stage}]"
    result = run(Recipe.read(recipe_file, [stages]))
    told = [state.measurements[0].value for state in result.report.states]
    folder = result.output / "checkpoint"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    options = PerplexityOptions(source=str(text), length=16)
    (found,) = Perplexity(options).measure(Session(loaded, AutoTokenizer.from_pretrained(folder)))
    assert found.value == pytest.approx(told[2], rel=1e-6)
    assert abs(told[2] - told[1]) > 1e-3 * told[1]


@pytest.mark.process
def test_a_killed_run_leaves_no_folder_that_looks_finished(
    recipe_file: Path, tmp_path: Path
) -> None:
    """SIGKILL in the middle: no output folder; the next run succeeds and clears the rest."""
    script = (
        "import sys, time, slm_plugin.pipeline as p\n"
        "def hang(*_, **__):\n"
        "    print('measured', flush=True); time.sleep(60)\n"
        "p.write_report = hang\n"
        f"p.run({str(recipe_file)!r})\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "measured\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "out").exists()
    left = [p for p in tmp_path.iterdir() if p.name.startswith(".out.partial-")]
    assert len(left) == 1
    run(recipe_file)
    assert (tmp_path / "out" / "report.json").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".out")]


def process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "slm_plugin", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200", "HF_HUB_OFFLINE": "1"},
    )


@pytest.mark.process
def test_the_command_line_runs_plans_explains_and_applies(
    recipe_file: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """run, plan, explain, apply: results on stdout, exit code 0, the same weights at the end."""
    ran = process("run", str(recipe_file), "--set", "export=[checkpoint]")
    assert ran.returncode == 0, ran.stderr
    assert "perplexity" in ran.stdout and "report.html" in ran.stdout
    one_stage = "stages=[{prune: slm, target: {layers_removed: 3}}]"
    planned = command("plan", str(recipe_file), "--set", one_stage, "--to", str(tmp_path / "plans"))
    assert planned.returncode == 0, planned.stderr
    assert files_below(tmp_path / "plans") == [MARKER, "plan-01-slm.json"]
    plan = tmp_path / "plans" / "plan-01-slm.json"
    assert plan.read_bytes() == (tmp_path / "out" / "plan-01-slm.json").read_bytes()
    explained = command("explain", str(plan))
    assert explained.returncode == 0 and "8" in explained.stdout
    assert json.loads(command("explain", str(plan), "--json").stdout)["pruner"] == "slm"
    applied = command(
        "apply", str(plan), "--model", str(checkpoint), "--dtype", "float32",
        "--output", str(tmp_path / "applied"),
    )  # fmt: skip
    assert applied.returncode == 0, applied.stderr
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "applied" / "checkpoint")
    assert loaded.config.num_hidden_layers == 5


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "nowhere.yaml"], "cannot read the recipe nowhere.yaml"),
        (["run", "RECIPE", "--set", "model.id=./nowhere"], "there is no folder nowhere"),
        (["run", "RECIPE", "--set", "model.id=no-such-model"], "cannot fetch 'no-such-model'"),
        (["run", "RECIPE", "--set", "model.id=none.gguf"], "there is no file none.gguf"),
        (["run", "RECIPE", "--set", "model.device=cuda:99"], "no device 'cuda:99'"),
        (["run", "RECIPE", "--set", "stages.0.target.layers_removed=9"], "the model has 8"),
        (["run", "RECIPE", "--set", "output=/proc/nowhere/out"], "cannot write"),
        (["validate", "RECIPE", "--set", "stages.0.target.ratio=2"], "should be less than 1"),
        (["run", "RECIPE", "--set", "evaluate=[{footprint: {tokens: 999}}]"], "the model has 256"),
        (["explain", "nowhere.json"], "cannot read the plan nowhere.json"),
        (["inspect", "./nowhere"], "there is no folder nowhere"),
        (["run"], "Missing argument"),
        (["rum"], "No such command"),
    ],
)
def test_users_errors_are_one_message_and_exit_code_two(
    recipe_file: Path, tmp_path: Path, arguments: list[str], told: str
) -> None:
    """No traceback, nothing on stdout, nothing written."""
    before = files_below(tmp_path)
    done = command(*(str(recipe_file) if a == "RECIPE" else a for a in arguments))
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert files_below(tmp_path) == before


def damaged(checkpoint: Path, **config: Any) -> None:
    """Change fields of a checkpoint's config."""
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def test_nan_weights_are_refused_at_the_door(recipe_file: Path, checkpoint: Path) -> None:
    """A model with NaN is refused with the parameter's name."""
    model = make_model(num_hidden_layers=8)
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(checkpoint)
    done = command("run", str(recipe_file))
    assert done.returncode == 2
    assert "NaN or infinity in model.layers.3.mlp.up_proj.weight" in done.stderr


def test_missing_weights_are_refused(recipe_file: Path, checkpoint: Path) -> None:
    """A ninth layer, which transformers would fill with random numbers, is an error."""
    damaged(checkpoint, num_hidden_layers=9)
    done = command("run", str(recipe_file))
    assert done.returncode == 2
    assert "weights of 8 layers, but its config says num_hidden_layers 9" in done.stderr


def test_an_unsupported_architecture_names_the_supported_ones(
    recipe_file: Path, tmp_path: Path
) -> None:
    """GPT-2 is refused before anything is done to it."""
    from transformers import BloomConfig, BloomForCausalLM

    BloomForCausalLM(
        BloomConfig(n_layer=2, n_head=2, hidden_size=32, vocab_size=128)
    ).save_pretrained(tmp_path / "bloom")
    done = command("run", str(recipe_file), "--set", f"model.id={tmp_path / 'bloom'}")
    assert done.returncode == 2
    assert "BloomForCausalLM is not supported" in done.stderr
    assert "LlamaForCausalLM" in done.stderr


def test_pickled_weights_are_refused(recipe_file: Path, checkpoint: Path) -> None:
    """Only safetensors is read: a pickle could run code."""
    (checkpoint / "model.safetensors").unlink()
    torch.save(make_model(num_hidden_layers=8).state_dict(), checkpoint / "pytorch_model.bin")
    done = command("run", str(recipe_file))
    assert done.returncode == 2
    assert "only safetensors are read" in done.stderr


def test_help_is_fast_and_imports_no_torch() -> None:
    """`import slm_plugin` and the command line load no torch until it is needed."""
    code = (
        "import sys, slm_plugin, slm_plugin.cli.commands, slm_plugin.cli.border\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'torch was imported'\n"
        "assert 'Pruner' in dir(slm_plugin)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    started = time.perf_counter()
    assert process("--help").returncode == 0
    assert time.perf_counter() - started < 30


def test_reading_commands_give_json() -> None:
    """list, doctor, schema and inspect have machine-readable output."""
    listed = json.loads(command("list", "--json").stdout)
    assert {"slm", "torch_pruning", "perplexity", "checkpoint"} <= {row["name"] for row in listed}
    doctor = command("doctor", "--json")
    assert json.loads(doctor.stdout)["problems"] == [] and doctor.returncode == 0
    assert json.loads(command("schema").stdout)["properties"]["stages"]["items"]["oneOf"]


def test_inspect_accounts_for_every_parameter(checkpoint: Path) -> None:
    """The parts of a model add up to the whole."""
    found = json.loads(command("inspect", str(checkpoint), "--json").stdout)
    assert sum(found["parameters"].values()) == found["dimensions"]["parameters"]
    model = make_model(num_hidden_layers=8)
    assert found["dimensions"]["parameters"] == sum(p.numel() for p in model.parameters())
