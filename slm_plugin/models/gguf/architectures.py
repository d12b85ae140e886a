"""The architectures whose GGUF files are read, and what is true of the files of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from slm_plugin.models.families.family import Family
from slm_plugin.models.families.gemma import GEMMA3
from slm_plugin.models.families.llama import LLAMA, QWEN2, QWEN3

_BLOCKS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PRE = {**_BLOCKS, "ffn_norm": "post_attention_layernorm"}
_SANDWICH = {
    **_BLOCKS,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What is true of all files of one architecture.

    Attributes:
        name: Its name, with which its keys begin.
        family: What is true of the stock class.
        modules: Name of a layer's tensor to the module of the stock class.
        paired: Whether queries and keys are stored with the two channels of a pair side by side.
        biases: Config fields that ask for biases, each with the tensors that may have one.
        reads: Keys that only files of this architecture may state, with the architecture's name
            left out.
        changed: Keys of which no value is neutral here, as it is for other architectures.
        local_base: Base of the rotary frequencies of layers with a sliding window, where the file
            states none; None where all layers have one base.
    """

    name: str
    family: Family
    modules: Mapping[str, str]
    paired: bool = False
    biases: Mapping[str, frozenset[str]]
    reads: frozenset[str] = frozenset()
    changed: frozenset[str] = frozenset()
    local_base: float | None = None

    @property
    def norm_offset(self) -> float:
        """What converters add to the weights of norms: the stock class does so when it computes."""
        return self.family.gain_offset


_ATTENTION = {"attention_bias": frozenset({"attn_q", "attn_k", "attn_v", "attn_output"})}
_MLP = {"mlp_bias": frozenset({"ffn_gate", "ffn_up", "ffn_down"})}
ARCHITECTURES = {
    known.name: known
    for known in (
        Architecture(
            name="llama", family=LLAMA, modules=_PRE, paired=True, biases={**_ATTENTION, **_MLP}
        ),
        Architecture(name="qwen2", family=QWEN2, modules=_PRE, biases={}),
        Architecture(name="qwen3", family=QWEN3, modules=_PRE, biases=_ATTENTION),
        Architecture(
            name="gemma3",
            family=GEMMA3,
            modules=_SANDWICH,
            biases=_ATTENTION,
            reads=frozenset(
                {
                    "attention.sliding_window_pattern",
                    "final_logit_softcapping",
                    "rope.freq_base_swa",
                }
            ),
            # The class multiplies embeddings by the root of their width, whatever is stated.
            changed=frozenset({"embedding_scale"}),
            local_base=10_000.0,
        ),
    )
}
