"""Draw a calibration set: token ids of shape ``(samples, length)``, seeded and never repeated."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from slm_plugin.calibration.sources import TextSource, check_source, is_file, read_documents
from slm_plugin.calibration.tensors import read_tensors
from slm_plugin.calibration.token_files import refuse_ids, stored_ids
from slm_plugin.counts import MOST, Count, Seed
from slm_plugin.errors import CalibrationError
from slm_plugin.lazy import inference_mode, torch
from slm_plugin.models.view import DecoderView
from slm_plugin.record import Record
from slm_plugin.texts import expanded, regular_file, shown_path

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from slm_plugin.models.families.family import Family

DEFAULT_SAMPLES = 10
DEFAULT_LENGTH = 128
TOKEN_FILES = (".json", ".safetensors")


class CalibrationSource(TextSource):
    """Where the calibration tokens come from and how many there are.

    The defaults, 10 samples of 128 tokens, are those of the published scripts (SLM,
    Shortened-LLaMA).
    """

    source: Annotated[
        str,
        Field(
            min_length=1,
            description="builtin, self (the model writes it), a .txt or .jsonl file, token ids in "
            ".json or .safetensors, a datasets id, or tensors for an encoder",
        ),
    ] = "builtin"
    path: Annotated[
        str | None,
        Field(min_length=1, description=".safetensors file with the tensors of source: tensors"),
    ] = None
    samples: Annotated[Count | None, Field(description="samples to draw (10)")] = None
    length: Annotated[int | None, Field(ge=2, le=MOST, description="tokens per sample (128)")] = (
        None
    )
    seed: Annotated[Seed | None, Field(description="seed of the draw; default: the recipe's")] = (
        None
    )
    sampling: Annotated[
        Literal["crop", "pack"],
        Field(
            description="crop: a random stretch of a random document; pack: shuffled documents "
            "joined and cut into pieces"
        ),
    ] = "crop"

    @property
    def is_token_file(self) -> bool:
        """Whether the source holds token ids rather than text."""
        return self.source.lower().endswith(TOKEN_FILES)

    def check(self) -> None:
        """Read a file, or make sure that datasets can be read, before any model is loaded.

        Raises:
            CalibrationError: The file is missing or malformed, or the source is no such thing.
            MissingExtraError: A dataset is asked for and `datasets` is not installed.
        """
        if self.source == "self" and self.path is None:
            return
        if self.source == "tensors" or self.path is not None:
            self._check_tensors()
            return
        check_source(self.source)
        if self.is_token_file:
            _token_file(self)
        elif is_file(self.source):
            read_documents(self, "calibration")

    def unsuited(self, family: Family) -> str:
        """Why it does not calibrate a model, with the remedy; empty where it does."""
        if family.by_tensors and self.source != "tensors" and self.path is None:
            names = ", ".join(family.inputs)
            return (
                f"a {family.label} is calibrated by tensors ({names}), not by text; "
                "write `calibration: {source: tensors, path: FILE.safetensors}`"
            )
        if self.source == "tensors" and not family.by_tensors:
            return (
                f"tensors calibrate encoders, and {family.architecture} is a decoder; name a text "
                "or a file of token ids as `source`"
            )
        return ""

    def _check_tensors(self) -> None:
        if self.source != "tensors":
            raise CalibrationError(
                f"path goes with source: tensors, not with '{self.source}'",
                hint="write `source: tensors`, or remove `path`",
            )
        if self.path is None:
            raise CalibrationError(
                "source: tensors needs `path`", hint="add `path: FILE.safetensors`"
            )
        if not self.path.lower().endswith(".safetensors"):
            raise CalibrationError(
                f"{shown_path(self.path)} is no .safetensors file",
                hint="save the tensors with safetensors.torch.save_file",
            )
        drawing = ("samples", "length", "seed", "split", "config")
        stated = [name for name in drawing if getattr(self, name) is not None]
        if stated:
            raise CalibrationError(
                f"`{stated[0]}` says how to draw text, and tensors are used as they are",
                hint=f"remove `{stated[0]}`",
            )
        if wrong := regular_file(expanded(self.path)):
            raise CalibrationError(wrong)
        read_tensors(expanded(self.path))


class CalibrationRecord(Record):
    """What a run calibrated on; ``sha256`` is over the token ids or the tensors.

    Of tensors ``length`` counts positions before any layer shortens them, padding included.
    """

    source: str
    samples: int
    length: int
    seed: int
    sha256: str
    unit: Literal["tokens", "positions"] = "tokens"

    @classmethod
    def of(cls, source: CalibrationSource, tokens: Tensor, seed: int) -> CalibrationRecord:
        """Note a set that was drawn from a source, by ``seed`` where the source names none."""
        samples, length = tokens.shape
        return cls(
            source=source.source,
            samples=samples,
            length=length,
            seed=seed if source.seed is None else source.seed,
            sha256=digest(tokens),
        )


def draw(
    source: CalibrationSource,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    seed: int,
) -> Tensor:
    """Token ids of a calibration set, ``(samples, length)``, on the CPU.

    Args:
        source: What to draw from.
        model: Bounds the ids and the length; writes the text when the source is ``self``.
        tokenizer: Needed for text.
        seed: Used when the source names none. The same seed, source and tokenizer give the same
            tokens; another tokenizer may skip other documents and cuts other stretches.

    Raises:
        CalibrationError: The source is missing, malformed or too short, or its ids do not fit.
    """
    limit = DecoderView.of(model).config.max_position_embeddings
    if source.length is not None and source.length > limit:
        raise CalibrationError(
            f"calibration length {source.length} is more than the model's {limit} positions"
        )
    generator = random.Random(seed if source.seed is None else source.seed)
    if source.is_token_file:
        tokens = _token_file(source)
    elif source.source == "self":
        tokens = _written_by(model, source, generator.randrange(2**31))
    else:
        if tokenizer is None:
            raise CalibrationError(
                "the model has no tokenizer, so text cannot calibrate it",
                hint="give token ids in a .json or .safetensors file, or source: self",
            )
        pieces = _crops if source.sampling == "crop" else _packed
        tokens = torch.tensor(_take(source, pieces(source, tokenizer, generator)))
    check_ids(tokens, source.source, model)
    return tokens


def digest(tokens: Tensor) -> str:
    """SHA-256 over the ids as little-endian 64-bit integers: names a calibration set."""
    return hashlib.sha256(tokens.to(torch.int64).contiguous().numpy().tobytes()).hexdigest()


def _sizes(source: CalibrationSource) -> tuple[int, int]:
    return source.samples or DEFAULT_SAMPLES, source.length or DEFAULT_LENGTH


def _crops(
    source: CalibrationSource, tokenizer: PreTrainedTokenizerBase, generator: random.Random
) -> Iterator[list[int]]:
    """One random stretch from each document that is long enough, documents in random order.

    Special tokens are those the tokenizer adds by itself, so BOS is in a sample only when its
    stretch begins where the document does (as in the released SLM script).
    """
    _, length = _sizes(source)
    documents = read_documents(source, "calibration")
    generator.shuffle(documents)
    for document in documents:
        ids = tokenizer(document).input_ids
        if len(ids) >= length:
            start = generator.randint(0, len(ids) - length)
            yield ids[start : start + length]


def _packed(
    source: CalibrationSource, tokenizer: PreTrainedTokenizerBase, generator: random.Random
) -> Iterator[list[int]]:
    """Consecutive pieces of the shuffled documents, joined by blank lines; the tail is dropped."""
    _, length = _sizes(source)
    documents = read_documents(source, "calibration")
    generator.shuffle(documents)
    rest: list[int] = []
    for number, document in enumerate(documents):
        rest += tokenizer(("\n\n" if number else "") + document, add_special_tokens=False).input_ids
        while len(rest) >= length:
            yield rest[:length]
            rest = rest[length:]


def _take(source: CalibrationSource, pieces: Iterator[list[int]]) -> list[list[int]]:
    samples, length = _sizes(source)
    taken = [piece for piece, _ in zip(pieces, range(samples), strict=False)]
    if len(taken) < samples:
        remedy = "lower `samples` or `length`"
        if source.sampling == "crop":
            remedy += ", or set `sampling: pack` to join short documents"
        raise CalibrationError(
            f"the source '{source.source}' gives {len(taken)} samples of {length} tokens; "
            f"{samples} are asked for",
            hint=remedy,
        )
    return taken


@inference_mode
def _written_by(model: PreTrainedModel, source: CalibrationSource, seed: int) -> Tensor:
    """Text that the model itself writes, sampled at temperature 1 from a random first token.

    Source: LLM-QAT (arXiv 2305.17888), section 3.1, without its greedy opening tokens.
    """
    samples, length = _sizes(source)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(
        DecoderView.of(model).config.vocab_size, (samples, 1), generator=generator
    )
    cache = None
    step = tokens
    while tokens.shape[1] < length:
        output = model(
            step.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        cache = output.past_key_values
        chances = output.logits[:, -1].float().softmax(-1).cpu()
        step = torch.multinomial(chances, 1, generator=generator)
        tokens = torch.cat((tokens, step), dim=1)
    return tokens


def _token_file(source: CalibrationSource) -> Tensor:
    """Ids exactly as they lie in the file, so that an experiment can be repeated."""
    path = expanded(source.source)
    tokens = stored_ids(path)
    refuse_ids(tokens, shown_path(path))
    for name, wanted, found in zip(
        ("samples", "length"), (source.samples, source.length), tokens.shape, strict=True
    ):
        if wanted is not None and wanted != found:
            raise CalibrationError(
                f"{path} has {name} {found}, the recipe says {wanted}",
                hint=f"ids are used as they are: remove `{name}` or make it {found}",
            )
    return tokens.to(torch.int64)


# What the configs of models of images and text call the tokens in whose place features are put.
IMAGE_TOKENS = ("image_token_id", "image_token_index", "video_token_id")


def check_ids(tokens: Tensor, source: str, model: PreTrainedModel) -> None:
    """Refuse token ids that a model cannot read.

    Raises:
        CalibrationError: They are no token ids, beyond the vocabulary, or too many in a sample, or
            stand for an image.
    """
    refuse_ids(tokens, source)
    config = DecoderView.of(model).config
    size = config.vocab_size
    if int(tokens.max()) >= size:
        raise CalibrationError(
            f"{source} holds token id {int(tokens.max())}; the vocabulary ends at {size - 1}",
            hint="the ids were made with another tokenizer",
        )
    for name in IMAGE_TOKENS:
        token = getattr(model.config, name, None)
        if token is not None and bool((tokens == token).any()):
            raise CalibrationError(
                f"{source} holds token {token}, which stands for an image, and text alone "
                "calibrates",
                hint="leave out what belongs to images",
            )
    if tokens.shape[1] > config.max_position_embeddings:
        raise CalibrationError(
            f"{source} has samples of {tokens.shape[1]} tokens; the model has "
            f"{config.max_position_embeddings} positions"
        )
