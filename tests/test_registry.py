"""Names of components: built-in, registered, and installed as plugins."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from slm_plugin import registry as module
from slm_plugin.errors import SlmError, UserError
from slm_plugin.registry import Registry, installed


def test_builtin_names_are_listed_without_importing_them() -> None:
    """A registry knows its names before any module is loaded."""
    made: Registry[object] = Registry("pruner", {"one": "no.such.module"})
    assert "one" in made.names()


def test_a_class_is_found_under_its_name_and_knows_it() -> None:
    """The decorator returns the class and writes its name on it."""
    made: Registry[object] = Registry("pruner", {})

    @made.register("mine")
    class Mine:
        name = ""

    assert made.get("mine") is Mine
    assert Mine.name == "mine"


def test_a_taken_name_is_refused() -> None:
    """Two classes cannot share a name, and a built-in one cannot be replaced."""
    made: Registry[object] = Registry("pruner", {"slm": "slm_plugin.pruners.depth.slm"})
    made.register("mine")(type("First", (), {}))
    with pytest.raises(SlmError, match="taken by First"):
        made.register("mine")(type("Second", (), {}))
    with pytest.raises(SlmError, match="taken by a built-in"):
        made.register("slm")(type("Third", (), {}))


def test_a_misspelt_name_gets_a_suggestion() -> None:
    """The error names the nearest known name, or all of them."""
    with pytest.raises(UserError, match="did you mean 'torch_pruning'"):
        module.pruners.get("torch_prunning")
    with pytest.raises(UserError, match=r"known: .*slm"):
        module.pruners.get("zzz")


def test_entry_points_offer_components(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed plugin is listed and loaded; a broken one is one clear error."""
    points = [
        EntryPoint("fine", "tests.test_registry:Offered", "slm_plugin.pruners"),
        EntryPoint("broken", "no_such_package:Thing", "slm_plugin.pruners"),
    ]
    monkeypatch.setattr(installed, "_points", lambda group, places: points)
    made: Registry[object] = Registry("pruner", {})
    assert made.names() == ["broken", "fine"]
    with pytest.raises(UserError, match=r"plugin 'broken' .* cannot be imported"):
        made.get("broken")
    assert made.get("fine") is Offered
    assert Offered.name == "fine"


class Offered:
    """What the plugin of the test above offers."""

    name = ""
