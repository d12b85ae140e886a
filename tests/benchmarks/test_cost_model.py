"""The cost model against bytes that a tiny model really reads."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType

import pytest

from slm_plugin.models.loading import ModelSource, load
from slm_plugin.models.stored import StoredTensor
from slm_plugin.pruners.depth.slm import SlidingLayerMerging, SlmOptions
from slm_plugin.session import Session
from slm_plugin.target import Target
from tests.benchmarks.loaded import loaded
from tests.tiny import make_model, random_tokens


@pytest.fixture
def cost_model(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark as a module."""
    return loaded("cost_model", monkeypatch)


def test_a_plan_reads_what_is_computed(
    cost_model: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing merges, all but one reading of the embedding, which stays in memory."""
    make_model(num_hidden_layers=8).save_pretrained(tmp_path)
    # The first capture of a class in a process runs one layer more, to see what it returns.
    Session(make_model(), calibration=random_tokens(1, 4)).captured()
    read = []
    original = StoredTensor.read

    def counted(self: StoredTensor) -> object:
        read.append(math.prod(self.shape))
        return original(self)

    monkeypatch.setattr(StoredTensor, "read", counted)
    model, _ = load(ModelSource(id=str(tmp_path), device="cpu", memory="layerwise"))
    session = Session(model, calibration=random_tokens(3, 16), batch_tokens=16)
    plan = SlidingLayerMerging(SlmOptions(), Target(threshold=1.1)).plan(session)
    shape = cost_model.Shape("tiny", 8, 32, 48, 16, 128)
    assert shape.parameters == session.original.parameters
    found = cost_model.cost(shape, None, 48)
    assert found.trials == len(plan.trials) == 6
    computed = found.bytes_read // cost_model.WIDTH
    assert computed - sum(read) == shape.embedding + shape.hidden


def test_known_models_have_their_published_sizes(cost_model: ModuleType) -> None:
    """Llama-2-7B, Llama-3.1-70B and Llama-3.1-405B, to the parameter."""
    sizes = [shape.parameters for shape in cost_model.SHAPES]
    assert sizes == [6_738_415_616, 70_553_706_496, 405_853_388_800]
