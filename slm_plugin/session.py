"""The one loaded model of a run, with its tokenizer, calibration set and captured activations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from slm_plugin.calibration.captures import Batch, capture, split
from slm_plugin.errors import CalibrationError
from slm_plugin.models.fingerprint import Fingerprint, fingerprint
from slm_plugin.models.view import DecoderView, Dimensions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Session:
    """State that the stages of a recipe share.

    The model is loaded once and changed in place by surgery, which then calls `model_changed`.

    Attributes:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer; None when only token ids are used.
        calibration: Token ids, ``(samples, length)``; None when no stage needs them.
        original: Dimensions of the model as it was loaded: what ratios are a share of.
        sources: For every layer of the model the lowest and the highest layer that it is made of,
            of those that were loaded.
        reference: What the layers saw when `keep_reference` was called; None before that.
        source: The recipe's model id, for reports.
        seed: Seed of everything random in a run.
        batch_tokens: Tokens that one calibration batch holds at most; 0 takes what suits the
            model's device.
        journals: Folder where searches keep their trials over the end of the process; None keeps
            them in memory.
        known_trials: Trials that searches have found in those journals: they took no time here.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None = None
    calibration: Tensor | None = None
    source: str = ""
    seed: int = 1234
    batch_tokens: int = 0
    journals: Path | None = None
    known_trials: int = field(default=0, init=False)
    original: Dimensions = field(init=False)
    sources: tuple[tuple[int, int], ...] = field(init=False)
    reference: list[Batch] | None = field(default=None, init=False, repr=False)
    _captured: list[Batch] | None = field(default=None, init=False, repr=False)
    _fingerprint: Fingerprint | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.original = self.view.dimensions()
        self.sources = tuple((index, index) for index in range(self.original.layers))
        if not self.batch_tokens:
            # A CPU is as fast on small batches, which need less memory and let a search stop a
            # trial sooner; a GPU is not (benchmarks/slm_search.py --batch-tokens).
            self.batch_tokens = 256 if self.model.device.type == "cpu" else 8192

    @property
    def view(self) -> DecoderView:
        """The model seen as a decoder."""
        return DecoderView.of(self.model)

    def batches(self) -> Iterator[Tensor]:
        """Calibration token ids in batches, on the model's device.

        Raises:
            CalibrationError: The session has no calibration set.
        """
        if self.calibration is None:
            raise CalibrationError(
                "this stage needs calibration data and the recipe has none",
                hint="add a `calibration:` section",
            )
        for tokens in split(self.calibration, self.batch_tokens):
            yield tokens.to(self.model.device)

    def captured(self) -> list[Batch]:
        """Layer inputs of the model in its present state, captured at the first request.

        Raises:
            CalibrationError: The session has no calibration set.
            NumericalError: The model produces NaN or infinity.
        """
        if self._captured is None:
            self._captured = capture(self.view, self.batches())
        return self._captured

    def keep_reference(self) -> None:
        """Keep what the layers see now, for recoveries that lead a pruned model back to it.

        The states lie on disk, beside the final one of every batch, and outlive `release`.

        Raises:
            CalibrationError: The session has no calibration set.
            NumericalError: The model produces NaN or infinity.
        """
        self.reference = self.captured()

    def fingerprint(self) -> Fingerprint:
        """Identity of the model in its present state."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.model)
        return self._fingerprint

    def release(self) -> None:
        """Give up captured activations; the next request captures anew."""
        self._captured = None

    def layers_changed(self, runs: Sequence[tuple[int, int]]) -> None:
        """Note what the layers are made of now.

        Args:
            runs: For every layer the lowest and the highest of the former layers.
        """
        former = self.sources
        self.sources = tuple((former[first][0], former[last][1]) for first, last in runs)

    def model_changed(self) -> None:
        """Forget everything that was derived from the model's former state."""
        self._captured = None
        self._fingerprint = None
