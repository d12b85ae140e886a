"""Commands that only read import neither PyTorch nor anything that takes as long."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from slm_plugin import lazy
from slm_plugin.extras import missing
from tests.report.sample_plans import depth_plan, width_plan

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
REFUSING = """
import sys


class Refusal:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "numpy", "safetensors", "lm_eval"}:
            raise AssertionError(f"{name} is imported")


sys.meta_path.insert(0, Refusal())
"""
COMMAND = f"{REFUSING}from slm_plugin.cli import main\nmain()"
# Several commands, one after the other: what one of them imports stays imported.
END = "-- end --"
COMMANDS = f"""{REFUSING}
import json

from slm_plugin.cli import main

for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit as end:
        assert end.code == 0, arguments
    print({END!r})
"""
# All modules, beside the one with subclasses of PyTorch's classes.
MODULES = f"""{REFUSING}
from importlib import import_module
from pkgutil import walk_packages

import slm_plugin

for module in walk_packages(slm_plugin.__path__, "slm_plugin."):
    if module.name not in ("slm_plugin.__main__", "slm_plugin.models.torch_subclasses"):
        import_module(module.name)
for name in slm_plugin.__all__:
    getattr(slm_plugin, name)
"""


def run(code: str, *arguments: str) -> str:
    """What a child process prints that refuses to import the slow packages."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_reading_commands_import_nothing_slow(tmp_path: Path) -> None:
    """They answer without PyTorch, transformers, numpy, safetensors and lm-eval."""
    recipes = [r for r in RECIPES if r.name != "hybrid.yaml" or not missing("onnx")]
    commands = [
        ["--help"],
        ["validate", "--help"],
        ["list"],
        ["list", "--json"],
        ["schema"],
        ["schema", "--comparison"],
        *(["validate", str(recipe)] for recipe in recipes),
    ]
    for plan in (depth_plan(), width_plan()):
        file = tmp_path / f"{plan.pruner}.json"
        plan.write(file)
        commands.append(["explain", str(file)])
    parts = run(COMMANDS, json.dumps(commands)).split(END)
    assert len(parts) == len(commands) + 1
    assert all(part.strip() for part in parts[:-1])
    assert depth_plan().pruner in parts[-3] and width_plan().pruner in parts[-2]


def test_wrong_recipes_import_nothing_slow(tmp_path: Path) -> None:
    """Mistakes are found, and named, without these packages too."""
    file = tmp_path / "recipe.yaml"
    data = {"version": 1, "model": {"id": "smollm2-135m"}, "output": "runs/x", "stages": []}
    stages = [{"prune": "slm", "target": {"ratio": 2}}, {"recover": "refit", "rank": 1}]
    file.write_text(json.dumps({**data, "stages": stages}))
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "validate", str(file)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "unknown key 'rank'" in done.stderr and "is imported" not in done.stderr


def test_modules_import_nothing_slow() -> None:
    """No module needs PyTorch to be imported, and no public name to be got."""
    run(MODULES)


def modes() -> tuple[bool, bool]:
    """Whether inference mode and gradients are on."""
    return torch.is_inference_mode_enabled(), torch.is_grad_enabled()


def plain() -> list[tuple[bool, bool]]:
    """The modes inside a function."""
    return [modes()]


def generator() -> Iterator[tuple[bool, bool]]:
    """The modes inside a generator, after what is sent and thrown as well."""
    yield modes()
    try:
        yield modes()
    except ValueError:
        yield modes()


class Holder:
    """Something that has a method."""

    def method(self) -> list[tuple[bool, bool]]:
        """The modes inside a method."""
        assert isinstance(self, Holder)
        return [modes()]


def traced(decorate: Callable[..., Callable[..., object]]) -> list[object]:
    """The modes inside and outside of everything that can be decorated."""
    found: list[object] = [decorate(plain)(), modes()]
    kind = type("Decorated", (Holder,), {"method": decorate(Holder.method)})
    found += [kind().method(), modes()]
    made = decorate(generator)()
    assert isinstance(made, Iterator)
    for step in (made.__next__, made.__next__, lambda: made.throw(ValueError)):  # type: ignore[attr-defined]
        found += [step(), modes()]
    return found


@pytest.mark.parametrize(
    ("ours", "original"),
    [(lazy.inference_mode, torch.inference_mode()), (lazy.no_grad, torch.no_grad())],
    ids=["inference_mode", "no_grad"],
)
def test_decorators_are_those_of_pytorch(
    ours: Callable[..., Callable[..., object]], original: Callable[..., Callable[..., object]]
) -> None:
    """Functions, methods and suspended generators see the modes that PyTorch's own give them."""
    assert traced(ours) == traced(original)
    assert ours(plain).__name__ == "plain" and ours(plain).__doc__ == plain.__doc__


def test_lazy_modules_are_the_modules() -> None:
    """Attributes are the modules' own, and one that is not there fails as it would there."""
    assert lazy.torch.Tensor is torch.Tensor and lazy.nn.Linear is torch.nn.Linear
    with pytest.raises(AttributeError, match="'torch' has no attribute 'nowhere'"):
        _ = lazy.torch.nowhere  # type: ignore[attr-defined]
