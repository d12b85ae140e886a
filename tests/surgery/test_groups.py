"""Tests of slm_plugin.surgery.groups."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import repeat_kv

from slm_plugin.models.families.llama import LLAMA
from slm_plugin.models.view import DecoderView, projections
from slm_plugin.surgery.groups import (
    axis,
    channel_members,
    kv_group_members,
    members,
    query_head_members,
)
from tests.tiny import make_model


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_query_heads_are_those_that_repeat_kv_feeds(kv_heads: int) -> None:
    """A KV group holds exactly the query heads to which transformers repeats its key head."""
    dimensions = DecoderView.of(make_model(num_key_value_heads=kv_heads)).dimensions()
    owners = torch.arange(kv_heads).view(1, kv_heads, 1, 1)
    owner_of_query = repeat_kv(owners, 4 // kv_heads).flatten().tolist()
    for group in range(kv_heads):
        members = kv_group_members((group,), dimensions)
        queries = [head for head, owner in enumerate(owner_of_query) if owner == group]
        rows = tuple(head * 8 + i for head in queries for i in range(8))
        assert members["q_proj"] == members["o_proj"] == rows
        assert members["k_proj"] == members["v_proj"] == tuple(range(group * 8, group * 8 + 8))


def test_several_groups_are_the_union() -> None:
    """Members of several groups are those of each, in order."""
    dimensions = DecoderView.of(make_model()).dimensions()
    first, second = (kv_group_members((group,), dimensions) for group in (0, 1))
    both = kv_group_members((0, 1), dimensions)
    assert both == {name: first[name] + second[name] for name in first}


def test_members_hold_the_parameters_that_dimensions_count() -> None:
    """Rows and columns of a unit, biases with their rows, hold as many scalars as a unit weighs."""
    model = make_model(attention_bias=True, mlp_bias=True)
    dimensions = DecoderView.of(model).dimensions()
    modules = projections(model.model.layers[0], LLAMA)

    def scalars(found: dict[str, tuple[int, ...]]) -> int:
        total = 0
        for name, lines in found.items():
            weight = modules[name].weight
            total += len(lines) * (weight.shape[1 - axis(name)] + (axis(name) == 0))
        return total

    assert scalars(channel_members((3,))) == dimensions.channel_parameters
    assert scalars(kv_group_members((1,), dimensions)) == dimensions.kv_group_parameters
    assert scalars(query_head_members((3,), dimensions)) == dimensions.query_head_parameters


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_query_heads_make_up_the_queries_of_their_group(kv_heads: int) -> None:
    """Keys and values stay, also where they share a matrix with the queries."""
    for family in ("llama", "phi3"):
        sizes = DecoderView.of(make_model(family, num_key_value_heads=kv_heads)).dimensions()
        count = sizes.queries_per_group
        heads = members("query_heads", range(count, 2 * count) if kv_heads > 1 else (0,), sizes)
        group = members("kv_groups", (1,) if kv_heads > 1 else (0,), sizes)
        queries = next(iter(heads))
        assert heads["o_proj"] == group["o_proj"][: len(heads["o_proj"])]
        assert heads[queries] == heads["o_proj"]
        assert {name for name, lines in heads.items() if lines} == {queries, "o_proj"}
