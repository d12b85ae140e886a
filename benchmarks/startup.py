"""Measure how long commands take that only read, beside Python's own start.

    python benchmarks/startup.py                 # about a minute on two cores
    python benchmarks/startup.py --runs 9 --recipe recipes/width.yaml

Every command runs as a process of its own, all of them in turn, and the median counts.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from slm_plugin.models.dimensions import Dimensions
from slm_plugin.models.fingerprint import Fingerprint
from slm_plugin.plans import DropLayers, PruningPlan
from slm_plugin.target import Target

BASE = "python -c pass"
DIMENSIONS = Dimensions(
    architecture="LlamaForCausalLM",
    layers=30,
    hidden_size=576,
    intermediate_size=1536,
    attention_heads=9,
    kv_heads=3,
    head_dim=64,
    vocab_size=49152,
    tied_embeddings=True,
    parameters=134_515_008,
    layer_parameters=3_540_096,
    channel_parameters=3 * 576,
    kv_group_parameters=8 * 576 * 64,
)
PLAN = PruningPlan(
    pruner="deepest",
    kind="depth",
    target=Target(layers_removed=2),
    fingerprint=Fingerprint(
        architecture="LlamaForCausalLM", dtype="float32", weights=f"sha256:{'0' * 64}"
    ),
    before=DIMENSIONS,
    after=DIMENSIONS.without_layers(2),
    operations=(DropLayers(indices=(27, 28)),),
)


def commands(recipe: Path, plan: Path) -> dict[str, list[str]]:
    """What is measured, by its name in the table."""
    tool = ["-m", "slm_plugin"]
    return {
        BASE: ["-c", "pass"],
        "import slm_plugin": ["-c", "import slm_plugin"],
        "slm-plugin --help": [*tool, "--help"],
        f"slm-plugin validate {recipe}": [*tool, "validate", str(recipe)],
        "slm-plugin schema": [*tool, "schema"],
        "slm-plugin list": [*tool, "list"],
        "slm-plugin explain PLAN": [*tool, "explain", str(plan)],
    }


def main() -> None:
    """Print a line for every command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/hybrid.yaml"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "plan.json"
        plan.write_text(PLAN.to_json())
        measured = commands(arguments.recipe, plan)
        seconds: dict[str, list[float]] = {name: [] for name in measured}
        for _ in range(arguments.runs):
            for name, command in measured.items():
                started = time.perf_counter()
                subprocess.run([sys.executable, *command], check=True, capture_output=True)
                seconds[name].append(time.perf_counter() - started)
    base = statistics.median(seconds[BASE])
    print(f"{'command':44} {'seconds':>8} {'times':>6}")
    for name, taken in seconds.items():
        median = statistics.median(taken)
        print(f"{name:44} {median:8.3f} {median / base:6.1f}")


if __name__ == "__main__":
    main()
