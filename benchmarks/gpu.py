"""What pruning takes and gives on one GPU, beside the CPU of the same machine; see `gpu.sh`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from slm_plugin import prune  # noqa: E402 - run from a checkout
from slm_plugin.calibration.samples import CalibrationSource, draw  # noqa: E402
from slm_plugin.models.loading import ModelSource, load  # noqa: E402
from slm_plugin.result import RunResult  # noqa: E402
from tests.oracles.slm_released import released_loop  # noqa: E402

# Shapes of SmolLM2-135M and of Llama 3.2 1B.
SMALL = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}
LARGE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
TINY = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 512}
# Mean similarity above which Sliding Layer Merging goes on merging.
THRESHOLD = 0.9
# What the planner is asked for, as a share of the dense model's decoding time.
DECODE = 0.8
Row = tuple[str, str, str, str]


def random_model(shape: dict[str, int], device: str, dtype: torch.dtype) -> PreTrainedModel:
    """Random weights, made on the device; what is timed does not depend on them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **shape, tie_word_embeddings=True, max_position_embeddings=4096, dtype=dtype
    )
    with torch.device(device):
        return LlamaForCausalLM._from_config(config)


def token_ids(vocabulary: int, samples: int, length: int, seed: int = 1) -> torch.Tensor:
    """Random token ids; what is timed does not depend on their meaning."""
    return torch.randint(
        vocabulary, (samples, length), generator=torch.Generator().manual_seed(seed)
    )


def seconds(result: RunResult) -> Iterator[tuple[str, float]]:
    """Every stage of a run with its time."""
    for stage in result.report.stages:
        yield stage.name, stage.seconds


def decode_speeds(result: RunResult) -> str:
    """Decoded tokens per second before and after."""
    states = [
        next(m.value for m in state.measurements if "decode" in m.name)
        for state in result.report.states
    ]
    return f"{states[0]:.1f} to {states[-1]:.1f}"


def hybrid(arguments: argparse.Namespace, device: str) -> RunResult:
    """The stages of the hybrid recipe, its latencies measured before and after."""
    # Other samples every time: no trial of a search is read from a journal.
    fresh = time.time_ns() % 2**31
    recipe = yaml.safe_load((ROOT / "recipes" / "hybrid.yaml").read_text(encoding="utf-8"))
    latency = {"prompt_tokens": 128, "new_tokens": 32, "repeats": 5}
    named: dict[str, Any] = {"evaluate": [{"latency": latency}], "seed": recipe["seed"]}
    if arguments.random:
        model = random_model(arguments.small, device, torch.float32)
        ids = token_ids(arguments.small["vocab_size"], 10, 128, fresh)
        return prune(model, None, recipe["stages"], calibration=ids, **named)
    model, tokenizer = load(ModelSource(id=recipe["model"]["id"], dtype="float32", device=device))
    calibration = {**recipe["calibration"], "seed": fresh}
    return prune(model, tokenizer, recipe["stages"], calibration=calibration, **named)


def saved(result: RunResult) -> float:
    """Seconds to write the checkpoint and to load it again, in a process of its own."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result.save(Path(folder) / "checkpoint")
    return time.perf_counter() - started


def search(arguments: argparse.Namespace, device: str) -> float:
    """Seconds of a greedy search by loss for two layers."""
    model = random_model(arguments.small, device, torch.float32)
    ids = token_ids(arguments.small["vocab_size"], 16, 128, time.time_ns() % 2**31)
    started = time.perf_counter()
    prune(model, None, "sleb", layers_removed=2, calibration=ids)
    return time.perf_counter() - started


def sliding(arguments: argparse.Namespace, device: str) -> tuple[float, float, bool]:
    """Seconds of the search of Sliding Layer Merging, of the released loop, and if they agree."""
    if arguments.random:
        model = random_model(arguments.small, device, torch.float32)
        ids = token_ids(arguments.small["vocab_size"], 10, 128)
    else:
        model, tokenizer = load(ModelSource(id="smollm2-135m", dtype="float32", device=device))
        source = CalibrationSource(source="builtin", samples=10, length=128)
        ids = draw(source, model, tokenizer, time.time_ns() % 2**31)
    started = time.perf_counter()
    found = released_loop(model, ids.to(device), THRESHOLD)
    loop = time.perf_counter() - started
    started = time.perf_counter()
    plan = prune(model, None, "slm", threshold=THRESHOLD, calibration=ids).plan
    ours = time.perf_counter() - started
    windows = [(operation.first, operation.last) for operation in plan.operations]
    return ours, loop, windows == found.windows


def planned(arguments: argparse.Namespace, device: str) -> RunResult:
    """The planner with a target of decoding time, and the times before and after."""
    model = random_model(arguments.small, device, torch.float32)
    ids = token_ids(arguments.small["vocab_size"], 16, 128, time.time_ns() % 2**31)
    lengths = {"prompt_tokens": 128, "new_tokens": 32}
    stage = {"prune": "hybrid", "target": {"latency": {"decode": DECODE}}, **lengths}
    latency = {"latency": {**lengths, "repeats": 9}}
    return prune(model, None, [stage], calibration=ids, evaluate=[latency])


def decode_share(result: RunResult) -> float:
    """Time of a decoding step after pruning, as a share of that before."""
    before, after = (
        next(m.value for m in state.measurements if m.name == "decode time per step")
        for state in (result.report.states[0], result.report.states[-1])
    )
    return after / before


def large(arguments: argparse.Namespace, device: str) -> RunResult:
    """Depth, its repair and width on a model of 1.2 billion parameters in bfloat16."""
    model = random_model(arguments.large, device, torch.bfloat16)
    stages = [
        {"prune": "block_influence", "target": {"layers_removed": 2}},
        {"recover": "refit"},
        {"prune": "torch_pruning", "target": {"ratio": 0.1}, "kv_groups": 0},
    ]
    ids = token_ids(arguments.large["vocab_size"], 32, 512 if device != "cpu" else 64)
    latency = {"prompt_tokens": 128, "new_tokens": 32, "repeats": 5}
    return prune(model, None, stages, calibration=ids, evaluate=[{"latency": latency}])


def rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """All rows of the table, each when it is done."""
    device = arguments.device
    reset_peak(device)
    here = hybrid(arguments, device)
    memory = peak(device)
    cpu = hybrid(arguments, "cpu")
    for (name, took), (_, reference) in zip(seconds(here), seconds(cpu), strict=True):
        yield f"hybrid: {name}", f"{took:.2f} s", f"{reference:.2f} s", f"{reference / took:.1f}"
    yield "hybrid: decode in tokens/s, before to after", decode_speeds(here), decode_speeds(cpu), ""
    if not arguments.random:
        yield "hybrid: checkpoint, loaded again", f"{saved(here):.2f} s", f"{saved(cpu):.2f} s", ""
    yield "hybrid: peak memory", memory, "", ""
    del here, cpu
    took, reference = search(arguments, device), search(arguments, "cpu")
    yield "search: sleb, 2 layers", f"{took:.2f} s", f"{reference:.2f} s", f"{reference / took:.1f}"
    took, loop, agree = sliding(arguments, device)
    yield f"search: slm at {THRESHOLD}, with surgery", f"{took:.2f} s", "", ""
    yield "search: slm, the released loop", f"{loop:.2f} s", "", ""
    yield "search: slm, the same windows", "yes" if agree else "NO", "", ""
    result = planned(arguments, device)
    (plan,) = result.plans.values()
    (chosen,) = [shape for shape in plan.frontier if shape.chosen]
    yield (
        f"planner: decode {DECODE}, all it does",
        f"{sum(dict(seconds(result)).values()):.2f} s",
        "",
        "",
    )
    yield "planner: layers and MLP channels", f"{chosen.layers}, {chosen.mlp_width}", "", ""
    yield "planner: decode as predicted", f"{chosen.cost:.3f}", "", ""
    yield "planner: decode as measured", f"{decode_share(result):.3f}", "", ""
    reset_peak(device)
    result = large(arguments, device)
    for name, took in seconds(result):
        yield f"1.2 billion, bfloat16: {name}", f"{took:.2f} s", "", ""
    yield "1.2 billion: decode in tokens/s, before to after", decode_speeds(result), "", ""
    yield "1.2 billion: peak memory", peak(device), "", ""


def reset_peak(device: str) -> None:
    """Forget the greatest memory that PyTorch took so far."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak(device: str) -> str:
    """The greatest memory that PyTorch took on the card since then."""
    if not device.startswith("cuda"):
        return ""
    return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"


def main() -> None:
    """Print the card and the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--random", action="store_true", help="random weights, nothing fetched")
    parser.add_argument("--tiny", action="store_true", help="small shapes: a trial of the script")
    arguments = parser.parse_args()
    arguments.small = {**SMALL, **TINY, "num_attention_heads": 4, "num_key_value_heads": 2}
    arguments.large = {**LARGE, **TINY, "num_attention_heads": 4, "num_key_value_heads": 2}
    if not arguments.tiny:
        arguments.small, arguments.large = SMALL, LARGE
    card = "no card"
    if arguments.device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise SystemExit(
                "this machine has no CUDA device: --device cpu tries the script itself"
            )
        card = torch.cuda.get_device_name()
    print(f"{card}, torch {torch.__version__}\n")
    print(f"| what | {arguments.device} | cpu | ratio |\n|---|---|---|---|")
    for row in rows(arguments):
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
