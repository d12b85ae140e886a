"""Read a GGUF file into the stock class, and compare the result with a second reading.

transformers has a reader of its own. It fills what is missing with random numbers, drops what it
has no place for, and its two lines differ in both, so neither weights nor tokenizer come from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_plugin.extras import require
from slm_plugin.lazy import nn, torch, transformers
from slm_plugin.models.border import reading
from slm_plugin.models.completeness import check_complete
from slm_plugin.models.empty import empty_model
from slm_plugin.models.families.family import Family
from slm_plugin.models.gguf.metadata import Network, read_network
from slm_plugin.models.gguf.parts import GgufModel, read_parts
from slm_plugin.models.gguf.rope import FREQUENCIES, read_rope
from slm_plugin.models.gguf.tokenizer import make_tokenizer
from slm_plugin.models.gguf.verification import (
    verify_attention,
    verify_rotation,
    verify_tokens,
    verify_weights,
)
from slm_plugin.models.gguf.vocabulary import Vocabulary, read_vocabulary
from slm_plugin.models.gguf.weights import bias_flags, parameter_values, tensor_of
from slm_plugin.models.rope import Rope, rope_fields

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


Accept = Callable[[Family, Mapping[str, Any]], None]


def read_gguf(
    path: Path, dtype: str = "auto", accept: Accept = lambda family, config: None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Dequantise the GGUF file or files of a model; the tokenizer is None if they hold none.

    Args:
        path: The file, or any part of a split one.
        dtype: Number format in memory; ``auto`` is float32.
        accept: Called with the family and the content of the config before any weight is read.

    Raises:
        MissingExtraError: The package ``gguf`` is not installed.
        UnsupportedModelError: The architecture is not supported.
        ModelSourceError: A file is damaged or incomplete, states what the stock class does not
            compute or a tokenizer cannot honour, or a second reading gives something else.
    """
    require("gguf", f"reading {path.name}")
    source = read_parts(path)
    network = read_network(source)
    scaling = read_rope(source, network)
    vocabulary = read_vocabulary(source, network.vocabulary)
    config = _config(source, network, scaling, vocabulary)
    accept(network.architecture.family, config.to_dict())
    wanted = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    model = _filled(source, network, config, wanted)
    verify_weights(source, network, model)
    verify_attention(source, network, model)
    verify_rotation(source, network, scaling, model)
    if vocabulary is None:
        return model, None
    tokenizer = make_tokenizer(vocabulary, network.context)
    verify_tokens(source, vocabulary, tokenizer)
    return model, tokenizer


def _config(
    source: GgufModel,
    network: Network,
    scaling: dict[str, Any] | None,
    vocabulary: Vocabulary | None,
) -> PretrainedConfig:
    """The config of the stock class, spelled for the transformers that is installed."""
    family = network.architecture.family
    kind: Any = getattr(transformers, family.config_name)
    roles = {} if vocabulary is None else vocabulary.roles
    local = None if network.sliding is None else network.sliding.base
    with reading(f"transformers {transformers.__version__} does not take {source.name}"):
        config: PretrainedConfig = kind(
            max_position_embeddings=network.context,
            hidden_size=network.hidden,
            num_hidden_layers=network.layers,
            intermediate_size=network.intermediate,
            num_attention_heads=network.heads,
            num_key_value_heads=network.kv_heads,
            head_dim=network.head_dim,
            vocab_size=network.vocabulary,
            rms_norm_eps=network.epsilon,
            tie_word_embeddings="output.weight" not in source.tensors,
            **{f"{role}_token_id": roles.get(role) for role in ("bos", "eos", "pad")},
            **rope_fields(Rope(network.rope_base, scaling, local_base=local), family),
            **bias_flags(source.tensors, network.architecture),
            **_sliding_fields(network),
        )
    config.architectures = [family.architecture]
    return config


def _sliding_fields(network: Network) -> dict[str, Any]:
    """What the config of a class with two types of attention has besides."""
    if network.sliding is None:
        return {}
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": network.query_width,
        "sliding_window": network.sliding.window,
        "layer_types": list(network.sliding.kinds),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": network.logits_cap,
    }


def _filled(
    source: GgufModel, network: Network, config: PretrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    """A model whose every parameter comes from the file."""
    config.dtype = dtype
    model = empty_model(config, dtype)
    decoder: Any = model.model
    tied = "lm_head.weight" if config.tie_word_embeddings else None
    places = {
        tensor_of(f"{prefix}.{name}", network.architecture): (module, name, parameter)
        for prefix, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if f"{prefix}.{name}" != tied
    }
    check_complete(
        source.name,
        stored={tensor: place.shape for tensor, place in source.tensors.items()},
        wanted={tensor: tuple(parameter.shape) for tensor, (_, _, parameter) in places.items()},
        # With two tables of frequencies, it would not say which one to scale.
        redundant=() if network.sliding else (FREQUENCIES,),
    )
    for tensor, (module, name, _) in places.items():
        values = parameter_values(tensor, source.tensors[tensor], network).to(dtype)
        setattr(module, name, nn.Parameter(values))
    if tied:
        decoder_head: Any = model.lm_head
        decoder_head.weight = decoder.embed_tokens.weight
    return model.eval()
