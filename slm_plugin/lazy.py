"""PyTorch and what belongs to it, imported at first use: to check a recipe takes none of them.

Other modules import these packages from here, and nowhere at their top. What needs them while a
module is imported is written otherwise: constants are functions, annotations stay text, and
subclasses of PyTorch's classes lie in `slm_plugin.models.torch_subclasses`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import safetensors
    import torch
    import torch.nn.functional as F
    import transformers
    from torch import nn

__all__ = ["F", "inference_mode", "nn", "no_grad", "np", "safetensors", "torch", "transformers"]

P = ParamSpec("P")
R = TypeVar("R")


class _Lazy:
    """A module that is imported when an attribute of it is asked for."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __getattr__(self, attribute: str) -> Any:
        module = import_module(self.__name__)
        # From now on attributes are found without this detour, and changes of them are seen.
        self.__dict__ = module.__dict__
        return getattr(module, attribute)

    def __repr__(self) -> str:
        return f"<lazy module '{self.__name__}'>"


if not TYPE_CHECKING:
    F = _Lazy("torch.nn.functional")
    nn = _Lazy("torch.nn")
    np = _Lazy("numpy")
    safetensors = _Lazy("safetensors")
    torch = _Lazy("torch")
    transformers = _Lazy("transformers")


def inference_mode(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate as ``torch.inference_mode()`` does, generators too, but import PyTorch at a call."""
    return _decorated(function, lambda: torch.inference_mode()(function))


def no_grad(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate as ``torch.no_grad()`` does, generators too, but import PyTorch at a call."""
    return _decorated(function, lambda: torch.no_grad()(function))


def _decorated(function: Callable[P, R], decorate: Callable[[], Callable[P, R]]) -> Callable[P, R]:
    """The function that decorates itself at its first call."""
    once = cache(decorate)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return once()(*args, **kwargs)

    return call
