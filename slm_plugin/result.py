"""What a run leaves: the pruned model, its plans, and the figures before and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from slm_plugin.errors import UserError
from slm_plugin.export.checkpoint import save_checkpoint, verify_checkpoint
from slm_plugin.outputs.claim import claim
from slm_plugin.outputs.place import located
from slm_plugin.plans import PruningPlan
from slm_plugin.report.before_after import summary, summary_table
from slm_plugin.report.record import RunReport
from slm_plugin.report.table import as_text, terminal
from slm_plugin.session import Session

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, repr=False)
class RunResult:
    """A run that is done.

    Attributes:
        report: What was done and measured.
        plans: The plans by file name, in the order of their stages.
        output: The folder that was written; None where the recipe names none.
        session: The model as it is now, with its tokenizer and calibration set.
    """

    report: RunReport
    plans: Mapping[str, PruningPlan]
    output: Path | None
    session: Session

    @property
    def model(self) -> PreTrainedModel:
        """The pruned model, in evaluation mode."""
        return self.session.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's tokenizer."""
        return self.session.tokenizer

    @property
    def plan(self) -> PruningPlan:
        """The plan of a run with one pruning stage.

        Raises:
            UserError: There is none, or more than one.
        """
        if len(self.plans) != 1:
            raise UserError(
                f"this run has {len(self.plans)} plans, not one",
                hint="`plans` has all of them by file name",
            )
        return next(iter(self.plans.values()))

    def summary(self) -> str:
        """The stages, and a table of sizes and measurements before and after, as text."""
        stages = [f"{one.number}. {one.name}: {one.summary}" for one in self.report.stages]
        # As a caption the sentence would be wrapped to the width of the table.
        table = as_text(terminal(replace(summary_table(self.report), title="", caption="")))
        return "\n".join([*stages, f"{table}{summary(self.report)}"])

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the model so that ``from_pretrained(folder)`` loads it, and prove that it does.

        The plans are written beside the weights. A new process loads the folder with stock
        transformers and compares weights, logits and greedy tokens with the model in memory.

        Args:
            folder: Appears when everything in it is written and verified, or not at all.
            overwrite: Replace a former result.

        Returns:
            The folder.

        Raises:
            UserError: The model was pruned again since.
            OutputError: The folder exists, or cannot be written.
            UnsupportedModelError: No stock class holds the model.
            VerificationError: What was written does not compute what the model computes.
        """
        if self.session.view.dimensions() != self.report.after:
            raise UserError(
                "the model has another size than this run left: it was pruned again",
                hint="save the result of the last run",
            )
        target = located(str(folder))
        with claim(target, "save", overwrite=overwrite) as output:
            save_checkpoint(self.session, output.folder)
            verify_checkpoint(self.session, output.folder)
            for name, plan in self.plans.items():
                plan.write(output.folder / name)
        return target

    def __repr__(self) -> str:
        return f"<RunResult: {summary(self.report)}>"

    def _repr_html_(self) -> str:
        return f"<pre>{escape(self.summary())}</pre>"
