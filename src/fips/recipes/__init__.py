"""Recipes that ship with fips, by name."""

from __future__ import annotations

import difflib
import os
from importlib.resources import files
from pathlib import Path

from fips.config import Recipe
from fips.errors import ConfigError

__all__ = ["load_recipe", "recipe_names"]


def recipe_names() -> list[str]:
    """Names of the recipes in the package."""
    entries = files(__name__).iterdir()
    return sorted(entry.name.removesuffix(".yaml") for entry in entries if entry.name.endswith(".yaml"))


def load_recipe(name_or_path: str) -> Recipe:
    """A recipe of the package by name, or any YAML file by path; raises ``ConfigError`` if there is none."""
    names = recipe_names()
    if name_or_path in names:
        text = files(__name__).joinpath(f"{name_or_path}.yaml").read_text(encoding="utf-8")
        return Recipe.from_yaml(text, name=name_or_path)
    if os.path.exists(name_or_path):
        return Recipe.load(Path(name_or_path))
    near = difflib.get_close_matches(name_or_path, names, n=1)
    guess = f"did you mean `{near[0]}`? " if near else ""
    raise ConfigError(f"no recipe `{name_or_path}`; {guess}known: {', '.join(names)}, or the path of a YAML file")
