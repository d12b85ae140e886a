"""What plans do to the residual stream: rotate it, and remove channels of it.

Rotated into another orthonormal basis, the model computes the same.

With Q orthogonal, x Q in place of x passes through a norm without weights as x does, because its
length is the same. So the weights of norms are first multiplied into the maps that read them; then
what reads the stream is multiplied by Q, and what writes to it by Q transposed. Where each block
has a Q of its own, it writes in the basis of the next, into which an operator turns the stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from slm_plugin.errors import PlanError
from slm_plugin.lazy import nn, torch
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.models.operators import put_shortcut
from slm_plugin.models.streaming import is_streamed
from slm_plugin.models.view import DecoderView
from slm_plugin.plans.stream import StreamChange
from slm_plugin.surgery.hidden import coupled, keep_hidden

if TYPE_CHECKING:
    from torch import Tensor


def change_stream(
    view: DecoderView, change: StreamChange, basis: Tensor | None, after: Dimensions
) -> None:
    """Rotate the residual stream, or remove channels of it, or both in this order.

    Args:
        view: The model, changed in place. Its class allows it: `Family.hidden_channels`.
        change: What is done.
        basis: The basis of a rotation, ``(hidden, hidden)``; or, for operators at every block,
            those of all blocks and of the head, ``(2 * layers + 1, hidden, hidden)``.
        after: Dimensions of the result.

    Raises:
        PlanError: The layers are read from disk one at a time, or there is no basis.
    """
    if is_streamed(view.model):
        raise PlanError(
            "a change of the residual stream is one of every weight, and these are read from "
            "disk one layer at a time",
            hint="apply the plan without `memory: layerwise`",
        )
    if change.rotation is not None:
        if basis is None:
            raise PlanError(
                "the plan rotates the residual stream, and there is no basis",
                hint="apply it through a session with the calibration set that it was made with",
            )
        rotate_stream(view, basis)
    if change.kept is not None:
        keep_hidden(view, change.kept, after)
    if basis is not None and basis.dim() == 3:
        _turn_between(view, stream_basis(change, basis.shape[-1], basis))


def rotate_stream(view: DecoderView, basis: Tensor) -> None:
    """Rotate the residual stream of the whole model.

    The head is untied from the embedding, because it alone takes the last norm's weights.

    Args:
        view: The model, changed in place. Its class allows it: `Family.hidden_channels`.
        basis: Orthonormal columns, ``(hidden, hidden)``, float64; or a basis for every block and
            one for the head, ``(2 * layers + 1, hidden, hidden)``. Operators from one to the next
            are not inserted here.

    Source: SliceGPT (Ashkboos et al. 2024, arXiv 2401.15024), section 3.2, whose every block has a
        basis.
    """
    _untie(view)
    with torch.no_grad():
        for norm, readers in _readers(view):
            gain = norm.get_parameter("weight")
            for linear in readers:
                linear.weight.copy_(linear.weight.double() * gain.double())
            gain.fill_(1.0)
        for one in coupled(view):
            if one.place is None:
                continue
            weight = one.parameter
            turn = (basis if basis.dim() == 2 else basis[one.place]).to(weight.device)
            if one.axis == 1:
                weight.copy_(weight.double() @ turn)
            else:
                weight.copy_(turn.T @ weight.double())


def _turn_between(view: DecoderView, bases: Tensor) -> None:
    """Let every block turn the stream from its basis into that of the next.

    Args:
        view: The model, whose blocks read and write in these bases; changed in place.
        bases: ``(2 * layers + 1, hidden, channels)``.
    """
    family = view.family
    turns = (here.T @ above for here, above in pairwise(bases))
    for layer in view.layers:
        for block, norm in (family.attention, family.mlp):
            put_shortcut(layer, block, norm, next(turns), view.residual_multiplier)


def _untie(view: DecoderView) -> None:
    """Give the head weights of its own."""
    if not view.tied:
        return
    former = view.embedding.weight
    view.head.weight = nn.Parameter(former.detach().clone(), requires_grad=former.requires_grad)
    view.model.config.tie_word_embeddings = False


def _readers(view: DecoderView) -> Iterator[tuple[nn.Module, list[nn.Linear]]]:
    """Every norm of the stream with the maps that read what it puts out."""
    family = view.family
    for layer in view.layers:
        modules = view.projections(layer)
        for (_, norm), names in (
            (family.attention, ("q_proj", "k_proj", "v_proj")),
            (family.mlp, ("gate_proj", "up_proj")),
        ):
            read = [m for name, m in modules.items() if family.parts(name)[0] in names]
            yield layer.get_submodule(norm), read
    yield view.norm, [view.head]


def stream_basis(change: StreamChange, hidden: int, basis: Tensor | None) -> Tensor:
    """The channels of the changed stream as vectors in the former one, ``(hidden, channels)``.

    With a basis for every block, those of each and of the head, ``(2 * layers + 1, hidden,
    channels)``.

    Args:
        change: What was done.
        hidden: Channels of the former stream.
        basis: The basis of a rotation, or all of them.
    """
    whole = torch.eye(hidden, dtype=torch.float64) if basis is None else basis
    return whole if change.kept is None else whole[..., list(change.kept)]
