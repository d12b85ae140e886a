"""The command line: results on standard output, progress and messages on standard error."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from slm_plugin.errors import SlmError
from slm_plugin.progress import console

app = typer.Typer(
    help="Prune language models in depth and width, from one YAML recipe.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipePath = Annotated[Path, typer.Argument(help="Recipe file (YAML).")]
ModelName = Annotated[str, typer.Argument(help="Alias, checkpoint folder, .gguf file or Hub id.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override, as stages.0.target.ratio=0.2; repeat for more."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")]


def main() -> None:
    """Run the command line; a known error is one message, never a traceback."""
    try:
        code = app(standalone_mode=False)
    except SlmError as error:
        _complain(error.message, error.hint)
        code = error.exit_code
    except KeyboardInterrupt:
        _complain("interrupted; nothing was written")
        code = 130
    except MemoryError:
        _complain("out of memory", "use a smaller model, batch or dtype")
        code = 1
    except Exception as error:
        code = _unexpected(error)
    sys.exit(code if isinstance(code, int) else 0)


@app.command()
def run(recipe: RecipePath, overrides: Overrides = None, overwrite: Overwrite = False) -> None:
    """Carry a recipe out: load, prune, evaluate, export, report."""
    _quiet_libraries()
    from slm_plugin import pipeline
    from slm_plugin.recipe import Recipe
    from slm_plugin.report.terminal import summary_table

    result = pipeline.run(Recipe.read(recipe, overrides or ()), overwrite=overwrite)
    _print(summary_table(result.report))
    typer.echo(f"Everything lies in {result.output}")
    for path in sorted(result.output.iterdir()):
        typer.echo(f"  {path.name}{'/' if path.is_dir() else ''}")


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    to: Annotated[
        Path | None, typer.Option(help="Folder for the plans; default: the output with .plans.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Stop after planning: write the plans and no weights."""
    _quiet_libraries()
    from slm_plugin import pipeline
    from slm_plugin.files import check_free, whole_folder
    from slm_plugin.recipe import Recipe
    from slm_plugin.report.explain import explain

    read = Recipe.read(recipe, overrides or ())
    folder = to or read.output.with_name(read.output.name + ".plans")
    check_free(folder, overwrite=overwrite)
    plans = pipeline.plan(read)
    with whole_folder(folder, overwrite=overwrite) as scratch:
        for name, made in plans.items():
            made.write(scratch / name)
    for name, made in plans.items():
        _print(explain(made))
        typer.echo(f"{folder / name}")


@app.command()
def apply(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="Plan file (JSON).")],
    model: Annotated[str, typer.Option(help="The model that the plan was made for.")],
    output: Annotated[Path, typer.Option(help="Folder for the pruned checkpoint.")],
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16; as in the plan's recipe.")
    ] = "auto",
    upto: Annotated[
        int | None, typer.Option(min=1, help="Carry out only the first so many operations.")
    ] = None,
    memory: Annotated[
        str, typer.Option(help="whole, or layerwise: write it without holding the model.")
    ] = "whole",
    overwrite: Overwrite = False,
) -> None:
    """Apply a plan to the model that it was made for and write the checkpoint."""
    _quiet_libraries()
    from pydantic import ValidationError

    from slm_plugin.errors import UserError
    from slm_plugin.export.checkpoint import CheckpointExporter
    from slm_plugin.files import check_free, whole_folder
    from slm_plugin.models.loading import ModelSource, load
    from slm_plugin.pruners.plan import PruningPlan
    from slm_plugin.session import Session
    from slm_plugin.surgery import apply as carry_out

    made = PruningPlan.read(plan_file)
    if upto is not None:
        made = made.upto(upto)
    check_free(output, overwrite=overwrite)
    try:
        source = ModelSource(id=model, dtype=dtype, memory=memory)  # type: ignore[arg-type]
    except ValidationError as error:
        wrong = error.errors()[0]
        given = {"dtype": dtype, "memory": memory}[str(wrong["loc"][0])]
        raise UserError(f"--{wrong['loc'][0]} {given}: {wrong['msg']}") from error
    network, tokenizer = load(source)
    session = Session(network, tokenizer, source=model)
    carry_out(made, session)
    with whole_folder(output, overwrite=overwrite) as scratch:
        record = CheckpointExporter(CheckpointExporter.Options()).export(session, scratch)
        made.write(scratch / "plan.json")
    typer.echo(f"{output / record.folder}")


@app.command()
def validate(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Check a recipe whole and load nothing."""
    from slm_plugin.recipe import Recipe

    read = Recipe.read(recipe, overrides or ())
    stages = ", ".join(stage.name for stage in read.stages) or "no stages"
    typer.echo(f"{recipe} is a valid recipe: {stages}; output {read.output}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from slm_plugin.recipe.schema import schema as recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2))


@app.command("list")
def list_components(as_json: AsJson = False) -> None:
    """List pruners, recoveries, evaluators and exporters with their options."""
    from slm_plugin.listing import component_table, components

    found = components()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _print(component_table(found))


@app.command()
def explain(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="Plan file (JSON).")],
    as_json: AsJson = False,
) -> None:
    """Say in words and a table what a plan will do."""
    from slm_plugin.pruners.plan import PruningPlan
    from slm_plugin.report.explain import explain as describe

    made = PruningPlan.read(plan_file)
    if as_json:
        typer.echo(made.to_json(), nl=False)
    else:
        _print(describe(made))


@app.command()
def inspect(
    model: ModelName,
    as_json: AsJson = False,
) -> None:
    """Show a model's dimensions, its parameters by part, and what can be pruned."""
    _quiet_libraries()
    from slm_plugin.listing import inspection, inspection_table
    from slm_plugin.models.loading import ModelSource, load
    from slm_plugin.models.view import DecoderView

    network, _ = load(ModelSource(id=model, device="cpu"))
    found = inspection(DecoderView.of(network))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _print(inspection_table(model, found))


@app.command()
def analyze(
    model: ModelName,
    output: Annotated[Path, typer.Option(help="Folder for the page and the figures.")],
    source: Annotated[
        str, typer.Option(help="Calibration: builtin, a text or token file, a datasets id.")
    ] = "builtin",
    samples: Annotated[
        int | None, typer.Option(min=4, help="Samples to draw; default: 32, of a token file all.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens per sample; default: 128, or the file's.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draw and of the noise control.")] = 1234,
    overwrite: Overwrite = False,
) -> None:
    """Compare a model's layers: CKA, cosines, block influence, norms, as a page and JSON."""
    _quiet_libraries()
    from slm_plugin.analyze import analyze as analyze_model

    analyze_model(
        model,
        output,
        source=source,
        samples=samples,
        length=length,
        seed=seed,
        overwrite=overwrite,
    )
    for name in ("analysis.html", "analysis.json"):
        typer.echo(f"{output / name}")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show the versions found and wanted, and what each extra needs."""
    from slm_plugin.listing import doctor_report, doctor_table

    found = doctor_report()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _print(doctor_table(found))
    if found["problems"]:
        raise typer.Exit(1)


def _print(renderable: Any) -> None:
    """Print a rich renderable on standard output; wide enough for tables when it is no terminal."""
    from rich.console import Console

    out = Console(highlight=False)
    if not out.is_terminal:
        out = Console(highlight=False, width=140)
    out.print(renderable)


def _complain(message: str, hint: str = "") -> None:
    for line in message.splitlines():
        console.print(f"error: {line}", style="red", markup=False, soft_wrap=True)
    if hint:
        console.print(f"hint: {hint}", markup=False, soft_wrap=True)


def _unexpected(error: Exception) -> int:
    """Show usage errors as they are; anything else is a fault of ours and says how to see it."""
    # Typer carries a click of its own, whose usage errors it does not export.
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, typer.Abort):
        _complain("interrupted; nothing was written")
        return 130
    show, code = getattr(error, "show", None), getattr(error, "exit_code", None)
    if callable(show) and isinstance(code, int):
        show()
        return code
    if os.environ.get("SLM_PLUGIN_TRACEBACK"):
        raise error
    reason = (str(error).strip().splitlines() or [""])[0]
    _complain(
        f"internal error: {type(error).__name__}: {reason}",
        "SLM_PLUGIN_TRACEBACK=1 shows where; please report it",
    )
    return 1


def _quiet_libraries() -> None:
    """Keep the progress bars and notices of the libraries underneath off the terminal."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    main()
