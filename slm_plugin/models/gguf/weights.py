"""Tensors of a GGUF file as parameters of the stock class: each from one, each into one."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, cast

from slm_plugin.errors import ModelSourceError
from slm_plugin.lazy import np, torch
from slm_plugin.models.gguf.header import DAMAGED, TensorPlace

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from slm_plugin.models.gguf.architectures import Architecture
    from slm_plugin.models.gguf.metadata import Network

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_TENSOR = re.compile(r"blk\.(0|[1-9][0-9]*)\.([a-z_]+)\.(weight|bias)")
_PARAMETER = {parameter: tensor for tensor, parameter in _TOP.items()}


def parameter_of(tensor: str, architecture: Architecture) -> str | None:
    """The parameter that a tensor holds, or None when its name means nothing here."""
    if tensor in _TOP:
        return _TOP[tensor]
    found = _LAYER_TENSOR.fullmatch(tensor)
    if found is None or found[2] not in architecture.modules:
        return None
    return f"model.layers.{found[1]}.{architecture.modules[found[2]]}.{found[3]}"


def tensor_of(parameter: str, architecture: Architecture) -> str:
    """The tensor that holds a parameter of a supported class."""
    if parameter in _PARAMETER:
        return _PARAMETER[parameter]
    _, _, layer, rest = parameter.split(".", 3)
    module, _, kind = rest.rpartition(".")
    tensors = {module: tensor for tensor, module in architecture.modules.items()}
    return f"blk.{layer}.{tensors[module]}.{kind}"


def dequantised(place: TensorPlace) -> NDArray[np.float32]:
    """The values of a tensor in memory of their own.

    Raises:
        ModelSourceError: The file is missing or truncated.
    """
    from gguf import GGMLQuantizationType, dequantize

    try:
        raw = np.fromfile(place.file, np.uint8, place.size, offset=place.offset)
    except OSError as error:
        raise ModelSourceError(f"cannot read {place.file}: {error.strerror or error}") from error
    if raw.size != place.size:
        raise ModelSourceError(f"{place.file} ends in the middle of a tensor", hint=DAMAGED)
    rows = raw.reshape(-1, place.size // (np.prod(place.shape[:-1], dtype=int) or 1))
    values = dequantize(rows, GGMLQuantizationType(place.kind))
    return cast("NDArray[np.float32]", values.reshape(place.shape))


def parameter_values(tensor: str, place: TensorPlace, network: Network) -> Tensor:
    """The values of a tensor as the stock class wants them: in its order, norms without offset."""
    values = torch.from_numpy(dequantised(place))
    if tensor.endswith("norm.weight"):
        return values - network.architecture.norm_offset
    if not network.architecture.paired:
        return values
    name = tensor.split(".")[2] if tensor.startswith("blk.") else tensor
    heads = {"attn_q": network.heads, "attn_k": network.kv_heads}.get(name)
    return values if heads is None else halves(values, heads)


def halves(rows: Tensor, heads: int) -> Tensor:
    """Rows of each head from neighbouring pairs to two halves.

    GGUF keeps Llama's queries and keys as Meta's code turns them: channels 2i and 2i+1 are a pair.
    transformers pairs channel i with i + head_dim / 2.
    """
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def bias_flags(tensors: Any, architecture: Architecture) -> dict[str, bool]:
    """Which biases the config must ask for, from the tensors that are there."""
    names = {
        found[2] for found in map(_LAYER_TENSOR.fullmatch, tensors) if found and found[3] == "bias"
    }
    return {flag: bool(names & holders) for flag, holders in architecture.biases.items()}
