"""The ``onnx`` exporter: Optimum writes the graph, ONNX Runtime proves it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import Field

from slm_plugin.component import Options
from slm_plugin.errors import SlmError, UnsupportedModelError
from slm_plugin.evaluation.isolation import isolated
from slm_plugin.export.base import Check, Exporter, ExportRecord
from slm_plugin.export.checkpoint import save_checkpoint
from slm_plugin.export.ort_heads import load_ort_model, require_onnx
from slm_plugin.export.parity import (
    DIFFERENCE,
    GENERATION,
    ONE_PASS,
    departure,
    prove,
    reference,
    size_bytes,
)
from slm_plugin.export.rehearsal import refuse_length_dependent, rehearse, unproved_windows
from slm_plugin.lazy import torch
from slm_plugin.models.carried_files import save_carried
from slm_plugin.models.configuration import plain_attention
from slm_plugin.models.operators import operators, put_copies, without_operators
from slm_plugin.outputs.scratch import temporary_folder, whole_folder
from slm_plugin.plans import KeepChannels
from slm_plugin.progress import say
from slm_plugin.registry import register_exporter
from slm_plugin.surgery.channels import apply_channels

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from slm_plugin.models.families.family import Family
    from slm_plugin.session import Session

# What the exporter that Optimum calls can write (TorchScript's, in PyTorch).
HIGHEST_OPSET = 20
Task = Literal["text-generation-with-past", "text-generation"]


class OnnxOptions(Options):
    """What Optimum is asked for, and how near the result must come."""

    task: Task = Field(
        default="text-generation-with-past",
        description="with a key/value cache, or without",
    )
    opset: int | None = Field(
        default=None,
        ge=14,
        le=HIGHEST_OPSET,
        description="ONNX operator set; null takes Optimum's choice",
    )
    tolerance: float = Field(
        default=1e-4,
        gt=0,
        le=1,
        description="largest allowed difference of a logit, as a share of the largest logit",
    )


@register_exporter("onnx")
class OnnxExporter(Exporter):
    """Writes a float32 ONNX graph with config and tokenizer, for ``ORTModelForCausalLM``.

    The graph is float32 whatever the model is: a bfloat16 one does not run in ONNX Runtime on a
    CPU. Widening is exact, and a model in a narrower format is compared as its float32 copy.
    Optimum's own validation is left out: it knows random inputs only.
    """

    extra = "onnx"
    operators = True
    Options = OnnxOptions

    @classmethod
    def unsuited(cls, family: Family, config: Mapping[str, Any]) -> str:
        """A graph of a decoder has no images; Optimum's of Falcon no KV groups and no ALiBi."""
        if family.tower is not None:
            return "Optimum exports a decoder of text, without the images"
        for switch in ("new_decoder_architecture", "alibi"):
            if family.model_type == "falcon" and config.get(switch):
                return f"Optimum exports no Falcon with {switch}"
        return ""

    def check_model(self, session: Session) -> None:
        """Refuse positions that no graph can hold, and windows that Optimum does not honour.

        Raises:
            MissingExtraError: Optimum or ONNX Runtime is missing, or does not fit transformers.
            UnsupportedModelError: Optimum does not export the family, or the graph would compute
                something else on long texts.
        """
        require_onnx("the onnx exporter")
        _refuse_unknown(session.view.family.model_type)
        refuse_length_dependent(session.view.config)
        if unproved_windows(session.view.config, session.view.embedding.num_embeddings):
            with temporary_folder() as scratch:
                rehearse(session, scratch, self)

    def export(self, session: Session, output: Path) -> ExportRecord:
        """Write ``output / "onnx"`` from ``output / "checkpoint"`` where there is one, and verify.

        Raises:
            MissingExtraError: Optimum or ONNX Runtime is missing, or does not fit transformers.
            OutputError: The folder exists or cannot be written.
            UnsupportedModelError: The graph would compute something else on long texts.
            SlmError: Optimum cannot export the model.
            VerificationError: ONNX Runtime does not compute what the model computes.
        """
        options = cast(OnnxOptions, self.options)
        self.check_model(session)
        if session.model.dtype != torch.float32:
            say(f"onnx: the model is {session.model.dtype}, its ONNX graph is float32")
        target = output / self.name
        with whole_folder(target) as folder:
            with _checkpoint(session, output) as source:
                write_onnx(
                    source,
                    folder,
                    options,
                    operators(session.model),
                    plain_attention(session.model),
                    session.view.dimensions().layer_widths,
                )
            save_carried(session.model, folder)
            checks = verify_onnx(session, folder, tolerance=options.tolerance)
        return ExportRecord(
            exporter=self.name, folder=self.name, size_bytes=size_bytes(target), checks=checks
        )


def write_onnx(
    checkpoint: Path,
    folder: Path,
    options: OnnxOptions,
    between: Mapping[str, nn.Linear],
    attention: str | None = None,
    widths: Sequence[int] = (),
) -> None:
    """Let Optimum export a checkpoint.

    Args:
        checkpoint: The folder to read.
        folder: Where to write.
        options: What Optimum is asked for.
        between: Operators, which a checkpoint does not hold, by the path of their module.
        attention: Implementation of attention to trace; None for the class's default.
        widths: MLP channels of every layer, where the checkpoint is padded; a graph needs no
            padding.

    Raises:
        SlmError: Optimum cannot.
    """
    from transformers import AutoModelForCausalLM

    with quiet_optimum():
        with _told():
            model = AutoModelForCausalLM.from_pretrained(
                checkpoint,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                attn_implementation=attention,
            )
            if widths:
                keep = enumerate(widths)
                apply_channels(
                    model, [KeepChannels(layer=i, indices=tuple(range(n))) for i, n in keep]
                )
            put_copies(model, between)
        trace(model, folder, options)


def trace(model: PreTrainedModel, folder: Path, options: OnnxOptions) -> None:
    """Let Optimum export a model in memory, which is float32 and on the CPU.

    Args:
        model: The model; ``use_cache`` of its config is set.
        folder: Where to write.
        options: What Optimum is asked for.

    Raises:
        SlmError: Optimum cannot.
    """
    from optimum.exporters.onnx import onnx_export_from_model

    with quiet_optimum(), _told():
        model.config.use_cache = options.task.endswith("with-past")
        # Not main_export, which takes nothing but what it loads itself.
        onnx_export_from_model(
            model, folder, task=options.task, opset=options.opset, do_validation=False
        )


@contextmanager
def _told() -> Iterator[None]:
    """Turn an error of Optimum into one line; errors of the disk pass."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise SlmError(
            f"Optimum cannot export the model to ONNX: {' '.join(str(error).split())[:300]}"
        ) from error


def verify_onnx(session: Session, folder: Path, *, tolerance: float = 1e-4) -> tuple[Check, ...]:
    """Run an exported graph on the prompts and compare it with the session's model.

    Args:
        session: Holds the model that was exported.
        folder: What `write_onnx` wrote.
        tolerance: Largest allowed difference of a logit, as a share of the largest logit.

    Returns:
        The checks, all passed.

    Raises:
        VerificationError: Logits or greedy tokens differ.
    """
    expected = reference(session, full_precision=True)
    with quiet_optimum():
        allowed = tolerance * expected.scale
        found = departure(load_ort_model(folder), expected, allowed)
    checks = [
        Check(name=DIFFERENCE, value=found.logits, tolerance=allowed, unit="logits"),
        Check(name=GENERATION, value=found.with_cache, tolerance=0, unit="prompts"),
        Check(name=ONE_PASS, value=found.without_cache, tolerance=0, unit="prompts"),
    ]
    return prove("the ONNX model", checks)


def _refuse_unknown(model_type: str) -> None:
    """Check that the installed Optimum exports a family."""
    with quiet_optimum():
        import optimum.exporters.onnx.model_configs  # noqa: F401
        from optimum.exporters.tasks import TasksManager

        try:
            TasksManager.get_supported_tasks_for_model_type(
                model_type, "onnx", library_name="transformers"
            )
        except KeyError as error:
            raise UnsupportedModelError(
                f"the installed Optimum exports no {model_type} to ONNX", hint="leave `onnx` out"
            ) from error


@contextmanager
def _checkpoint(session: Session, output: Path) -> Iterator[Path]:
    """The checkpoint that the run wrote, or a temporary one beside the graph."""
    written = output / "checkpoint"
    if (written / "config.json").is_file():
        yield written
        return
    with temporary_folder(output) as scratch:
        with without_operators(session.model):
            save_checkpoint(session, scratch)
        yield scratch


@contextmanager
def quiet_optimum() -> Iterator[None]:
    """Keep back what tracing says on the way: the parity check is the judge."""
    with ExitStack() as stack:
        stack.enter_context(isolated("optimum", logging.ERROR))
        stack.enter_context(isolated("transformers", logging.ERROR))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield
