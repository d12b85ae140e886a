"""A stock model without memory for its weights, which a reader then fills."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from slm_plugin.lazy import nn, torch, transformers
from slm_plugin.models.families import family_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def empty_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The stock class of a config, with its parameters on the meta device.

    Buffers have values: rotary frequencies and factors are computed from the config.
    """
    (architecture,) = config.architectures
    auto_class = family_of(architecture).auto_class
    with _parameters_on_meta():
        model: PreTrainedModel = getattr(transformers, auto_class).from_config(
            config,
            dtype=dtype,
            trust_remote_code=False,
            attn_implementation=config._attn_implementation or "sdpa",
        )
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    plain = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        plain(module, name, parameter)
        if parameter is not None:
            stub = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
            module._parameters[name] = stub

    cast(Any, nn.Module).register_parameter = register
    try:
        yield
    finally:
        cast(Any, nn.Module).register_parameter = plain
