"""A run of three stages on the model of the sample plans, written by hand."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from slm_plugin.evaluation.base import Measurement
from slm_plugin.export.base import Check, ExportRecord
from slm_plugin.plans import PruningPlan
from slm_plugin.recovery.base import RecoveryRecord
from slm_plugin.report.record import CalibrationRecord, RunReport, StageRecord, StateRecord
from tests.report.sample_plans import (
    DEPTH_FILE,
    NARROW,
    ORIGINAL,
    SHALLOW,
    WIDTH_FILE,
    depth_plan,
    identity,
    width_plan,
)


def typed(text: str) -> str:
    """A text with the signs that a keyboard has: tests are easier to write that way."""
    signs = {"\N{MINUS SIGN}": "-", "\N{EN DASH}": "-", "\N{MULTIPLICATION SIGN}": "x"}
    return text.translate(str.maketrans(signs))


def measurements(shift: float) -> tuple[Measurement, ...]:
    """Figures of one state; ``shift`` grows with what was pruned."""
    perplexity = (
        "rows joined by two newlines, tokenised once with 0 special tokens at the start, 162 "
        "non-overlapping pieces of 2048 tokens, 331614 scored positions (2047 a piece), exp of the "
        "mean cross entropy, token ids sha256 3f1c2a9d5e7b"
    )
    tasks = "lm-eval 0.4.13, task version 1.0, 0-shot, 200 of 1838 documents"
    speed = (
        "batch 1, random prompt of 128 tokens, 128 greedy steps with KV cache, median of 10 after "
        "2 warm-up, cpu with 2 threads, float32"
    )
    return (
        Measurement(
            name="perplexity wikitext2 2048",
            value=33.914 * (1 + shift),
            protocol=perplexity,
            better="lower",
        ),
        Measurement(
            name="piqa acc",
            value=0.685 - 0.08 * shift,
            protocol=tasks,
            better="higher",
            stderr=0.0329,
        ),
        Measurement(
            name="arc_easy acc_norm",
            value=0.605 - 0.17 * shift,
            protocol=tasks,
            better="higher",
            stderr=0.0347,
        ),
        Measurement(
            name="prefill time",
            value=61.42 - 9.6 * shift,
            protocol=speed,
            better="lower",
            unit="ms",
        ),
        Measurement(
            name="decode speed",
            value=18.31 + 3.1 * shift,
            protocol=speed,
            better="higher",
            unit="tokens/s",
        ),
        Measurement(
            name="weights",
            value=538_060_032 - 130_704_000 * shift,
            protocol="parameters and buffers, float32",
            better="lower",
            unit="bytes",
        ),
    )


def recipe(model: str) -> dict[str, Any]:
    """The recipe of the run."""
    return {
        "version": 1,
        "model": {"id": model, "dtype": "float32"},
        "calibration": {"source": "builtin", "samples": 10, "length": 128, "seed": 1234},
        "stages": [
            {"prune": "slm", "target": {"threshold": 0.9}, "merge_rule": "telescoped"},
            {"prune": "torch_pruning", "target": {"ratio": 0.1}, "importance": "taylor"},
            {"recover": "lora", "epochs": 1},
        ],
        "evaluate": [
            {"perplexity": {"source": "wikitext2", "length": 2048, "every_stage": True}},
            {"lm_eval": {"tasks": ["piqa", "arc_easy"], "limit": 200}},
            {"latency": {"prompt_tokens": 128, "new_tokens": 128}},
        ],
        "export": [{"checkpoint": {}}, {"onnx": {"task": "text-generation-with-past"}}],
        "output": "runs/hybrid",
    }


def stages() -> tuple[StageRecord, ...]:
    """A depth stage, a width stage and a recovery."""
    rates = [3.9 * 0.997**step + 0.12 * random.Random(step).random() for step in range(120)]
    return (
        StageRecord(
            number=1,
            kind="depth",
            name="slm",
            summary="merged 2 windows; 3 of 30 layers removed",
            seconds=38.4,
            after=SHALLOW,
            plan=DEPTH_FILE,
            warnings=("a similarity above 0.9 says little about perplexity on this model",),
        ),
        StageRecord(
            number=2,
            kind="width",
            name="torch_pruning",
            summary="kept 1360 of 1536 channels and 2 of 3 KV groups in each of 27 layers",
            seconds=21.7,
            after=NARROW,
            plan=WIDTH_FILE,
        ),
        StageRecord(
            number=3,
            kind="recovery",
            name="lora",
            summary="trained rank 8 adapters for 120 steps and merged them",
            seconds=141.2,
            after=NARROW,
            recovery=RecoveryRecord(
                recovery="lora",
                options={"rank": 8, "epochs": 1},
                losses=tuple(round(rate, 4) for rate in rates),
                notes=("the adapters were merged into the weights",),
            ),
        ),
    )


def make_report(**changes: Any) -> RunReport:
    """The whole run."""
    model = changes.pop("model", "HuggingFaceTB/SmolLM2-135M-Instruct")
    labels = ("before", "after slm", "after torch_pruning", "after")
    perplexity_only = [measurements(0.56)[:1], measurements(1.9)[:1]]
    taken = [measurements(0), *perplexity_only, measurements(0.82)]
    fields: dict[str, Any] = {
        "title": "SmolLM2-135M, three layers and a tenth of the width fewer",
        "created": "2026-03-14T15:09:26+00:00",
        "recipe": recipe(model),
        "versions": {
            "slm-plugin": "0.1.0",
            "python": "3.11.9",
            "torch": "2.13.0",
            "transformers": "4.57.6",
            "torch-pruning": "1.6.1",
        },
        "machine": "Linux x86_64, 2 CPU threads",
        "seed": 1234,
        "model": model,
        "license": "apache-2.0",
        "calibration": CalibrationRecord(
            source="builtin", samples=10, length=128, seed=1234, sha256="c" * 64
        ),
        "input": identity("a"),
        "output": identity("d"),
        "before": ORIGINAL,
        "after": NARROW,
        "stages": stages(),
        "states": tuple(
            StateRecord(stage=number, label=label, measurements=figures)
            for number, (label, figures) in enumerate(zip(labels, taken, strict=True))
        ),
        "exports": (
            ExportRecord(
                exporter="checkpoint",
                folder="checkpoint",
                size_bytes=430_891_264,
                checks=(Check(name="largest logit difference", value=0.0, tolerance=0.0),),
            ),
            ExportRecord(
                exporter="onnx",
                folder="onnx",
                size_bytes=432_204_118,
                checks=(
                    Check(name="largest logit difference", value=5.9e-5, tolerance=1e-3),
                    Check(name="differing greedy tokens", value=0, tolerance=0, unit="tokens"),
                ),
            ),
        ),
        "seconds": 203.6,
    }
    return RunReport(**{**fields, **changes})


def nasty(text: str) -> tuple[RunReport, Mapping[str, PruningPlan]]:
    """The run with one string in every place that a user or a plugin can write to."""
    report = make_report(model=text)
    stage = report.stages[0].model_copy(
        update={"name": text, "summary": text, "warnings": (text,), "plan": DEPTH_FILE}
    )
    state = report.states[0].model_copy(
        update={
            "label": text,
            "measurements": tuple(
                m.model_copy(update={"name": text, "protocol": text})
                for m in report.states[0].measurements[:1]
            ),
        }
    )
    last = report.states[-1].model_copy(update={"measurements": state.measurements})
    export = report.exports[0].model_copy(update={"folder": text})
    poisoned = report.model_copy(
        update={
            "title": text,
            "machine": text,
            "license": text,
            "versions": {text: text},
            "recipe": {"model": {"id": text}, text: text},
            "stages": (stage, *report.stages[1:]),
            "states": (state, *report.states[1:-1], last),
            "exports": (export, *report.exports[1:]),
        }
    )
    plan = depth_plan(pruner=text, notes=(text,), warnings=(text,))
    return poisoned, {DEPTH_FILE: plan, WIDTH_FILE: width_plan()}
