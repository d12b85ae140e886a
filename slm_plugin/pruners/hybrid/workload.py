"""What a model is used for: lengths, batch and backend that time and memory refer to."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from slm_plugin.evaluation.footprint import cache_bytes_per_token
from slm_plugin.evaluation.prefill import Prompts
from slm_plugin.lazy import torch
from slm_plugin.models.dimensions import Dimensions


class Workload(Prompts):
    """A prompt, the tokens after it, how many of them at once, and what runs the model."""

    backend: Annotated[
        Literal["pytorch", "onnxruntime"], Field(description="what runs the model")
    ] = "pytorch"

    def dtype(self, model: torch.dtype) -> torch.dtype:
        """Number format that a model of this one runs in; an exported graph is float32."""
        return model if self.backend == "pytorch" else torch.float32

    def memory(self, sizes: Dimensions, dtype: torch.dtype) -> int:
        """Bytes of the weights, tied ones once, and of the full KV cache.

        The cache has keys and values of every position in every layer::

            2 * layers * kv_heads * head_dim * batch_size * positions * bytes of a number

        A layer with a sliding window counts like the others, although a cache that forgets what
        lies before the window is smaller. Falcon's new classes, whose cache repeats each
        key/value head for all its query heads, hold more. Activations, buffers and libraries are
        not counted.

        Args:
            sizes: The model.
            dtype: Its number format; `dtype` tells that of the backend.
        """
        positions = self.batch_size * self.positions
        cache = positions * cache_bytes_per_token(sizes, self.dtype(dtype))
        return sizes.parameters * self.dtype(dtype).itemsize + cache
