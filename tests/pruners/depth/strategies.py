"""What the tests of all strategies that drop layers need."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from slm_plugin.plans import DropLayers, PruningPlan
from slm_plugin.registry import pruners
from slm_plugin.session import Session
from slm_plugin.target import Target
from tests.recovery.pruned import TOKENS as MANY_TOKENS
from tests.recovery.pruned import UNFITTED
from tests.tiny import random_tokens

TOKENS = random_tokens(6, 10)
# The recovery, with its options, that makes the fits of each repair of `repaired`.
FITS = {"boundary": ("refit", {"layers": "boundaries"}), "fold_linear": ("fold_linear", {})}
RECOVERY = {**FITS, "rescale": ("rescale", {})}


def judged_on(repair: str) -> torch.Tensor:
    """Those of many samples on which trials are judged: that no repair is fitted to."""
    return UNFITTED if repair in FITS else MANY_TOKENS


def session_of(model: PreTrainedModel, **changes: object) -> Session:
    """A session on six samples, two a batch."""
    return Session(model, **{"calibration": TOKENS, "batch_tokens": 20, **changes})  # type: ignore[arg-type]


@torch.no_grad()
def greedy(model: PreTrainedModel, *, use_cache: bool) -> torch.Tensor:
    """Six greedy tokens after the prompt."""
    return model.generate(  # type: ignore[operator,no-any-return]
        TOKENS[:2],
        attention_mask=torch.ones_like(TOKENS[:2]),
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        use_cache=use_cache,
    )


def own_text(model: PreTrainedModel) -> torch.Tensor:
    """Make a model certain of what it says, and let it speak: whatever changes it, it loses."""
    with torch.no_grad():
        model.model.norm.weight.mul_(20)
        tokens: torch.Tensor = model.generate(  # type: ignore[operator,assignment]
            TOKENS[:, :1],
            attention_mask=torch.ones_like(TOKENS[:, :1]),
            max_new_tokens=9,
            min_new_tokens=9,
            do_sample=False,
        )
    return tokens


def planned(
    name: str,
    model: PreTrainedModel,
    target: int | Target,
    *,
    tokens: torch.Tensor = TOKENS,
    **options: object,
) -> PruningPlan:
    """The plan of a strategy; a number is a number of layers."""
    kind = pruners.get(name)
    wanted = Target(layers_removed=target) if isinstance(target, int) else target
    return session_of(model, calibration=tokens).plan(kind(kind.Options(**options), wanted))


def removed(plan: PruningPlan) -> list[int]:
    """Dropped layers in the order of the plan."""
    return [i for op in plan.operations if isinstance(op, DropLayers) for i in op.indices]


def make_identity(model: PreTrainedModel, indices: list[int]) -> None:
    """Make layers pass their input through unchanged, bit by bit."""
    with torch.no_grad():
        for index in indices:
            layer = model.model.layers[index]
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.zero_()


@torch.no_grad()
def layer_outputs(model: PreTrainedModel, tokens: torch.Tensor) -> list[torch.Tensor]:
    """The embedding and every layer's output before the final norm, by hooks on a whole forward."""
    states: list[torch.Tensor] = []
    hooks = [
        module.register_forward_hook(
            lambda _module, _args, out: states.append(out[0] if isinstance(out, tuple) else out)
        )
        for module in (model.model.embed_tokens, *model.model.layers)
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return states


@torch.no_grad()
def mean_loss(model: PreTrainedModel, tokens: torch.Tensor = TOKENS) -> float:
    """Next-token cross entropy over all samples, written out."""
    logits = model(tokens).logits.double()
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    )
    return float(losses)
