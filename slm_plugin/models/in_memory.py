"""Checks of a model and a tokenizer that a caller passes, before anything is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slm_plugin.errors import UnsupportedModelError, UserError
from slm_plugin.lazy import nn, transformers
from slm_plugin.models.families import is_known
from slm_plugin.models.families.unlisted import describe
from slm_plugin.models.streaming import is_streamed
from slm_plugin.models.view import DecoderView
from slm_plugin.progress import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Packages whose modules stand in the layers of stock classes.
STOCK = ("torch", "transformers")


def check_given(model: object, tokenizer: object, stack: str | None = None) -> None:
    """Check that a model and its tokenizer are such, and that the model can be pruned.

    Args:
        model: What was passed as the model.
        tokenizer: What was passed as its tokenizer, or None.
        stack: Which of its two stacks of layers, where it has two.

    Raises:
        UserError: One of them is of another type, the weights are not in memory, or the model has
            no such stack.
        UnsupportedModelError: The class is not supported, or modules of a layer were replaced.
    """
    if not isinstance(model, transformers.PreTrainedModel):
        if type(model).__module__.partition(".")[0] == "peft":
            raise UnsupportedModelError(
                "the model has adapters, which pruning cannot cut along",
                hint="merge them first: model = model.merge_and_unload()",
            )
        raise UserError(
            f"the model is of type {type(model).__name__}, not a model of transformers",
            hint="load it with AutoModelForCausalLM.from_pretrained",
        )
    if tokenizer is not None and not isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
        raise UserError(
            f"the tokenizer is of type {type(tokenizer).__name__}, not a tokenizer of transformers",
            hint="load it with AutoTokenizer.from_pretrained, or pass None",
        )
    _check_plain(model, stack)


def _check_plain(model: PreTrainedModel, stack: str | None) -> None:
    """Check that the model's weights are in memory and its modules those of its stock class.

    Raises:
        UserError: Weights are on the meta device.
        UnsupportedModelError: The class is not supported, or a linear map or the embedding was
            replaced, as adapters, quantisation and parametrisations do.
    """
    # The weights of a streamed model are read when they are used.
    if not is_streamed(model) and any(weight.is_meta for weight in model.parameters()):
        raise UserError(
            "weights of the model are on the meta device, without values",
            hint="load the model with its weights",
        )
    _check_class(model)
    view = DecoderView.of(model, stack)
    if view.family.by_tensors:
        _check_whole_layers(view)
        return
    config = view.config
    if getattr(config, "attn_logit_softcapping", None) and config._attn_implementation == "sdpa":
        say(
            "warning: the model computes attention by sdpa, which leaves out its "
            "attn_logit_softcapping; load it with attn_implementation='eager'"
        )
    for place, found, stock in _modules(view):
        kind = type(found)
        # Some families have an embedding of their own, as Gemma 3's, which scales.
        own = kind.__module__ == type(model).__module__ and issubclass(kind, stock)
        if kind is not stock and not own:
            raise UnsupportedModelError(
                f"{place} is a {kind.__module__}.{kind.__qualname__}, not a {stock.__name__} of "
                "PyTorch",
                hint="merge adapters first (merge_and_unload), and load weights unquantised",
            )


def _check_class(model: PreTrainedModel) -> None:
    """Check that what is known of the class by its name holds for it.

    Raises:
        UnsupportedModelError: Another class has the name of one of transformers, or no record holds
            for it and none can be made.
    """
    found, name = type(model), type(model).__name__
    stock = getattr(transformers, name, None)
    if stock is not None and found is not stock:
        raise UnsupportedModelError(
            f"the model is a {found.__module__}.{found.__qualname__}, which is not the {name} of "
            "transformers",
            hint="load it without trust_remote_code, or give a class of your own a name of its own",
        )
    # A record that was made from another model of the class may not hold for this one.
    if not is_known(name):
        describe(model)


def _check_whole_layers(view: DecoderView) -> None:
    """Check an encoder: its settings, and that nobody replaced a module of its layers.

    Raises:
        ModelSourceError: A setting is not supported.
        UnsupportedModelError: A module of a layer is of another library.
    """
    settings = view.config.to_dict()
    for name, check in view.family.fields.items():
        if name in settings:
            check(f"{name} of the model's config", settings[name])
    for index, layer in enumerate(view.layers):
        for name, module in layer.named_modules():
            kind = type(module)
            if kind.__module__.partition(".")[0] not in STOCK:
                raise UnsupportedModelError(
                    f"{name or 'all'} of layer {index} is a {kind.__module__}.{kind.__qualname__}, "
                    "no module of PyTorch or transformers",
                    hint="merge adapters first (merge_and_unload), and load weights unquantised",
                )


def _modules(view: DecoderView) -> list[tuple[str, Any, type[nn.Module]]]:
    listed: list[tuple[str, Any, type[nn.Module]]] = [
        ("the embedding", view.embedding, nn.Embedding),
        ("the language-modelling head", view.head, nn.Linear),
    ]
    for index, layer in enumerate(view.layers):
        for name, linear in view.projections(layer).items():
            listed.append((f"{name} of layer {index}", linear, nn.Linear))
    return listed
