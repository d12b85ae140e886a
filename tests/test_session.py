"""The session keeps book of what its layers are made of and of what they once saw."""

from __future__ import annotations

import torch

from slm_plugin.pruners.plan import DropLayers, MergeLayers, PruningPlan
from slm_plugin.session import Session
from slm_plugin.surgery import apply
from slm_plugin.target import Target
from tests.conftest import make_model, random_tokens


def _removed(session: Session, *operations: MergeLayers | DropLayers) -> None:
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


def test_layers_know_the_ones_they_are_made_of() -> None:
    """Merges and drops of a second plan are told in layers of the model that was loaded."""
    session = Session(make_model())
    assert session.sources == tuple((index, index) for index in range(6))
    _removed(session, MergeLayers(first=1, last=2), DropLayers(indices=(4,)))
    assert session.sources == ((0, 0), (1, 2), (3, 3), (5, 5))
    _removed(session, MergeLayers(first=1, last=3))
    assert session.sources == ((0, 0), (1, 5))


def test_the_reference_outlives_surgery() -> None:
    """What the layers saw before the first stage is there after pruning and releasing."""
    session = Session(make_model(), calibration=random_tokens())
    session.keep_reference()
    expected = [batch.inputs[3] for batch in session.captured()]
    _removed(session, DropLayers(indices=(1, 2)))
    session.release()
    assert session.reference is not None
    for batch, seen in zip(session.reference, expected, strict=True):
        assert torch.equal(batch.inputs[3], seen)
    assert len(session.captured()[0].inputs) == 5
