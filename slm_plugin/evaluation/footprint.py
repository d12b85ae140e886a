"""How much room a model takes: parameters, weights, memory at work, cache."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field

from slm_plugin.evaluation.base import Evaluator, EvaluatorOptions, Measurement
from slm_plugin.evaluation.prefill import check_room, prefill, random_prompt
from slm_plugin.models.view import Dimensions
from slm_plugin.registry import register_evaluator

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slm_plugin.session import Session

MEGABYTE = 10**6
RESET = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


class FootprintOptions(EvaluatorOptions):
    """What the peak is measured on."""

    tokens: Annotated[int, Field(ge=1, description="prompt length of the peak measurement")] = 512


@register_evaluator("footprint")
class Footprint(Evaluator):
    """Parameters, bytes of the weights, bytes of the KV cache, and the peak of one prefill.

    The peak is PyTorch's allocated memory on CUDA. On a CPU under Linux it is the largest resident
    set of the whole process during the prefill, Python and libraries and whatever else the process
    holds included: compare it within one run. Elsewhere it is left out.
    """

    streams = True
    Options = FootprintOptions
    options: FootprintOptions

    def fit(self, session: Session) -> None:
        """Make sure that the model has room for the prompt.

        Raises:
            UserError: It has not.
        """
        check_room(session.model, self.options.tokens, "footprint")

    def measure(self, session: Session) -> list[Measurement]:
        """Count, and run one prefill.

        Raises:
            UserError: The prompt exceeds the model's positions.
        """
        model, sizes = session.model, session.view.dimensions()
        self.fit(session)
        counted = "tied weights counted once"
        measurements = [
            _lower("parameters", sizes.parameters, "", counted),
            _lower("weights", weight_bytes(model) / MEGABYTE, "MB", f"{counted}, MB of 10^6 bytes"),
            _lower(
                "KV cache per token",
                cache_bytes_per_token(sizes, model.dtype),
                "bytes",
                f"keys and values of all layers in {_name(model.dtype)}",
            ),
        ]
        prompt = random_prompt(session, 1, self.options.tokens)
        peak = peak_memory(model.device, partial(_run, model, prompt))
        if peak is not None:
            what, size = peak
            protocol = (
                f"{what} during one prefill of {self.options.tokens} tokens, MB of 10^6 bytes"
            )
            measurements.append(_lower("peak memory", size / MEGABYTE, "MB", protocol))
        return measurements


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters, tied ones once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def cache_bytes_per_token(sizes: Dimensions, dtype: torch.dtype) -> int:
    """Bytes that one token of one sequence adds to the key/value cache."""
    return 2 * sizes.layers * sizes.kv_heads * sizes.head_dim * dtype.itemsize


def peak_memory(device: torch.device, work: Callable[[], object]) -> tuple[str, int] | None:
    """What was measured and its peak in bytes while ``work`` runs; None where nothing tells."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return "memory allocated on the GPU", torch.cuda.max_memory_allocated(device)
    if device.type != "cpu":
        return None
    try:
        # 5 resets the high-water mark of the resident set: proc_pid_clear_refs(5).
        RESET.write_text("5")
    except OSError:
        return None
    work()
    found = re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text(), flags=re.MULTILINE)
    return ("resident set of the whole process", 1024 * int(found[1])) if found else None


@torch.inference_mode()
def _run(model: PreTrainedModel, prompt: torch.Tensor) -> None:
    prefill(model, prompt)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _lower(name: str, value: float, unit: str, protocol: str) -> Measurement:
    return Measurement(name=name, value=value, unit=unit, protocol=protocol, better="lower")
