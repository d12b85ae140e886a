"""Memory footprint of a model: parameters, weights, peak memory, cache."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from slm_plugin.counts import Count
from slm_plugin.evaluation.base import Evaluator, EvaluatorOptions, Measurement
from slm_plugin.evaluation.prefill import check_room, prefill, random_prompt
from slm_plugin.lazy import inference_mode, torch
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.models.streaming import is_stub
from slm_plugin.registry import register_evaluator

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slm_plugin.session import Session

MEGABYTE = 10**6
RESET = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


class FootprintOptions(EvaluatorOptions):
    """The prompt of the peak measurement."""

    tokens: Annotated[Count, Field(description="prompt length of the peak measurement")] = 512


@register_evaluator("footprint")
class Footprint(Evaluator):
    """Parameters, bytes of the weights, bytes of the KV cache, and the peak of one prefill.

    The peak is the weights' bytes and what the prefill adds to them: on CUDA to PyTorch's allocated
    memory, on a CPU under Linux to the resident set. What else the process holds (libraries, a
    calibration set, other stages' leavings) has no part in it. Elsewhere it is left out.
    """

    unlisted: ClassVar[bool] = True
    streams = True
    Options = FootprintOptions
    options: FootprintOptions

    def check_model(self, session: Session) -> None:
        """Check that the prompt fits the model's positions.

        Raises:
            UserError: It does not.
        """
        check_room(session.model, self.options.tokens, "footprint", "`tokens`")

    def measure(self, session: Session) -> list[Measurement]:
        """Count parameters and bytes, and run one prefill.

        Raises:
            UserError: The prompt exceeds the model's positions.
        """
        model, sizes = session.model, session.view.dimensions()
        self.check_model(session)
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
        work = partial(_run, model, prompt)
        # The first run loads what is lazy: weights mapped from a file, libraries.
        work()
        added = added_memory(model.device, work)
        if added is not None:
            where, size = added
            protocol = (
                f"weights and what one prefill of {self.options.tokens} tokens adds to {where}, "
                "MB of 10^6 bytes"
            )
            peak = (held_bytes(model) + size) / MEGABYTE
            measurements.append(_lower("peak memory", peak, "MB", protocol))
        return measurements


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters, tied ones once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def held_bytes(model: PreTrainedModel) -> int:
    """Bytes of the parameters in memory, without streamed ones."""
    held = (p for p in model.parameters() if not is_stub(p))
    return sum(p.numel() * p.element_size() for p in held)


def cache_bytes_per_token(sizes: Dimensions, dtype: torch.dtype) -> int:
    """Bytes that one token of one sequence adds to the key/value cache."""
    return 2 * sizes.layers * sizes.kv_heads * sizes.head_dim * dtype.itemsize


def added_memory(device: torch.device, work: Callable[[], object]) -> tuple[str, int] | None:
    """Run a function; returns where memory was measured, and its peak above the start.

    Returns:
        The place in words and bytes; None where nothing tells.
    """
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return "the allocated GPU memory", torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not _restart_peak():
        work()
        return None
    before = _resident("VmRSS")
    work()
    return "the resident set", max(0, _resident("VmHWM") - before)


def _restart_peak() -> bool:
    """Reset the peak of the resident set, if the system allows it."""
    if not RESET.exists():
        return False
    _give_back_free_memory()
    try:
        # 5 resets the high-water mark of the resident set: proc_pid_clear_refs(5).
        RESET.write_text("5")
    except OSError:
        return False
    return True


def _give_back_free_memory() -> None:
    """Make the C library release free memory, which would otherwise hide allocations."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident(line: str) -> int:
    """Bytes in a line of the process's status."""
    found = re.search(rf"^{line}:\s+(\d+) kB$", STATUS.read_text(), flags=re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


@inference_mode
def _run(model: PreTrainedModel, prompt: torch.Tensor) -> None:
    prefill(model, prompt)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _lower(name: str, value: float, unit: str, protocol: str) -> Measurement:
    return Measurement(name=name, value=value, unit=unit, protocol=protocol, better="lower")
