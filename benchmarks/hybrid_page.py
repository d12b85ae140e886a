"""Depth, width, hybrids made by hand and the planner, at equal sizes and under time targets.

At every size: the search for layers alone, width alone, layers for a share of the size with width
behind them, and the planner; at one size the same shape in the other order too; all with the
restoration that follows. Under every time target the planner alone. Each row is a run of a recipe;
its checkpoint and its figures are written below --output, and rows that are there are not run
again. At the end all checkpoints are timed in turns: each as the ratio to the dense model in the
same round, median over the rounds. Rows of a time target in ONNX Runtime are timed there, as
float32 graphs beside that of the dense model.

    SLM_PLUGIN_EVAL_DATA=data python benchmarks/hybrid_page.py --data data --output runs/hybrid-page
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from slm_plugin import PruningPlan, Recipe, Session, SlmError, run
from slm_plugin.evaluation.latency import time_run
from slm_plugin.evaluation.prefill import random_prompt
from slm_plugin.export.onnx import OnnxOptions, trace
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.models.loading import ModelSource, load
from slm_plugin.outputs.scratch import temporary_folder
from slm_plugin.pruners.hybrid.onnx_timing import Graph
from slm_plugin.registry import evaluators

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TASK_FILES = Path(__file__).resolve().parents[1] / "integration" / "lm_eval" / "tasks"
SIZES = (0.1, 0.2, 0.3)
# At which the hybrids made by hand are measured in the other order too.
REVERSED = 0.2
TIMES = ("decode 0.8", "prefill 0.7")
DENSE = "dense"
TASKS = ("local_piqa", "local_arc_easy", "local_winogrande")
PROMPT, NEW = 128, 32


def methods(arguments: argparse.Namespace, dense: Dimensions) -> dict[str, list[dict[str, Any]]]:
    """The stages of every row, by its name."""
    score = {"score": arguments.score}
    found: dict[str, list[dict[str, Any]]] = {}
    for size in arguments.sizes:
        kept = round((1 - size) * dense.parameters)
        found[f"{size:.0%} depth"] = [_depth(_layers(size, dense))]
        found[f"{size:.0%} width"] = [_width(kept, arguments)]
        for split in arguments.splits:
            gone = _layers(split * size, dense)
            stages = [_depth(gone), _width(kept, arguments)]
            found[f"{size:.0%} {gone} layers, then width"] = stages
            if size != REVERSED:
                continue
            # As many channels as the other order leaves in each layer.
            channels = (dense.without_layers(gone).parameters - kept) // dense.channel_parameters
            each = round(channels / (dense.layers - gone) / 8) * 8
            whole = dense.without_units(channels=each).parameters
            stages = [_width(whole, arguments), _depth(gone)]
            found[f"{size:.0%} width, then {gone} layers"] = stages
        found[f"{size:.0%} hybrid"] = [{"prune": "hybrid", **score, "target": {"ratio": size}}]
    for target in arguments.times:
        phase, share, *backend = target.split()
        workload = {"prompt_tokens": PROMPT, "new_tokens": NEW}
        asked = {"prune": "hybrid", **score, "target": {"latency": {phase: float(share)}}}
        named = {"backend": backend[0]} if backend else {}
        found[f"{target} hybrid"] = [{**asked, **workload, **named}]
    return found


def _layers(size: float, dense: Dimensions) -> int:
    """The layers whose parameters come nearest to a share of all."""
    return round(size * dense.parameters / dense.layer_parameters)


def _depth(layers: int) -> dict[str, Any]:
    return {"prune": "repaired", "target": {"layers_removed": layers}}


def _width(kept: int, arguments: argparse.Namespace) -> dict[str, Any]:
    return {"prune": "width", "score": arguments.score, "target": {"parameters": kept}}


def pruned(arguments: argparse.Namespace, name: str, stages: Sequence[dict[str, Any]]) -> Session:
    """The model of a row, written to its folder."""
    recipe = {
        "version": 1,
        "model": {"id": arguments.model, "dtype": arguments.dtype},
        "calibration": {
            "source": str(arguments.data / "c4_en_train_1k.jsonl"),
            "samples": arguments.samples,
            "length": arguments.length,
        },
        "seed": 1234,
        "stages": [*stages],
        "export": [{"checkpoint": {}}],
        "output": str(folder(arguments, name)),
    }
    return run(Recipe.from_dict(recipe, name=name), overwrite=True).session


def folder(arguments: argparse.Namespace, name: str) -> Path:
    """The folder of a row."""
    output: Path = arguments.output
    return output / name.replace(" ", "-").replace(",", "").replace("%", "")


def quality(arguments: argparse.Namespace, session: Session) -> dict[str, float]:
    """Perplexities, and the mean accuracy of the zero-shot tasks."""
    data, found = arguments.data, {}
    for column, source, length, limit in (
        ("WikiText-2, 2048", "wikitext2_raw_test.txt", 2048, 4),
        ("WikiText-2, 128", "wikitext2_raw_test.txt", 128, 32),
        ("C4, 512", "c4_en_dev_300.jsonl", 512, 32),
    ):
        options = {"source": str(data / source), "length": length, "limit": limit}
        found[column] = _measured(session, "perplexity", **options)[0]
    found["zero-shot"] = fmean(
        _measured(
            session,
            "lm_eval",
            tasks=list(TASKS),
            include_path=str(TASK_FILES),
            limit=arguments.items,
            batch_size=32,
        )
    )
    return found


def _measured(session: Session, name: str, **options: Any) -> list[float]:
    """Values of an evaluator; of lm-eval the accuracy of each task."""
    kind = evaluators.get(name)
    found = kind(kind.Options(**options)).measure(session)
    kept = [one for one in found if name == "perplexity" or one.name.endswith(" acc")]
    if not kept:
        raise SystemExit(f"{name} gave none of the expected figures: {[one.name for one in found]}")
    return [one.value for one in kept]


def measured(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The figures of every row, each written as soon as it is known."""
    model, tokenizer = load(ModelSource(id=arguments.model, dtype=arguments.dtype))
    dense = Session(model, tokenizer)
    parameters = dense.view.dimensions().parameters
    found = {}
    for name, stages in {DENSE: [], **methods(arguments, dense.view.dimensions())}.items():
        file = arguments.output / f"{folder(arguments, name).name}.json"
        if not file.exists():
            started = time.perf_counter()
            session = pruned(arguments, name, stages) if stages else dense
            took = time.perf_counter() - started
            size = session.view.dimensions()
            figures = {
                "layers": size.layers,
                "channels": size.width_range,
                "removed": 1 - size.parameters / parameters,
                "minutes": took / 60,
                **quality(arguments, session),
            }
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(figures), encoding="utf-8")
            print(name, figures, flush=True)
        found[name] = json.loads(file.read_text(encoding="utf-8"))
    return found


def timed(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Times of prefill and of decoding as shares of the dense model's, medians over the rounds."""
    by_graph = [name for name in names if "onnxruntime" in name]
    models = {name: _loaded(arguments, name) for name in names if name not in by_graph}
    prompt = random_prompt(Session(models[DENSE], None), 1, PROMPT)
    runs = {name: partial(time_run, model, prompt, NEW) for name, model in models.items()}
    found = _in_turns(runs, arguments.rounds)
    # Before graphs are made, which need memory.
    del models, runs
    if by_graph:
        with temporary_folder() as scratch:
            graphs = {}
            for number, name in enumerate([DENSE, *by_graph]):
                graph = Graph(scratch / str(number))
                model = _loaded(arguments, name, dtype="float32", device="cpu")
                trace(model, graph.folder, OnnxOptions())
                graphs[name] = partial(graph.time_run, prompt.cpu(), NEW)
            found = {**_in_turns(graphs, arguments.rounds), **found}
    return found


def _loaded(arguments: argparse.Namespace, name: str, **changes: Any) -> PreTrainedModel:
    """The model of a row, in the number format of all of them unless another is given."""
    place = arguments.model if name == DENSE else str(folder(arguments, name) / "checkpoint")
    return load(ModelSource(**{"id": place, "dtype": arguments.dtype, **changes}))[0]


def _in_turns(
    runs: Mapping[str, Callable[[], tuple[float, float]]], rounds: int
) -> dict[str, tuple[float, float]]:
    """Shares of the dense model's times; a first round does not count."""
    found: list[dict[str, tuple[float, float]]] = []
    order, shuffler = list(runs), random.Random(1234)
    for _ in range(rounds + 1):
        shuffler.shuffle(order)
        found.append({name: runs[name]() for name in order})
    return {name: (_share(found[1:], name, 0), _share(found[1:], name, 1)) for name in runs}


def _share(rounds: Sequence[Mapping[str, tuple[float, float]]], name: str, phase: int) -> float:
    return median(one[name][phase] / one[DENSE][phase] for one in rounds)


def rows(
    found: Mapping[str, Mapping[str, Any]], times: Mapping[str, tuple[float, float]]
) -> Iterator[list[str]]:
    """The table, row by row."""
    columns = [name for name in found[DENSE] if name not in ("layers", "channels", "removed")]
    yield ["", "layers", "channels", "removed", *columns[1:], "prefill", "decode", columns[0]]
    for name, figures in found.items():
        qualities = [f"{figures[column]:.1f}" for column in columns[1:-1]]
        yield [
            name,
            str(figures["layers"]),
            str(figures["channels"]),
            f"{figures['removed']:.1%}",
            *qualities,
            f"{figures[columns[-1]]:.3f}",
            *(f"{share:.2f}" for share in times[name]),
            f"{figures['minutes']:.1f}",
        ]


def planned(
    arguments: argparse.Namespace, times: Mapping[str, tuple[float, float]]
) -> Iterator[str]:
    """What the planner says of its own choices, beside the times that were measured."""
    for name in times:
        for file in sorted(folder(arguments, name).glob("plan*.json")):
            plan = PruningPlan.read(file)
            if plan.frontier:
                (chosen,) = [shape for shape in plan.frontier if shape.chosen]
                told = [f"adherence {plan.adherence}", f"cost predicted {chosen.cost:.3f}"]
                if latency := plan.target.latency:
                    share = times[name][latency.phase == "decode"]
                    told.append(f"asked {latency.share}, measured {share:.3f}")
                yield f"{name}: {', '.join(told)}; {'; '.join(plan.notes[2:])}"


def main() -> None:
    """Prune, measure, time and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--output", type=Path, default=Path("runs/hybrid-page"))
    parser.add_argument("--samples", type=int, default=16, help="calibration samples")
    parser.add_argument("--length", type=int, default=256, help="tokens of each")
    parser.add_argument("--score", default="taylor_second", help="of channels; see `width`")
    parser.add_argument("--items", type=int, default=40, help="items of each zero-shot task")
    parser.add_argument("--sizes", type=float, nargs="*", default=SIZES, help="shares to remove")
    parser.add_argument(
        "--splits",
        type=float,
        nargs="*",
        default=(0.5,),
        help="shares of the size that layers take in the hybrids made by hand",
    )
    parser.add_argument("--times", nargs="*", default=TIMES, help="as 'decode 0.8 onnxruntime'")
    parser.add_argument("--rounds", type=int, default=15, help="how often all are timed")
    arguments = parser.parse_args()
    try:
        found = measured(arguments)
        times = timed(arguments, list(found))
    except SlmError as error:
        raise SystemExit(str(error)) from error
    head, *body = rows(found, times)
    for line in (head, ["---"] * len(head), *body):
        print("| " + " | ".join(line) + " |")
    print(*planned(arguments, times), sep="\n")


if __name__ == "__main__":
    main()
