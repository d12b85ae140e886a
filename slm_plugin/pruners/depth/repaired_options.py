"""The options of `repaired`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator
from typing_extensions import Self

from slm_plugin.counts import Count, Natural
from slm_plugin.evaluation.prefill import Prompts
from slm_plugin.plans.rules import check_rule
from slm_plugin.pruners.depth.dropping import EndsOptions
from slm_plugin.pruners.depth.measures.layer_costs import Per
from slm_plugin.pruners.depth.polish import Start
from slm_plugin.pruners.depth.search.runs import JOIN


def _check_rule(rule: str) -> str:
    try:
        return rule if rule == JOIN else check_rule(rule)
    except ValueError as error:
        raise ValueError(f"{error}, or {JOIN}") from error


class RepairedOptions(Prompts, EndsOptions):
    """The repair, how candidates are screened and judged, and the prompts of `per: latency`."""

    repair: Annotated[
        Literal["boundary", "fold_linear", "rescale", "none"],
        Field(
            description="of the layer below a gap: boundary: `down_proj` fitted again; "
            "fold_linear: a linear map of what its MLP adds; rescale: the length of the stream"
        ),
    ] = "boundary"
    screen: Annotated[
        Count | Literal["all"],
        Field(
            description="candidates that are judged at each step: those whose repaired state lacks "
            "least; all: every one, without stopping early"
        ),
    ] = 5
    judge: Annotated[
        Literal["kl", "loss", "state"],
        Field(
            description="kl: divergence of the repaired model from the model; loss: its loss; "
            "state: the error behind the gap alone"
        ),
    ] = "kl"
    per: Annotated[
        Per,
        Field(
            description="what the model loses without a layer is divided by: nothing (layer), its "
            "parameters, or its time, where layers differ in it"
        ),
    ] = "layer"
    merge_rules: Annotated[
        tuple[Annotated[str, AfterValidator(_check_rule)], ...],
        Field(
            description="merges of two adjacent layers that are candidates too: merge rules of "
            "slm, or join: the lower one's attention with the upper one's MLP"
        ),
    ] = ()
    polish: Annotated[
        Natural,
        Field(
            description="exchanges of dropped layers for kept ones that are tried on the finished "
            "plan"
        ),
    ] = 0
    start: Annotated[
        Start | None,
        Field(
            description="strategy whose plan is polished, as {prune: block_influence} with its "
            "options; by default this search"
        ),
    ] = None

    @model_validator(mode="after")
    def _polishable(self) -> Self:
        if self.start is not None and not self.polish:
            raise ValueError("`start` is the plan to polish: set `polish` to a number of exchanges")
        if self.polish and self.merge_rules:
            raise ValueError("`polish` exchanges dropped layers: leave out `merge_rules`")
        if self.polish and self.per != "layer":
            raise ValueError("`polish` exchanges layers whatever they cost: leave out `per`")
        if self.polish and self.judge == "state":
            raise ValueError(
                "`polish` judges whole models: set `judge: kl` or loss, and search by the state "
                "with `start: {prune: repaired, judge: state}`"
            )
        return self

    @model_validator(mode="after")
    def _timed(self) -> Self:
        for name, field in Prompts.model_fields.items():
            if self.per != "latency" and getattr(self, name) != field.default:
                raise ValueError(f"`{name}` has no effect without `per: latency`; leave it out")
        return self
