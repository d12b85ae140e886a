"""The prompts that models are timed on, their prefill pass, and a check of their length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, Field
from typing_extensions import Self

from slm_plugin.counts import Count
from slm_plugin.errors import UserError
from slm_plugin.lazy import torch
from slm_plugin.models.view import DecoderView
from slm_plugin.record import Record

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutputWithPast

    from slm_plugin.session import Session


class Prompts(Record):
    """Prompts side by side, and the tokens after them."""

    prompt_tokens: Annotated[Count, Field(description="tokens of the prompt")] = 128
    new_tokens: Annotated[Count, Field(description="greedy steps after the prompt")] = 32
    batch_size: Annotated[Count, Field(description="prompts per batch")] = 1

    @classmethod
    def of(cls, options: BaseModel) -> Self:
        """These fields alone, of options that have them among others."""
        return cls(**{name: getattr(options, name) for name in cls.model_fields})

    @property
    def positions(self) -> int:
        """Positions of one sequence in the KV cache at the end."""
        return self.prompt_tokens + self.new_tokens

    def check_room(self, model: PreTrainedModel, wanted_by: str) -> None:
        """Check that they fit the model's positions; see `check_room`."""
        together = "`prompt_tokens` and `new_tokens` together"
        check_room(model, self.positions, wanted_by, together)


def check_room(model: PreTrainedModel, positions: int, wanted_by: str, option: str) -> None:
    """Check that a sequence fits the model's positions.

    Args:
        model: The model.
        positions: Length of the sequence.
        wanted_by: Who asks for it.
        option: What in a recipe makes it so long.

    Raises:
        UserError: It does not.
    """
    room = getattr(DecoderView.of(model).config, "max_position_embeddings", None)
    if room is not None and positions > room:
        raise UserError(
            f"{wanted_by} needs {positions} positions and the model has {room}",
            hint=f"set {option} to at most {room}",
        )


def random_prompt(session: Session, rows: int, tokens: int) -> Tensor:
    """Token ids ``(rows, tokens)`` on the model's device, the same for the same seed."""
    generator = torch.Generator().manual_seed(session.seed)
    ids = torch.randint(session.view.embedding.num_embeddings, (rows, tokens), generator=generator)
    return ids.to(session.model.device)


def prefill(model: PreTrainedModel, prompt: Tensor) -> CausalLMOutputWithPast:
    """Run a prompt ``(rows, tokens)`` like generation: fill a cache, score the last position."""
    output: CausalLMOutputWithPast = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    return output
