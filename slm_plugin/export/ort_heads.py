"""Open a pruned ONNX model: head count and head size come from the graph, not from a guess.

``ORTModelForCausalLM`` of optimum-onnx 0.1 takes hidden_size / num_attention_heads for the head
size of most families, whatever ``config.head_dim`` says (optimum issue 2379). Once heads are
pruned that is another number, and the first call dies with "Got: 12 Expected: 8". No honest
config.json avoids it, as only those two fields are read. The guess is used for nothing but the
empty cache of the first call, though, so that it can be corrected after loading, also without
this package::

    model = ORTModelForCausalLM.from_pretrained(folder)
    model.embed_size_per_head = model.config.head_dim
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from slm_plugin.errors import MissingExtraError
from slm_plugin.extras import found_version, require

if TYPE_CHECKING:
    from optimum.onnxruntime import ORTModelForCausalLM


def load_ort_model(folder: Path) -> ORTModelForCausalLM:
    """Open an exported decoder with ONNX Runtime on the CPU, with or without cache.

    Args:
        folder: What the ``onnx`` exporter, or Optimum, wrote.

    Raises:
        MissingExtraError: Optimum or ONNX Runtime is missing, or does not fit transformers.
    """
    require_onnx("load_ort_model")
    from optimum.onnxruntime import ORTModelForCausalLM

    model = ORTModelForCausalLM.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    if model.can_use_cache:
        take_heads_from_graph(model)
    else:
        model.config.use_cache = model.generation_config.use_cache = False
    return model


def take_heads_from_graph(model: ORTModelForCausalLM) -> None:
    """Correct the shape of the empty cache to what the graph's cache inputs declare.

    Those are ``(batch, heads, past tokens, head size)`` with numbers for heads and head size.
    """
    shape = model.input_shapes[model.key_value_input_names[0]]
    if len(shape) == 4:
        _, heads, _, size = shape
        model.num_key_value_heads, model.embed_size_per_head = int(heads), int(size)


def require_onnx(wanted_by: str) -> None:
    """Make sure that Optimum is there and fits the installed transformers.

    Raises:
        MissingExtraError: It is missing or cannot be imported.
    """
    require("onnx", wanted_by)
    try:
        import optimum.onnxruntime  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"{wanted_by} cannot import optimum-onnx {found_version('optimum-onnx')} beside "
            f"transformers {found_version('transformers')}: {str(error).splitlines()[0]}",
            hint="pip install 'slm-plugin[onnx]' in an environment of its own",
        ) from error
