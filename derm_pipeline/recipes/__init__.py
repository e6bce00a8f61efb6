"""Recipes: named, complete experiments as YAML files, shipped here and the user's own beside the data.

`recipe_files` and `recipe_sources` read names only and are quick; `load_recipe` reads a recipe into its typed model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from derm_pipeline.recipes.model import Recipe

SHIPPED = Path(__file__).parent

NAME = r"^[a-z][a-z0-9_]*$"
"""What a recipe's file may be called (without .yaml): its name is a partition and a job."""


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the file, the key and what is allowed."""


def recipe_files(folders: Sequence[Path] = ()) -> dict[str, Path]:
    """Name -> file of every recipe: the shipped ones, then those in `folders`, which must not take a shipped name.

    Raises:
        RecipeError: a file whose name cannot be a recipe's.
    """
    files: dict[str, Path] = {}
    for folder in (SHIPPED, *folders):
        for path in sorted(folder.glob("*.yaml")):
            if not re.match(NAME, path.stem):
                raise RecipeError(
                    f"{path}: rename it; a recipe's name is of a to z, 0 to 9 and _, and begins with a letter"
                )
            if path.stem in files:
                raise RecipeError(f"{path}: the recipe {path.stem} exists already ({files[path.stem]}); rename one")
            files[path.stem] = path
    return files


def read_recipe(name: str, files: Mapping[str, Path]) -> dict[str, Any]:
    """The recipe's settings as plain data, with everything that it extends filled in.

    Raises:
        RecipeError: no such recipe, broken YAML, a circle of `extends`, or a name that is not the file's.
    """
    layers: list[dict[str, Any]] = []
    chain: list[str] = []
    following: str | None = name
    while following is not None:
        if following not in files:
            where = f"{files[chain[-1]]}: extends {following!r}" if chain else repr(following)
            raise RecipeError(f"{where} is not a recipe; there are {', '.join(sorted(files))}")
        if following in chain:
            raise RecipeError(
                f"{files[following]}: recipes extend each other in a circle ({' -> '.join([*chain, following])})"
            )
        chain.append(following)
        layers.append(_parse(files[following]))
        following = _extended(layers[-1], files[following])
    settings: dict[str, Any] = {}
    for own in reversed(layers):  # from the root up: a `kind` that only the root names is known to all above it
        settings = _merged(settings, own)
    return settings


def recipe_sources(name: str, files: Mapping[str, Path]) -> list[str]:
    """The sources that a recipe names."""
    sources = read_recipe(name, files).get("sources")
    if not isinstance(sources, list) or not sources or not all(isinstance(source, str) for source in sources):
        raise RecipeError(f"{files[name]}: `sources` must be a list of source names")
    return sources


def load_recipe(name: str, files: Mapping[str, Path], sources: Collection[str] | None = None) -> Recipe:
    """The recipe, checked; `sources` are the names that it may use, the shipped ones where they are left out.

    Raises:
        RecipeError: naming the file, the key and what is allowed there.
    """
    from pydantic import ValidationError

    from derm_pipeline.recipes.model import Recipe, explain

    settings = read_recipe(name, files)
    try:
        return Recipe.model_validate({"name": name, **settings}, context={"sources": sources})
    except ValidationError as error:
        raise RecipeError(explain(error, files[name])) from error


def _extended(own: dict[str, Any], path: Path) -> str | None:
    """Take the name of what is extended out of a recipe's own settings."""
    extended = own.pop("extends", None)
    if extended is not None and not isinstance(extended, str):
        raise RecipeError(f"{path}: extends: must be the name of one recipe")
    if "name" in own:  # or it would silently become another partition
        raise RecipeError(f"{path}: name: unknown key; a recipe is called as its file is")
    return extended


def _parse(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise RecipeError(f"{path}: not YAML ({line}{error.problem})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(settings, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of settings; see {SHIPPED / 'quickstart.yaml'}")
    return settings


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`; settings of another `kind` or `plan` have other keys, so they take its whole place."""
    if "kind" in base and over.get("kind", base["kind"]) != base["kind"]:
        return dict(over)
    if "plan" in over and _plan(over) != _plan(base):
        return dict(over)
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _plan(settings: Mapping[str, Any]) -> Any:
    """By what samples are asked for; the two plans that ask by conditions have the same keys."""
    plan = settings.get("plan", "balanced")
    return "balanced" if plan == "fill" else plan
