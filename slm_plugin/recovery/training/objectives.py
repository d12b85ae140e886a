"""Training objectives of a single layer, on hidden states that are read from disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from slm_plugin.calibration.captures import enter, run_layers
from slm_plugin.calibration.spool import Spool
from slm_plugin.lazy import F, torch
from slm_plugin.models.head import next_token_losses

if TYPE_CHECKING:
    from torch import Tensor

    from slm_plugin.session import Session

# The mean loss of samples, given by their indices.
Loss: TypeAlias = "Callable[[Tensor], Tensor]"


def imitation_loss(session: Session, place: int, last: int) -> Loss:
    """Mean squared error of a layer's output against that of the original layers.

    Args:
        session: Holds the model and the reference.
        place: Index of the layer in the present model, which supplies its inputs.
        last: The highest of the original layers that it replaces.

    Returns:
        The mean squared error, over samples, tokens and features.
    """
    view, layer, tokens = session.view, session.view.layers[place], _tokens(session)
    inputs, targets = Spool(), Spool()
    for now, dense in zip(session.captured(), session.reference or (), strict=True):
        _append_each(inputs, now.inputs[place])
        _append_each(targets, dense.inputs[last + 1])
    session.release()

    def loss(samples: Tensor) -> Tensor:
        with torch.no_grad():
            _, arguments = enter(view, tokens[samples].to(view.model.device))
        output = run_layers([layer], _read(inputs, samples), arguments[place])
        return F.mse_loss(output.float(), _read(targets, samples).float())

    return loss


def language_loss(session: Session, place: int) -> Loss:
    """Next-token cross-entropy of the present model, computed from one layer on.

    Args:
        session: Holds the model.
        place: Index of the layer; those below it do not change.

    Returns:
        The mean cross-entropy over samples and tokens, in nats.
    """
    view, tokens = session.view, _tokens(session)
    inputs = Spool()
    for batch in session.captured():
        _append_each(inputs, batch.inputs[place])
    session.release()

    def loss(samples: Tensor) -> Tensor:
        ids = tokens[samples].to(view.model.device)
        with torch.no_grad():
            _, arguments = enter(view, ids)
        hidden = _read(inputs, samples)
        for index in range(place, len(view.layers)):
            hidden = run_layers([view.layers[index]], hidden, arguments[index])
        return next_token_losses(view.logits, view.norm(hidden), ids).mean()

    return loss


def _tokens(session: Session) -> Tensor:
    return torch.cat([tokens.cpu() for tokens in session.batches()])


def _append_each(spool: Spool, states: Tensor) -> None:
    """Store every sample by itself, because training steps read them in random order."""
    for state in states:
        spool.append(state)


def _read(spool: Spool, samples: Tensor) -> Tensor:
    return torch.stack([spool[number] for number in samples.tolist()])
