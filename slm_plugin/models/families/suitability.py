"""Which components work on a model, and why the others do not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from slm_plugin.component import Component
from slm_plugin.errors import UnsupportedModelError
from slm_plugin.models.families.family import Family


def complaint(
    component: Component | type[Component], family: Family, config: Mapping[str, Any]
) -> str:
    """What a user reads about a component that does not suit a model; empty where it does."""
    reason = why_not(component, family, config)
    if not reason:
        return ""
    return f"'{component.name}' cannot be used with {_said(family)}: {reason}"


def _said(family: Family) -> str:
    # The record of an encoder holds for classes with many heads.
    return f"a {family.label}" if family.by_tensors else family.architecture


def why_not(
    component: Component | type[Component], family: Family, config: Mapping[str, Any]
) -> str:
    """Why a component cannot be used with a model, as half a sentence; empty where it can."""
    if not family.listed and not component.unlisted:
        return "its family is not listed, and only dropping layers is known to be right"
    if family.by_tensors and not component.whole_layers:
        return family.why_limited
    reason = component.unsuited(family, config)
    if not reason and isinstance(component, Component):
        reason = component.unsuited_options(family, config)
    return reason


def refuse_unsuited(
    components: Iterable[Component], family: Family, config: Mapping[str, Any]
) -> None:
    """Check that all components work on a model.

    Raises:
        UnsupportedModelError: One of them does not.
    """
    for component in components:
        found = complaint(component, family, config)
        if found:
            hint = "`slm-plugin list --model` names what can be used"
            raise UnsupportedModelError(found, hint=hint)
