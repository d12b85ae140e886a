"""Check of the coupled groups against those that torch-pruning finds by tracing the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from slm_plugin.errors import UnsupportedModelError
from slm_plugin.lazy import nn, torch
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.models.streaming import held
from slm_plugin.models.view import DecoderView
from slm_plugin.pruners.gradients import only_trainable
from slm_plugin.surgery.groups import Members, members

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRACED_TOKENS = 4


def check_coupling(view: DecoderView) -> None:
    """Compare our groups with those of torch-pruning's dependency graph.

    All layers couple alike, so only the first and the last are compared. MLP groups are
    always compared, attention groups only when every query head has its own key/value head. With
    two query heads per key/value head, torch-pruning 1.6.1 does not terminate on the rotary
    embedding's concatenation. With more, it couples a key head with no query head or with the one
    at the same index. Only linear maps are compared: all heads share the query and key norms of
    Qwen3, which therefore remain, though torch-pruning lists them.

    Raises:
        UnsupportedModelError: torch-pruning couples other rows or columns.
    """
    import torch_pruning

    dimensions = view.dimensions()
    with _ends(view) as ends, _undisturbed(view.model):
        graph = torch_pruning.DependencyGraph().build_dependency(
            view.model,
            # A dictionary, because positional inputs are unpacked along the batch.
            example_inputs={
                "input_ids": torch.zeros(
                    (1, TRACED_TOKENS), dtype=torch.long, device=view.model.device
                ),
                "use_cache": False,
            },
            output_transform=lambda output: output.logits,
            unwrapped_parameters=[(norm, 0) for norm in _norm_weights(view.model)],
        )
        for index, layer in ends.items():
            modules = view.projections(layer)
            for root, expected in _expected_groups(dimensions.of_layer(index)):
                found = _traced_group(graph, modules, root, expected[root])
                _require_equal(found, expected, f"layer {index}")
        # Nodes refer to one another and to every parameter; clear them so that memory is freed.
        for node in graph.module2node.values():
            vars(node).clear()


def _expected_groups(dimensions: Dimensions) -> Iterator[tuple[str, Members]]:
    """Root projections, each with the group that surgery removes."""
    family = dimensions.family
    matrix = {part: name for name in family.projections for part in family.parts(name)}
    last = dimensions.intermediate_size - 1
    yield matrix["gate_proj"], members("channels", sorted({0, last}), dimensions)
    if dimensions.queries_per_group == 1:
        yield matrix["q_proj"], members("kv_groups", (dimensions.kv_heads - 1,), dimensions)


def _traced_group(
    graph: Any, modules: dict[str, nn.Linear], root: str, indices: tuple[int, ...]
) -> Members:
    import torch_pruning

    names = {module: name for name, module in modules.items()}
    handler = torch_pruning.prune_linear_out_channels
    group = graph.get_pruning_group(modules[root], handler, list(indices))
    return {
        names.get(dep.target.module, dep.target.name): tuple(sorted(found))
        for dep, found in group
        if isinstance(dep.target.module, nn.Linear)
    }


def _require_equal(found: Members, expected: Members, place: str) -> None:
    if found == expected:
        return
    differing = sorted(n for n in found | expected if found.get(n) != expected.get(n))
    raise UnsupportedModelError(
        f"torch-pruning couples {', '.join(differing)} of {place} differently from "
        "transformers' own layers",
        hint="the model's forward pass was changed; prune the unchanged architecture",
    )


def _norm_weights(model: PreTrainedModel) -> list[nn.Parameter]:
    """Parameters of layer types unknown to torch-pruning, listed to avoid its warning."""
    known = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Embedding)
        for parameter in module.parameters()
    }
    return [parameter for parameter in model.parameters() if id(parameter) not in known]


@contextmanager
def _ends(view: DecoderView) -> Iterator[dict[int, nn.Module]]:
    """The first and the last layer by index, alone in the model while they are traced.

    Their weights are in memory, and those of an output head, where layers are streamed.
    """
    layers = view.layers
    ends = {index: layers[index] for index in sorted({0, len(layers) - 1})}
    with ExitStack() as stack:
        for module in (*ends.values(), view.head):
            stack.enter_context(held(module))
        view.put_layers(nn.ModuleList(ends.values()))
        try:
            yield ends
        finally:
            view.put_layers(layers)


@contextmanager
def _undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Enable gradients for tracing, and restore flags and hooks."""
    found = [(m, m.training, set(m._forward_hooks)) for m in model.modules()]
    try:
        with only_trainable(model, model.parameters()):
            yield
    finally:
        for module, training, hooks in found:
            module.training = training
            # torch-pruning does not remove its own hooks when the forward pass fails.
            for added in set(module._forward_hooks) - hooks:
                del module._forward_hooks[added]
