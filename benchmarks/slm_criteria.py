"""Which criterion and which search keep a model best: a table at equal numbers of layers removed.

Every cell merges the same number of layers of the same model, calibrated on the same tokens, with
one criterion and one search of ``slm``, and is measured by the same protocols. Cells are kept as
JSON in the output folder as they are done, and trials in its journals, so that an interrupted run
goes on and a longer list of cells only adds to a shorter one.

    python benchmarks/slm_criteria.py --output runs/criteria \
        --calibration c4_en_train_1k.jsonl --perplexity wikitext2_raw_test.txt \
        --tasks local_piqa local_arc_easy local_winogrande --include-path integration/lm_eval/tasks
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slm_plugin import Session, Target
from slm_plugin.calibration.samples import CalibrationSource, digest, draw
from slm_plugin.evaluation.base import Evaluator
from slm_plugin.evaluation.lm_eval import LmEval, LmEvalOptions
from slm_plugin.evaluation.perplexity import Perplexity, PerplexityOptions
from slm_plugin.files import write_text
from slm_plugin.models.loading import ModelSource, load
from slm_plugin.pruners.depth.slm import SlidingLayerMerging, SlmOptions
from slm_plugin.session import apply

SEED = 1234


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--criteria", nargs="+", default=["flat_cosine", "token_cosine", "loss"])
    parser.add_argument("--searches", nargs="+", default=["sliding", "greedy", "budgeted"])
    parser.add_argument("--rules", nargs="+", default=["telescoped"])
    parser.add_argument("--removed", nargs="+", type=int, default=[3, 6, 9])
    parser.add_argument("--perplexity", default="builtin", help="text file or builtin")
    parser.add_argument("--pieces", nargs=2, type=int, default=[4, 64], help="of 2048, of 128")
    parser.add_argument("--tasks", nargs="*", default=[])
    parser.add_argument("--include-path")
    parser.add_argument("--limit", type=int, default=50, help="items of each task")
    parser.add_argument("--batch-size", type=int, default=8, help="of the tasks")
    return parser.parse_args()


def evaluators(chosen: argparse.Namespace) -> Iterator[Evaluator]:
    """What every cell is measured by."""
    for length, pieces in zip((2048, 128), chosen.pieces, strict=True):
        yield Perplexity(PerplexityOptions(source=chosen.perplexity, length=length, limit=pieces))
    if chosen.tasks:
        yield LmEval(
            LmEvalOptions(
                tasks=tuple(chosen.tasks),
                include_path=chosen.include_path,
                limit=chosen.limit,
                batch_size=chosen.batch_size,
            )
        )


def cell(chosen: argparse.Namespace, dense: Session, options: SlmOptions, removed: int) -> Any:
    """Plan, merge a copy and measure it."""
    session = Session(
        copy.deepcopy(dense.model),
        dense.tokenizer,
        dense.calibration,
        source=dense.source,
        journals=chosen.output / "journals",
    )
    started = time.perf_counter()
    operations = []
    if removed:
        plan = SlidingLayerMerging(options, Target(layers_removed=removed)).plan(session)
        operations = [f"{op.first}-{op.last} {op.rule}" for op in plan.operations]
        apply(plan, session)
    searched = time.perf_counter() - started
    session.release()
    measured = [m for evaluator in evaluators(chosen) for m in session.measure(evaluator)]
    return {
        "criterion": options.criterion if removed else "",
        "search": options.search if removed else "dense",
        "rule": options.merge_rule if removed else "",
        "removed": removed,
        "runs": operations,
        "seconds": round(searched, 1),
        "measurements": [m.model_dump() for m in measured],
    }


def main() -> None:
    """Fill the cells that are missing and print the table."""
    chosen = arguments()
    model, tokenizer = load(ModelSource(id=chosen.model, dtype="float32"))
    source = CalibrationSource(
        source=chosen.calibration, samples=chosen.samples, length=chosen.length
    )
    tokens = draw(source, model, tokenizer, SEED)
    dense = Session(model, tokenizer, tokens, source=chosen.model)
    grid = itertools.product(chosen.criteria, chosen.searches, chosen.rules, chosen.removed)
    cells = [("flat_cosine", "sliding", "telescoped", 0), *grid]
    rows = []
    for criterion, search, rule, removed in cells:
        file = chosen.output / f"{criterion}-{search}-{rule}-{removed}.json"
        if not file.is_file():
            options = SlmOptions(criterion=criterion, search=search, merge_rule=rule)
            made = cell(chosen, dense, options, removed)
            write_text(file, json.dumps(made, indent=1))
            print(line(made), flush=True)
        rows.append(json.loads(file.read_text(encoding="utf-8")))
    print(
        f"\n{chosen.model}, calibrated on {chosen.samples} x {chosen.length} tokens of "
        f"{Path(chosen.calibration).name} (sha256 {digest(tokens)[:12]})"
    )
    names = [m["name"] for m in rows[0]["measurements"]]
    print("| removed | search | criterion | rule | " + " | ".join(names) + " | runs |")
    print("|---" * (5 + len(names)) + "|")
    for row in sorted(rows, key=lambda row: row["removed"]):
        print(line(row))


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    values = " | ".join(f"{m['value']:.4g}" for m in row["measurements"])
    runs = ", ".join(run.split()[0] for run in row["runs"])
    head = f"| {row['removed']} | {row['search']} | {row['criterion']} | {row['rule']} "
    return f"{head}| {values} | {runs} |"


if __name__ == "__main__":
    main()
