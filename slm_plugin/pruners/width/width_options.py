"""The options of `width`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from slm_plugin.component import Options
from slm_plugin.counts import Count, Natural
from slm_plugin.pruners.width.allocation.choice import (
    NOT_POOLED,
    STRETCHED,
    WITHOUT_DATA,
    AllocationName,
)
from slm_plugin.pruners.width.heads import QueryHeads
from slm_plugin.pruners.width.hidden_scores import HIDDEN_SCORES, ROTATIONS
from slm_plugin.pruners.width.policy_gradient import Estimator
from slm_plugin.pruners.width.uniform import KvGroups, MultipleOf

ScoreName = Literal[
    "activation",
    "contribution",
    "flap",
    "leverage",
    "magnitude",
    "obs",
    "policy_gradient",
    "taylor",
    "taylor_mixed",
    "taylor_second",
    "taylor_sum",
    "wanda_sp",
]
# Relative to the mean sparsity: what AlphaPruning releases as ``epsilon``.
SPREAD = 0.3
FLOOR = 0.1


class WidthOptions(Options):
    """The score, the restoration, and how the removal is split between layers and their parts."""

    score: Annotated[
        ScoreName,
        Field(
            description="those of Taylor look at the loss's gradient, policy_gradient at losses of "
            "masked models, magnitude at the weights alone, the others at what each layer computes"
        ),
    ] = "taylor"
    restore: Annotated[
        Literal["dense", "own", "none"],
        Field(
            description="refit the projections that read the remaining units toward the dense "
            "model's states or toward what the layer itself gave before the cut; none removes only"
        ),
    ] = "dense"
    allocation: Annotated[
        AllocationName,
        Field(
            description="how many MLP channels each layer loses; with all but uniform, layers "
            "differ, and a checkpoint is padded with zeros"
        ),
    ] = "uniform"
    spread: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description=f"how far {', '.join(STRETCHED)} take the layers' shares apart: at 0.3 "
            "the least is about 0.7 of the mean",
        ),
    ] = SPREAD
    floor: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="smallest share of its MLP channels that a layer keeps, where layers "
            "may differ",
        ),
    ] = FLOOR
    kv_groups: KvGroups = 0
    query_heads: QueryHeads = 0
    hidden_channels: Annotated[
        Natural,
        Field(
            strict=True,
            description="channels of the residual stream to remove from the whole model",
        ),
    ] = 0
    hidden_score: Annotated[
        Literal["activation", "magnitude", "pca", "pca_per_block", "taylor"] | None,
        Field(
            description="what ranks hidden channels, where it is not `score`; pca rotates the "
            "stream into its principal components first, which unties the head; pca_per_block "
            "into those of every block, which needs operators that only onnx stores"
        ),
    ] = None
    multiple_of: MultipleOf = 8
    steps: Annotated[Count, Field(description="of policy_gradient: updates")] = 200
    learning_rate: Annotated[
        float, Field(gt=0, le=1, description="of policy_gradient: rate of the first update")
    ] = 2e-3
    estimator: Annotated[
        Estimator,
        Field(
            description="of policy_gradient: with the true score function, or weighted as in the "
            "released code"
        ),
    ] = "unbiased"

    @model_validator(mode="after")
    def _used(self) -> Self:
        """Settings that have no effect, or no meaning, are mistakes."""
        fields = type(self).model_fields
        for name in ("steps", "learning_rate", "estimator"):
            if self.score != "policy_gradient" and getattr(self, name) != fields[name].default:
                raise ValueError(f"{name} needs score: policy_gradient")
        if self.query_heads and self.kv_groups != 0:
            raise ValueError(
                "kv_groups and query_heads remove from the same attention; use one of them, or a "
                "stage for each"
            )
        if self.hidden_channels:
            self._hidden_allowed()
        elif self.hidden_score is not None:
            raise ValueError("hidden_score needs hidden_channels")
        if self.allocation == "global" and self.score in NOT_POOLED:
            raise ValueError(
                f"score {self.score} ranks the channels of one layer and cannot be compared "
                "between layers; choose another score or allocation"
            )
        if self.spread != SPREAD and self.allocation not in STRETCHED:
            raise ValueError(
                f"spread has no effect with allocation {self.allocation}; leave it out, or choose "
                f"{', '.join(STRETCHED)}"
            )
        return self

    @property
    def plans_from_weights(self) -> bool:
        """Nothing that plans with these options looks at data."""
        scores = {self.score, self.hidden_score}
        return scores <= {"magnitude", None} and self.allocation in WITHOUT_DATA

    @property
    def ranks_hidden(self) -> str:
        """The score of hidden channels."""
        return self.hidden_score or self.score

    @property
    def inserts_operators(self) -> bool:
        """Whether the model has operators afterwards."""
        return ROTATIONS.get(self.hidden_score or "") == "block"

    def _hidden_allowed(self) -> None:
        known = sorted({*HIDDEN_SCORES, *ROTATIONS})
        if self.ranks_hidden not in known:
            raise ValueError(
                f"score {self.score} ranks what one projection reads, and every projection reads "
                f"hidden channels; set hidden_score to {', '.join(known)}"
            )
        if self.score == "obs":
            raise ValueError(
                "score obs scores layers as they will be, with all hidden channels; leave "
                "hidden_channels out or choose another score"
            )
        if self.inserts_operators and self.restore != "none":
            raise ValueError(
                "no restoration fits a model with operators, which pca_per_block inserts; set "
                "restore: none"
            )
        if self.restore == "own":
            raise ValueError(
                "restore own runs the layers as they were before, which read more hidden channels "
                "than are left; with hidden_channels choose dense or none"
            )
