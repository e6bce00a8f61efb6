"""Where everything lies for one set of definitions: raw files, recipes, the store. Knows no dagster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from derm_pipeline.recipes import load_recipe, recipe_files, recipe_sources
from derm_pipeline.store import Store

if TYPE_CHECKING:
    from derm_pipeline.recipes.model import Recipe


@dataclass(frozen=True)
class Workspace:
    """A folder of data (store, own recipes) and a folder of raw sources."""

    data: Path
    raw: Path

    @cached_property
    def store(self) -> Store:
        return Store(self.data / "store")

    @cached_property
    def recipe_files(self) -> Mapping[str, Path]:
        """Name -> file of every recipe, shipped and own."""
        return recipe_files([self.data / "recipes"])

    def recipe(self, name: str) -> Recipe:
        """The recipe, checked."""
        return load_recipe(name, self.recipe_files)

    def sources_of(self, recipe: str) -> list[str]:
        """The sources that a recipe names."""
        return recipe_sources(recipe, self.recipe_files)

    def source_folder(self, source: str) -> Path:
        """Where a source's files lie as they were published."""
        return self.raw / source
