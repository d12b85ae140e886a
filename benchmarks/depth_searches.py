"""Searches that choose layers by the loss: what `repaired` costs beside `sleb`, and what it finds.

Each search runs in a process of its own that loads the model, and says how often a decoder layer
ran (in layer forwards of the whole calibration set, free of clock noise), what it took in seconds,
and the loss of the model that its plan and `recover: refit` leave, on the calibration set and on a
text that no search saw. With `repair: none`, `judge: loss`, `screen: all` the search is that of
`sleb`, and the plans must be equal.

    python benchmarks/depth_searches.py --layers 6 --samples 16 --length 256
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
ENDS = {"protect_first": 1, "protect_last": 1}
TRIES = 24
SEARCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "sleb": ("sleb", {}),
    "repaired, as sleb": (
        "repaired",
        {"repair": "none", "judge": "loss", "screen": "all", **ENDS},
    ),
    "repaired": ("repaired", {}),
    "repaired, loss": ("repaired", {"judge": "loss"}),
    "repaired, screen 10": ("repaired", {"screen": 10}),
    "repaired, fold_linear": ("repaired", {"repair": "fold_linear"}),
    "repaired, rescale": ("repaired", {"repair": "rescale"}),
    "repaired, state": ("repaired", {"judge": "state"}),
    "repaired, polished": ("repaired", {"polish": TRIES}),
    "state, polished": (
        "repaired",
        {"polish": TRIES, "start": {"prune": "repaired", "judge": "state"}},
    ),
    "block_influence": ("block_influence", {}),
    "block_influence, polished": (
        "repaired",
        {"polish": TRIES, "start": {"prune": "block_influence"}},
    ),
}


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Search, and say what it took and found."""
    import torch

    from slm_plugin.calibration.samples import CalibrationSource, draw
    from slm_plugin.models.loading import ModelSource, load
    from slm_plugin.models.view import DecoderView
    from slm_plugin.registry import pruners, recoveries
    from slm_plugin.session import Session
    from slm_plugin.target import Target

    model, tokenizer = load(ModelSource(id=arguments.model, dtype="float32"))
    sizes = {"samples": arguments.samples, "length": arguments.length}
    tokens = draw(CalibrationSource(source=arguments.source, **sizes), model, tokenizer, 1234)
    unseen = CalibrationSource(source=arguments.held_out or arguments.source, **sizes)
    other = draw(unseen, model, tokenizer, 4321).to(model.device)
    layer_class = type(DecoderView.of(model).layers[0])
    forward, samples_run = layer_class.forward, 0

    def counted(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal samples_run
        samples_run += hidden_states.shape[0]
        return forward(self, hidden_states, *args, **kwargs)

    def loss() -> float:
        with torch.inference_mode():
            losses = [float(model(one[None], labels=one[None]).loss) for one in other]
        return sum(losses) / len(losses)

    strategy, options = SEARCHES[name]
    kind = pruners.get(strategy)
    session = Session(model, tokenizer, tokens)
    session.keep_reference()
    before = loss()
    layer_class.forward = counted
    started = time.perf_counter()
    plan = session.plan(kind(kind.Options(**options), Target(layers_removed=arguments.layers)))
    seconds = time.perf_counter() - started
    layer_class.forward = forward
    session.apply(plan)
    refit = recoveries.get("refit")
    session.recover(refit(refit.Options()))
    return {
        "layer forwards": samples_run / len(tokens),
        "seconds": seconds,
        "operations": [operation.model_dump() for operation in plan.operations],
        "loss": loss() - before,
    }


def main() -> None:
    """Run the searches one after another, and print their figures and ratios to the first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--source", default="builtin", help="calibration source, as in a recipe")
    parser.add_argument("--held-out", default="", help="text of the final loss; as --source")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--searches", nargs="+", choices=SEARCHES, default=list(SEARCHES))
    parser.add_argument("--search", choices=SEARCHES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.search:
        print(json.dumps(measure(arguments.search, arguments)))
        return
    found: dict[str, dict[str, Any]] = {}
    print(f"{'search':26} {'forwards':>9} {'share':>6} {'seconds':>8} {'loss':>7}  dropped")
    for name in arguments.searches:
        command = [sys.executable, __file__, *sys.argv[1:], "--search", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[name] = one = json.loads(done.stdout.strip().splitlines()[-1])
        first = found[arguments.searches[0]]
        gone = " ".join(str(index) for op in one["operations"] for index in op.get("indices", "?"))
        print(
            f"{name:26} {one['layer forwards']:9.0f} "
            f"{one['layer forwards'] / first['layer forwards']:6.2f} {one['seconds']:8.1f} "
            f"{one['loss']:+7.3f}  {gone}",
            flush=True,
        )
    same = [found[name]["operations"] for name in ("sleb", "repaired, as sleb") if name in found]
    if len(same) == 2 and same[0] != same[1]:
        sys.exit("the searches of sleb and of repaired without repair and screening differ")


if __name__ == "__main__":
    main()
