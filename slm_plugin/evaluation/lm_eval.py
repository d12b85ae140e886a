"""Accuracy on tasks of the lm-evaluation-harness, run on the model in memory."""

from __future__ import annotations

import copy
import logging
import random
from contextlib import nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from slm_plugin.counts import Count, Natural, Seed
from slm_plugin.errors import MissingExtraError, UserError
from slm_plugin.evaluation.base import Evaluator, EvaluatorOptions, Measurement
from slm_plugin.evaluation.isolation import isolated
from slm_plugin.evaluation.lm_eval_sandbox import sandboxed
from slm_plugin.evaluation.lm_eval_scores import scores
from slm_plugin.evaluation.lm_eval_tasks import (
    FoundTasks,
    LoadedTasks,
    find_tasks,
    load_tasks,
    needs_lm_eval,
)
from slm_plugin.extras import found_version, require
from slm_plugin.foreign import contained
from slm_plugin.lazy import np, torch
from slm_plugin.registry import register_evaluator

if TYPE_CHECKING:
    from slm_plugin.session import Session

# For metrics without a closed-form error; lm-eval's default of 100,000 takes minutes.
BOOTSTRAP_DRAWS = 1000


class LmEvalOptions(EvaluatorOptions):
    """The tasks and how to run them."""

    tasks: Annotated[
        tuple[str, ...],
        Field(min_length=1, description="lm-eval tasks, groups or tags, or builtin_continuation"),
    ]
    limit: Annotated[Count, Field(description="use only the first items of each task")] | None = (
        None
    )
    include_path: Annotated[
        str | None, Field(min_length=1, description="folder of further task YAML files")
    ] = None
    num_fewshot: (
        Annotated[Natural, Field(description="shots; by default each task's own number")] | None
    ) = None
    batch_size: Annotated[Count, Field(description="sequences per batch")] = 8
    seed: Annotated[
        Seed | None, Field(description="seed of few-shot draws; by default the run's")
    ] = None


@register_evaluator("lm_eval")
class LmEval(Evaluator):
    """Scores of lm-eval tasks: ``acc`` and ``acc_norm``, or the task's own metrics.

    Reported is what the recipe names: a task; a group's own aggregate, or its members where it has
    none; the members of a tag. The task `builtin_continuation` needs no network and no files.

    Source:
        Gao et al., "A framework for few-shot language model evaluation" (lm-evaluation-harness).
    """

    unlisted: ClassVar[bool] = True
    extra = "eval"
    Options = LmEvalOptions
    options: LmEvalOptions

    @cached_property
    def found(self) -> FoundTasks:
        """The tasks, before any of their code has run."""
        require("eval", "the lm_eval evaluator")
        asked = needs_lm_eval(self.options.tasks)
        with isolated("lm_eval", logging.ERROR) if asked else nullcontext():
            return find_tasks(self.options.tasks, self.options.include_path)

    @cached_property
    def loaded(self) -> LoadedTasks:
        """The tasks with their data, loaded once."""
        found = self.found
        with isolated("lm_eval", logging.ERROR), sandboxed():
            return load_tasks(found)

    def check(self) -> None:
        """Look up the tasks and check the user's task files, without running their code.

        Raises:
            MissingExtraError: lm-eval is not installed.
            UserError: A task is unknown, or its file is wrong.
        """
        try:
            _ = self.found
        except MissingExtraError:
            raise
        except UserError as error:
            error.option = error.option or "tasks"
            raise

    def load(self) -> None:
        """Load the tasks and their data, which runs the code that they name.

        Raises:
            MissingExtraError: lm-eval is not installed.
            UserError: A task is unknown or cannot be loaded.
        """
        _ = self.loaded

    def measure(self, session: Session) -> list[Measurement]:
        """Run the tasks.

        Raises:
            MissingExtraError: lm-eval is not installed.
            UserError: A task is unknown or cannot be run, or there is no tokenizer.
        """
        if session.tokenizer is None:
            raise UserError(
                "lm_eval needs a tokenizer and the session has none",
                hint="load the model with its tokenizer",
            )
        loaded, options = self.loaded, self.options
        seed = session.seed if options.seed is None else options.seed
        with isolated("lm_eval", logging.ERROR):
            from lm_eval.models.huggingface import HFLM

            loaded.set_shots(options.num_fewshot, seed)
            # lm-eval may add a padding token to the tokenizer, so it gets a copy.
            model = HFLM(
                pretrained=session.model,
                tokenizer=copy.deepcopy(session.tokenizer),
                batch_size=options.batch_size,
            )
        with (
            isolated("lm_eval", logging.WARNING),
            sandboxed(),
            contained("lm-eval cannot run these tasks", UserError),
        ):
            results = self._run(model, loaded, seed)
        return scores(results, loaded.names)

    def _run(self, model: Any, loaded: LoadedTasks, seed: int) -> dict[str, Any]:
        """Evaluate, and record the same run data as `simple_evaluate`.

        `simple_evaluate` itself asks git and pip about the machine, which takes seconds each time
        and lets git complain on standard error.
        """
        from lm_eval import evaluate

        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        results: dict[str, Any] = evaluate(
            lm=model,
            task_dict=loaded.found,
            limit=self.options.limit,
            bootstrap_iters=BOOTSTRAP_DRAWS,
            log_samples=False,
        )
        return {
            **results,
            "lm_eval_version": found_version("lm-eval"),
            "config": {"limit": self.options.limit, "fewshot_seed": seed},
        }
