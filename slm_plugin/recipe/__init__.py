"""Recipes: read, check, describe. One YAML file is one compression run."""

from slm_plugin.recipe.parsing import Recipe, Stage

__all__ = ["Recipe", "Stage"]
