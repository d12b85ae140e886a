"""What the tests of all recoveries need: pruned models, and what they compute."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from slm_plugin.plans import DropLayers, DropSublayers, MergeLayers, PruningPlan
from slm_plugin.recovery.base import RecoveryRecord
from slm_plugin.registry import recoveries
from slm_plugin.session import Session, apply
from slm_plugin.target import Target
from tests.tiny import random_tokens

TOKENS = random_tokens(15, 16)
# Every fifth sample is held out of all fits.
UNFITTED = TOKENS[::5]
# Which of all tokens, one after the other, are fitted.
FITTED = (torch.arange(15) % 5 != 0).repeat_interleave(16)


def pruned(
    model: PreTrainedModel, *operations: MergeLayers | DropLayers | DropSublayers, **changes: object
) -> Session:
    """A session that kept its reference and then had layers removed."""
    settings = {"calibration": TOKENS, "batch_tokens": 32, **changes}
    session = Session(model, **settings)  # type: ignore[arg-type]
    session.keep_reference()
    if operations:
        remove(session, *operations)
    return session


def remove(session: Session, *operations: MergeLayers | DropLayers | DropSublayers) -> None:
    """Carry out depth operations."""
    before = session.view.dimensions()
    gone = sum(operation.layers_removed for operation in operations)
    plan = PruningPlan(
        pruner="test",
        kind="depth",
        target=Target(layers_removed=gone),
        fingerprint=session.fingerprint(),
        before=before,
        after=before.without_layers(gone),
        operations=operations,
    )
    apply(plan, session)


def drop(*indices: int) -> DropLayers:
    """The operation that drops layers."""
    return DropLayers(indices=indices)


def join(index: int) -> DropSublayers:
    """The operation that makes one layer of a layer's attention and the next one's MLP."""
    return DropSublayers(attention=(index + 1,), mlp=(index,))


def recover(name: str, session: Session, **options: object) -> RecoveryRecord:
    """Carry a recovery out."""
    kind = recoveries.get(name)
    return session.recover(kind(kind.Options(**options)))


@torch.no_grad()
def seen_by(model: PreTrainedModel, place: str, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    """What a module gets to see of all tokens in one whole forward, ``(tokens, features)``."""
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(place).register_forward_pre_hook(
        lambda _module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    model(tokens)
    hook.remove()
    return seen[0].flatten(0, 1).double()


@torch.no_grad()
def written_by(model: PreTrainedModel, place: str) -> torch.Tensor:
    """What a module makes of all tokens in one whole forward, ``(tokens, features)``."""
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(place).register_forward_hook(
        lambda _module, _args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    model(TOKENS)
    hook.remove()
    return seen[0].flatten(0, 1).double()


def ridge_oracle(features: torch.Tensor, lack: torch.Tensor, ridge: float) -> torch.Tensor:
    """Ridge least squares over all tokens at once: rows that pull toward zero, stacked below."""
    width = features.shape[1]
    strength = (ridge * features.square().sum() / width).sqrt()
    rows = torch.cat([features, strength * torch.eye(width, dtype=torch.float64)])
    zeros = torch.zeros(width, lack.shape[1], dtype=torch.float64)
    return torch.linalg.lstsq(rows, torch.cat([lack, zeros])).solution


def chosen_ridge(note: str) -> float:
    """The ridge that a note tells."""
    return float(note.split("ridge ")[1].split(",")[0])
