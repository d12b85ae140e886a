"""Depth and width pruning of decoder language models, from one YAML recipe."""

from __future__ import annotations

from importlib import import_module

# As in typing, which `python -m slm_plugin` would take from the working directory here already.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from slm_plugin.api import get_pruner, list_pruners, load_model, prune
    from slm_plugin.comparison.configuration import Comparison
    from slm_plugin.comparison.run import compare
    from slm_plugin.component import Options
    from slm_plugin.errors import SlmError
    from slm_plugin.models.families import register_family
    from slm_plugin.models.families.family import Family
    from slm_plugin.pipeline import plan, run
    from slm_plugin.plans import PruningPlan
    from slm_plugin.pruners.base import Pruner
    from slm_plugin.recipe import Recipe
    from slm_plugin.registry import (
        register_evaluator,
        register_exporter,
        register_pruner,
        register_recovery,
    )
    from slm_plugin.result import RunResult
    from slm_plugin.session import Session, apply
    from slm_plugin.target import Target

__version__ = "0.1.0"

# Public names load on first use, so that `import slm_plugin` costs no torch.
_HOMES = {
    "Comparison": "slm_plugin.comparison.configuration",
    "Family": "slm_plugin.models.families.family",
    "Options": "slm_plugin.component",
    "Pruner": "slm_plugin.pruners.base",
    "PruningPlan": "slm_plugin.plans",
    "Recipe": "slm_plugin.recipe",
    "RunResult": "slm_plugin.result",
    "Session": "slm_plugin.session",
    "SlmError": "slm_plugin.errors",
    "Target": "slm_plugin.target",
    "apply": "slm_plugin.session",
    "compare": "slm_plugin.comparison.run",
    "get_pruner": "slm_plugin.api",
    "list_pruners": "slm_plugin.api",
    "load_model": "slm_plugin.api",
    "plan": "slm_plugin.pipeline",
    "prune": "slm_plugin.api",
    "register_evaluator": "slm_plugin.registry",
    "register_exporter": "slm_plugin.registry",
    "register_family": "slm_plugin.models.families",
    "register_pruner": "slm_plugin.registry",
    "register_recovery": "slm_plugin.registry",
    "run": "slm_plugin.pipeline",
}

__all__ = [
    "Comparison",
    "Family",
    "Options",
    "Pruner",
    "PruningPlan",
    "Recipe",
    "RunResult",
    "Session",
    "SlmError",
    "Target",
    "__version__",
    "apply",
    "compare",
    "get_pruner",
    "list_pruners",
    "load_model",
    "plan",
    "prune",
    "register_evaluator",
    "register_exporter",
    "register_family",
    "register_pruner",
    "register_recovery",
    "run",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'slm_plugin' has no attribute '{name}'")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
