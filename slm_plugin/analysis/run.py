"""Carry out one analysis of a model's layers, from loading to the page."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from pathlib import Path

from pydantic import ValidationError

from slm_plugin.analysis.measurement import measure
from slm_plugin.analysis.page import write_analysis
from slm_plugin.analysis.record import Analysis
from slm_plugin.calibration.samples import CalibrationSource
from slm_plugin.errors import UnsupportedModelError, UserError
from slm_plugin.models.encoders import is_encoder
from slm_plugin.models.loading import ModelSource, folder_of
from slm_plugin.outputs.claim import claim
from slm_plugin.outputs.place import local
from slm_plugin.preparation import calibration_record, prepare
from slm_plugin.progress import say
from slm_plugin.versions import installed_versions, machine

DEFAULT_SAMPLES = 32


def analyze(
    model: str,
    output: Path,
    *,
    source: str = "builtin",
    samples: int | None = None,
    length: int | None = None,
    seed: int = 1234,
    overwrite: bool = False,
) -> Analysis:
    """Compare a model's layers on a calibration set; write ``analysis.json`` and its page.

    Args:
        model: Alias, checkpoint folder, GGUF file or Hub id.
        output: Folder that appears when everything in it is written, or not at all.
        source: Where the calibration tokens come from, as in a recipe.
        samples: How many to draw, at least four; by default 32, of a token file all.
        length: Tokens per sample; by default 128, or the token file's.
        seed: Seed of the draw and of the noise control.
        overwrite: Replace a folder that exists.

    Raises:
        UserError: An argument, the model or the calibration set is at fault.
        SlmError: Anything else that goes wrong, said in one sentence.
    """
    started = time.perf_counter()
    try:
        wanted = ModelSource(id=model)
        drawn = CalibrationSource(source=source, samples=samples, length=length)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{first['loc'][0]}: {first['msg']}") from error
    if samples is None and not drawn.is_token_file:
        drawn = drawn.model_copy(update={"samples": DEFAULT_SAMPLES})
    drawn.check()
    inputs = (*local("the model", model), *local("the calibration file", source))
    with claim(output, "analyze", overwrite=overwrite, inputs=inputs) as written:
        folder = folder_of(wanted)
        if folder is not None and is_encoder(folder):
            raise UnsupportedModelError(
                f"analyze compares the layers of plain decoders, and {model} is none",
                hint="the plan of `block_influence` or `angular` holds the scores of its layers",
            )
        session = prepare(wanted, calibration=drawn, seed=seed, trials=False)
        record = calibration_record(wanted, drawn, session)
        assert record is not None
        say(f"analyze {session.original.layers} layers on {record.samples} samples …")
        analysis = Analysis(
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            model=model,
            seed=seed,
            calibration=record,
            fingerprint=session.fingerprint(),
            dimensions=session.original,
            figures=measure(session),
            versions=installed_versions(),
            machine=machine(),
            seconds=time.perf_counter() - started,
        )
        write_analysis(analysis, written.folder)
    return analysis
