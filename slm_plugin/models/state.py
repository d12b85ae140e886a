"""The state of a model that a component must not change, recorded and compared cheaply.

Version counters of parameters miss writes through ``.data`` or NumPy. A checksum over the bits is
computed instead: one pass over the memory, on the device, in about half the time of a SHA-256.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from slm_plugin.lazy import torch
from slm_plugin.models.operators import NAME, is_operator_hook
from slm_plugin.models.streaming import is_stub

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

# Kind and name of a fact: ("weight", "model.norm.weight").
Key = tuple[str, str]
State = dict[Key, object]
WEIGHT = "weight"
# Rotary embeddings of these kinds update their frequencies at every forward pass.
MOVING_ROPE = ("dynamic", "longrope")
# What a forward pass leaves in a module: Qwen3-VL's offset of positions behind images.
REMEMBERED = ("rope_deltas",)
HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
HOOKS_OF_TENSORS = ("_backward_hooks", "_post_accumulate_grad_hooks")
# Words per chunk of the checksum (2 MB), so that intermediate results stay in the CPU cache.
_CHUNK, _WIDTH = 2**18, 2**10
_ODD = 0x1E3779B97F4A7C15
# Bytes up to which starting a dozen kernels costs more than a hash on the CPU.
_SMALL = 2**16


def checksum(tensor: Tensor) -> int:
    """A 64-bit checksum of the words of a tensor and their positions.

    Every word is multiplied and mixed, so that changes of sign do not cancel. Sums over rows and
    columns are then combined with different weights, odd and even. About one in 2^64 accidental
    changes is missed; the checksum does not detect forgery.

    Args:
        tensor: Of any shape and number format, in memory.
    """
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.device.type == "cpu" and len(flat) <= _SMALL:
        return int.from_bytes(hashlib.blake2b(flat.numpy().data, digest_size=8).digest(), "little")
    if flat.storage_offset() % 8:
        flat = flat.clone()
    whole = flat.numel() // 8 * 8
    words = flat[:whole].view(torch.int64)
    total = _weighted(flat[whole:].to(torch.int64) + 1, 3)
    # Two buffers for all chunks, because allocation would cost more than the arithmetic.
    buffers = words.new_empty(2, min(len(words), _CHUNK))
    for number, chunk in enumerate(torch.split(words, _CHUNK)):
        mixed, shifted = buffers[:, : len(chunk)]
        torch.mul(chunk, _ODD, out=mixed)
        mixed ^= torch.bitwise_right_shift(mixed, 32, out=shifted)
        table = mixed[: len(mixed) // _WIDTH * _WIDTH].view(-1, _WIDTH)
        part = _weighted(table.sum(1), 1) + 2 * _weighted(table.sum(0), 7)
        part += _weighted(mixed[table.numel() :], 5)
        total = total + part * (2 * number + 1)
    return int(total)


def _weighted(sums: Tensor, start: int) -> Tensor:
    """The sum with an odd weight per position, modulo 2^64."""
    places = torch.arange(start, start + len(sums), device=sums.device)
    weights = places * _ODD
    return (sums * ((weights ^ (weights >> 31)) | 1)).sum()


def weights_of(model: nn.Module) -> State:
    """The checksum of every parameter, tied ones once.

    A streamed parameter is represented by its source, because files do not change.
    """
    return _weights(dict(model.named_parameters()))


def _weights(parameters: Mapping[str, Tensor]) -> State:
    return {(WEIGHT, name): _value(parameter) for name, parameter in parameters.items()}


def _value(parameter: Tensor) -> object:
    if is_stub(parameter):
        return parameter.source
    return None if parameter.is_meta else checksum(parameter)


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, by name."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def state_of(model: PreTrainedModel) -> State:
    """Weights, layout, modules, hooks and configuration of a model.

    Training mode, gradients and their flags are not included: `kept_trainability` restores them.
    """
    # Walked once: for a small model, walking its modules takes longer than all checksums.
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    return {
        **_weights(parameters),
        **_layout(parameters),
        **_members(parameters, modules),
        **_modules(modules),
        **_settings(model),
    }


def changes(before: Mapping[Key, object], after: Mapping[Key, object]) -> list[Key]:
    """The sorted keys whose values differ or that only one state has."""
    missing = object()
    return sorted(
        key
        for key in before.keys() | after.keys()
        if not _same(before.get(key, missing), after.get(key, missing))
    )


def without_operators(state: Mapping[Key, object]) -> State:
    """The facts that are not about operators between layers."""
    return {key: fact for key, fact in state.items() if NAME not in key[1].split(".")}


def in_words(keys: list[Key], most: int = 3) -> str:
    """Description of changed facts: the first few, and the number of others."""
    said = ", ".join(f"{kind} {place}" for kind, place in keys[:most])
    return said if len(keys) <= most else f"{said} and {len(keys) - most} more"


def _same(one: object, other: object) -> bool:
    # Sources of streamed weights may hold tensors, which have no plain equality.
    if one is other:
        return True
    return isinstance(one, int | float | str | tuple | list | dict) and bool(one == other)


def _layout(parameters: Mapping[str, Tensor]) -> State:
    return {
        ("layout of", name): (tuple(p.shape), str(p.dtype), str(p.device), type(p).__name__)
        for name, p in parameters.items()
    }


def _modules(modules: Mapping[str, nn.Module]) -> State:
    found: State = {}
    for name, module in modules.items():
        place = name or "the model"
        found["module", place] = type(module).__qualname__
        # transformers calls it by either name, by release.
        kind = str(vars(module).get("rope_type", ""))
        moving = kind in MOVING_ROPE
        for attribute, value in vars(module).items():
            if attribute[0] == "_" or attribute in ("training", *REMEMBERED):
                continue
            if attribute == "forward":
                found["forward method of", place] = value
            # What a module remembers of the last length, as Wav2Vec2-Conformer's positions do.
            if moving or attribute.startswith("cached_"):
                continue
            if value is None or isinstance(value, bool | int | float | str):
                found["attribute", f"{name}.{attribute}".lstrip(".")] = value
        for attribute, buffer in module._buffers.items():
            if buffer is not None and not moving and not buffer.is_meta:
                found["buffer", f"{name}.{attribute}".lstrip(".")] = checksum(buffer)
        found["hooks of", place] = _hooks(map(vars(module).get, HOOKS))
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                registered = (getattr(parameter, hooks, None) for hooks in HOOKS_OF_TENSORS)
                found["hooks of", f"{name}.{attribute}".lstrip(".")] = _hooks(registered)
    return found


def _members(parameters: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> State:
    """What hangs below every module: walks name a part once, even if it stands in two places."""
    parts = (*parameters.items(), *modules.items())
    names = {id(part): name for name, part in parts}
    return {
        ("members of", name or "the model"): tuple(
            (attribute, names.get(id(part)))
            for attribute, part in {**module._modules, **module._parameters}.items()
            if attribute != NAME
        )
        for name, module in modules.items()
    }


def _hooks(registered: Iterable[Any]) -> tuple[object, ...]:
    return tuple(
        hook
        for hooks in registered
        if hooks
        for hook in hooks.values()
        if not is_operator_hook(hook)
    )


def _settings(model: PreTrainedModel) -> State:
    found: State = {}
    for part in ("config", "generation_config"):
        settings: Any = getattr(model, part, None)
        fields = {} if settings is None else settings.to_dict()
        fields["attention"] = getattr(settings, "_attn_implementation", None)
        for field, value in fields.items():
            if not str(field).startswith("_"):
                found[f"{part} field", str(field)] = value
    return found


@contextmanager
def kept_trainability(model: Callable[[], nn.Module]) -> Iterator[list[str]]:
    """Set evaluation mode, and restore gradients and their flags afterwards.

    Afterwards the model is in evaluation mode, and every remaining parameter has its former
    gradient and flag: the same one under whatever name, or one that took its name and shape.

    Args:
        model: Returns the model; afterwards it may return another one with the same parameters.

    Yields:
        A list that afterwards names what had to be restored.
    """
    model().eval()
    former = {name: (p.requires_grad, p.grad, p.shape) for name, p in model().named_parameters()}
    # Weakly, so that surgery frees what it replaces.
    names = {id(p): (weakref.ref(p), name) for name, p in model().named_parameters()}
    put_back: list[str] = []
    try:
        yield put_back
    finally:
        now = model()
        if any(module.training for module in now.modules()):
            put_back.append("training mode")
            now.eval()
        found = set()
        for name, parameter in now.named_parameters():
            same, former_name = names.get(id(parameter), (None, ""))
            place = former_name if same is not None and same() is parameter else name
            if place not in former or former[place][2] != parameter.shape:
                continue
            needed, gradient, _ = former[place]
            if parameter.grad is not gradient:
                found.add("gradients")
                parameter.grad = gradient
            if parameter.requires_grad != needed:
                found.add("requires_grad")
                parameter.requires_grad_(needed)
        put_back.extend(sorted(found))
