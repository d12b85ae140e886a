"""What torch-pruning does with grouped-query attention; a failure here may be good news.

Width pruning builds its own head groups because of the first two. When they fail, compare the
attention groups of grouped-query models too, in slm_plugin.pruners.width.coupling.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

pytest.importorskip("torch_pruning")

SECONDS = 5
SCRIPT = """
import faulthandler
import torch
import torch_pruning as tp
from tests.tiny import make_model

model = make_model(num_hidden_layers=1, num_key_value_heads={kv_heads})
graph = tp.DependencyGraph().build_dependency(
    model,
    example_inputs={{"input_ids": torch.zeros((1, 4), dtype=torch.long), "use_cache": False}},
    output_transform=lambda output: output.logits,
    verbose=False,
)
attention = model.model.layers[0].self_attn
print("traced", flush=True)
faulthandler.dump_traceback_later({seconds}, exit=True)
group = graph.get_pruning_group(attention.{root}, tp.prune_linear_out_channels, list(range(8)))
faulthandler.cancel_dump_traceback_later()
names = {{module: name for name, module in attention.named_children()}}
for dependency, lines in group:
    if dependency.target.module in names:
        print(names[dependency.target.module], *sorted({{line // 8 for line in lines}}))
"""


def _group(root: str, kv_heads: int) -> dict[str, list[int]]:
    """Heads that torch-pruning couples with a projection's first one; empty when it hangs."""
    script = SCRIPT.format(root=root, kv_heads=kv_heads, seconds=SECONDS)
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False
    )
    traced, *found = run.stdout.splitlines() or [""]
    assert traced == "traced", run.stderr
    assert found or "Timeout" in run.stderr, run.stderr
    groups = (line.split() for line in found)
    return {name: [int(head) for head in heads] for name, *heads in groups}


def test_one_query_head_a_key_head_is_coupled_rightly() -> None:
    """Without grouping the same head of all four projections belongs together."""
    group = _group("q_proj", kv_heads=4)
    assert group == {name: [0] for name in ("q_proj", "k_proj", "v_proj", "o_proj")}


@pytest.mark.parametrize("root", ["q_proj", "k_proj"])
def test_two_query_heads_a_key_head_never_end(root: str) -> None:
    """With two query heads a key head the search for the group does not terminate."""
    assert _group(root, kv_heads=2) == {}


def test_four_query_heads_a_key_head_are_not_coupled() -> None:
    """With more query heads a key head, it is not coupled with all of them."""
    group = _group("k_proj", kv_heads=1)
    assert group["k_proj"] == [0]
    assert group.get("q_proj", []) != [0, 1, 2, 3]


def test_module_misstates_its_version() -> None:
    """The attribute of the 1.6.1 wheel says 1.6.0; only the metadata can be trusted."""
    import torch_pruning

    if version("torch-pruning") != "1.6.1":
        pytest.skip("another release")
    assert torch_pruning.__version__ == "1.6.0"
