"""Block influence: how much layers change the direction of the hidden state."""

from __future__ import annotations

from collections.abc import Sequence

from slm_plugin.calibration.captures import Batch
from slm_plugin.errors import NumericalError
from slm_plugin.lazy import inference_mode, torch
from slm_plugin.models.view import DecoderView
from slm_plugin.pruners.depth.measures.criteria import token_cosine


@inference_mode
def block_influence(view: DecoderView, captured: Sequence[Batch], span: int = 1) -> list[float]:
    """One minus the mean cosine, over all tokens, of the input and the output of some layers.

    The last layer's output is taken before the final norm, as that of every other layer.

    Args:
        view: The model.
        captured: The inputs of its layers.
        span: Number of consecutive layers per score.

    Returns:
        One number per span, by its lowest layer, from 0 (only the norm changes) to 2.

    Raises:
        NumericalError: A hidden state is NaN or zero.

    Source: ShortGPT (arXiv 2403.03853), equation 1, for one layer.
    """
    total = torch.zeros(len(view.layers) + 1 - span, dtype=torch.float64)
    samples = 0
    for batch in captured:
        for index in range(len(total)):
            before, after = batch.inputs[index], batch.inputs[index + span]
            total[index] += token_cosine(before, after, batch.valid).sum().cpu()
        samples += len(batch.tokens)
    influence = 1 - total / samples
    if not torch.isfinite(influence).all():
        raise NumericalError(
            "the block influence of a layer is NaN",
            hint="load the model in float32 or bfloat16: float16 overflows",
        )
    return influence.tolist()
