"""Search of Sliding Layer Merging: this package against a straight transcription of the script.

Each side runs in a process of its own that loads the model, searches at one threshold and reports
seconds of the search, peak resident memory above what it held after ``import torch``, and how
often a decoder layer ran (in layer forwards of the whole calibration set, free of clock noise).

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
SIDES = ("slm_plugin", "transcription")


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
    from slm_plugin.calibration.samples import CalibrationSource, draw
    from slm_plugin.models.loading import ModelSource, load
    from slm_plugin.models.view import DecoderView

    model, tokenizer = load(ModelSource(id=arguments.model, dtype="float32", device="cpu"))
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
    if side == "slm_plugin":
        found = search(model, tokenizer, tokens, arguments.threshold)
    else:
        found = transcribed(model, tokens, arguments.threshold)
    seconds = time.perf_counter() - started
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        **found,
        "seconds": seconds,
        "peak_bytes": peak_bytes() - baseline,
        "model_bytes": weights,
        "layer_forwards": samples_run / len(tokens),
    }


def search(model: Any, tokenizer: Any, tokens: Any, threshold: float) -> dict[str, Any]:
    """The package's search, ending with the windows of the released loop."""
    from slm_plugin.pruners.depth.slm import SlidingLayerMerging, SlmOptions
    from slm_plugin.session import Session
    from slm_plugin.target import Target

    options = SlmOptions(flush_tail=False)
    plan = SlidingLayerMerging(options, Target(threshold=threshold)).plan(
        Session(model, tokenizer, tokens)
    )
    return {
        "windows": [[op.first, op.last] for op in plan.operations],
        "similarities": {f"{t.first}-{t.last}": t.similarity for t in plan.trials},
    }


def transcribed(model: Any, tokens: Any, threshold: float) -> dict[str, Any]:
    """The released loop: a deep copy and a full forward, with logits, for every trial."""
    from tests.oracles.slm_released import released_loop

    found = released_loop(model, tokens, threshold)
    return {
        "windows": [list(window) for window in found.windows],
        "similarities": {f"{low}-{high}": value for low, high, value in found.trials},
    }


def main() -> None:
    """Run both sides and print their figures and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--source", default="builtin", help="calibration source, as in a recipe")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments.side, arguments)))
        return
    results = {}
    for side in SIDES:
        command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results[side] = json.loads(done.stdout.strip().splitlines()[-1])
    report(results, as_json=arguments.json)


def report(results: dict[str, dict[str, Any]], *, as_json: bool) -> None:
    """Print figures and ratios, and fail when the two sides disagree."""
    ours, slow = (results[side] for side in SIDES)
    shared = ours["similarities"].keys() & slow["similarities"].keys()
    difference = max(abs(ours["similarities"][k] - slow["similarities"][k]) for k in shared)
    ratios = {
        "time": slow["seconds"] / ours["seconds"],
        "peak memory": slow["peak_bytes"] / ours["peak_bytes"],
        "layer forwards": slow["layer_forwards"] / ours["layer_forwards"],
    }
    if as_json:
        print(json.dumps({"sides": results, "ratios": ratios, "difference": difference}, indent=2))
    else:
        print(f"{'':24}{SIDES[0]:>14}{SIDES[1]:>16}{'ratio':>8}")
        for name, key, scale in (
            ("seconds", "seconds", 1.0),
            ("peak / model bytes", "peak_bytes", ours["model_bytes"]),
            ("layer forwards", "layer_forwards", 1.0),
        ):
            a, b = ours[key] / scale, slow[key] / scale
            print(f"{name:24}{a:14.2f}{b:16.2f}{b / a:8.2f}")
        print(f"windows: {ours['windows']} and {slow['windows']}")
        print(f"greatest difference of {len(shared)} similarities: {difference:.1e}")
    if ours["windows"] != slow["windows"] or difference > 1e-4:
        raise SystemExit("the two sides disagree")


if __name__ == "__main__":
    main()
