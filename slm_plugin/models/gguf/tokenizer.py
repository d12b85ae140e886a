"""The tokenizer that a GGUF file describes, made of the parts that its original is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slm_plugin.models.gguf.pretokenizers import pre_tokenizer
from slm_plugin.models.gguf.vocabulary import BYTE_LEVEL, NORMAL, Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACE = "▁"


def make_tokenizer(vocabulary: Vocabulary, context: int) -> PreTrainedTokenizerBase:
    """A fast tokenizer for a vocabulary; ``context`` is the longest text that fits the model."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    backend = _byte_level(vocabulary) if vocabulary.model == BYTE_LEVEL else _pieces(vocabulary)
    for special in (True, False):
        entries = [
            AddedToken(token, normalized=False, special=special)
            for token, kind in vocabulary.added()
            if kind == special
        ]
        (backend.add_special_tokens if special else backend.add_tokens)(entries)
    frame = _frame(vocabulary)
    if frame is not None:
        backend.post_processor = frame
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=vocabulary.chat_template,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=context,
        **{f"{role}_token": vocabulary.tokens[i] for role, i in vocabulary.roles.items()},
    )


def _byte_level(vocabulary: Vocabulary) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    backend = Tokenizer(
        models.BPE(
            {token: index for index, token in enumerate(vocabulary.tokens)},
            vocabulary.merges,
            ignore_merges=vocabulary.cut.whole_words,
        )
    )
    if vocabulary.cut.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizer(vocabulary.cut)
    backend.decoder = decoders.ByteLevel()
    return backend


def _pieces(vocabulary: Vocabulary) -> Any:
    """SentencePiece's merging of pieces, by the scores of what they become."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    unknown = vocabulary.roles.get("unk")
    backend = Tokenizer(
        models.BPE(
            {token: index for index, token in enumerate(vocabulary.tokens)},
            _merges_by_score(vocabulary),
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = [normalizers.Prepend(SPACE)] if vocabulary.space_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    undone = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(" ", 1, 0)] if vocabulary.space_prefix else []
    backend.decoder = decoders.Sequence([*undone, *strip])
    return backend


def _merges_by_score(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every way to put two pieces together to a third, the best third first."""
    ids = {
        token: index
        for index, token in enumerate(vocabulary.tokens)
        if vocabulary.types[index] == NORMAL
    }
    found = []
    for token, index in ids.items():
        for at in range(1, len(token)):
            left, right = ids.get(token[:at]), ids.get(token[at:])
            if left is not None and right is not None:
                found.append((-vocabulary.scores[index], index, left, right))
    tokens = vocabulary.tokens
    return [(tokens[left], tokens[right]) for _, _, left, right in sorted(found)]


def _frame(vocabulary: Vocabulary) -> Any:
    """What stands before and after a text; None when nothing does."""
    from tokenizers import processors

    steps: list[Any] = []
    if vocabulary.model == BYTE_LEVEL:
        steps.append(processors.ByteLevel(trim_offsets=False))
    before, after = vocabulary.around()
    if before or after:
        first, second = (
            [f"{vocabulary.tokens[i]}:{part}" for i in before]
            + [f"{text}:{part}"]
            + [f"{vocabulary.tokens[i]}:{part}" for i in after]
            for part, text in enumerate(("$A", "$B"))
        )
        steps.append(
            processors.TemplateProcessing(
                single=first,
                pair=[*first, *second],
                special_tokens=[(vocabulary.tokens[i], i) for i in {*before, *after}],
            )
        )
    if len(steps) > 1:
        return processors.Sequence(steps)
    return steps[0] if steps else None
