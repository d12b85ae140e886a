"""The session keeps book of what its layers are made of, and of who may change its model."""

from __future__ import annotations

import copy
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import slm_plugin
from slm_plugin.errors import (
    ContractError,
    NumericalError,
    PlanError,
    UserError,
    VerificationError,
)
from slm_plugin.evaluation.base import Evaluator, Measurement
from slm_plugin.export.base import Exporter, ExportRecord
from slm_plugin.plans import DropLayers, MergeLayers, PruningPlan
from slm_plugin.pruners.base import Pruner
from slm_plugin.pruners.depth.deepest import Deepest
from slm_plugin.recovery.base import Recovery, RecoveryRecord
from slm_plugin.session import Session
from slm_plugin.target import Target
from tests.recovery.pruned import remove
from tests.tiny import make_model, make_tokenizer, random_tokens

Deed = Callable[[Session], object]
# A context that is entered and never left ends with its object: these do not.
LEAKED: list[Any] = []


def session_of(model: PreTrainedModel | None = None) -> Session:
    """A session with all that a component may ask for."""
    return Session(model or make_model(), make_tokenizer(), random_tokens())


def deepest(removed: int = 1) -> Deepest:
    """A strategy that needs nothing."""
    return Deepest(Deepest.Options(), Target(layers_removed=removed))


class Doing(Pruner, Recovery, Evaluator, Exporter):  # type: ignore[misc]
    """A component of every kind that does one thing first, and then what it should."""

    name = "doing"
    kind = "depth"
    operators = False

    def __init__(self, deed: Deed) -> None:
        self.deed = deed

    def plan(self, session: Session) -> PruningPlan:
        """As the deepest layer would have it."""
        made = deepest().plan(session)
        self.deed(session)
        return made

    def recover(self, session: Session) -> RecoveryRecord:
        """Do the deed."""
        self.deed(session)
        return RecoveryRecord(recovery=self.name, options={})

    def measure(self, session: Session) -> list[Measurement]:
        """Do the deed."""
        self.deed(session)
        return [Measurement(name="n", value=1, protocol="p", better="lower")]

    def export(self, session: Session, output: Path) -> ExportRecord:
        """Do the deed."""
        self.deed(session)
        return ExportRecord(exporter=self.name, folder="f", size_bytes=0, checks=())


CALLS: dict[str, Callable[[Session, Doing], object]] = {
    "planning": Session.plan,
    "recovering": Session.recover,
    "measuring": Session.measure,
    "exporting": lambda session, doing: session.export(doing, Path("nowhere")),
}


def scale(session: Session) -> None:
    """Change a weight in the open."""
    with torch.no_grad():
        session.model.model.layers[1].mlp.up_proj.weight.mul_(1.5)


def scale_unseen(session: Session) -> None:
    """Change a weight where no version counter sees it."""
    session.model.model.layers[1].mlp.up_proj.weight.data.mul_(1.5)


def flip_one_sign(session: Session) -> None:
    """Change a single bit of the whole model."""
    session.model.lm_head.weight.detach().numpy().view(np.uint32)[7, 9] ^= 1 << 31


def swap_rows(session: Session) -> None:
    """Change no value, only places."""
    weight = session.model.model.layers[1].mlp.up_proj.weight.data
    weight.copy_(weight.flip(0))


def drop_a_layer(session: Session) -> None:
    """What only surgery may do."""
    del session.model.model.layers[-1]
    session.model.config.num_hidden_layers -= 1


def repeat_a_layer(session: Session) -> None:
    """No part of the model is new, but one stands in two places."""
    session.model.model.layers.append(session.model.model.layers[0])


def alias_a_weight(session: Session) -> None:
    """The same of a parameter."""
    norm = session.model.model.norm
    norm.register_parameter("second", norm.weight)


def narrow(session: Session) -> None:
    """Another shape under the same name."""
    session.model.lm_head.weight = nn.Parameter(torch.zeros(5, 32))


def add_adapter(session: Session) -> None:
    """A module that was not there."""
    session.model.model.layers[0].add_module("adapter", nn.Linear(4, 4).eval())


def wrap(session: Session) -> None:
    """A wrapper in place of the model, as peft's."""
    session.model = nn.Sequential(session.model)  # type: ignore[assignment]


def another(session: Session) -> None:
    """Another model of the same class and sizes."""
    session.model = make_model(seed=5)


def override_forward(session: Session) -> None:
    """A method put in place of the class's, on one module."""
    norm = session.model.model.norm
    norm.forward = lambda states: states


def hook(session: Session) -> None:
    """A hook that nobody takes away."""
    session.model.model.norm.register_forward_hook(lambda *_: None)


def hook_a_parameter(session: Session) -> None:
    """A hook on a gradient."""
    session.model.lm_head.weight.register_post_accumulate_grad_hook(lambda _: None)


def to_half(session: Session) -> None:
    """Another number format."""
    session.model.to(torch.bfloat16)


def untie(session: Session) -> None:
    """The config says otherwise than before."""
    session.model.config.rope_theta = 7.0


def sample(session: Session) -> None:
    """Generation settings."""
    session.model.generation_config.temperature = 0.3


def renumber(session: Session) -> None:
    """Places in the cache."""
    session.model.model.layers[0].self_attn.layer_idx = 3


def rotate(session: Session) -> None:
    """A buffer."""
    session.model.model.rotary_emb.inv_freq.mul_(2)


def edit_tokens(session: Session) -> None:
    """The calibration set of all who come after."""
    session.calibration[0, 0] += 1  # type: ignore[index]


def pad_left(session: Session) -> None:
    """The tokenizer of all who come after."""
    session.tokenizer.padding_side = "left"  # type: ignore[union-attr]


def note_otherwise(session: Session) -> None:
    """The session's own book."""
    session.sources = session.sources[1:]


WEIGHTS = [scale, scale_unseen, flip_one_sign, swap_rows]
BEYOND = [
    drop_a_layer, repeat_a_layer, alias_a_weight, narrow, add_adapter, wrap, override_forward,
    hook, hook_a_parameter, to_half, untie, sample, renumber, rotate, edit_tokens, pad_left,
    note_otherwise,
]  # fmt: skip


def leave_training(session: Session) -> None:
    """Training mode."""
    session.model.model.layers[2].train()


def leave_gradients(session: Session) -> None:
    """A gradient on every weight."""
    session.model(random_tokens(), labels=random_tokens()).loss.backward()


def freeze(session: Session) -> None:
    """Weights that no gradient reaches."""
    session.model.requires_grad_(False)


def no_gradients(_: Session) -> None:
    """Of the process."""
    torch.set_grad_enabled(False)


def inference(_: Session) -> None:
    """Of the process."""
    LEAKED.append(torch.inference_mode())
    LEAKED[-1].__enter__()


def double(_: Session) -> None:
    """Of the process."""
    torch.set_default_dtype(torch.float64)


def threads(_: Session) -> None:
    """Of the process."""
    torch.set_num_threads(torch.get_num_threads() + 1)


def deterministic(_: Session) -> None:
    """Of the process."""
    torch.use_deterministic_algorithms(True, warn_only=True)


def elsewhere(_: Session) -> None:
    """Of the process."""
    os.chdir("/")


def no_output(_: Session) -> None:
    """Of the process."""
    sys.stdout = None  # type: ignore[assignment]


def deaf(_: Session) -> None:
    """Of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


MENDED = {
    elsewhere: "working directory",
    no_output: "standard output",
    deaf: "handler of SIGINT",
    leave_training: "training mode",
    leave_gradients: "gradients",
    freeze: "requires_grad",
    no_gradients: "gradients on or off",
    inference: "inference mode",
    double: "default dtype",
    threads: "number of threads",
    deterministic: "deterministic algorithms",
}


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


@pytest.mark.parametrize("deed", WEIGHTS)
def test_a_plan_is_refused_after_weights_changed(deed: Deed) -> None:
    """By a recovery that says nothing of it, or by the user, and captures are made anew."""
    for change in (lambda s: s.recover(Doing(deed)), deed):
        session = session_of()
        plan, captured = session.plan(deepest()), session.captured()
        change(session)
        with pytest.raises(PlanError, match="made for another model: weights differ"):
            session.apply(plan)
        assert session.captured() is not captured
        session.apply(session.plan(deepest()))
        assert len(session.sources) == 5


def test_a_plan_is_for_bytes_and_not_for_an_object() -> None:
    """It fits a copy, and the model behind a recovery that changed no bit; never twice."""
    session = session_of()
    plan = session.plan(deepest())
    twin = session_of(copy.deepcopy(session.model))
    session.recover(Doing(lambda _: None))
    for each in (session, twin):
        slm_plugin.apply(plan, each)
        with pytest.raises(PlanError, match="weights differ"):
            each.apply(plan)
    assert session.fingerprint() == twin.fingerprint()


def test_layers_changed_by_another_session_are_told() -> None:
    """Of two sessions on one model the one that did not prune it knows nothing of its layers."""
    model = make_model()
    one, other = Session(model), Session(model)
    one.apply(one.plan(deepest()))
    for work in (lambda: other.plan(deepest()), lambda: other.recover(Doing(scale))):
        with pytest.raises(UserError, match="layers changed outside the session"):
            work()
    assert Session(model).plan(deepest()).before.layers == 5


@pytest.mark.parametrize("doing", ["planning", "measuring", "exporting"])
@pytest.mark.parametrize("deed", [*WEIGHTS, *BEYOND, another])
def test_who_may_change_nothing_is_caught(doing: str, deed: Deed) -> None:
    """The error names the component, and the session is unusable."""
    session = session_of()
    with pytest.raises(ContractError, match=rf"^'doing' .* while {doing}") as caught:
        CALLS[doing](session, Doing(deed))
    assert caught.value.exit_code == 1
    for call in CALLS.values():
        with pytest.raises(ContractError, match="unusable: 'doing' "):
            call(session, Doing(lambda _: None))


@pytest.mark.parametrize("deed", BEYOND)
def test_a_recovery_that_changes_more_than_weights_is_caught(deed: Deed) -> None:
    """And so is what it did, by name."""
    session = session_of()
    with pytest.raises(ContractError, match=r"'doing' (changed more|left a Sequential)"):
        session.recover(Doing(deed))
    with pytest.raises(ContractError, match="unusable"):
        session.plan(deepest())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_number_is_told_with_its_name(value: float) -> None:
    """Also one of many; what is large but finite passes."""
    session = session_of()

    def spoil(session: Session) -> None:
        session.model.model.norm.weight.data[3] = value

    with pytest.raises(NumericalError, match=r"'doing' left NaN .* in model\.norm\.weight"):
        session.recover(Doing(spoil))
    with pytest.raises(ContractError, match="unusable"):
        session.plan(deepest())
    Session(make_model()).recover(Doing(lambda s: s.model.lm_head.weight.data.fill_(3e38)))


@pytest.mark.parametrize("error", [NumericalError("no"), ValueError("no"), KeyboardInterrupt()])
def test_what_fails_half_way_makes_the_session_useless(error: BaseException) -> None:
    """Unless the model is as it was; the error itself passes through, an interrupt always."""
    for doing, call in CALLS.items():
        for deed, spoilt in ((scale_unseen, True), (lambda _: None, False)):
            session = session_of()

            def fail(session: Session, deed: Deed = deed) -> None:
                deed(session)
                session.model.train()
                raise error

            expected = type(error)
            if spoilt and doing != "recovering" and isinstance(error, Exception):
                expected = ContractError
            with pytest.raises(expected):
                call(session, Doing(fail))
            assert not any(module.training for module in session.model.modules())
            if spoilt:
                with pytest.raises(ContractError, match="unusable"):
                    session.plan(deepest())
            else:
                session.apply(session.plan(deepest()))


def test_a_plan_that_promises_too_much_leaves_no_half_pruned_session() -> None:
    """Surgery is done by then, and cannot be undone."""
    session = session_of()
    plan = session.plan(deepest())
    false = plan.model_copy(update={"after": plan.before.without_layers(2)})
    with pytest.raises(VerificationError):
        session.apply(false)
    with pytest.raises(ContractError, match="plan by 'deepest' was applied only in part"):
        session.apply(plan)


@pytest.mark.parametrize("doing", sorted(CALLS))
@pytest.mark.parametrize("deed", MENDED, ids=lambda deed: deed.__name__)
def test_what_can_be_put_back_is(
    doing: str, deed: Deed, capsys: pytest.CaptureFixture[str]
) -> None:
    """Modes, gradients and settings of the process are as before, with a line that says so."""
    session = session_of()
    session.model.model.norm.weight.requires_grad_(False)
    kept = session.model.lm_head.weight.grad = torch.ones(128, 32)
    settings = (torch.get_default_dtype(), torch.get_num_threads())
    process = (Path.cwd(), sys.stdout, signal.getsignal(signal.SIGINT))
    CALLS[doing](session, Doing(deed))
    said = capsys.readouterr().err
    assert "'doing' left changed" in said and MENDED[deed] in said
    assert not any(module.training for module in session.model.modules())
    assert session.model.lm_head.weight.grad is kept
    assert [n for n, p in session.model.named_parameters() if p.grad is not None] == [
        "lm_head.weight"
    ]
    frozen = [n for n, p in session.model.named_parameters() if not p.requires_grad]
    assert frozen == ["model.norm.weight"]
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert settings == (torch.get_default_dtype(), torch.get_num_threads())
    assert process == (Path.cwd(), sys.stdout, signal.getsignal(signal.SIGINT))
    assert not torch.are_deterministic_algorithms_enabled()
    session.apply(session.plan(deepest()))


@pytest.mark.parametrize("doing", sorted(CALLS))
def test_every_component_starts_alike(doing: str) -> None:
    """In evaluation mode, with gradients, from the seed; the caller's state comes back."""
    found: list[Any] = []

    def look(session: Session) -> None:
        assert not session.model.training
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        found.append((torch.rand(1).item(), random.random(), np.random.rand()))

    session = session_of()
    for seed in (1, 2):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        session.model.train()
        states = torch.get_rng_state(), random.getstate()
        with torch.no_grad():
            CALLS[doing](session, Doing(look))
            assert not torch.is_grad_enabled()
        assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert found[0] == found[1]


@pytest.mark.parametrize("doing", sorted(CALLS))
def test_what_gives_back_something_else_is_named(doing: str) -> None:
    """None, mostly: a forgotten return."""

    class Nothing(Doing):
        plan = recover = measure = lambda *_: None  # type: ignore[assignment]
        export = lambda *_: None  # type: ignore[assignment]  # noqa: E731

    with pytest.raises(ContractError, match="'doing' gave back a NoneType, not "):
        CALLS[doing](session_of(), Nothing(lambda _: None))


def test_a_new_calibration_set_is_captured_anew() -> None:
    """What was captured of another one is of no use."""
    session = session_of()
    first = session.captured()
    session.calibration = random_tokens(seed=8)
    assert session.captured() is not first


def test_a_model_in_training_mode_is_put_into_evaluation_mode() -> None:
    """At once, as every figure and every plan is of a model without dropout."""
    model = make_model(attention_dropout=0.5).train()
    Session(model)
    assert not any(module.training for module in model.modules())
