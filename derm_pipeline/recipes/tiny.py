"""A recipe of a pretrained base in miniature: a tiny base of its family, drawn images, minutes on two cores.

It is written as a recipe of the user's own, `<recipe>_tiny.yaml`, that extends the recipe: to be looked at and changed.
What is drawn by it is noise, since the tiny base knows nothing; it tries out the recipe, not the model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from derm_pipeline.recipes import RecipeError, load_recipe
from derm_pipeline.store import replacing

if TYPE_CHECKING:
    from derm_pipeline.models.pretrained.config import TinyFamily
    from derm_pipeline.recipes.model import Recipe
    from derm_pipeline.training.fine_tuning_settings import FineTuning, Stage

DRAWN = "phantom"
"""The source of drawn images, which is always there."""

_SIZE_PX = 64
_HEAD = """\
# {name} in miniature, as `derm run {name} --models tiny` wrote it: it tries out the recipe, not the model.
# Change what you like; it is not written again while it is there. What is not said here is as in {name}.
# - the base is tiny and random (`derm models tiny`), and its autoencoder brings back little of an image of {size} px;
# - rates are higher and budgets smaller, so that all of it takes minutes on two cores;
{sources}
"""
_OWN_SOURCES = "# - the images are those of {name}."
_DRAWN_SOURCES = """\
# - the images are drawn, since {missing} is not there (`derm sources {missing}` says where it is looked for): once it
#   is, take out the line `sources`."""


def tiny_name(name: str) -> str:
    """What the recipe in miniature is called."""
    return f"{name}_tiny"


def write_tiny_recipe(
    name: str, files: Mapping[str, Path], data: Path, *, known: Collection[str], there: Collection[str]
) -> Path:
    """Write a recipe in miniature, and the tiny base that it starts from, unless they are there.

    Args:
        name: The recipe.
        files: Of all recipes, by name.
        data: The data folder: the recipe goes into `recipes/`, the base into `models/tiny/<family>/`.
        known: Sources that recipes may name.
        there: Those whose files are there; in the place of others images are drawn.

    Returns:
        The recipe's file.

    Raises:
        RecipeError: there is no such recipe, or it starts from no pretrained base.
    """
    from derm_pipeline.models.pretrained.tiny import write_tiny

    recipe = load_recipe(name, files, known)
    if recipe.generator.kind != "pretrained":
        raise RecipeError(
            f"{files[name]}: starts from no pretrained base (generator.kind is {recipe.generator.kind}), so there is "
            f"none to be replaced by a tiny one: derm run {name}"
        )
    family = _family(recipe.generator)
    folder, path = data / "models" / "tiny" / family, data / "recipes" / f"{tiny_name(name)}.yaml"
    if not (folder / "model_index.json").is_file():
        write_tiny(family, folder)
    if not path.is_file():
        missing = [source for source in recipe.sources if source not in there]
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as aside:
            aside.write_text(_text(recipe, folder.resolve(), missing), encoding="utf-8")
    return path


def _family(config: FineTuning) -> TinyFamily:
    """Of the base that the recipe names; where it does not say, Stable Diffusion 1.x."""
    return config.base.family or "sd"


def _text(recipe: Recipe, base: Path, missing: Sequence[str]) -> str:
    sources = _DRAWN_SOURCES.format(missing=missing[0]) if missing else _OWN_SOURCES.format(name=recipe.name)
    head = _HEAD.format(name=recipe.name, size=_SIZE_PX, sources=sources)
    what = {"extends": recipe.name, "title": f"{recipe.title}, in miniature"}
    settings = what | ({"sources": [DRAWN]} if missing else {}) | tiny_settings(recipe, base)
    return head + yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)


def tiny_settings(recipe: Recipe, base: Path) -> dict[str, Any]:
    """What differs from the recipe: `base`, sizes, budgets and counts."""
    config = recipe.generator
    assert config.kind == "pretrained"  # as asked before
    generator: dict[str, Any] = {
        "base": {"model": str(base), "revision": None, "layout": None},
        "grid": {"num_each": 1, "num_steps": 4},
        "stages": [_stage(stage) for stage in config.stages],
    }
    if config.hldf is not None:
        generator["hldf"] = {"every_steps": 20, "num_steps": 4}
    if config.prior is not None:
        generator["prior"] = {"num_samples": 8, "num_steps": 4}
    return {
        "latents": {"size_px": _SIZE_PX, "batch_size": 32},
        "reconstruction": {"psnr_db": 0, "ssim": -1},
        "generator": generator,
        "synthetic_dataset": _sampling(recipe),
        "classifiers": {"num_seeds": 2, "width": 16, "num_steps": 120, "batch_size": 32},
        "group_metrics": {"num_bootstrap": 200},
    }


def _stage(stage: Stage) -> dict[str, Any]:
    """A stage as it is (a list is replaced as a whole), but for its budget and rate."""
    said = stage.model_dump(mode="json", exclude_unset=True)
    kept = {name: value for name, value in said["training"].items() if name not in _CUT}
    budget = {"num_steps": 40, "batch_size": 4, "lr": 1e-2 if stage.kind == "inversion" else 1e-3, "warmup_steps": 4}
    return {"kind": stage.kind} | said | {"training": kept | budget | {"checkpoint_every_steps": 10}}


_CUT = {"num_images", "micro_batch_size", "optimizer", "checkpoint_every_images"}
"""What a training in miniature goes without: it is counted in steps, fits, and has no need of 8 bits."""


def _sampling(recipe: Recipe) -> dict[str, Any]:
    config = recipe.synthetic_dataset
    if config.plan == "lesiongen":
        how = {"guidances": [3, 7.5], "steps": [4, 6]} if config.mode == "dataset" else {"num_steps": 6}
        return {"num_samples": 70, **how}
    if config.plan == "captions":
        return {"num_samples": 70, "num_steps": 6}
    if config.plan == "prompts":
        return {"samples_each": 12, "num_steps": 6}
    return {"max_images": 80, "samples_each": 1, "num_steps": 10}
