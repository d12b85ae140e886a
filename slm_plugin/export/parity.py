"""What the model in memory computes on a few prompts, and how far a written one departs from it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_plugin.errors import VerificationError
from slm_plugin.export.base import Check
from slm_plugin.export.lengths import depends_on_length, probe_length
from slm_plugin.lazy import inference_mode, safetensors, torch

if TYPE_CHECKING:
    from torch import Tensor

    from slm_plugin.session import Session

SENTENCES = (
    "Water boils.",
    "The library on the corner opens at nine, and by ten every chair in it is taken.",
    "When the snow melted in April the river rose so fast that the miller moved his grain to the "
    "loft, tied the boat to the oak behind the house and waited two days for the rain to stop.",
)
SENTENCE_LENGTHS = (3, 12, 48)
RANDOM_LENGTHS = (1, 24)
NEW_TOKENS = 8
# Reading the same bytes back on the same machine gives the same logits; these shares of the
# largest logit leave room for another device and another order of summation.
TOLERANCES = {"torch.float32": 1e-4, "torch.float16": 1e-2, "torch.bfloat16": 5e-2}
# Names of the checks that every exporter makes.
DIFFERENCE = "largest logit difference"
GENERATION = "greedy continuations that differ"
ONE_PASS = "greedy continuations that differ without a cache"


@dataclass(frozen=True, slots=True)
class Reference:
    """What the model in memory computes.

    Attributes:
        prompts: Token ids, each ``(1, tokens)``.
        continuations: Greedy continuations with cache, each ``(1, NEW_TOKENS)``.
        logits: Logits of prompt and continuation in one pass, each
            ``(1, tokens + NEW_TOKENS, vocabulary)``, float32.
    """

    prompts: tuple[Tensor, ...]
    continuations: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]

    @property
    def scale(self) -> float:
        """Largest magnitude among the logits."""
        return max(float(logits.abs().max()) for logits in self.logits)

    def write(self, file: Path, facts: dict[str, str]) -> None:
        """Write as safetensors, with facts about the model beside the tensors."""
        from safetensors.torch import save_file

        tensors = {
            f"{name}.{index}": tensor.contiguous()
            for name in self.__slots__
            for index, tensor in enumerate(getattr(self, name))
        }
        save_file(tensors, file, metadata=facts)

    @classmethod
    def read(cls, file: Path) -> tuple[Reference, dict[str, str]]:
        """Read what `write` wrote."""
        with safetensors.safe_open(file, framework="pt") as stored:
            count = len(stored.keys()) // len(cls.__slots__)
            fields = {
                name: tuple(stored.get_tensor(f"{name}.{index}") for index in range(count))
                for name in cls.__slots__
            }
            return cls(**fields), stored.metadata()


@dataclass(frozen=True, slots=True)
class Departure:
    """How far a model is from a reference.

    Attributes:
        logits: Largest absolute difference of a logit; NaN when either side has NaN.
        with_cache: Prompts that ``generate`` continues otherwise.
        without_cache: Prompts on which the most likely tokens of one pass are others. A pass
            over the continuation shows what greedy decoding without a cache would choose.
    """

    logits: float
    with_cache: int
    without_cache: int


def prompts(session: Session) -> tuple[Tensor, ...]:
    """Prompts of several lengths: sentences through the tokenizer, and seeded random ids.

    Without a tokenizer all are random. The last prompt goes beyond sliding windows and the
    positions of training, where these are short enough.
    """
    vocabulary = session.view.embedding.num_embeddings
    generator = torch.Generator().manual_seed(session.seed)
    written = encode(session.tokenizer) if session.tokenizer is not None else []
    lengths = [*RANDOM_LENGTHS, *(() if written else SENTENCE_LENGTHS)]
    beyond = probe_length(session.view.config, vocabulary)
    # A table of learned positions has an end.
    if beyond is not None and session.view.family.rotary != "none":
        lengths.append(beyond)
    drawn = [torch.randint(vocabulary, (1, length), generator=generator) for length in lengths]
    return (*(torch.tensor([ids]) for ids in written if ids), *drawn)


def encode(tokenizer: Any) -> list[list[int]]:
    """Token ids of the sentences."""
    return [tokenizer(sentence)["input_ids"] for sentence in SENTENCES]


def reference(session: Session, *, full_precision: bool = False) -> Reference:
    """Run the session's model on the prompts.

    Args:
        session: Holds the model, which stays as it is.
        full_precision: Compute in float32 with a model in a narrower format, on a copy.
    """
    model: Any = session.model
    if full_precision and model.dtype != torch.float32:
        model = copy.deepcopy(model).float()
    asked = prompts(session)
    continuations = tuple(continue_greedily(model, prompt) for prompt in asked)
    whole = tuple(torch.cat(pair, dim=1) for pair in zip(asked, continuations, strict=True))
    return Reference(asked, continuations, tuple(logits_of(model, ids) for ids in whole))


@inference_mode
def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Logits ``(1, tokens, vocabulary)`` of ids ``(1, tokens)`` in one pass, float32 on the CPU."""
    _forget_length(model)
    ids = ids.to(model.device)
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    logits: Tensor = output.logits.float().cpu()
    return logits


def continue_greedily(model: Any, prompt: Tensor) -> Tensor:
    """The NEW_TOKENS most likely next tokens by the model's own ``generate``, ``(1, new)``.

    With a cache, unless the model is an ONNX graph without one.
    """
    from transformers import GenerationConfig

    _forget_length(model)
    ids = prompt.to(model.device)
    cached = getattr(model, "can_use_cache", True)
    greedy = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=cached)
    with _plain_generation(model):
        tokens: Tensor = model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=greedy
        )
    return tokens[:, ids.shape[1] :].cpu()


def departure(model: Any, expected: Reference, tolerance: float) -> Departure:
    """Measure a model against a reference.

    A greedy token that differs does not count when the reference's own logits hold the two
    tokens for equal within twice the tolerance: rounding may pick either.

    Args:
        model: A transformers or an ONNX Runtime model.
        expected: What the model in memory computes.
        tolerance: Largest allowed difference of a logit.
    """
    moving = depends_on_length(getattr(model, "config", None))
    differences, with_cache, without_cache = [], 0, 0
    for prompt, continuation, logits in _cases(expected):
        found = logits_of(model, torch.cat([prompt, continuation], dim=1))
        differences.append((found - logits).abs().max())
        steps = slice(prompt.shape[1] - 1, -1)
        case = logits[0, steps], 2 * tolerance
        with_cache += _goes_elsewhere(continue_greedily(model, prompt)[0], continuation[0], *case)
        # With dynamic scaling one pass rotates the first tokens otherwise than the cache holds
        # them, and so may choose otherwise than `generate` in the reference as well.
        chosen = logits[0, steps].argmax(-1) if moving else continuation[0]
        without_cache += _goes_elsewhere(found[0, steps].argmax(-1), chosen, *case)
    return Departure(float(torch.stack(differences).max()), with_cache, without_cache)


def prove(what: str, checks: Sequence[Check]) -> tuple[Check, ...]:
    """The checks, when all of them pass.

    Raises:
        VerificationError: A value is above its tolerance, or NaN.
    """
    failed = [
        f"{check.name} {check.value:.4g}, allowed {check.tolerance:.3g}"
        for check in checks
        if not check.value <= check.tolerance
    ]
    if failed:
        raise VerificationError(
            f"{what} does not compute what the model in memory computes: {'; '.join(failed)}"
        )
    return tuple(checks)


def size_bytes(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _cases(expected: Reference) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    return zip(expected.prompts, expected.continuations, expected.logits, strict=True)


def _goes_elsewhere(found: Tensor, expected: Tensor, logits: Tensor, tie: float) -> bool:
    """Whether the first token that differs, of ``(new,)``, was clearly not the one to choose."""
    different = (found != expected).nonzero()
    if not len(different):
        return False
    step = int(different[0])
    preference = logits[step, expected[step]] - logits[step, found[step]]
    return not abs(float(preference)) <= tie


@inference_mode
def _forget_length(model: Any) -> None:
    """Take the frequencies of short texts again: dynamic scaling keeps those of the longest."""
    if depends_on_length(model.config):
        one = torch.zeros((1, 1), dtype=torch.long, device=model.device)
        model(input_ids=one, attention_mask=torch.ones_like(one), use_cache=False)


@contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """Hide the model's generation settings: penalties and end tokens would blur the comparison.

    The warning of transformers about prompts beyond the model's positions is off as well, because
    the checks use such prompts on purpose.
    """
    from transformers import GenerationConfig
    from transformers.utils import logging

    own, verbosity = model.generation_config, logging.get_verbosity()
    model.generation_config = GenerationConfig()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        model.generation_config = own
        logging.set_verbosity(verbosity)
