"""The ``checkpoint`` exporter: a folder that stock transformers loads, proved by a new process."""

from __future__ import annotations

import copy
import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

from pydantic import AfterValidator, Field

from slm_plugin.child import run_module
from slm_plugin.component import Options
from slm_plugin.errors import (
    ModelSourceError,
    OutputError,
    UnsupportedModelError,
    VerificationError,
)
from slm_plugin.evaluation.isolation import isolated
from slm_plugin.export.base import Check, Exporter, ExportRecord
from slm_plugin.export.encoder_parity import OUTPUTS, write_outputs
from slm_plugin.export.layerwise import LOGITS, save_streamed, streamed_reference
from slm_plugin.export.padding import padded_weights, padding
from slm_plugin.export.parity import (
    DIFFERENCE,
    GENERATION,
    ONE_PASS,
    TOLERANCES,
    encode,
    prove,
    reference,
    size_bytes,
)
from slm_plugin.export.portable_json import mend_config, mend_tokenizer_config
from slm_plugin.lazy import safetensors
from slm_plugin.models.border import reason
from slm_plugin.models.carried_files import save_carried
from slm_plugin.models.configuration import plain_attention
from slm_plugin.models.fingerprint import fingerprint
from slm_plugin.models.generation import without_generation
from slm_plugin.models.operators import operators
from slm_plugin.models.streaming import is_streamed
from slm_plugin.models.towers import TEXT, portable_names
from slm_plugin.outputs.scratch import temporary_folder, whole_folder
from slm_plugin.registry import register_exporter
from slm_plugin.texts import shown

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from slm_plugin.session import Session

FIGURES = {
    "logits": (DIFFERENCE, "logits"),
    "streamed_logits": (LOGITS, "logits"),
    "with_cache": (GENERATION, "prompts"),
    "without_cache": (ONE_PASS, "prompts"),
    "parameters": ("difference in parameters", "parameters"),
    "weights": ("other SHA-256 of all weights", "hashes"),
    "sentences": ("sentences encoded otherwise", "sentences"),
    "outputs": (OUTPUTS, "outputs"),
}


# A size in words: up to 999 999 of a unit, with a fraction.
_SIZE = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)\s*[KMG]B")


def check_size(size: str) -> str:
    """Return a size of files that can be written.

    Raises:
        ValueError: It is none.
    """
    match = _SIZE.fullmatch(size)
    if match is None:
        raise ValueError(f"should be a size as 5GB, 500MB or 64KB, not '{shown(size)}'")
    if not float(match[1]):
        raise ValueError(f"'{shown(size)}' holds no tensor; give a size as 5GB or 500MB")
    return size


class CheckpointOptions(Options):
    """How the checkpoint is cut into files."""

    max_shard_size: Annotated[
        str,
        AfterValidator(check_size),
        Field(
            description="largest safetensors file, as 5GB or 500MB",
            json_schema_extra={"pattern": f"^{_SIZE.pattern}$"},
        ),
    ] = "5GB"


@register_exporter("checkpoint")
class CheckpointExporter(Exporter):
    """Writes safetensors weights, config, tokenizer, chat template and generation config.

    The folder is then loaded by a fresh process with ``AutoModelForCausalLM``, or for models of
    images and text ``AutoModelForImageTextToText``, and ``AutoTokenizer`` alone, on the CPU.
    Weights, parameter count (tied ones once), encoded sentences and greedy tokens, with and without
    cache, must be equal to those of the model in memory. Logits may differ by a share of the
    largest logit: 1e-4 in float32, 1e-2 in float16, 5e-2 in bfloat16; a greedy token may differ
    where two tokens are equal within twice that.

    Layers of different widths are padded with zeros to the largest, because no stock class holds
    them otherwise; the record counts the zeros.

    A model that is streamed from disk is written tensor by tensor, and the fresh process reads it
    layer by layer as well: the same figures, but no tokens are generated, and the record says so.

    A checkpoint of an encoder is loaded by the class that its config names. What that class puts
    out on random inputs is equal to the last bit. Files of processors and tokenizers are carried
    over from the folder that the model was loaded from.
    """

    unlisted: ClassVar[bool] = True
    whole_layers: ClassVar[bool] = True
    streams = True
    Options = CheckpointOptions

    def export(self, session: Session, output: Path) -> ExportRecord:
        """Write ``output / "checkpoint"`` and verify.

        Raises:
            OutputError: The folder exists or cannot be written.
            VerificationError: What was written does not compute what the model computes.
        """
        options = cast(CheckpointOptions, self.options)
        target = output / self.name
        with whole_folder(target) as folder:
            save_checkpoint(session, folder, max_shard_size=options.max_shard_size)
            checks = verify_checkpoint(session, folder)
        return ExportRecord(
            exporter=self.name,
            folder=self.name,
            size_bytes=size_bytes(target),
            checks=checks,
            padding=padding(session.view),
        )


def save_checkpoint(session: Session, folder: Path, *, max_shard_size: str = "5GB") -> None:
    """Write what ``from_pretrained`` needs, readable by transformers 4.57 and 5 alike.

    The session's model and its config stay as they are.

    Raises:
        UnsupportedModelError: The model has operators, or is streamed and has layers
            of different widths.
        OutputError: The folder cannot be written.
    """
    model = session.model
    if operators(model):
        raise UnsupportedModelError(
            "no checkpoint of a stock class holds this model's operators",
            hint="export `onnx`, or leave out the stage that inserts them",
        )
    if is_streamed(model) and session.view.dimensions().layer_widths:
        raise UnsupportedModelError(
            "layers of different widths cannot be padded while the model is streamed from disk",
            hint="load it whole, or take `allocation: uniform`",
        )
    try:
        with isolated("transformers", logging.ERROR), _clean_config(session) as generation:
            if is_streamed(model):
                save_streamed(model, folder, max_shard_size=max_shard_size)
            else:
                _save_model(session, folder, max_shard_size)
            if session.tokenizer is not None:
                _save_tokenizer(session.tokenizer, folder)
        # save_pretrained refuses settings that from_pretrained took, such as a temperature
        # without sampling; to_json_file writes what is there.
        if generation is not None:
            generation.to_json_file(folder / "generation_config.json")
        save_carried(model, folder)
    except (OSError, safetensors.SafetensorError) as error:
        raise OutputError(
            f"cannot write the checkpoint {folder}: {error}",
            hint="check the free disk space and the permissions",
        ) from error
    family = session.view.family
    nested = None if family.tower is None else TEXT
    mend_config(folder, family.synonyms, nested=nested, tied=session.view.tied)
    mend_tokenizer_config(folder)


def _save_model(session: Session, folder: Path, max_shard_size: str) -> None:
    model = session.model
    padded = padded_weights(session.view)
    weights = {**model.state_dict(), **padded}
    named = portable_names(weights, session.view.family) or (weights if padded else None)
    if named is None:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    else:
        model.save_pretrained(folder, max_shard_size=max_shard_size, state_dict=named)


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except (TypeError, ValueError) as error:
        raise ModelSourceError(
            f"the tokenizer cannot be written: {reason(error)}",
            hint="correct the settings in its tokenizer_config.json",
        ) from error


def verify_checkpoint(
    session: Session, folder: Path, *, python: str = sys.executable
) -> tuple[Check, ...]:
    """Load a checkpoint in a fresh process and compare it with the session's model.

    Args:
        session: Holds the model that the checkpoint was saved from.
        folder: The checkpoint.
        python: Interpreter to load it with; another environment's tries another transformers.

    Returns:
        The checks, all passed.

    Raises:
        VerificationError: The checkpoint does not load or computes something else.
    """
    with temporary_folder() as scratch:
        file = scratch / "reference.safetensors"
        tolerance = write_reference(session, file)
        figures = _run_reload(python, folder, file)
    if "error" in figures:
        raise VerificationError(
            f"the checkpoint does not load with stock transformers: {figures['error']}"
        )
    if figures.get("sentences"):
        raise VerificationError(
            f"the tokenizer that AutoTokenizer loads from the checkpoint encodes "
            f"{figures['sentences']} sentences otherwise than the one in memory",
            hint="transformers 5 puts its own tokenizer class in place of a qwen2 model's; "
            "try with transformers 4.57",
        )
    checks = [
        Check(
            name=FIGURES[key][0],
            value=value,
            tolerance=tolerance if FIGURES[key][1] == "logits" else 0,
            unit=FIGURES[key][1],
        )
        for key, value in figures.items()
    ]
    return prove("the reloaded checkpoint", checks)


def write_reference(session: Session, file: Path) -> float:
    """Write what the model in memory computes, for `slm_plugin.export.reload`.

    Returns:
        Largest allowed difference of a logit.
    """
    parameters = sum(p.numel() for p in session.model.parameters()) + padding(session.view)
    padded = padded_weights(session.view)
    found = fingerprint(session.model, padded) if padded else session.fingerprint()
    facts = {"parameters": str(parameters), "weights": found.weights}
    attention = plain_attention(session.model)
    if attention is not None:
        facts["attention"] = attention
    if session.tokenizer is not None:
        facts["sentences"] = json.dumps(encode(session.tokenizer))
    if session.view.family.by_tensors:
        write_outputs(session, file, facts)
        return 0.0
    streamed = is_streamed(session.model)
    expected = streamed_reference(session) if streamed else reference(session)
    tolerance = (
        TOLERANCES.get(str(session.model.dtype), TOLERANCES["torch.float32"]) * expected.scale
    )
    facts |= {"class": session.view.family.auto_class, "tolerance": repr(tolerance)}
    if streamed:
        facts["memory"] = "layerwise"
    expected.write(file, facts)
    return tolerance


def _run_reload(python: str, folder: Path, file: Path) -> dict[str, Any]:
    # Offline, so that the folder has to stand by itself.
    offline = {"HF_HUB_OFFLINE": "1"}
    paths = (str(path.absolute()) for path in (folder, file))
    try:
        done = run_module("slm_plugin.export.reload", *paths, python=python, variables=offline)
    except OSError as error:
        raise VerificationError(
            f"no process could be started to reload the checkpoint: {error}",
            hint=f"make sure that {python} can be run",
        ) from error
    try:
        figures: dict[str, Any] = json.loads(done.stdout)
    except json.JSONDecodeError:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise VerificationError(
            f"the process that reloads the checkpoint ended with code {done.returncode}: {last}",
            hint="code -9 means that the machine ran out of memory",
        ) from None
    return figures


@contextmanager
def _clean_config(session: Session) -> Iterator[GenerationConfig | None]:
    """Give the model, while it is saved, a config without leftovers and with ``head_dim``.

    Whether the head is the embedding is what the model does, whatever its config says.

    Yields:
        The generation settings to write; None for a model that generates nothing.
    """
    from transformers import GenerationConfig

    model: PreTrainedModel = session.model
    own, own_generation = model.config, getattr(model, "generation_config", None)
    if own_generation is None:
        model.config = copy.deepcopy(own)
        try:
            yield None
        finally:
            model.config = own
        return
    config, generation = without_generation(model)
    # transformers refuses to save a model that it still takes for a quantised one.
    config.__dict__.pop("quantization_config", None)
    family = session.view.family
    decoder = family.text_config(config)
    if family.own_head_dim:
        decoder.head_dim = session.view.dimensions().head_dim
    if not family.by_tensors:
        config.tie_word_embeddings = decoder.tie_word_embeddings = session.view.tied
    model.config, model.generation_config = config, GenerationConfig()
    try:
        yield generation
    finally:
        model.config, model.generation_config = own, own_generation
