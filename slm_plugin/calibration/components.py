"""Principal components of the residual stream on the calibration set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from slm_plugin.calibration.captures import Batch, in_float64, layer_runs, projection_inputs
from slm_plugin.lazy import no_grad, torch
from slm_plugin.models.dimensions import BasisOf
from slm_plugin.models.view import DecoderView

if TYPE_CHECKING:
    from torch import Tensor, nn


def stream_components(
    view: DecoderView, batches: Sequence[Batch], per: BasisOf, kept: int
) -> tuple[Tensor, Tensor]:
    """Shares and eigenvectors of `principal_components`, or of `block_components`.

    Args:
        view: The model.
        batches: Its captured layer inputs.
        per: What has a basis of its own.
        kept: Components that each basis keeps.
    """
    if per == "model":
        return principal_components(view, batches)
    return block_components(view, batches, kept)


@no_grad
def principal_components(view: DecoderView, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """One orthonormal basis for the whole stream, by how much the blocks read along it.

    It is that of the eigenvectors of the summed second moments of what all blocks and the head
    read: the stream divided by its root mean square, as a norm without weights puts it out. Every
    token counts alike, whatever its length.

    Args:
        view: The model, whose blocks read the stream through norms.
        batches: Its captured layer inputs.

    Returns:
        The eigenvalues as shares of their sum, descending, ``(hidden,)``, and the eigenvectors in
        its columns, ``(hidden, hidden)``, float64. In each the entry of greatest size is positive.

    Source: SliceGPT (Ashkboos et al. 2024, arXiv 2401.15024), section 3.3, which has a basis for
        every block and takes the stream itself.
    """
    size = view.embedding.embedding_dim
    moments = torch.zeros((size, size), dtype=torch.float64)
    for states in _read_by_blocks(view, batches):
        tokens = in_float64(states.flatten(0, 1))
        # A token that is 0 has no direction.
        read = tokens / tokens.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30)
        moments += (read.T @ read).cpu()
    return _eigenvectors(moments)


@no_grad
def block_components(
    view: DecoderView, batches: Sequence[Batch], kept: int
) -> tuple[Tensor, Tensor]:
    """A basis of the stream for every block and for the head, each behind the cuts below it.

    Each is that of the eigenvectors of the second moments of the stream that the block receives
    where all blocks below it, and the embedding, keep no more than their first components. The
    weights of the model stay as they are: a block that keeps some components computes what it does
    on the stream's projection on them.

    Args:
        view: The model, whose blocks read the stream through norms, one after the other.
        batches: Its captured layer inputs.
        kept: Components that each basis keeps.

    Returns:
        The eigenvalues as shares of their sum, descending, the mean of all bases, ``(hidden,)``;
        and the bases, each with the eigenvectors in its columns, ``(2 * layers + 1, hidden,
        hidden)``, float64, in the order in which attention, MLP and at last the head read.

    Source: SliceGPT (Ashkboos et al. 2024, arXiv 2401.15024), section 3.3, here with the head's
        basis cut like the others.
    """
    size = view.embedding.embedding_dim
    found: list[tuple[Tensor, Tensor]] = []

    def cut(states: list[Tensor]) -> list[Tensor]:
        moments = torch.zeros((size, size), dtype=torch.float64)
        for tokens in map(in_float64, states):
            moments += torch.einsum("...i,...j->ij", tokens, tokens).cpu()
        found.append(_eigenvectors(moments))
        leading = found[-1][1][:, :kept]
        projection = (leading @ leading.T).to(states[0])
        return [tokens @ projection for tokens in states]

    states = [batch.inputs[0] for batch in batches]
    added = view.residual_multiplier
    for index, layer in enumerate(view.layers):
        mlp, norm = map(layer.get_submodule, view.family.mlp)
        arguments = (batch.arguments[index] for batch in batches)
        runs = zip(cut(states), arguments, strict=True)
        received = cut([seen for seen, _ in projection_inputs(layer, norm, runs)])
        states = [stream + added * mlp(norm(stream)) for stream in received]
    cut(states)
    shares, bases = zip(*found, strict=True)
    return torch.stack(shares).mean(0), torch.stack(bases)


def _eigenvectors(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues as shares of their sum, descending, and eigenvectors in columns."""
    values, vectors = torch.linalg.eigh(moments)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return values / values.sum(), vectors * largest.sign()


def _read_by_blocks(view: DecoderView, batches: Sequence[Batch]) -> Iterator[Tensor]:
    """The stream before every norm, batch by batch, each ``(samples, length, hidden)``."""
    norm = view.family.mlp[1]
    for index, layer in enumerate(view.layers):
        before_mlp: nn.Module = layer.get_submodule(norm)
        for batch, (seen, _) in zip(
            batches, projection_inputs(layer, before_mlp, layer_runs(batches, index)), strict=True
        ):
            yield batch.inputs[index]
            yield seen
    for batch in batches:
        yield batch.inputs[len(view.layers)]
