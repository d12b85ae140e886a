"""LoRA trains on the loss that everything else here measures, and leaves the model behind."""

from __future__ import annotations

import pytest
import torch

from slm_plugin.errors import NumericalError
from slm_plugin.models.fingerprint import fingerprint
from slm_plugin.recovery.base import RecoveryRecord
from slm_plugin.session import Session
from tests.pruners.depth.strategies import mean_loss
from tests.recovery.pruned import recover
from tests.tiny import make_model, random_tokens

pytest.importorskip("peft")
SAMPLES = random_tokens(6, 12)


def trained(session: Session, **options: object) -> RecoveryRecord:
    """Train on all samples at once, without dropout."""
    return recover("lora", session, **{"batch_size": len(SAMPLES), "dropout": 0.0, **options})


def test_the_loss_is_that_of_the_next_token(family: str) -> None:
    """Adapters change nothing at first: position t is asked for token t + 1, shifted once."""
    model = make_model(family)
    expected = mean_loss(model, SAMPLES)
    record = trained(Session(model, calibration=SAMPLES), epochs=1)
    assert record.losses == pytest.approx([expected], rel=1e-5)


def test_what_is_merged_is_what_was_trained() -> None:
    """The model that stays has learnt: its own loss is below that of the last step."""
    session = Session(make_model(), calibration=SAMPLES)
    record = trained(session, epochs=20, learning_rate=0.01)
    found = mean_loss(session.model, SAMPLES)
    assert found < record.losses[-1] < record.losses[0]
    assert not any("lora" in name for name, _ in session.model.named_parameters())


def test_a_step_has_the_gradient_of_its_own_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no step changes anything that counts, all have the same gradient."""
    norms: list[float] = []
    clip = torch.nn.utils.clip_grad_norm_

    def recorded(parameters: list[torch.Tensor], most: float) -> torch.Tensor:
        norms.append(float(clip(parameters, most)))
        return torch.tensor(norms[-1])

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", recorded)
    trained(Session(make_model(), calibration=SAMPLES), epochs=3, learning_rate=1e-12)
    assert norms[0] > 0 and norms == pytest.approx([norms[0]] * 3, rel=1e-3)


def test_a_loss_that_is_no_number_leaves_the_former_weights() -> None:
    """And no adapter."""
    model = make_model()
    session = Session(model, calibration=SAMPLES)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    names, before = list(model.state_dict()), fingerprint(model)
    with pytest.raises(NumericalError, match="training loss of lora"):
        trained(session)
    assert list(session.model.state_dict()) == names
    assert fingerprint(session.model) == before
