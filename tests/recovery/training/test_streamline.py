"""Training of replacement layers, against losses written out over whole models."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from slm_plugin import Recipe, run
from slm_plugin.errors import CalibrationError, NumericalError, UserError
from slm_plugin.models.fingerprint import fingerprint
from slm_plugin.plans import DropLayers, MergeLayers
from slm_plugin.recovery.base import RecoveryRecord
from slm_plugin.recovery.training.streamline import StreamlineOptions, StreamlineRecovery
from slm_plugin.session import Session
from tests.pruners.depth.strategies import layer_outputs, make_identity, mean_loss
from tests.recovery.pruned import remove
from tests.tiny import make_checkpoint, make_model, random_tokens

SAMPLES = random_tokens(12, 10)
# Text in which every next token follows from the last: there is something to learn.
COUNTING = 3 + (SAMPLES[:, :1] + torch.arange(10)) % 12
JUDGES = [0, 5, 10]
TEXTS = {"mse": SAMPLES, "lm": COUNTING}
NOTE = re.compile(r"layer (\d+) for layers (\d+) to (\d+): held-out [a-z -]+ (\S+) before, (\S+) ")
ONE_RUN = [MergeLayers(first=2, last=4, rule="keep_low")]
FAST: dict[str, object] = {"learning_rate": 0.003, "epochs": 6, "batch_size": 3}


def pruned(
    model: PreTrainedModel,
    operations: list[MergeLayers | DropLayers],
    *,
    tokens: torch.Tensor = SAMPLES,
    seed: int = 1,
) -> Session:
    """A session whose reference was kept before these operations; two samples a batch."""
    session = Session(model, calibration=tokens, batch_tokens=20, seed=seed)
    session.keep_reference()
    remove(session, *operations)
    return session


def recover(session: Session, **options: object) -> RecoveryRecord:
    """Train with these options, fast unless they say otherwise."""
    return session.recover(StreamlineRecovery(StreamlineOptions(**{**FAST, **options})))  # type: ignore[arg-type]


def told(record: RecoveryRecord) -> dict[int, tuple[float, float]]:
    """Held-out losses before and after by layer, as the notes have them."""
    found = [NOTE.match(note) for note in record.notes]
    return {int(m[1]): (float(m[4]), float(m[5])) for m in found if m}


def error(
    dense: PreTrainedModel,
    short: PreTrainedModel,
    place: int,
    last: int,
    samples: torch.Tensor = SAMPLES[JUDGES],
) -> float:
    """Mean squared difference of a layer's output from the original one's, held-out samples."""
    made = layer_outputs(short, samples)[place + 1]
    return float((made - layer_outputs(dense, samples)[last + 1]).square().mean())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_light_layer_learns_to_imitate_the_run(family: str, attention: str) -> None:
    """Held-out errors are those of whole causal models, before and after, and fall."""
    settings = {"attn_implementation": attention}
    dense, model = make_model(family, **settings), make_model(family, **settings)
    session = pruned(model, ONE_RUN)
    before = error(dense, model, 2, 4)
    record = recover(session)
    after = error(dense, model, 2, 4)
    assert told(record)[2] == pytest.approx((before, after), rel=1e-3)
    assert after < 0.8 * before
    assert len(record.losses) == 6 * 3
    assert sum(record.losses[-3:]) < sum(record.losses[:3])


def test_the_light_layer_learns_the_next_token(family: str) -> None:
    """Held-out losses are the pruned model's own, before and after, and fall."""
    model = make_model(family)
    session = pruned(model, ONE_RUN, tokens=COUNTING)
    before = mean_loss(model, COUNTING[JUDGES])
    record = recover(session, objective="lm")
    after = mean_loss(model, COUNTING[JUDGES])
    assert told(record)[2] == pytest.approx((before, after), rel=1e-3)
    assert after < 0.97 * before


@pytest.mark.parametrize("objective", ["mse", "lm"])
def test_only_the_light_layer_changes(objective: str) -> None:
    """No other bit, no gradient flag and no gradient; the model is in evaluation mode."""
    model = make_model()
    session = pruned(model, ONE_RUN, tokens=TEXTS[objective])
    names = dict(model.named_parameters())
    names["model.layers.0.mlp.up_proj.weight"].requires_grad_(False)
    names["lm_head.weight"].grad = torch.ones_like(names["lm_head.weight"])
    model.model.layers[1].train()
    before = {name: p.detach().clone() for name, p in names.items()}
    flags = [p.requires_grad for p in names.values()]
    layers = list(model.model.layers)
    recover(session, objective=objective)
    assert list(model.model.layers) == layers
    changed = {name for name, p in names.items() if not torch.equal(p, before[name])}
    assert changed and all(name.startswith("model.layers.2.") for name in changed)
    assert [p.requires_grad for p in names.values()] == flags
    assert not any(module.training for module in model.modules())
    grads = [name for name, p in names.items() if p.grad is not None]
    assert grads == ["lm_head.weight"]


def test_what_is_right_already_stays_bit_by_bit() -> None:
    """A real layer below idle ones stands for them from the start: the error is 0."""
    model = make_model()
    make_identity(model, [3, 4])
    session = pruned(model, ONE_RUN)
    before = fingerprint(model)
    record = recover(session)
    assert told(record)[2] == (0, 0)
    assert "no improvement, left untrained" in record.notes[1]
    assert fingerprint(model) == before


@pytest.mark.parametrize("objective", ["mse", "lm"])
def test_a_training_that_harms_is_taken_back(objective: str) -> None:
    """The best state by the held-out loss stays, the untrained one included."""
    model = make_model()
    session = pruned(model, ONE_RUN)
    before = fingerprint(model)
    record = recover(session, objective=objective, learning_rate=30.0, epochs=2)
    assert "no improvement, left untrained" in record.notes[1]
    assert fingerprint(model) == before


def test_an_earlier_epoch_can_be_the_best() -> None:
    """When later epochs only harm, the weights of the best one come back."""
    few = SAMPLES[:3, :6]
    dense, model = make_model(), make_model()
    session = pruned(model, ONE_RUN, tokens=few)
    record = recover(session, learning_rate=0.03, epochs=30)
    epoch = re.search(r"after epoch (\d+), the best", record.notes[1])
    assert epoch is not None and int(epoch[1]) < 30
    after = error(dense, model, 2, 4, few[:1])
    assert told(record)[2][1] == pytest.approx(after, rel=1e-3)


@pytest.mark.parametrize("objective", ["mse", "lm"])
def test_layers_are_trained_from_the_bottom_to_the_top(objective: str) -> None:
    """An upper one sees what lower ones, and a dropped layer, have made of its input."""
    operations = [
        DropLayers(indices=(0,)),
        MergeLayers(first=1, last=2, rule="keep_low"),
        MergeLayers(first=4, last=6),
    ]
    dense, model = make_model(num_hidden_layers=8), make_model(num_hidden_layers=8)
    session = pruned(model, operations, tokens=TEXTS[objective])
    assert session.sources == ((1, 2), (3, 3), (4, 6), (7, 7))
    record = recover(session, objective=objective)
    found = told(record)
    assert list(found) == [0, 2]
    if objective == "mse":
        assert found[0][1] == pytest.approx(error(dense, model, 0, 2), rel=1e-3)
        assert found[2][1] == pytest.approx(error(dense, model, 2, 6), rel=1e-3)
    else:
        assert found[2] == pytest.approx(
            (found[0][1], mean_loss(model, COUNTING[JUDGES])), rel=1e-3
        )
    assert all(after < before for before, after in found.values())
    assert len(record.losses) == 2 * 6 * 3


def test_the_seed_alone_decides(family: str) -> None:
    """Same seed, same bits; another seed, another order and other bits."""
    found = []
    for seed in (1, 1, 2):
        model = make_model(family)
        session = pruned(model, ONE_RUN, seed=seed)
        torch.manual_seed(len(found))
        recover(session, epochs=2)
        found.append(fingerprint(model))
    assert found[0] == found[1] != found[2]


def test_what_later_stages_ask_is_measured_anew() -> None:
    """Captured states and the fingerprint are those of the trained model."""
    model = make_model()
    session = pruned(model, ONE_RUN)
    stale = session.fingerprint()
    recover(session)
    assert session.fingerprint() != stale
    assert torch.equal(session.captured()[0].inputs[3], layer_outputs(model, SAMPLES[:2])[3])


def test_half_precision_learns_too() -> None:
    """Steps smaller than a digit of bfloat16 add up."""
    model = make_model().to(torch.bfloat16)
    session = pruned(model, ONE_RUN)
    record = recover(session, learning_rate=3e-4, epochs=20)
    before, after = told(record)[2]
    assert after < 0.95 * before
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_loss_that_is_no_number_leaves_the_former_weights() -> None:
    """All of them, also of a layer below that was trained already."""
    operations = [
        MergeLayers(first=1, last=2, rule="keep_low"),
        MergeLayers(first=4, last=5, rule="keep_low"),
    ]
    model = make_model()
    session = pruned(model, operations)
    assert session.reference is not None
    for batch in session.reference:
        states = list(batch.inputs)
        states[6].fill_(float("nan"))
        batch.inputs._entries.clear()
        for state in states:
            batch.inputs.append(state)
    before = fingerprint(model)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(NumericalError, match="training loss of streamline"):
        recover(session)
    assert fingerprint(model) == before == session.fingerprint()
    assert [p.requires_grad for p in model.parameters()] == flags


def test_weights_that_overflow_are_refused() -> None:
    """A rate that makes infinities ends in a message, with the weights as they were."""
    model = make_model()
    session = pruned(model, ONE_RUN)
    before = fingerprint(model)
    with pytest.raises(NumericalError, match="streamline is NaN or infinite"):
        recover(session, learning_rate=1e30)
    assert fingerprint(model) == before


def test_the_trained_model_is_causal() -> None:
    """A later token changes nothing before it."""
    model = make_model()
    recover(pruned(model, ONE_RUN))
    other = SAMPLES.clone()
    other[:, 6] = (other[:, 6] + 1) % 100 + 3
    with torch.no_grad():
        same, changed = model(SAMPLES).logits, model(other).logits
    assert torch.allclose(same[:, :6], changed[:, :6], atol=1e-6)
    assert not torch.allclose(same[:, 6:], changed[:, 6:], atol=1e-3)


def test_nothing_to_train_is_said() -> None:
    """Dropped layers leave no replacement layer."""
    session = pruned(make_model(), [DropLayers(indices=(2, 3))])
    with pytest.raises(UserError, match="the model has no replacement layer"):
        recover(session)


@pytest.mark.parametrize("late", [False, True])
def test_a_reference_is_needed_from_before_the_first_stage(late: bool) -> None:
    """Without one, or with one of a model that was pruned already, nothing can be imitated."""
    model = make_model()
    session = Session(model, calibration=SAMPLES)
    remove(session, *ONE_RUN)
    if late:
        session.keep_reference()
    with pytest.raises(UserError, match="before the first stage"):
        recover(session)


def test_one_sample_cannot_both_teach_and_judge() -> None:
    """Two can."""
    with pytest.raises(CalibrationError, match="has fewer than 2"):
        recover(pruned(make_model(), ONE_RUN, tokens=SAMPLES[:1]))
    record = recover(pruned(make_model(), ONE_RUN, tokens=SAMPLES[:2]))
    assert "on 1 samples, 1 more held out" in record.notes[0]


def test_a_recipe_prunes_and_trains(tmp_path: Path, tokens: Path) -> None:
    """The reference is kept before the first stage, through others, and losses are reported."""
    text = f"""\
version: 1
model: {{id: {make_checkpoint(tmp_path / "model")}, dtype: float32, device: cpu}}
calibration: {{source: {tokens}}}
stages:
  - {{prune: sleb, target: {{layers_removed: 1}}}}
  - {{prune: streamline, target: {{layers_removed: 2}}}}
  - {{recover: streamline, learning_rate: 0.003, epochs: 3, batch_size: 2}}
output: {tmp_path / "out"}
"""
    report = run(Recipe.parse(text)).report
    assert report.after.layers == 3
    record = report.stages[2].recovery
    assert record is not None and len(record.losses) == 3 * 2
    assert "held-out mean squared error" in report.stages[2].summary
    assert "held-out mean squared error" in (tmp_path / "out" / "report.html").read_text()


def test_a_run_that_ends_at_the_top_is_imitated_before_the_final_norm() -> None:
    """Its held-out errors are those of the last layer's output, not of the normalised one."""
    operations: list[MergeLayers | DropLayers] = [MergeLayers(first=4, last=5, rule="keep_low")]
    dense, model = make_model(), make_model()
    session = pruned(model, operations)
    before = error(dense, model, 4, 5)
    record = recover(session)
    assert told(record)[4] == pytest.approx((before, error(dense, model, 4, 5)), rel=1e-3)
    assert told(record)[4][1] < 0.9 * before
