"""Plans of operations that a test gives, and the loss that they have to state."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from transformers import PreTrainedModel

from slm_plugin.extras import missing
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.models.head import next_token_losses
from slm_plugin.models.view import DecoderView
from slm_plugin.plans import KeepChannels, KeepHeads, Operation, PruningPlan
from slm_plugin.plans.steps import steps_of
from slm_plugin.plans.stream import stream_change
from slm_plugin.pruners.base import Pruner
from slm_plugin.session import Session
from slm_plugin.surgery import apply_operations
from slm_plugin.target import Target
from tests.tiny import make_model, random_tokens

needs_extra = pytest.mark.skipif(bool(missing("width")), reason="width surgery needs torch-pruning")
TOKENS = random_tokens(5, 12)
LAYERS = 5


class Given(Pruner):
    """A strategy whose decision is given to it."""

    name = "given"
    kind: ClassVar = "depth"
    targets: ClassVar = ("ratio",)

    def __init__(
        self, operations: Sequence[Operation], *, needs: bool = True, **fields: Any
    ) -> None:
        super().__init__(Pruner.Options(), Target(ratio=0.1))
        self.operations, self.needs, self.fields = tuple(operations), needs, fields

    @property
    def needs_calibration(self) -> bool:
        """As given."""
        return self.needs

    def plan(self, session: Session) -> PruningPlan:
        """The plan of the given operations; what it leaves is what surgery finds."""
        return planned(session, self.operations, **self.fields)


def planned(session: Session, operations: Sequence[Operation], **changes: Any) -> PruningPlan:
    """A plan of some operations, whose dimensions are what they leave."""
    before = session.view.dimensions()
    kinds = dict.fromkeys(operation.kind for operation in operations)
    fields: dict[str, Any] = {
        "pruner": "given",
        "kind": next(iter(kinds)) if len(kinds) == 1 else "hybrid",
        "target": Target(ratio=0.1),
        "fingerprint": session.fingerprint(),
        "before": before,
        "operations": tuple(operations),
        **changes,
    }
    plan = PruningPlan(**{"after": before, **fields})
    if "after" in fields:
        return plan
    return plan.model_copy(update={"after": left_by(session.model, plan)})


def channels(layers: Sequence[int] = range(LAYERS), kept: int = 32) -> list[KeepChannels]:
    """Other channels in every layer, in the order of the model."""
    return [
        KeepChannels(layer=i, indices=tuple(sorted((7 * j + i) % 48 for j in range(kept))))
        for i in layers
    ]


def heads(layers: Sequence[int] = range(LAYERS)) -> list[KeepHeads]:
    """One KV group of two in every layer."""
    return [KeepHeads(layer=i, kv_groups=(i % 2,)) for i in layers]


def left_by(model: PreTrainedModel, plan: PruningPlan) -> Dimensions:
    """What surgery leaves of a copy of a model."""
    copied = copy.deepcopy(model)
    for step in steps_of(plan):
        basis = None
        if stream_change(step.operations).rotation is not None:
            basis = torch.eye(copied.config.hidden_size, dtype=torch.float64)
        apply_operations(copied, step.operations, basis=basis)
    return DecoderView.of(copied).dimensions()


def session_of(family: str = "llama", layers: int = LAYERS, **settings: Any) -> Session:
    """A session of several batches."""
    model = make_model(family, num_hidden_layers=layers)
    return Session(model, **{"calibration": TOKENS, "batch_tokens": 24, **settings})


def loss(session: Session) -> float:
    """The calibration loss of a session's model, through all its layers, in float64."""
    head = session.view.logits
    with torch.inference_mode():
        parts = [next_token_losses(head, b.final, b.tokens) for b in session.captured()]
    return float(torch.cat([part.flatten() for part in parts]).mean())


def stock_loss(session: Session) -> float:
    """The same as the class itself computes it."""
    with torch.no_grad():
        return float(session.model(TOKENS, labels=TOKENS).loss)
