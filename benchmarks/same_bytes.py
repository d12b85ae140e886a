"""Write hashes of the plans and checkpoints of every strategy, to compare two versions.

Run it before a change that must not change results, and again after it:

    python benchmarks/same_bytes.py > before.txt      # about ten minutes on two cores
    python benchmarks/same_bytes.py | diff before.txt -

Every recipe runs as a process of its own on the default model with one seed. Hashed are the plan
without its prose and the options of its strategy, whose words may change, and the weights,
configuration and tokenizer of the checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

COMMAND = str(Path(sys.executable).with_name("slm-plugin"))
TWO = {"layers_removed": 2}
NARROWER = {"prune": "torch_pruning", "target": {"ratio": 0.05}}
DROP = {"prune": "block_influence", "target": TWO}
STAGES: dict[str, list[dict[str, Any]]] = {
    **{
        name: [{"prune": name, "target": TWO}]
        for name in (
            "angular",
            "block_influence",
            "deepest",
            "laco",
            "merge_concat",
            "shortened",
            "sleb",
            "slm",
            "streamline",
            "sublayer",
        )
    },
    "shapley": [{"prune": "shapley", "target": TWO, "samples": 40}],
    "slm released": [{"prune": "slm", "target": {"threshold": 0.8}, "compatibility": "released"}],
    "slm greedy": [{"prune": "slm", "target": TWO, "search": "greedy", "criterion": "loss"}],
    "slm budgeted": [{"prune": "slm", "target": TWO, "search": "budgeted", "merge_rule": "mean"}],
    "width taylor": [NARROWER],
    "width magnitude": [
        {**NARROWER, "target": {"ratio": 0.1}, "importance": "magnitude", "kv_groups": 1}
    ],
    **{
        f"recovery {name}": [DROP, {"recover": name}]
        for name in ("fold_linear", "refit", "rescale")
    },
    "recovery lora": [DROP, {"recover": "lora", "epochs": 1}],
    "recovery streamline": [
        {"prune": "streamline", "target": TWO},
        {"recover": "streamline", "epochs": 1},
    ],
    "hybrid": [{"prune": "slm", "target": TWO}, NARROWER, {"recover": "refit"}],
}


def digest(output: Path) -> dict[str, str]:
    """SHA-256 of every plan and of every file of the checkpoint, shortened."""
    found = {}
    for file in sorted(output.glob("plan-*.json")):
        plan = json.loads(file.read_text())
        # The losses follow from the operations.
        for name in ("options", "notes", "warnings", "loss_before", "loss_after"):
            plan.pop(name, None)
        found[file.name] = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
    for file in sorted((output / "checkpoint").iterdir()):
        if file.suffix in (".json", ".safetensors"):
            found[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return {name: value[:16] for name, value in found.items()}


def main() -> None:
    """Run all recipes and print a line for every file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--model", default="smollm2-135m")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.only:
            output = Path(folder) / "out"
            recipe = {
                "version": 1,
                "model": {"id": arguments.model, "dtype": "float32", "device": "cpu"},
                "calibration": {"source": "builtin", "samples": 8, "length": 32, "seed": 7},
                "seed": 7,
                "stages": STAGES[name],
                "export": [{"checkpoint": {}}],
                "output": str(output),
            }
            file = Path(folder) / "recipe.yaml"
            file.write_text(json.dumps(recipe))
            done = subprocess.run(
                [COMMAND, "run", str(file), "--overwrite"],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise SystemExit(f"{name}: exit {done.returncode}: {done.stderr[-400:]}")
            for part, value in digest(output).items():
                print(f"{name:24} {part:36} {value}", flush=True)


if __name__ == "__main__":
    main()
