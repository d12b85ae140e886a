"""The session keeps book of what its layers are made of and of what they once saw."""

from __future__ import annotations

import torch

from slm_plugin.pruners.plan import DropLayers, MergeLayers
from slm_plugin.session import Session
from tests.conftest import make_model, random_tokens
from tests.recovery.pruned import remove


def test_layers_know_the_ones_they_are_made_of() -> None:
    """Merges and drops of a second plan are told in layers of the model that was loaded."""
    session = Session(make_model())
    assert session.sources == tuple((index, index) for index in range(6))
    remove(session, MergeLayers(first=1, last=2), DropLayers(indices=(4,)))
    assert session.sources == ((0, 0), (1, 2), (3, 3), (5, 5))
    remove(session, MergeLayers(first=1, last=3))
    assert session.sources == ((0, 0), (1, 5))


def test_the_reference_outlives_surgery() -> None:
    """What the layers saw before the first stage is there after pruning and releasing."""
    session = Session(make_model(), calibration=random_tokens())
    session.keep_reference()
    expected = [batch.inputs[3] for batch in session.captured()]
    remove(session, DropLayers(indices=(1, 2)))
    session.release()
    assert session.reference is not None
    for batch, seen in zip(session.reference, expected, strict=True):
        assert torch.equal(batch.inputs[3], seen)
    assert len(session.captured()[0].inputs) == 5
