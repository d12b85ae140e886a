"""Principal components of the residual stream on the calibration set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from slm_plugin.calibration.captures import Batch, in_float64, layer_runs, projection_inputs
from slm_plugin.lazy import no_grad, torch
from slm_plugin.models.view import DecoderView

if TYPE_CHECKING:
    from torch import Tensor, nn


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
        moments += moments_read(states).cpu()
    values, vectors = torch.linalg.eigh(moments)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return values / values.sum(), vectors * largest.sign()


def moments_read(states: Tensor) -> Tensor:
    """Second moments of what a norm without weights puts out, ``(hidden, hidden)``, float64.

    Args:
        states: ``(samples, length, hidden)``.
    """
    tokens = in_float64(states.flatten(0, 1))
    # A token that is 0 has no direction.
    read = tokens / tokens.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30)
    return read.T @ read


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
