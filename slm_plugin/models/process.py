"""Process-wide settings that a component may change only temporarily."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from slm_plugin.lazy import np, torch

# Name, getter and setter of every setting.
_SETTINGS: tuple[tuple[str, Callable[[], Any], Callable[[Any], Any]], ...] = (
    (
        "gradients on or off",
        lambda: torch.is_grad_enabled(),
        lambda found: torch.set_grad_enabled(found),
    ),
    (
        "default dtype",
        lambda: torch.get_default_dtype(),
        lambda found: torch.set_default_dtype(found),
    ),
    (
        "number of threads",
        lambda: torch.get_num_threads(),
        lambda found: torch.set_num_threads(found),
    ),
    (
        "deterministic algorithms",
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        lambda found: torch.use_deterministic_algorithms(found[0], warn_only=found[1]),
    ),
    (
        "matrix product precision",
        lambda: torch.get_float32_matmul_precision(),
        lambda found: torch.set_float32_matmul_precision(found),
    ),
    (
        "cuDNN benchmark mode",
        lambda: torch.backends.cudnn.benchmark,
        lambda found: setattr(torch.backends.cudnn, "benchmark", found),
    ),
    (
        "cuDNN deterministic mode",
        lambda: torch.backends.cudnn.deterministic,
        lambda found: setattr(torch.backends.cudnn, "deterministic", found),
    ),
)


@contextmanager
def same_process(seed: int, device: torch.device) -> Iterator[list[str]]:
    """Run a block reproducibly, and restore the process's settings afterwards.

    The random generators of Python, NumPy, the CPU and the model's device are seeded, gradients are
    enabled and inference mode is off. The former settings are restored at the end.

    Args:
        seed: Seed of the random generators.
        device: Device of the model.

    Yields:
        A list that afterwards names the settings that had been left changed.
    """
    put_back: list[str] = []
    with ExitStack() as stack:
        # Use of a generator is not a change to report; its state is restored silently.
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.callback(_put_back, [(n, get(), put) for n, get, put in _SETTINGS], put_back)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        if device.type == "cpu":
            # `torch.manual_seed` would change the generators of GPUs too, and records a stack trace
            # for each kind of device.
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)
        yield put_back


def _put_back(found: list[tuple[str, Any, Callable[[Any], Any]]], put_back: list[str]) -> None:
    now = {name: get() for name, get, _ in _SETTINGS}
    for name, value, put in found:
        if now[name] != value:
            put_back.append(name)
            put(value)
    if torch.is_inference_mode_enabled():
        put_back.append("inference mode")
