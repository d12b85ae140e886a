"""What a single layer can be trained for, on hidden states that are read from disk step by step."""

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

# The mean loss of some samples, given by their numbers.
Loss: TypeAlias = "Callable[[Tensor], Tensor]"


def imitation_loss(session: Session, place: int, last: int) -> Loss:
    """How far a layer is from what the original layers made of the same samples.

    Args:
        session: Gives the model, and what its layers saw before the first stage.
        place: The layer, in the model as it is now. It sees what this model shows it.
        last: The highest of the original layers that it stands for.

    Returns:
        The mean squared error, over samples, tokens and features.
    """
    view, layer, tokens = session.view, session.view.layers[place], _tokens(session)
    seen, wanted = Spool(), Spool()
    for now, once in zip(session.captured(), session.reference or (), strict=True):
        _append_each(seen, now.inputs[place])
        _append_each(wanted, once.inputs[last + 1])
    session.release()

    def loss(samples: Tensor) -> Tensor:
        with torch.no_grad():
            _, arguments = enter(view, tokens[samples].to(view.model.device))
        made = run_layers([layer], _read(seen, samples), arguments[place])
        return F.mse_loss(made.float(), _read(wanted, samples).float())

    return loss


def language_loss(session: Session, place: int) -> Loss:
    """How badly the model as it is now foretells the next token, from one layer on.

    Args:
        session: Gives the model.
        place: The layer: those below it do not change.

    Returns:
        The mean cross entropy over samples and tokens, in nats.
    """
    view, tokens = session.view, _tokens(session)
    seen = Spool()
    for batch in session.captured():
        _append_each(seen, batch.inputs[place])
    session.release()

    def loss(samples: Tensor) -> Tensor:
        ids = tokens[samples].to(view.model.device)
        with torch.no_grad():
            _, arguments = enter(view, ids)
        hidden = _read(seen, samples)
        for index in range(place, len(view.layers)):
            hidden = run_layers([view.layers[index]], hidden, arguments[index])
        return next_token_losses(view.head, view.norm(hidden), ids).mean()

    return loss


def _tokens(session: Session) -> Tensor:
    return torch.cat([tokens.cpu() for tokens in session.batches()])


def _append_each(spool: Spool, states: Tensor) -> None:
    """Keep the states of every sample by themselves: steps read samples in another order."""
    for state in states:
        spool.append(state)


def _read(spool: Spool, samples: Tensor) -> Tensor:
    return torch.stack([spool[number] for number in samples.tolist()])
