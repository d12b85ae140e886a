"""A sample comparison: the dense model and three methods at two targets, one of them failed."""

from __future__ import annotations

import math

from slm_plugin.comparison.record import Cell, ComparisonReport, Cost
from slm_plugin.evaluation.base import Measurement
from slm_plugin.models.fingerprint import Fingerprint
from slm_plugin.target import Target
from tests.tiny import SMOLLM2

# Label, layers removed, perplexity, accuracy on two tasks, decode speed, seconds of planning.
ROWS = (
    ("dense", 0, 24.15, (0.70, 0.50), 20.0, None),
    ("slm", 3, 40.0, (0.65, 0.45), 22.0, 30.0),
    ("<i>sleb</i>", 3, 35.0, (0.66, 0.40), 21.5, 60.0),
    ("slm", 6, 300.0, (0.60, 0.35), 25.0, 45.0),
    ("<i>sleb</i>", 6, math.inf, (0.60, 0.30), 24.0, 90.0),
)


def _figure(name: str, value: float, stderr: float | None = None) -> Measurement:
    better = "lower" if name.startswith("perplexity") else "higher"
    unit = "tokens/s" if name.endswith("speed") else ""
    return Measurement(
        name=name, value=value, protocol=f"of {name}", better=better, unit=unit, stderr=stderr
    )


def _cell(
    label: str,
    removed: int,
    perplexity: float,
    scores: tuple[float, float],
    speed: float,
    seconds: float | None,
) -> Cell:
    one, two = scores
    return Cell(
        label=label,
        method=label if removed else None,
        target=Target(layers_removed=removed) if removed else None,
        after=SMOLLM2.without_layers(removed) if removed else SMOLLM2,
        planning=None if seconds is None else Cost(seconds=seconds, memory=10**6),
        measured={
            "perplexity": (_figure("perplexity text 128", perplexity),),
            "lm_eval": (
                _figure("piqa acc", one, 0.03),
                _figure("piqa acc_norm", one + 0.01, 0.03),
                _figure("winogrande acc", two, 0.04),
            ),
            "latency": (_figure("decode speed", speed, 0.5),),
        },
    )


def make_comparison() -> ComparisonReport:
    """The sample; its last row failed."""
    failed = Cell(
        label="angular",
        method="angular",
        target=Target(layers_removed=6),
        error="the score of layer 3 is <NaN>",
    )
    return ComparisonReport(
        title="depth & <width>",
        created="2026-01-01T00:00:00+00:00",
        comparison={"version": 1, "output": "</pre>"},
        versions={"python": "3.11"},
        machine="a machine",
        seed=1,
        model="smollm2-135m",
        calibration=None,
        fingerprint=Fingerprint(architecture="L", dtype="float32", weights="sha256:0"),
        cells=(*(_cell(*row) for row in ROWS), failed),
        seconds=5.0,
    )
