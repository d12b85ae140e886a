"""Search of Sliding Layer Merging: this package against a straight transcription of the script.

Four sides, each in a process of its own that loads the model, searches at one threshold and says
what that took: seconds of the search, peak resident memory above what was held after ``import
torch``, and how often a decoder layer ran (in layer forwards of the whole calibration set, free of
clock noise). ``slm`` ends with the windows of the released loop and stops trials that are decided;
``layerwise`` is the same on a model that is read from disk layer by layer; ``released`` is
``compatibility: released``, which makes every trial of the loop on all samples; the last is the
loop itself, with a copy of the model for every trial. Imports other than torch take part of the
memory, whatever the model: that share has a line of its own.

    python benchmarks/slm_search.py --threshold 0.9 --samples 10 --length 128
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
OURS = ("slm", "layerwise", "released")
LOOP = "transcription"


def resident_bytes() -> int:
    """Resident memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def peak_bytes() -> int:
    """Greatest resident memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(side: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Search on one side and say what it took."""
    import torch

    baseline = resident_bytes()
    from transformers.models.llama import modeling_llama  # noqa: F401 - counted as an import

    from slm_plugin.calibration.samples import CalibrationSource, draw
    from slm_plugin.models.loading import ModelSource, load
    from slm_plugin.models.view import DecoderView

    imports = resident_bytes() - baseline
    memory = "layerwise" if side == "layerwise" else "whole"
    model, tokenizer = load(
        ModelSource(id=arguments.model, dtype="float32", device="cpu", memory=memory)
    )
    source = CalibrationSource(
        source=arguments.source, samples=arguments.samples, length=arguments.length
    )
    tokens = draw(source, model, tokenizer, 1234)
    layer_class = type(DecoderView.of(model).layers[0])
    samples_run = 0
    forward = layer_class.forward

    def counted(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal samples_run
        samples_run += hidden_states.shape[0]
        return forward(self, hidden_states, *args, **kwargs)

    layer_class.forward = counted
    started = time.perf_counter()
    if side == LOOP:
        found = transcribed(model, tokens, arguments.threshold)
    else:
        found = search(side, model, tokenizer, tokens, arguments)
    seconds = time.perf_counter() - started
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        **found,
        "seconds": seconds,
        "peak_bytes": peak_bytes() - baseline,
        "import_bytes": imports,
        "model_bytes": weights,
        "layer_forwards": samples_run / len(tokens),
    }


def search(
    side: str, model: Any, tokenizer: Any, tokens: Any, arguments: argparse.Namespace
) -> dict[str, Any]:
    """The package's search."""
    from slm_plugin.pruners.depth.slm import SlidingLayerMerging, SlmOptions
    from slm_plugin.session import Session
    from slm_plugin.target import Target

    options = SlmOptions(compatibility="released") if side == "released" else SlmOptions()
    session = Session(model, tokenizer, tokens, batch_tokens=arguments.batch_tokens)
    plan = SlidingLayerMerging(options, Target(threshold=arguments.threshold)).plan(session)
    return {
        "windows": [[op.first, op.last] for op in plan.operations],
        # A trial that was stopped has no similarity over all samples to compare.
        "similarities": {
            f"{t.first}-{t.last}": t.similarity for t in plan.trials if t.samples is None
        },
        "trials": len(plan.trials),
        "stopped": sum(t.samples is not None for t in plan.trials),
    }


def transcribed(model: Any, tokens: Any, threshold: float) -> dict[str, Any]:
    """The released loop: a deep copy and a full forward, with logits, for every trial."""
    from tests.oracles.slm_released import released_loop

    found = released_loop(model, tokens, threshold)
    return {
        "windows": [list(window) for window in found.windows],
        "similarities": {f"{low}-{high}": value for low, high, value in found.trials},
        "trials": len(found.trials),
        "stopped": 0,
    }


def main() -> None:
    """Run both sides and print their figures and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--source", default="builtin", help="calibration source, as in a recipe")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--batch-tokens", type=int, default=0, help="0: what suits the device")
    parser.add_argument(
        "--sides",
        nargs="+",
        choices=OURS,
        default=list(OURS),
        help="which of ours to run; the transcription always runs",
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", choices=[*OURS, LOOP], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments.side, arguments)))
        return
    results = {}
    for side in (*arguments.sides, LOOP):
        command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results[side] = json.loads(done.stdout.strip().splitlines()[-1])
    report(results, as_json=arguments.json)


def report(results: dict[str, dict[str, Any]], *, as_json: bool) -> None:
    """Print figures and ratios, and fail when the sides disagree."""
    slow, ours = results[LOOP], [side for side in results if side != LOOP]
    figures = {
        "seconds": "seconds",
        "peak / model bytes": "peak_bytes",
        "of that, imports": "import_bytes",
        "layer forwards": "layer_forwards",
    }
    ratios = {
        side: {
            name: slow[key] / results[side][key]
            for name, key in figures.items()
            if key != "import_bytes"
        }
        for side in ours
    }
    difference = max(
        abs(value - slow["similarities"][window])
        for side in ours
        for window, value in results[side]["similarities"].items()
    )
    if as_json:
        print(json.dumps({"sides": results, "ratios": ratios, "difference": difference}, indent=2))
    else:
        print(f"{'':20}" + "".join(f"{side:>15}" for side in results))
        for name, key in figures.items():
            scale = slow["model_bytes"] if key.endswith("_bytes") else 1.0
            values = "".join(f"{results[side][key] / scale:15.2f}" for side in results)
            print(f"{name:20}{values}")
        for name in ratios[ours[0]]:
            values = "".join(f"{ratios[side][name]:15.2f}" for side in ours)
            print(f"{'ratio, ' + name:20}{values}")
        for key in ("trials", "stopped"):
            print(f"{key:20}" + "".join(f"{results[side][key]:15}" for side in results))
        print(f"windows: {slow['windows']}, greatest difference of a similarity {difference:.1e}")
    if any(results[side]["windows"] != slow["windows"] for side in results) or difference > 1e-4:
        raise SystemExit("the sides disagree")


if __name__ == "__main__":
    main()
