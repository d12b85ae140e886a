"""Rotary positions of a GGUF file, as transformers' ``rope_scaling`` spells them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from slm_plugin.lazy import np
from slm_plugin.models.gguf.metadata import Network, refusal
from slm_plugin.models.gguf.parts import GgufModel
from slm_plugin.models.gguf.weights import dequantised

if TYPE_CHECKING:
    from numpy.typing import NDArray

FREQUENCIES = "rope_freqs.weight"
TOLERANCE = 1e-5
# What Llama 3.1 and 3.2 have; only their ratio matters, so another pair is found as well.
_LOW = 1.0
_USUAL_FACTORS = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
_LARGEST_CONTEXT = 20  # As a power of two, when no frequency tells the original length.


def read_rope(model: GgufModel, network: Network) -> dict[str, Any] | None:
    """The ``rope_scaling`` that turns queries and keys as the file says; None when unscaled.

    Raises:
        ModelSourceError: The file scales in a way that the stock class does not.
    """
    scaling = _stated(model, network)
    if FREQUENCIES not in model.tensors:
        return scaling
    factors = _factors(model, network)
    if np.abs(factors - 1).max() <= TOLERANCE:
        return scaling
    if scaling is not None:
        kind = scaling["rope_type"]
        raise refusal(
            model, FREQUENCIES, factors.tolist(), f"the metadata asks for {kind} scaling besides"
        )
    found = llama3_scaling(factors, frequencies(network))
    if found is None:
        raise refusal(
            model,
            FREQUENCIES,
            factors.tolist(),
            "no scaling of the Llama 3 kind gives these values",
        )
    return found


def frequencies(network: Network, base: float | None = None) -> NDArray[np.float64]:
    """Angle per position of each pair of channels before scaling, ``(head_dim / 2,)``."""
    exponents = np.arange(0, network.head_dim, 2) / network.head_dim
    return np.asarray((base or network.rope_base) ** -exponents)


def llama3_factors(
    plain: NDArray[np.float64], factor: float, high: float, original: float, low: float = _LOW
) -> NDArray[np.float64]:
    """What Llama 3 divides each frequency by.

    Slow frequencies are divided by ``factor``, fast ones kept, those between interpolated.

    Source: https://arxiv.org/abs/2407.21783, section 3.4.2, and Meta's `llama-models`.
    """
    turns = original * plain / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - smooth) / factor + smooth))


def llama3_scaling(
    factors: NDArray[np.float64], plain: NDArray[np.float64]
) -> dict[str, Any] | None:
    """The parameters of Llama 3 scaling that give these factors to 1e-5, or None."""
    largest = float(factors.max())
    # The slowest frequency may be interpolated, too: then the factor is larger than any here.
    for factor in (largest, *(power for power in _USUAL_FACTORS if power > largest)):
        for high, original in _candidates(factors, plain, factor):
            again = llama3_factors(plain, factor, high, original)
            if np.abs(again / factors - 1).max() <= TOLERANCE:
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": _LOW,
                    "high_freq_factor": high,
                    "original_max_position_embeddings": original,
                }
    return None


def _candidates(
    factors: NDArray[np.float64], plain: NDArray[np.float64], factor: float
) -> list[tuple[float, int]]:
    """Pairs of high_freq_factor and original length that may explain the factors."""
    found = [(4.0, 8192), *((4.0, 1 << power) for power in range(4, _LARGEST_CONTEXT))]
    between = (factors > 1 + TOLERANCE) & (factors < factor * (1 - TOLERANCE))
    smooth = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
    turns = plain[between] / (2 * math.pi)
    # smooth * (high - low) + low = original * turns, for each frequency between the two ends.
    for one, turn in zip(smooth, turns, strict=True):
        found.append((4.0, round((one * 3 + _LOW) / turn)))
    if len(smooth) > 1:
        slope, offset = np.polyfit(turns, smooth, 1)
        if slope > 0 and offset < 0:
            high = 1 - 1 / offset
            found.append((float(high), round((high - _LOW) * slope)))
    return [(high, original) for high, original in found if original > 0 and high > _LOW]


def _factors(model: GgufModel, network: Network) -> NDArray[np.float64]:
    place = model.tensors[FREQUENCIES]
    factors = dequantised(place).astype(np.float64)
    if factors.shape != (network.head_dim // 2,):
        raise refusal(
            model,
            f"{FREQUENCIES} of the shape",
            list(factors.shape),
            f"heads have {network.head_dim // 2} frequencies",
        )
    if not np.isfinite(factors).all() or factors.min() <= 0:
        raise refusal(model, FREQUENCIES, factors.tolist(), "factors must be finite and above 0")
    return factors


def _stated(model: GgufModel, network: Network) -> dict[str, Any] | None:
    """The scaling that the metadata ask for."""

    def key(name: str) -> str:
        return f"{network.architecture.name}.rope.{name}"

    def number(name: str, default: float | None = None) -> float:
        value = network.rope.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise refusal(model, key(name), value, f"{kind} scaling needs a number")
        if not math.isfinite(value) or value <= 0:
            raise refusal(model, key(name), value, "a finite number above 0 is wanted")
        return float(value)

    read = ("dimension_count", "freq_base", "freq_base_swa")
    rope = {k: v for k, v in network.rope.items() if k not in read}
    kind = rope.get("scaling.type", "linear")
    # Of two tables, llama.cpp scales with YaRN both, and transformers one.
    kinds = ("linear",) if network.sliding else ("linear", "yarn")
    if kind not in ("none", *kinds):
        wanted = " and ".join(kinds)
        raise refusal(model, key("scaling.type"), kind, f"only {wanted} can be read")
    if "scaling.factor" in rope and "scale_linear" in rope:
        raise refusal(
            model, key("scale_linear"), rope["scale_linear"], "scaling.factor is stated, too"
        )
    factor_name = "scale_linear" if "scale_linear" in rope else "scaling.factor"
    factor = 1.0 if rope.get(factor_name, 0) == 0 else number(factor_name)
    if kind == "none" and factor != 1:
        raise refusal(model, key(factor_name), factor, "scaling.type is none")
    if kind != "yarn":
        for name in ("scaling.yarn_beta_fast", "scaling.yarn_beta_slow"):
            if name in rope:
                raise refusal(model, key(name), rope[name], f"scaling.type is {kind}")
    if factor == 1 and kind != "yarn":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if factor < 1:
        raise refusal(model, key(factor_name), factor, "yarn stretches by at least 1")
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": round(
            number("scaling.original_context_length", network.context)
        ),
        "beta_fast": number("scaling.yarn_beta_fast", 32.0),
        "beta_slow": number("scaling.yarn_beta_slow", 1.0),
        "attention_factor": 1.0 if factor == 1 else 0.1 * math.log(factor) + 1,
    }
