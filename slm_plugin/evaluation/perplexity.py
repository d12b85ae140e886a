"""Perplexity of a text, by the protocol of pruning papers."""

from __future__ import annotations

import hashlib
import math
import sys
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from slm_plugin.calibration.captures import split
from slm_plugin.calibration.sources import (
    TextSource,
    check_source,
    is_file,
    read_rows,
    read_whole,
)
from slm_plugin.counts import MOST, Count
from slm_plugin.errors import CalibrationError, NumericalError
from slm_plugin.evaluation.base import Evaluator, EvaluatorOptions, Measurement
from slm_plugin.evaluation.prefill import check_room
from slm_plugin.lazy import inference_mode, torch
from slm_plugin.models.head import next_token_losses
from slm_plugin.models.view import DecoderView
from slm_plugin.progress import track
from slm_plugin.registry import register_evaluator

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from slm_plugin.session import Session

BATCH_TOKENS = 2048
LARGEST_EXPONENT = math.log(sys.float_info.max)


class PerplexityOptions(EvaluatorOptions, TextSource):
    """The text and how it is split."""

    length: Annotated[
        int, Field(ge=2, le=MOST, description="tokens per piece; papers use 128 or 2048")
    ] = 2048
    limit: Annotated[Count, Field(description="use only the first pieces")] | None = None
    join: Annotated[
        Literal["rows", "none"],
        Field(
            description="rows: the rows of the text joined by two newlines, as published; "
            "none: a .txt file unchanged"
        ),
    ] = "rows"

    @model_validator(mode="after")
    def _only_a_file_is_whole(self) -> Self:
        if self.join == "none" and not self.source.lower().endswith(".txt"):
            raise ValueError("`join: none` is only for .txt files; remove `join`")
        return self


@register_evaluator("perplexity")
class Perplexity(Evaluator):
    """Perplexity over non-overlapping pieces of one long text.

    The text is tokenised once, with the special tokens that the tokenizer puts at its start and no
    others, and cut into pieces of ``length`` tokens; what is left over is dropped. Every piece is
    scored on its own at its ``length - 1`` shifted positions, in float32, and summed in float64:
    ``exp`` of the mean over all positions.

    Source:
        The released evaluation code of Shortened LLaMA (arXiv 2402.02834) and SLM
        (arXiv 2502.19159), with pieces of 128 tokens; SLEB (arXiv 2402.09025) and others use 2048.
    """

    unlisted: ClassVar[bool] = True
    streams = True
    Options = PerplexityOptions
    options: PerplexityOptions

    @cached_property
    def text(self) -> str:
        """The text to score, read once.

        Raises:
            CalibrationError: The source is missing, malformed or holds no text.
        """
        if self.options.join == "rows":
            return "\n\n".join(read_rows(self.options, "evaluation"))
        return read_whole(self.options.source)

    def check(self) -> None:
        """Read a local text, or check that datasets can be read.

        Raises:
            CalibrationError: The file is missing, malformed or holds no text.
            MissingExtraError: A dataset is named and `datasets` is not installed.
        """
        try:
            check_source(self.options.source)
            if self.options.source == "builtin" or is_file(self.options.source):
                _ = self.text
        except CalibrationError as error:
            error.option = "source"
            raise

    def check_model(self, session: Session) -> None:
        """Check that a piece fits the model's positions.

        Raises:
            UserError: It does not.
        """
        check_room(session.model, self.options.length, "a piece of the perplexity text", "`length`")

    def measure(self, session: Session) -> list[Measurement]:
        """Score the text.

        Raises:
            CalibrationError: The text is too short for one piece, or there is no tokenizer.
            NumericalError: The model produces NaN or infinity.
            UserError: A piece is longer than the model's positions.
        """
        self.check_model(session)
        if session.tokenizer is None:
            raise CalibrationError(
                "perplexity needs a tokenizer and the session has none",
                hint="load the model with its tokenizer",
            )
        tokens, special = token_ids(session.tokenizer, self.text)
        pieces = cut(tokens, self.options.length, self.options.limit)
        mean = negative_log_likelihood(session.view, pieces) / pieces[:, 1:].numel()
        return [
            Measurement(
                name=f"perplexity {self._stem()} {self.options.length}",
                # A diverged model can overflow float64; infinity is a valid result.
                value=math.exp(mean) if mean < LARGEST_EXPONENT else math.inf,
                protocol=self._protocol(pieces, special),
                better="lower",
            )
        ]

    def _stem(self) -> str:
        source = self.options.source
        return Path(source).stem if is_file(source) else source

    def _protocol(self, pieces: Tensor, special: int) -> str:
        length, first = self.options.length, "first " * (self.options.limit is not None)
        joined = {"rows": "rows joined by two newlines", "none": "file as it is"}
        details = [
            joined[self.options.join],
            f"tokenised once, special tokens at the start: {special}",
            f"{first}{len(pieces)} non-overlapping pieces of {length} tokens",
            f"{pieces[:, 1:].numel()} scored positions ({length - 1} a piece)",
            "exp of the mean cross entropy",
            f"token ids sha256 {_digest(pieces)}",
        ]
        return ", ".join(details)


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[Tensor, int]:
    """Token ids ``(tokens,)`` of a text, and the number of special tokens before it.

    Special tokens after the text are removed, because the pieces are continuous text.
    """
    encoded = tokenizer(text, return_special_tokens_mask=True, verbose=False)
    ids, added = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
    while added and added[-1]:
        ids.pop()
        added.pop()
    return torch.tensor(ids, dtype=torch.long), [*added, 0].index(0)


def cut(tokens: Tensor, length: int, limit: int | None) -> Tensor:
    """Cut token ids ``(tokens,)`` into pieces ``(pieces, length)`` and drop the tail.

    Raises:
        CalibrationError: There are not enough tokens for one piece.
    """
    count = tokens.numel() // length
    if count == 0:
        fitting = 2 ** (tokens.numel().bit_length() - 1) if tokens.numel() else 0
        raise CalibrationError(
            f"the perplexity text has {tokens.numel()} tokens and a piece takes {length}",
            hint=f"use a longer text or `length: {fitting}`"
            if fitting > 1
            else "use a longer text",
        )
    return tokens[: count * length].view(count, length)[:limit]


@inference_mode
def negative_log_likelihood(view: DecoderView, pieces: Tensor) -> float:
    """Cross-entropy of ``(pieces, length)`` token ids, in nats, summed over shifted positions.

    Raises:
        NumericalError: The model produces NaN or infinity.
    """
    total = 0.0
    batches = list(split(pieces, BATCH_TOKENS))
    for batch in track(batches, "perplexity", total=len(batches)):
        tokens = batch.to(view.model.device)
        hidden = view.decoder(**view.inputs(tokens)).last_hidden_state
        total += next_token_losses(view.logits, hidden, tokens).sum().item()
        if not math.isfinite(total):
            raise NumericalError(
                "the model produces NaN or infinity on the perplexity text",
                hint="load it in float32 or bfloat16 and check its weights",
            )
    return total


def _digest(pieces: Tensor) -> str:
    return hashlib.sha256(pieces.numpy().tobytes()).hexdigest()[:12]
