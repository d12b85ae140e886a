"""A second reading of a GGUF file, by other means, that has to give the same model.

Weights come from the `gguf` package's own reader and are compared with what is in memory; row and
channel are counted out again instead of reshaping. Rotary frequencies are computed from the
metadata, and the window of each layer is counted out from its number. Tokens come from a plain
search for the best merge over the file's own lists.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from slm_plugin.errors import ModelSourceError
from slm_plugin.lazy import np
from slm_plugin.models.families.family import FULL, SLIDING
from slm_plugin.models.gguf.metadata import Network
from slm_plugin.models.gguf.parts import GgufModel
from slm_plugin.models.gguf.pretokenizers import pre_tokenizer
from slm_plugin.models.gguf.rope import FREQUENCIES, TOLERANCE, frequencies
from slm_plugin.models.gguf.tokenizer import SPACE
from slm_plugin.models.gguf.vocabulary import BYTE_LEVEL, NORMAL, Vocabulary
from slm_plugin.models.gguf.weights import dequantised, parameter_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REPORT = "the file is unusual: please report it, and give a checkpoint folder meanwhile"
TEXTS = (
    "The river rose, and the miller moved his grain to the loft; he'd waited for 20 days.",
    "see example.com and (self.name) = 20240131; I'LL say it isn't\n\n\n  new\tline \n",
    "def f(x):\n    return x ** 2  # 3.14159\r\n",
    "Zürich, naïve café — Ελλάδα, Москва, 東京 2024年, हिन्दी, 🙂🙃 e\u0301",
    " leading and trailing  ",
    "\n\n5  17",
)


def verify_weights(source: GgufModel, network: Network, model: PreTrainedModel) -> None:
    """Compare some rows of some parameters, and the list of all tensors, with `gguf`'s reading.

    Raises:
        ModelSourceError: They differ.
    """
    from gguf import GGUFReader

    layers = sorted({0, network.layers // 2, network.layers - 1})
    checked = ["token_embd.weight", "output_norm.weight", "output.weight"]
    for layer in layers:
        names = [name for name in source.tensors if name.startswith(f"blk.{layer}.")]
        checked += names
    parameters = dict(model.named_parameters())
    listed = 0
    for file in source.files:
        for tensor in GGUFReader(file).tensors:
            listed += 1
            place = source.tensors.get(tensor.name)
            if place is None or tuple(tensor.shape[::-1].tolist()) != place.shape:
                raise _difference(source, tensor.name)
            if tensor.name in checked:
                parameter = parameters[str(parameter_of(tensor.name, network.architecture))]
                _compare_rows(source, tensor, parameter, network)
    if listed != len(source.tensors):
        raise _difference(source, f"the number of tensors, {listed}")


def _compare_rows(source: GgufModel, tensor: Any, parameter: Tensor, network: Network) -> None:
    import torch
    from gguf import dequantize

    data = tensor.data if len(tensor.shape) > 1 else tensor.data.reshape(1, -1)
    for row in sorted({0, 1, len(data) // 2, len(data) - 2, len(data) - 1} & set(range(len(data)))):
        values = dequantize(data[row : row + 1], tensor.tensor_type)[0]
        if "norm" in tensor.name:
            values = values - np.float32(network.architecture.norm_offset)
        read = torch.from_numpy(np.array(values)).to(parameter.dtype)
        if len(tensor.shape) > 1:
            same = parameter[_row(tensor.name, row, len(data), network)]
        else:
            order = [_row(tensor.name, i, len(read), network) for i in range(len(read))]
            same = parameter[order]
        if not torch.equal(torch.nan_to_num(same), torch.nan_to_num(read)):
            raise _difference(source, f"row {row} of {tensor.name}")


def _row(name: str, row: int, rows: int, network: Network) -> int:
    """Where the stock class has a row of the file."""
    if not network.architecture.paired or not re.search(r"\.attn_[qk]\.(weight|bias)$", name):
        return row
    head, channel = divmod(row, network.head_dim)
    pair, half = divmod(channel, 2)
    return head * network.head_dim + half * (network.head_dim // 2) + pair


def verify_attention(source: GgufModel, network: Network, model: PreTrainedModel) -> None:
    """Compare window and scale of each layer's attention with what the metadata give.

    Raises:
        ModelSourceError: They differ.
    """
    decoder: Any = model.model
    for index, layer in enumerate(decoder.layers):
        attention = layer.self_attn
        window = None if network.sliding is None else _window(source, network, index)
        if getattr(attention, "sliding_window", None) != window:
            raise _difference(source, f"the sliding window of layer {index}")
        if abs(attention.scaling * network.query_width**0.5 - 1) > TOLERANCE:
            raise _difference(source, f"the scale of attention of layer {index}")


def _window(source: GgufModel, network: Network, index: int) -> int | None:
    """The window of a layer as the metadata have it; None when it has full attention."""
    name = f"{network.architecture.name}.attention.sliding_window"
    pattern = source.fields.get(f"{name}_pattern", 6)
    slides = pattern[index] if isinstance(pattern, list) else index % pattern != pattern - 1
    return int(source.fields[name]) if slides else None


def verify_rotation(
    source: GgufModel, network: Network, scaling: dict[str, Any] | None, model: PreTrainedModel
) -> None:
    """Compare the model's rotary frequencies with those that the metadata give.

    Raises:
        ModelSourceError: They differ by more than 1e-5.
    """
    wanted = frequencies(network)
    amplitude = 1.0
    kind = "default" if scaling is None else scaling["rope_type"]
    if scaling is not None and kind == "linear":
        wanted = wanted / scaling["factor"]
    if scaling is not None and kind == "yarn":
        wanted = _yarn(wanted, network, scaling)
        amplitude = 1.0 + 0.1 * math.log(scaling["factor"])
    if FREQUENCIES in source.tensors:
        wanted = wanted / dequantised(source.tensors[FREQUENCIES])
    if network.sliding is None:
        _compare_rotation(source, model, "", kind, wanted, amplitude)
        return
    if FULL in network.sliding.kinds:
        _compare_rotation(source, model, FULL, kind, wanted, amplitude)
    if SLIDING in network.sliding.kinds:
        # Its table is never scaled.
        local = frequencies(network, network.sliding.base)
        _compare_rotation(source, model, SLIDING, "default", local, 1.0)


def _compare_rotation(
    source: GgufModel, model: PreTrainedModel, layers: str, kind: str, wanted: Any, amplitude: float
) -> None:
    """Compare one table, of layers with the attention type ``layers`` or, if empty, of all."""
    decoder: Any = model.model
    if layers == SLIDING and hasattr(decoder, "rotary_emb_local"):
        table, prefix = decoder.rotary_emb_local, ""
    else:
        table = decoder.rotary_emb
        prefix = f"{layers}_" if layers and hasattr(table, f"{layers}_inv_freq") else ""
    found = getattr(table, f"{prefix}inv_freq").double().numpy()
    named = f"{kind}, {layers}" if layers else kind
    if found.shape != wanted.shape or np.abs(found / wanted - 1).max() > TOLERANCE:
        raise _difference(source, f"the rotary frequencies ({named})")
    if abs(getattr(table, f"{prefix}attention_scaling") - amplitude) > TOLERANCE:
        raise _difference(source, f"the rotary amplitude ({named})")


def _yarn(plain: Any, network: Network, scaling: dict[str, Any]) -> Any:
    """Frequencies of YaRN: slow ones are divided by the factor, fast ones kept.

    Source: https://arxiv.org/abs/2309.00071, section 3.2.
    """

    def channel(turns: float) -> float:
        length = scaling["original_max_position_embeddings"]
        return (
            network.head_dim
            * math.log(length / (turns * 2 * math.pi))
            / (2 * math.log(network.rope_base))
        )

    low = max(math.floor(channel(scaling["beta_fast"])), 0)
    high = min(math.ceil(channel(scaling["beta_slow"])), network.head_dim - 1)
    slow = np.clip((np.arange(len(plain)) - low) / max(high - low, 0.001), 0, 1)
    return plain / scaling["factor"] * slow + plain * (1 - slow)


def verify_tokens(
    source: GgufModel, vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Compare the tokens of a few texts with those of a plain search over the file's lists.

    Raises:
        ModelSourceError: They differ.
    """
    if len(tokenizer) != len(vocabulary.tokens):
        raise _difference(source, f"the number of tokens, {len(tokenizer)}")
    before, after = vocabulary.around()
    encode = plain_encoder(vocabulary)
    for text in TEXTS:
        wanted = before + encode(text) + after
        if tokenizer(text)["input_ids"] != wanted:
            raise _difference(source, f"the tokens of {text!r}")


def plain_encoder(vocabulary: Vocabulary) -> Callable[[str], list[int]]:
    """A slow, plain encoder over the lists of a vocabulary: no token before or after the text."""
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    added = sorted((token for token, _ in vocabulary.added()), key=len, reverse=True)
    fences = re.compile("|".join(map(re.escape, added)) or r"(?!)")
    encode = (_byte_level if vocabulary.model == BYTE_LEVEL else _pieces)(vocabulary, ids)

    def encoded(text: str) -> list[int]:
        found, at = [], 0
        for fence in fences.finditer(text):
            found += encode(text[at : fence.start()]) if fence.start() > at else []
            found.append(ids[fence[0]])
            at = fence.end()
        return found + (encode(text[at:]) if at < len(text) else [])

    return encoded


def _byte_level(vocabulary: Vocabulary, ids: dict[str, int]) -> Callable[[str], list[int]]:
    import unicodedata

    cut = pre_tokenizer(vocabulary.cut)
    ranks = {pair: rank for rank, pair in enumerate(vocabulary.merges)}

    def encoded(text: str) -> list[int]:
        text = unicodedata.normalize("NFC", text) if vocabulary.cut.nfc else text
        found = []
        for piece, _ in cut.pre_tokenize_str(text):
            if vocabulary.cut.whole_words and piece in ids:
                found.append(ids[piece])
                continue
            # A byte that the vocabulary lacks has no token: the original drops it as well.
            symbols = [letter for letter in piece if letter in ids]
            found += [ids[s] for s in _merged(symbols, lambda a, b: ranks.get((a, b)))]
        return found

    return encoded


def _pieces(vocabulary: Vocabulary, ids: dict[str, int]) -> Callable[[str], list[int]]:
    scores = {
        token: -vocabulary.scores[index]
        for token, index in ids.items()
        if vocabulary.types[index] == NORMAL
    }

    def rank(left: str, right: str) -> float | None:
        return scores.get(left + right) if left in scores and right in scores else None

    def encoded(text: str) -> list[int]:
        spaced = (" " if vocabulary.space_prefix else "") + text
        found: list[int] = []
        for symbol in _merged(list(spaced.replace(" ", SPACE)), rank):
            if symbol in ids:
                found.append(ids[symbol])
                continue
            fallback = [ids.get(f"<0x{byte:02X}>") for byte in symbol.encode()]
            if None not in fallback:
                found += [index for index in fallback if index is not None]
            elif "unk" in vocabulary.roles and found[-1:] != [vocabulary.roles["unk"]]:
                found.append(vocabulary.roles["unk"])
        return found

    return encoded


def _merged(symbols: list[str], rank: Callable[[str, str], float | None]) -> list[str]:
    """Merge the best neighbours, the leftmost of equals, until none can be merged."""
    while True:
        best: tuple[float, int] | None = None
        for at in range(len(symbols) - 1):
            found = rank(symbols[at], symbols[at + 1])
            if found is not None and (best is None or found < best[0]):
                best = found, at
        if best is None:
            return symbols
        at = best[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]


def _difference(source: GgufModel, what: str) -> ModelSourceError:
    return ModelSourceError(f"two readings of {source.name} differ in {what}", hint=REPORT)
