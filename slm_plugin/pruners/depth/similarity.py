"""How alike two hidden states are: the criteria that depth strategies compare models by."""

from __future__ import annotations

import torch
from torch import Tensor

from slm_plugin.errors import NumericalError


def flat_cosine(reference: Tensor, hidden: Tensor) -> Tensor:
    """Cosine of each sample's whole hidden state, seen as one vector.

    Args:
        reference: ``(samples, tokens, hidden)``.
        hidden: ``(samples, tokens, hidden)``.

    Returns:
        One cosine a sample, ``(samples,)``, in float64.

    Raises:
        NumericalError: A cosine is NaN.

    Source: released code of SLM (arXiv 2502.19159). This is not a mean of per-token cosines:
    tokens of large norm weigh more.
    """
    x = reference.flatten(1).double()
    y = hidden.flatten(1).double()
    lengths = torch.linalg.vector_norm(x, dim=1) * torch.linalg.vector_norm(y, dim=1)
    cosine: Tensor = (x * y).sum(1) / lengths
    if torch.isnan(cosine).any():
        raise NumericalError(
            "the similarity of a trial is NaN",
            hint="load the model in float32 or bfloat16: float16 overflows",
        )
    return cosine
