"""Read GGUF files through transformers, and mend what its reader loses of the tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_plugin.errors import ModelSourceError
from slm_plugin.extras import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def read_gguf(path: Path, **settings: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Dequantise a GGUF file.

    Args:
        path: The file.
        settings: Passed to ``AutoModelForCausalLM.from_pretrained``, as ``dtype``.

    Raises:
        MissingExtraError: The package ``gguf`` is not installed.
        ModelSourceError: The file is not GGUF or holds an architecture transformers cannot read.
    """
    require("gguf", f"reading {path.name}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, trust_remote_code=False, **settings
        )
        tokenizer = AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelSourceError(
            f"transformers cannot read {path}: {reason}",
            hint="give a GGUF file of a Llama, Mistral, Qwen2 or Qwen3 model",
        ) from error
    # transformers refuses to save a dequantised model that still says it is GGUF.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    return model, mend_tokenizer(tokenizer, path)


def mend_tokenizer(tokenizer: PreTrainedTokenizerBase, path: Path) -> PreTrainedTokenizerBase:
    """Give a byte-level tokenizer the special tokens that its GGUF file states.

    transformers' reader takes the first special token for both BOS and EOS, adds BOS to every
    text even when the file says not to, and lets decoding drop spaces before punctuation.
    """
    from gguf import GGUFReader
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(path).fields

    def stated(name: str) -> Any:
        field = fields.get(f"tokenizer.ggml.{name}")
        return None if field is None else field.contents()

    if stated("model") != "gpt2":
        return tokenizer
    backend = tokenizer.backend_tokenizer
    if not stated("add_bos_token"):
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
    special = {
        role: backend.id_to_token(stated(key))
        for role, key in (
            ("bos_token", "bos_token_id"),
            ("eos_token", "eos_token_id"),
            ("unk_token", "unknown_token_id"),
            ("pad_token", "padding_token_id"),
        )
        if stated(key) is not None
    }
    context = fields.get(f"{fields['general.architecture'].contents()}.context_length")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=tokenizer.chat_template,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **({} if context is None else {"model_max_length": context.contents()}),
        **special,
    )
