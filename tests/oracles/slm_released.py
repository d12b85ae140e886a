"""The released search loop of SLM, step by step: a deep copy and a full forward a trial.

Nothing of slm_plugin is used. Deviations: the loop's known faults that depend on numerical
accident (NaN, non-determinism) cannot occur here.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@dataclass
class Released:
    """What the loop tried and what it merged, in original layer indices."""

    trials: list[tuple[int, int, float]] = field(default_factory=list)
    windows: list[tuple[int, int]] = field(default_factory=list)
    layers: int = 0


def merge(model: nn.Module, low: int, high: int) -> nn.Module:
    """Copy the model and merge its layers low..high as the released code does (w = 1)."""
    written = {id(parameter) for parameter in model.model.layers[low].parameters()}
    # The others are shared: copies of whole real models fill the memory before they are collected.
    shared = {id(one): one for one in model.parameters() if id(one) not in written}
    model = copy.deepcopy(model, shared)
    layers = model.model.layers
    for name in PROJECTIONS:
        current = layers[low].get_submodule(name).weight.data
        for index in range(low + 1, high + 1):
            current.add_(layers[index].get_submodule(name).weight.data - current)
    for index in range(high, low, -1):
        del layers[index]
    return model


@torch.no_grad()
def final_hidden(model: nn.Module, sample: Tensor) -> Tensor:
    """Hidden state behind the final norm, with all hidden states kept and logits computed."""
    output = model(
        input_ids=sample.unsqueeze(0), output_hidden_states=True, use_cache=False, return_dict=True
    )
    return output.hidden_states[-1]


def released_loop(
    model: nn.Module, samples: Tensor, threshold: float, *, flush_tail: bool = False
) -> Released:
    """Run the loop of the released script; ``flush_tail`` adds the missing last commit."""
    found = Released()
    reference = [final_hidden(model, sample) for sample in samples]
    merged = model
    high = len(model.model.layers) - 2
    low = high - 1
    while low >= 0:
        trial = merge(merged, low, high)
        cosines = [
            nn.functional.cosine_similarity(
                expected.flatten(), final_hidden(trial, sample).flatten(), dim=0
            )
            for expected, sample in zip(reference, samples, strict=True)
        ]
        similarity = float(torch.stack(cosines).mean())
        found.trials.append((low, high, similarity))
        if similarity > threshold:
            low -= 1
        elif low + 1 != high:
            merged = merge(merged, low + 1, high)
            found.windows.append((low + 1, high))
            high = low
        else:
            high -= 1
            low -= 1
    if flush_tail and low + 1 < high:
        merged = merge(merged, low + 1, high)
        found.windows.append((low + 1, high))
    found.layers = len(merged.model.layers)
    return found
