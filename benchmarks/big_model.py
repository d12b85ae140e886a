"""Plan, prune and export a model under a hard limit of memory that is far below its size.

A randomly initialised bfloat16 Llama of 1.86 billion parameters is written shard by shard, never
whole in memory. Then ``slm-plugin run`` with ``memory: layerwise`` goes through it under
``RLIMIT_AS``, which bounds the whole address space of the process and of the one that verifies the
checkpoint: Python, libraries, mapped files and all.

    python benchmarks/big_model.py --limit 2.4
    python benchmarks/big_model.py --limit 2.4 --memory whole     # fails, as it should
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
GB = 10**9
SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 2560,
    "intermediate_size": 8192,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "head_dim": 128,
    "max_position_embeddings": 2048,
}
RECIPE = """\
version: 1
model: {{id: {model}, device: cpu, memory: {memory}}}
calibration: {{source: {tokens}}}
stages:
  - prune: slm
    target: {target}
export:
  - checkpoint: {{max_shard_size: 1GB}}
output: {output}
"""


def write_model(folder: Path, layers: int) -> None:
    """Write the model, one file a layer: config, random weights, index."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from slm_plugin.models.stored import write_tensors
    from slm_plugin.models.weight_files import INDEX

    folder.mkdir(parents=True)
    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, tie_word_embeddings=True)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)

    def random(stub: torch.Tensor) -> torch.Tensor:
        if stub.dim() == 1:
            return torch.ones(stub.shape, dtype=stub.dtype)
        made = torch.empty(stub.shape, dtype=stub.dtype)
        return made.normal_(0, 0.02, generator=generator)

    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{part}.safetensors", {})[name] = parameter
    for file, tensors in files.items():
        write_tensors(folder / file, tensors, random)
    places = {name: file for file, tensors in files.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def write_recipe(folder: Path, model: Path, arguments: argparse.Namespace) -> Path:
    """Write calibration ids and the recipe."""
    import torch

    generator = torch.Generator().manual_seed(1)
    shape = (arguments.samples, arguments.length)
    ids = torch.randint(SHAPE["vocab_size"], shape, generator=generator)
    (folder / "ids.json").write_text(json.dumps(ids.tolist()))
    fields = {"model": model, "tokens": folder / "ids.json", "output": folder / "out"}
    text = RECIPE.format(**fields, memory=arguments.memory, target=arguments.target)
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


def limited_run(recipe: Path, limit: int) -> tuple[int, float, int]:
    """Exit code, seconds and peak resident bytes of a run under a limit of address space."""
    command = [sys.executable, "-m", "slm_plugin", "run", str(recipe), "--overwrite"]
    path = f"{Path(__file__).resolve().parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    # Each arena of the allocator reserves 64 MB of address space, each thread makes one.
    environment = {**os.environ, "PYTHONPATH": path, "MALLOC_ARENA_MAX": "1"}
    started = time.perf_counter()
    done = subprocess.run(
        command,
        env=environment,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return done.returncode, seconds, peak


def main() -> None:
    """Write the model, run under the limit, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where the model goes, and is found again")
    parser.add_argument(
        "--limit", type=float, default=2.4, help="address space in GB of 10^9 bytes"
    )
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--target", default="{threshold: 0.9}", help="as in a recipe")
    parser.add_argument("--memory", choices=("layerwise", "whole"), default="layerwise")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = (arguments.folder or Path(scratch)) / "model"
        if not model.is_dir():
            # Writing happens in a process of its own: its memory is not the run's.
            write_model(model, arguments.layers)
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        recipe = write_recipe(Path(scratch), model, arguments)
        code, seconds, peak = limited_run(recipe, int(arguments.limit * GB))
        print(f"weights of the model   {size / GB:6.2f} GB")
        print(f"limit, address space   {arguments.limit:6.2f} GB")
        print(f"peak resident memory   {peak / GB:6.2f} GB")
        print(f"seconds                {seconds:6.0f}")
        print(f"exit code              {code:6}")
        for plan in sorted(Path(scratch).glob("out/plan-*.json")):
            made = json.loads(plan.read_text())
            trials = len(made.get("trials", [])) + len(made.get("explored", []))
            layers = f"{made['before']['layers']} to {made['after']['layers']}"
            print(f"plan                   {layers} layers, {trials} trials")
        raise SystemExit(code)


if __name__ == "__main__":
    main()
