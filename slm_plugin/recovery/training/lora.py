"""Recovery by low-rank adapters, trained on the calibration set and merged into the weights.

Source: LoRA (arXiv 2106.09685); the defaults are those of the SLM and Shortened-LLaMA scripts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from slm_plugin.component import Options
from slm_plugin.counts import Count
from slm_plugin.errors import CalibrationError
from slm_plugin.extras import require
from slm_plugin.lazy import torch
from slm_plugin.progress import track
from slm_plugin.recovery.base import Recovery, RecoveryRecord
from slm_plugin.recovery.training.loop import refuse_non_finite, shuffled, warmup_cosine
from slm_plugin.registry import register_recovery

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from slm_plugin.models.families.family import Family
    from slm_plugin.session import Session

CLIP_NORM = 1.0


def _targets(family: Family) -> list[str] | str:
    """Names of the modules that get adapters, or a pattern of them: those of the decoder alone."""
    names = [path.rpartition(".")[2] for path in family.projections.values()]
    if family.tower is None:
        return names or "all-linear"
    return rf"{re.escape(family.decoder)}\..*\.({'|'.join(names)})"


class LoraOptions(Options):
    """How the adapters are trained."""

    rank: Annotated[int, Field(ge=1, le=2**16, description="rank of the adapters")] = 8
    alpha: Annotated[float, Field(gt=0, description="their scale is alpha / rank")] = 16
    dropout: Annotated[float, Field(ge=0, lt=1, description="dropout before the adapters")] = 0.05
    learning_rate: Annotated[float, Field(gt=0, description="peak of AdamW's rate")] = 1e-4
    epochs: Annotated[Count, Field(description="passes over the calibration set")] = 2
    batch_size: Annotated[Count, Field(description="samples per step")] = 4
    warmup: Annotated[
        float, Field(ge=0, lt=1, description="share of the steps that is linear warm-up")
    ] = 0.1


@register_recovery("lora")
class LoraRecovery(Recovery):
    """Train low-rank adapters on all projections and merge them into the weights."""

    extra: ClassVar[str | None] = "train"
    Options: ClassVar[type[LoraOptions]] = LoraOptions

    def __init__(self, options: LoraOptions) -> None:
        super().__init__(options)
        self.options: LoraOptions = options

    def recover(self, session: Session) -> RecoveryRecord:
        """Train on the calibration set with the language-modelling loss.

        Raises:
            MissingExtraError: peft is not installed.
            CalibrationError: The session has no calibration set.
            NumericalError: The loss is NaN or infinite; the model keeps its former weights.
        """
        require("train", "the recovery lora")
        from peft import LoraConfig, get_peft_model

        if session.calibration is None:
            raise CalibrationError(
                "lora trains on the calibration set and the recipe has none",
                hint="add a `calibration:` section",
            )
        torch.manual_seed(session.seed)
        settings = LoraConfig(
            r=self.options.rank,
            lora_alpha=self.options.alpha,
            lora_dropout=self.options.dropout,
            target_modules=_targets(session.view.family),
            task_type="CAUSAL_LM",
        )
        needed = [parameter.requires_grad for parameter in session.model.parameters()]
        adapted = get_peft_model(session.model, settings)
        session.release()
        try:
            losses = tuple(self._train(adapted, session.calibration, session.seed))
            session.model = adapted.eval().merge_and_unload()
        except BaseException:
            session.model = adapted.eval().unload()
            raise
        finally:
            for parameter, before in zip(session.model.parameters(), needed, strict=True):
                parameter.requires_grad_(before)
        samples, length = session.calibration.shape
        return RecoveryRecord(
            recovery=self.name,
            options=self.options.model_dump(),
            losses=losses,
            notes=(
                f"{len(losses)} steps on {samples} samples of {length} tokens; "
                f"training loss {losses[0]:.4f} in the first step, {losses[-1]:.4f} in the last",
            ),
        )

    def _train(self, model: PreTrainedModel, tokens: Tensor, seed: int) -> Iterator[float]:
        generator = torch.Generator().manual_seed(seed)
        batches = [
            batch
            for _ in range(self.options.epochs)
            for batch in shuffled(tokens, self.options.batch_size, generator)
        ]
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.options.learning_rate, weight_decay=0.0)
        schedule = warmup_cosine(optimizer, len(batches), self.options.warmup)
        model.train()
        for batch in track(batches, "lora: steps", total=len(batches)):
            ids = batch.to(model.device)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            refuse_non_finite(loss, self.name)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, CLIP_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            yield loss.item()
