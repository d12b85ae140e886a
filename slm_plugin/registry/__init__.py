"""Named components: the built-in ones, what a plugin has to be, and which are installed."""

from slm_plugin.registry.names import (
    Fault,
    Registry,
    evaluators,
    exporters,
    nearest,
    pruners,
    recoveries,
    register_evaluator,
    register_exporter,
    register_pruner,
    register_recovery,
)

__all__ = [
    "Fault",
    "Registry",
    "evaluators",
    "exporters",
    "nearest",
    "pruners",
    "recoveries",
    "register_evaluator",
    "register_exporter",
    "register_pruner",
    "register_recovery",
]
