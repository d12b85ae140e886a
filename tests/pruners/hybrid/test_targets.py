"""Targets of time and memory, as a strategy that takes them meets them."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from slm_plugin import prune
from slm_plugin.checks import refuse_targets
from slm_plugin.plans import DropLayers, PruningPlan
from slm_plugin.pruners.base import Pruner, missed
from slm_plugin.session import Session
from slm_plugin.target import Target
from tests.tiny import SMOLLM2, make_model


class DropOne(Pruner):
    """Drops the last layer, whatever is asked for."""

    name = "drop_one"
    kind: ClassVar = "depth"
    targets: ClassVar = ("latency", "memory")
    needs_calibration = False

    def plan(self, session: Session) -> PruningPlan:
        """The plan."""
        before = session.view.dimensions()
        return PruningPlan(
            pruner=self.name,
            kind="depth",
            options={},
            target=self.target,
            fingerprint=session.fingerprint(),
            before=before,
            after=before.without_layers(1),
            operations=(DropLayers(indices=(before.layers - 1,)),),
        )


TARGETS: list[dict[str, Any]] = [{"latency": {"decode": 0.8}}, {"memory": "100kB"}]


@pytest.mark.parametrize("target", TARGETS)
def test_a_strategy_that_takes_them_is_run(target: dict[str, Any]) -> None:
    """The checks before planning and after it count no parameters, and the report names them."""
    strategy = DropOne(DropOne.Options(), Target(**target))
    refuse_targets([strategy], SMOLLM2)
    model = make_model()
    result = prune(model, None, [strategy])
    assert len(model.model.layers) == 5
    assert result.plan.target == strategy.target
    assert PruningPlan.parse(result.plan.to_json()) == result.plan
    assert missed(strategy.target, result.plan, result.plan.before) == ""
