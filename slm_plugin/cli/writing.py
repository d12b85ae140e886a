"""Commands that compute and write: run, plan, apply, analyze, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slm_plugin.cli.app import (
    ModelName,
    Overrides,
    Overwrite,
    RecipePath,
    app,
    print_line,
    print_out,
    quiet_libraries,
)
from slm_plugin.cli.outcome import await_folder


@app.command()
def run(recipe: RecipePath, overrides: Overrides = None, overwrite: Overwrite = False) -> None:
    """Run a recipe: load, prune, evaluate, export, report."""
    from slm_plugin import pipeline
    from slm_plugin.recipe import Recipe
    from slm_plugin.report.before_after import summary_table
    from slm_plugin.report.table import terminal

    read = Recipe.read(recipe, overrides or ())
    quiet_libraries()
    assert read.output is not None, "a file names its output"
    await_folder(read.output)
    result = pipeline.run(read, overwrite=overwrite)
    print_out(terminal(summary_table(result.report), wrap=False))
    print_line(f"The output is in {read.output}")
    for path in sorted(p for p in read.output.iterdir() if not p.name.startswith(".")):
        print_line(f"  {path.name}{'/' if path.is_dir() else ''}")


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
    from slm_plugin import pipeline
    from slm_plugin.outputs.place import located
    from slm_plugin.recipe import Recipe
    from slm_plugin.report.explain import explain

    folder = None if to is None else located(str(to))
    read = Recipe.read(recipe, overrides or ())
    quiet_libraries()
    await_folder(folder or pipeline.plans_folder(read))
    plans = pipeline.write_plans(read, folder, overwrite=overwrite)
    for file, made in plans.items():
        print_out(explain(made))
        print_line(f"{file}")


@app.command()
def apply(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="Plan file (JSON).")],
    model: Annotated[str, typer.Option(help="The model that the plan was made for.")],
    output: Annotated[Path, typer.Option(help="Folder for the pruned checkpoint.")],
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16; as in the plan's recipe.")
    ] = "auto",
    upto: Annotated[
        int | None, typer.Option(min=1, help="Apply only the first N operations.")
    ] = None,
    memory: Annotated[
        str, typer.Option(help="whole, or layerwise: write it without holding the model.")
    ] = "whole",
    overwrite: Overwrite = False,
) -> None:
    """Apply a plan to the model that it was made for and write the checkpoint."""
    quiet_libraries()
    from pydantic import ValidationError

    from slm_plugin.errors import UserError
    from slm_plugin.models.loading import ModelSource
    from slm_plugin.outputs.place import Input, local, located
    from slm_plugin.pipeline import apply_plan
    from slm_plugin.plans import PruningPlan

    output = located(str(output))
    await_folder(output)
    made = PruningPlan.read(plan_file)
    if upto is not None:
        made = made.upto(upto)
    try:
        source = ModelSource(id=model, dtype=dtype, memory=memory)  # type: ignore[arg-type]
    except ValidationError as error:
        wrong = error.errors()[0]
        given = {"dtype": dtype, "memory": memory}[str(wrong["loc"][0])]
        raise UserError(f"--{wrong['loc'][0]} {given}: {wrong['msg']}") from error
    inputs = (Input("the plan", plan_file), *local("the model", model))
    written = apply_plan(made, source, output, overwrite=overwrite, inputs=inputs)
    print_line(f"{written}")


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
    quiet_libraries()
    from slm_plugin.analysis.run import analyze as analyze_model
    from slm_plugin.outputs.place import located

    output = located(str(output))
    await_folder(output)
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
        print_line(f"{output / name}")


@app.command()
def compare(
    comparison: Annotated[Path, typer.Argument(metavar="FILE", help="Comparison file (YAML).")],
    overrides: Overrides = None,
    overwrite: Overwrite = False,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Ignore cached results of earlier runs and searches."),
    ] = False,
    known: Annotated[
        bool, typer.Option("--known", help="Write the cached rows; measure nothing.")
    ] = False,
) -> None:
    """Prune one model by many methods and compare the results: a table, a page and JSON."""
    from slm_plugin.comparison.configuration import Comparison
    from slm_plugin.comparison.run import compare as compare_methods
    from slm_plugin.comparison.table import comparison_table
    from slm_plugin.report.table import terminal

    read = Comparison.read(comparison, overrides or ())
    quiet_libraries()
    assert read.output is not None, "a file names its output"
    await_folder(read.output)
    report = compare_methods(read, overwrite=overwrite, fresh=fresh, known=known)
    print_out(terminal(comparison_table(report, brief=True)))
    for name in ("comparison.html", "comparison.md", "comparison.json"):
        print_line(f"{read.output / name}")
