"""Where everything lies for one set of definitions: sources, recipes, the store. Knows no dagster."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from derm_pipeline.recipes import load_recipe, recipe_files, recipe_sources
from derm_pipeline.sources import SOURCES, Source
from derm_pipeline.store import Store

if TYPE_CHECKING:
    from derm_pipeline.captions.symptoms import CaptionerConfig
    from derm_pipeline.recipes.model import Recipe
    from derm_pipeline.sources.own import OwnSource


@dataclass(frozen=True)
class Workspace:
    """A folder of data (store, own recipes, own sources) and a folder of raw sources."""

    data: Path
    raw: Path
    tensorboard: Path | None = None
    """Folder of the event files of trainings, `<recipe>/<stage>` in it; None for none."""

    @cached_property
    def store(self) -> Store:
        return Store(self.data / "store")

    @cached_property
    def recipe_files(self) -> Mapping[str, Path]:
        """Name -> file of every recipe, shipped and own."""
        return recipe_files([self.data / "recipes"])

    def recipe(self, name: str) -> Recipe:
        """The recipe, checked."""
        return load_recipe(name, self.recipe_files, self.sources)

    def sources_of(self, recipe: str) -> list[str]:
        """The sources that a recipe names."""
        return recipe_sources(recipe, self.recipe_files)

    @cached_property
    def _own_sources(self) -> Mapping[str, OwnSource]:
        from derm_pipeline.sources.own import own_sources

        if not (self.data / "sources.yaml").exists():
            return {}
        return own_sources(self.data / "sources.yaml", SOURCES)

    @cached_property
    def sources(self) -> Mapping[str, Source]:
        """Every source by its name: the shipped ones, then the user's own (`sources.yaml` in the data folder)."""
        return {**SOURCES, **{name: own.source for name, own in self._own_sources.items()}}

    @cached_property
    def captioner(self) -> CaptionerConfig:
        """Who writes the visual captions: `captioner.yaml` in the data folder; without it the embedded descriptor."""
        from derm_pipeline.captions.symptoms import read_captioner_config

        config = read_captioner_config(self.data / "captioner.yaml")
        folder = self.data / Path(getattr(config, "model", "")).expanduser()
        if config.kind == "llava_next" and folder.is_dir():  # a path in a file is relative to the file
            return config.model_copy(update={"model": str(folder)})
        return config

    def api_key(self, captioner: CaptionerConfig) -> str | None:
        """The key of a captioner's server, from the environment variable that its settings name.

        Raises:
            ValueError: the variable is not set.
        """
        name = getattr(captioner, "api_key_env", None)
        if name is None:
            return None
        if not os.environ.get(name):
            raise ValueError(f"captioner.yaml: api_key_env: the environment variable {name} is not set")
        return os.environ[name]

    def has_files_of(self, source: str) -> bool:
        """Whether images of a source are there, be they in archives; those that are drawn come when they are needed.

        Raises:
            ValueError: they are there, and cannot be read.
        """
        from derm_pipeline.sources.layout import NotUnpackedError

        folder = self.source_folder(source)
        try:
            found = self.sources[source].list_images(folder)
        except NotUnpackedError:
            return True
        except FileNotFoundError:
            return False
        return any(image.file is not None for image in found.candidates) or any(folder.glob("**/*.zip"))

    def source_folder(self, source: str) -> Path:
        """Where a source's files lie as they were published."""
        own = self._own_sources.get(source)
        return self.data / own.path if own and own.path else self.raw / source
