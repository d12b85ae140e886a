"""A record of a class that nobody has described, where a check shows that layers can go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from slm_plugin.errors import SlmError, UnsupportedModelError
from slm_plugin.foreign import contained
from slm_plugin.lazy import nn, no_grad, torch
from slm_plugin.models.families import families, register_family
from slm_plugin.models.families.family import Family
from slm_plugin.models.state import changes, in_words, state_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

WHY = "its family is not listed"


@no_grad
def describe(model: PreTrainedModel) -> Family:
    """Make and register the record of a model whose class is unknown.

    It must have one list of layers of one class, which take and give hidden states; leaving a layer
    out of the list must be the same, to the last bit, as passing its input through; the final norm
    and the head, applied to what the last layer gives, must be the model's logits; and a forward
    pass must leave the model as it was.

    Args:
        model: The model, in memory; it is left as it was.

    Raises:
        UnsupportedModelError: It is not such a model.
    """
    training = model.training
    model.eval()
    try:
        with contained("its layers cannot be run alone", UnsupportedModelError):
            return register_family(_checked(model))
    except SlmError as error:
        raise UnsupportedModelError(
            f"architecture {type(model).__name__} is not supported: {error.message}",
            hint="supported: " + ", ".join(sorted(f.architecture for f in families())),
        ) from error
    finally:
        model.train(training)


def _checked(model: PreTrainedModel) -> Family:
    prefix = model.base_model_prefix
    decoder: Any = getattr(model, prefix, None)
    if decoder is None or decoder is model:
        raise UnsupportedModelError("it has no decoder beside its head")
    layers = _layers(model, decoder)
    stack = decoder.get_submodule(layers)
    tokens = torch.arange(3, 11, device=model.device).view(2, 4) % model.config.vocab_size
    logits = model(input_ids=tokens, use_cache=False).logits
    before = state_of(model)
    family = Family(
        architecture=type(model).__name__,
        model_type=model.config.model_type,
        listed=False,
        decoder=prefix,
        layers=layers,
        norm=_norm(model, decoder, stack, tokens, logits),
        projections={},
        units=(),
        no_fit=WHY,
        why_not={"channels": WHY, "kv_groups": WHY},
    )
    for index in sorted({0, len(stack) // 2, len(stack) - 1}):
        if not _is_skipping(model, decoder, layers, index, tokens):
            raise UnsupportedModelError(f"leaving out layer {index} is not skipping it")
    if changed := changes(before, state_of(model)):
        raise UnsupportedModelError(f"its forward pass changes {in_words(changed)}")
    return family


def _layers(model: PreTrainedModel, decoder: nn.Module) -> str:
    """Name of the one list of layers."""
    found = [
        name
        for name, module in decoder.named_children()
        if isinstance(module, nn.ModuleList)
        and len(module) == model.config.num_hidden_layers
        and len({type(layer) for layer in module}) == 1
    ]
    if len(found) != 1 or model.config.num_hidden_layers < 2:
        raise UnsupportedModelError("it has no single list of layers of one class")
    return found[0]


def _norm(
    model: PreTrainedModel, decoder: nn.Module, stack: nn.ModuleList, tokens: Tensor, logits: Tensor
) -> str:
    """Name of the norm between the last layer and the head."""
    output = _output(model, stack[-1], tokens)
    last = output[0] if isinstance(output, tuple) else output
    if last.shape != (*tokens.shape, model.config.hidden_size):
        raise UnsupportedModelError("its layers give no hidden states")
    head: Any = model.get_output_embeddings()
    for name, module in decoder.named_children():
        if isinstance(module, nn.ModuleList | nn.Embedding | nn.Dropout):
            continue
        try:
            found = head(module(last))
        except Exception:
            # Any module may be here, and this one takes no hidden states.
            continue
        if torch.equal(found, logits):
            return name
    raise UnsupportedModelError("its logits are not the head of a norm of the last layer's output")


def _output(model: PreTrainedModel, layer: nn.Module, tokens: Tensor) -> Any:
    """What a layer puts out in a forward pass of its model."""
    seen: list[Any] = []
    hook = layer.register_forward_hook(lambda layer, given, output: seen.append(output))
    try:
        model(input_ids=tokens, use_cache=False)
    finally:
        hook.remove()
    return seen[0]


def _is_skipping(
    model: PreTrainedModel, decoder: nn.Module, layers: str, index: int, tokens: Tensor
) -> bool:
    """Whether the list without a layer gives what the list with the layer's input gives."""
    from slm_plugin.models.torch_subclasses import Listener

    stack = getattr(decoder, layers)
    count = model.config.num_hidden_layers
    boxed = isinstance(_output(model, stack[index], tokens), tuple)
    passing = Listener(stack[index], boxed=boxed)
    outputs = []
    try:
        for shorter in (False, True):
            kept = list(_without(stack, index, None if shorter else passing))
            setattr(decoder, layers, nn.ModuleList(kept))
            model.config.num_hidden_layers = len(kept)
            outputs.append(model(input_ids=tokens, use_cache=False).logits)
    finally:
        setattr(decoder, layers, stack)
        model.config.num_hidden_layers = count
    return torch.equal(*outputs)


def _without(stack: nn.ModuleList, index: int, instead: nn.Module | None) -> Iterator[nn.Module]:
    for place, layer in enumerate(stack):
        if place != index:
            yield layer
        elif instead is not None:
            yield instead
