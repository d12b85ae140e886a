"""Commands that only read: validate, schema, list, explain, inspect, doctor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from slm_plugin.cli.app import (
    AsJson,
    ModelName,
    Overrides,
    RecipePath,
    StackName,
    app,
    print_json,
    print_line,
    print_out,
    quiet_libraries,
)


@app.command()
def validate(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Check a recipe or a comparison completely, without loading anything."""
    from slm_plugin.comparison.configuration import Comparison, read_either

    read = read_either(recipe, overrides or ())
    if isinstance(read, Comparison):
        methods = ", ".join(method.label for method in read.methods)
        print_line(f"{recipe} is a valid comparison: {methods}; output {read.output}")
        return
    stages = ", ".join(stage.name for stage in read.stages) or "no stages"
    print_line(f"{recipe} is a valid recipe: {stages}; output {read.output}")


@app.command()
def schema(
    comparison: Annotated[
        bool, typer.Option("--comparison", help="The schema of comparisons instead.")
    ] = False,
) -> None:
    """Print the JSON Schema of recipes, for editors."""
    from slm_plugin.comparison.schema import comparison_schema
    from slm_plugin.recipe.schema import schema as recipe_schema

    made = comparison_schema() if comparison else recipe_schema()
    print_json(json.dumps(made, indent=2))


@app.command("list")
def list_components(
    model: Annotated[
        str | None,
        typer.Option("--model", help="Say which of them work on this model, and why not."),
    ] = None,
    stack: StackName = None,
    families: Annotated[
        bool, typer.Option("--families", help="Say which work on which family, as Markdown.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List pruners, recoveries, evaluators and exporters with their options."""
    from slm_plugin.inspection import component_table, components, suitability_table

    if families:
        from slm_plugin.report.families import families_markdown

        for line in families_markdown().splitlines():
            print_line(line)
        return
    if model is None:
        found = components()
        table = component_table(found)
    else:
        quiet_libraries()
        from slm_plugin.models.loading import ModelSource, facts_of

        source = ModelSource(id=model, device="cpu", stack=None if stack is None else stack.value)
        found = components(*facts_of(source))
        table = suitability_table(model, found)
    if as_json:
        print_json(json.dumps(found, indent=2))
    else:
        print_out(table)


@app.command()
def explain(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="Plan file (JSON).")],
    as_json: AsJson = False,
) -> None:
    """Explain a plan as text and tables."""
    from slm_plugin.plans import PruningPlan
    from slm_plugin.report.explain import explain as describe

    made = PruningPlan.read(plan_file)
    if as_json:
        print_json(made.to_json())
    else:
        print_out(describe(made))


@app.command()
def inspect(
    model: ModelName,
    stack: StackName = None,
    as_json: AsJson = False,
) -> None:
    """Show a model's dimensions, its parameters by part, and what can be pruned."""
    quiet_libraries()
    from slm_plugin.inspection import inspection, inspection_table
    from slm_plugin.models.gguf import is_gguf
    from slm_plugin.models.loading import ModelSource, facts_of, load
    from slm_plugin.models.view import DecoderView

    source = ModelSource(id=model, device="cpu", stack=None if stack is None else stack.value)
    # Only shapes are needed, so layers are not loaded where they can be left out.
    if not is_gguf(model) and facts_of(source)[0].streams:
        source = source.model_copy(update={"memory": "layerwise"})
    network, _ = load(source)
    found = inspection(DecoderView.of(network, source.stack))
    if as_json:
        print_json(json.dumps(found, indent=2))
    else:
        print_out(inspection_table(model, found))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show installed and required versions, and the packages of every extra."""
    from slm_plugin.inspection import doctor_report, doctor_table

    found = doctor_report()
    if as_json:
        print_json(json.dumps(found, indent=2))
    else:
        print_out(doctor_table(found))
    if found["problems"]:
        raise typer.Exit(1)
