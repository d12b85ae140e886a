"""Tiny random models of every supported architecture, a tokenizer, and the command line.

Kept out of conftest.py: the process that hands the tests to others would import PyTorch too.
"""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, masking_utils, modeling_utils

from slm_plugin import cli
from slm_plugin.cli import writing
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.models.families import gemma, gpt, llama, moe, olmo, others, towers
from slm_plugin.models.families.family import Family

# Tiny models spend more time waking threads than computing.
torch.set_num_threads(1)


def broadcast_mask(rule: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The mask of a rule over (batch, heads, queries, keys), by one call with all its indices."""
    return lambda *axes: rule(*torch.meshgrid(*axes, indexing="ij"))


# transformers 4 makes a mask by four nested `vmap`, which take longer than the layers of a tiny
# model. Release 5 broadcasts too. Processes of their own keep what transformers has.
RELEASE_4 = transformers.__version__.startswith("4.")
if RELEASE_4:
    masking_utils._vmap_for_bhqkv = broadcast_mask
    masking_utils.TransformGetItemToIndex = nullcontext

# A short name of each family: its record, and what a tiny model of it has besides the common sizes.
FAMILIES: dict[str, tuple[Family, dict[str, Any]]] = {
    "llama": (llama.LLAMA, {}),
    "mistral": (llama.MISTRAL, {}),
    "qwen2": (llama.QWEN2, {}),
    "qwen3": (llama.QWEN3, {}),
    "smollm3": (llama.SMOLLM3, {"no_rope_layer_interval": 3}),
    "granite": (
        llama.GRANITE,
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.4,
            "logits_scaling": 0.8,
        },
    ),
    "gemma2": (
        gemma.GEMMA2,
        {
            "sliding_window": 8,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 5.0,
            "attn_implementation": "eager",
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        gemma.GEMMA3,
        {"sliding_window": 8, "query_pre_attn_scalar": 8, "sliding_window_pattern": 3},
    ),
    "olmo2": (olmo.OLMO2, {}),
    "olmo3": (olmo.OLMO3, {"sliding_window": 8, "rope_theta": 500_000.0}),
    "stablelm": (others.STABLELM, {"use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "stablelm_parallel": (
        others.STABLELM,
        {"use_parallel_residual": True, "partial_rotary_factor": 0.5},
    ),
    "phi3": (others.PHI3, {}),
    "gpt_neox": (gpt.GPT_NEOX, {"rotary_pct": 0.5, "num_key_value_heads": None}),
    "gpt_neox_sequential": (
        gpt.GPT_NEOX,
        {"use_parallel_residual": False, "num_key_value_heads": None},
    ),
    "opt": (gpt.OPT, {"word_embed_proj_dim": 32, "num_key_value_heads": None}),
    "gpt2": (gpt.GPT2, {"n_inner": 48, "num_key_value_heads": None}),
    "mixtral": (moe.MIXTRAL, {"num_local_experts": 4}),
    "qwen2_moe": (
        moe.QWEN2_MOE,
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "qwen3_moe": (
        moe.QWEN3_MOE,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
    "gpt_oss": (
        moe.GPT_OSS,
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "rope_scaling": None,
            "rope_theta": 150_000.0,
        },
    ),
    "falcon_sequential": (
        gpt.FALCON,
        {
            "ffn_hidden_size": 48,
            "new_decoder_architecture": False,
            "parallel_attn": False,
            "alibi": True,
        },
    ),
    "falcon": (gpt.FALCON, {"ffn_hidden_size": 48, "new_decoder_architecture": True}),
    "gemma3_tower": (
        towers.GEMMA3_TOWER,
        {"sliding_window": 8, "query_pre_attn_scalar": 8, "sliding_window_pattern": 3},
    ),
    "qwen3_vl": (
        towers.QWEN3_VL,
        {
            "rope_theta": 1_000_000.0,
            "rope_scaling": {
                "rope_type": "default",
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            },
        },
    ),
    "llava": (towers.LLAVA, {"model_type": "llama"}),
}
# What a tiny model of images and text has around its text: the token of an image is 0.
_SEEING = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
AROUND: dict[str, dict[str, Any]] = {
    "gemma3_tower": {
        "vision_config": {**_SEEING, "vision_use_head": False},
        "mm_tokens_per_image": 4,
        "image_token_index": 0,
    },
    "qwen3_vl": {
        "vision_config": {
            "depth": 3,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        "image_token_id": 0,
        "video_token_id": 1,
        "vision_start_token_id": 126,
        "vision_end_token_id": 125,
    },
    "llava": {
        "vision_config": {**_SEEING, "image_size": 8, "projection_dim": 16},
        "image_token_index": 0,
        "image_seq_length": 4,
    },
}
IMAGE = 4
VOCABULARY = 128
# SmolLM2-135M, by its published sizes.
SMOLLM2 = Dimensions(
    architecture="LlamaForCausalLM",
    layers=30,
    hidden_size=576,
    intermediate_size=1536,
    attention_heads=9,
    kv_heads=3,
    head_dim=64,
    vocab_size=49152,
    tied_embeddings=True,
    parameters=134_515_008,
    layer_parameters=3_540_096,
    channel_parameters=3 * 576,
    kv_group_parameters=8 * 576 * 64,
    query_head_parameters=2 * 576 * 64,
    stream_vectors=2,
)
ModelFactory = Callable[..., PreTrainedModel]


def make_model(family: str = "llama", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny random model with norm gains and biases that are not trivially 1 and 0."""
    record, own = FAMILIES[family]
    model_class = getattr(transformers, record.architecture)
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        **own,
    }
    settings = {
        record.own_name(name): value
        for name, value in {**settings, **overrides}.items()
        if record.names.get(name, name) is not None
        and (value is not None or name != "num_key_value_heads")
        and (record.own_head_dim or name != "head_dim")
    }
    # Not `torch.manual_seed`, which records the stack, deep in a test, for each kind of device.
    torch.default_generator.manual_seed(seed)
    if record.tower is not None:
        tied = settings["tie_word_embeddings"]
        settings = {"text_config": settings, "tie_word_embeddings": tied, **AROUND[family]}
        settings = copy.deepcopy(settings)
    # Every weight is written below. Release 5 makes buffers too where it initialises weights.
    with modeling_utils.no_init_weights() if RELEASE_4 else nullcontext():
        model = model_class(model_class.config_class(**settings)).eval()
    model.tie_weights()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or ".ln_" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1, generator=generator)
            else:
                # Large enough that every layer matters and greedy tokens are not ties.
                parameter.normal_(0, 0.15, generator=generator)
    return model


def make_image(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A text with an image in its middle, as the class's processor would prepare it."""
    generator = torch.Generator().manual_seed(5)
    before, after = random_tokens(1, 5, seed=1) % 100 + 3, random_tokens(1, 9, seed=2) % 100 + 3
    edges = torch.tensor([[126]]), torch.tensor([[125]])
    tokens = torch.cat([before, edges[0], torch.zeros(1, IMAGE).long(), edges[1], after], dim=1)
    given = {"input_ids": tokens}
    if model.config.model_type == "qwen3_vl":
        given["image_grid_thw"] = torch.tensor([[1, 4, 4]])
        if not RELEASE_4:
            given["mm_token_type_ids"] = (tokens == 0).long()
        return {**given, "pixel_values": torch.randn(16, 96, generator=generator)}
    if model.config.model_type == "gemma3":
        given["token_type_ids"] = (tokens == 0).long()
    side = model.config.vision_config.image_size
    return {**given, "pixel_values": torch.randn(1, 3, side, side, generator=generator)}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the tiny vocabulary: ``w3`` to ``w127``."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
    )


def make_checkpoint(folder: Path, **overrides: Any) -> Path:
    """A tiny Llama with its tokenizer, on disk."""
    make_model(**overrides).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def random_tokens(samples: int = 4, length: int = 16, *, seed: int = 7) -> torch.Tensor:
    """Token ids, ``(samples, length)``, without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (samples, length), generator=generator)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in this process, because a new one takes seconds to import PyTorch."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as exited,
    ):
        patch.setattr(sys, "argv", ["slm-plugin", *arguments])
        patch.setattr(writing, "quiet_libraries", lambda: None)
        patch.setenv("COLUMNS", "200")
        cli.main()
    assert isinstance(exited.value.code, int)
    return subprocess.CompletedProcess(arguments, exited.value.code, out.getvalue(), err.getvalue())
