"""Speed of a model that lost layers, and of one that lost as many parameters in width.

All models lie in one process: the one as loaded, for every number of layers the same without them
(`deepest`; which layers go does not matter to the speed), and one pruned by `torch_pruning` to as
many parameters as can be met. A round times each of them once, in an order that changes from round
to round, and a speed is told as the ratio to the model as loaded in the same round: median and
quartiles over the rounds, after one that does not count. What is timed is what `latency` times.

    python benchmarks/inference_speed.py --layers 3 6 9 --prompt 128
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
from pathlib import Path
from statistics import median, quantiles
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from slm_plugin.errors import SlmError
from slm_plugin.evaluation.latency import time_run
from slm_plugin.evaluation.prefill import check_room, random_prompt
from slm_plugin.models.loading import ModelSource, load
from slm_plugin.plans import PruningPlan
from slm_plugin.registry import pruners
from slm_plugin.session import Session, apply
from slm_plugin.target import Target

AS_LOADED = "as loaded"


def pruned(loaded: Session, strategy: str, target: Target, **options: Any) -> Session:
    """A copy of the model, pruned."""
    session = Session(copy.deepcopy(loaded.model), loaded.tokenizer, seed=loaded.seed)
    kind = pruners.get(strategy)
    plan: PruningPlan = kind(kind.Options(**options), target).plan(session)
    apply(plan, session)
    return session


def candidates(loaded: Session, removed: list[int]) -> dict[str, Session]:
    """The models to time, by what they are called."""
    found = {AS_LOADED: loaded}
    for count in removed:
        shallow = pruned(loaded, "deepest", Target(layers_removed=count))
        size = shallow.view.dimensions().parameters
        found[f"layers removed: {count}"] = shallow
        found[f"width, to the size of {count} removed"] = pruned(
            loaded, "torch_pruning", Target(parameters=size), importance="magnitude"
        )
    return found


def timed(
    sessions: dict[str, Session], arguments: argparse.Namespace
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of prefill and of decoding in every round that counts."""
    prompt = random_prompt(sessions[AS_LOADED], arguments.batch, arguments.prompt)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sessions}
    order, shuffler = list(sessions), random.Random(1234)
    for number in range(arguments.rounds + 1):
        shuffler.shuffle(order)
        for name in order:
            seconds = time_run(sessions[name].model, prompt, arguments.new)
            if number:
                found[name].append(seconds)
    return found


def rows(
    sessions: dict[str, Session], seconds: dict[str, list[tuple[float, float]]], new: int
) -> list[list[str]]:
    """The table: sizes, and how many times as fast as the model as loaded."""
    table = [["", "layers", "parameters", "prefill", "decode", "ms a step"]]
    base = seconds[AS_LOADED]
    for name, session in sessions.items():
        size, own = session.view.dimensions(), seconds[name]
        ratios = [[b[part] / o[part] for b, o in zip(base, own, strict=True)] for part in (0, 1)]
        step = median(1000 * decoding / new for _, decoding in own)
        table.append(
            [
                name,
                str(size.layers),
                f"{size.parameters / 1e6:.1f} M",
                *(_spread(part) for part in ratios),
                f"{step:.1f}",
            ]
        )
    return table


def _spread(ratios: list[float]) -> str:
    low, middle, high = quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def main() -> None:
    """Prune, time and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 6, 9], help="how many go")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=32, help="steps after the prompt")
    parser.add_argument("--batch", type=int, default=1, help="prompts side by side")
    parser.add_argument("--rounds", type=int, default=15, help="how often all are timed")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("quartiles need two rounds or more")
    try:
        model, tokenizer = load(ModelSource(id=arguments.model, dtype=arguments.dtype))
        check_room(model, arguments.prompt + arguments.new, "the benchmark")
        sessions = candidates(Session(model, tokenizer), arguments.layers)
    except SlmError as error:
        raise SystemExit(str(error)) from error
    head, *body = rows(sessions, timed(sessions, arguments), arguments.new)
    for line in (head, ["---"] * len(head), *body):
        print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    main()
