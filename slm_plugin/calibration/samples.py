"""Draw a calibration set: token ids of shape ``(samples, length)``, seeded and never repeated."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from slm_plugin.calibration.sources import TextSource, is_file, read_documents
from slm_plugin.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
            ".json or .safetensors, or a datasets id",
        ),
    ] = "builtin"
    samples: Annotated[int | None, Field(ge=1, description="samples to draw (10)")] = None
    length: Annotated[int | None, Field(ge=2, description="tokens per sample (128)")] = None
    seed: Annotated[int | None, Field(description="seed of the draw; default: the recipe's")] = None
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
        return self.source.endswith(TOKEN_FILES)

    def check(self) -> None:
        """Refuse a missing file before any model is loaded.

        Raises:
            CalibrationError: The file is not there.
        """
        if is_file(self.source) and not Path(self.source).is_file():
            raise CalibrationError(f"there is no file {self.source}")


class CalibrationRecord(BaseModel):
    """What a run calibrated on; ``sha256`` is over the token ids."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    samples: int
    length: int
    seed: int
    sha256: str

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
    limit = model.config.max_position_embeddings
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
    _check_ids(tokens, source.source, model)
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


@torch.inference_mode()
def _written_by(model: PreTrainedModel, source: CalibrationSource, seed: int) -> Tensor:
    """Text that the model itself writes, sampled at temperature 1 from a random first token.

    Source: LLM-QAT (arXiv 2305.17888), section 3.1, without its greedy opening tokens.
    """
    samples, length = _sizes(source)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.config.vocab_size, (samples, 1), generator=generator)
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
    path = Path(source.source)
    try:
        if path.suffix == ".json":
            tokens = torch.tensor(json.loads(path.read_text(encoding="utf-8")))
        else:
            tokens = _only_tensor(path)
    except CalibrationError:
        raise
    except Exception as error:
        raise CalibrationError(f"cannot read token ids from {path}: {error}") from error
    if tokens.dim() != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise CalibrationError(
            f"{path} holds {tokens.dtype} of shape {tuple(tokens.shape)}",
            hint="token ids are whole numbers of shape (samples, length)",
        )
    for name, wanted, found in zip(
        ("samples", "length"), (source.samples, source.length), tokens.shape, strict=True
    ):
        if wanted is not None and wanted != found:
            raise CalibrationError(
                f"{path} has {name} {found}, the recipe says {wanted}",
                hint=f"ids are used as they are: remove `{name}` or make it {found}",
            )
    return tokens.to(torch.int64)


def _only_tensor(path: Path) -> Tensor:
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = load_file(path)
    if "input_ids" in tensors:
        return tensors["input_ids"]
    if len(tensors) == 1:
        return next(iter(tensors.values()))
    raise CalibrationError(f"{path} holds several tensors and none is called 'input_ids'")


def _check_ids(tokens: Tensor, source: str, model: PreTrainedModel) -> None:
    if tokens.numel() == 0 or tokens.shape[1] < 2:
        raise CalibrationError(f"{source} gives samples of fewer than two tokens")
    size = model.config.vocab_size
    if int(tokens.min()) < 0 or int(tokens.max()) >= size:
        raise CalibrationError(
            f"{source} holds token id {int(tokens.max())}; the vocabulary ends at {size - 1}",
            hint="the ids were made with another tokenizer",
        )
    if tokens.shape[1] > model.config.max_position_embeddings:
        raise CalibrationError(
            f"{source} has samples of {tokens.shape[1]} tokens; the model has "
            f"{model.config.max_position_embeddings} positions"
        )
