"""What cannot work is refused before any work: all that a recipe, its training set and this machine tell.

`check_beforehand` needs the recipe and the machine only; `check_rows` the training set, too. Memory and disk are held
against what is surely needed (`_bounds`), and what trainings need beyond that is estimated on made-up examples.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

from derm_pipeline.defs.stages.fitting import stage_settings, values_of
from derm_pipeline.defs.workspace import Workspace

if TYPE_CHECKING:
    from torch import nn

    from derm_pipeline.recipes.model import Recipe
    from derm_pipeline.training.config import TrainingConfig

_FLOAT_BYTES, _HALF_BYTES = 4, 2
_STAGES = ("autoencoder", "generator", "synthetic_dataset")


class _Bound(NamedTuple):
    """Bytes that are surely needed, and those there are."""

    key: str
    need: float
    there: int
    change: str


class _Latent(NamedTuple):
    """What the autoencoder makes of an image, and the text encoder of a token."""

    downsampling: int
    channels: int
    text_width: int = 0


def check_beforehand(workspace: Workspace, name: str) -> None:
    """Refuse what the recipe and this machine alone tell could not work.

    A stage whose artifact is made with the recipe's settings is not asked about: it will be found.

    Raises:
        ValueError: too little memory or disk, or a pretrained autoencoder or text encoder that does not fit; names
            what to change.
        FileNotFoundError: the pretrained autoencoder or text encoder is not there.
    """
    recipe = workspace.recipe(name)
    stages = [stage for stage in _STAGES if not _is_made(workspace, recipe, stage)]
    if stages:
        check_recipe(recipe, workspace.store.root, stages)


def check_recipe(recipe: Recipe, store: Path, stages: tuple[str, ...] | list[str] = _STAGES) -> None:
    """As `check_beforehand`, of these stages, whatever is made.

    Args:
        recipe: Whose settings.
        store: Folder on the disk that will be written to.
        stages: Those that are still to be made.
    """
    from derm_pipeline.recipes.model import check_network

    latent = _latent_of(recipe)
    try:
        check_network(recipe, latent.downsampling, latent.channels)
    except ValueError as error:
        raise ValueError(f"recipe {recipe.name}: {error}") from error
    asked = (*stages, "latents")
    _refuse(recipe, (bound for bound in _bounds(recipe, latent, store) if bound.key.partition(".")[0] in asked))
    _rehearse(recipe, latent, stages)


def check_rows(recipe: Recipe, rows: pa.Table, store: Path) -> None:
    """Refuse what the training set tells could not work, before anything is made of it.

    Raises:
        ValueError: as `check_conditions`; or images or latents that memory or disk do not hold.
    """
    import torch

    from derm_pipeline.models.runtime import free_bytes

    check_conditions(recipe, rows)
    pixels = 3 * recipe.latents.size_px**2
    latent = _latent_of(recipe)
    cells = 2 * latent.channels * (recipe.latents.size_px // latent.downsampling) ** 2
    memory, moments = free_bytes(torch.device("cpu")), rows.num_rows * recipe.latents.orientations * cells * _HALF_BYTES
    bounds = (
        _Bound("latents.size_px", rows.num_rows * pixels, memory, "smaller images: all are held in memory at once"),
        _Bound("latents.orientations", moments, _free_disk(store), "2 orientations, smaller images or a larger disk"),
    )
    _refuse(recipe, bounds)


def check_conditions(recipe: Recipe, rows: pa.Table) -> None:
    """Refuse conditions of which the training set tells nothing, and samples of what it never shows.

    Raises:
        ValueError: naming the key to change.
    """
    for name in recipe.generator.conditions:
        if all(value is None for value in values_of(rows, name)):
            raise ValueError(
                f"recipe {recipe.name}: generator.conditions: no training image of {', '.join(recipe.sources)} tells "
                f"its {name}, so the generator could not learn it; leave {name} out"
            )
    seen = set(values_of(rows, "skin_type"))
    unseen = [skin_type for skin_type in recipe.synthetic_dataset.skin_types if skin_type not in seen]
    if unseen:
        raise ValueError(
            f"recipe {recipe.name}: synthetic_dataset.skin_types: no training image has skin type {unseen[0]}, so the "
            f"generator could not draw it; ask for {sorted(int(value) for value in seen if value is not None)}"
        )


def _is_made(workspace: Workspace, recipe: Recipe, stage: str) -> bool:
    """Whether the stage's current artifact has the recipe's settings of it."""
    if not workspace.store.has(stage, recipe.name):
        return False
    try:
        wanted = stage_settings(recipe, stage)[stage]
    except (FileNotFoundError, ValueError):
        return False  # `check_recipe` says what is wrong with its files
    return bool(workspace.store.current(stage, recipe.name).manifest.settings.get(stage) == wanted)


def _latent_of(recipe: Recipe) -> _Latent:
    """The shape that the autoencoder gives, and the text encoder; those of pretrained ones as their files say.

    Raises:
        FileNotFoundError: they are not there.
        ValueError: they are no autoencoder of images, or no encoder of texts so long.
    """
    import torch

    from derm_pipeline.models.pretrained_vae import PretrainedVaeConfig, load_pretrained_vae

    key = "generator.base" if recipe.autoencoder.kind == "base" else "autoencoder.model"
    try:
        choice = recipe.resolved_autoencoder()
        if not isinstance(choice, PretrainedVaeConfig):
            return _Latent(choice.network.downsampling, choice.network.latent_channels, _text_width_of(recipe))
        found = load_pretrained_vae(choice, torch.device("cpu")).config
    except FileNotFoundError as error:
        raise FileNotFoundError(f"recipe {recipe.name}: {key}: {error}") from error
    except ValueError as error:
        raise ValueError(f"recipe {recipe.name}: {key}: {error}") from error
    return _Latent(found.downsampling, found.latent_channels, _text_width_of(recipe))


def _text_width_of(recipe: Recipe) -> int:
    from derm_pipeline.models.text_encoder import text_width

    text = None if recipe.generator.kind == "pretrained" else recipe.generator.text
    try:
        return 0 if text is None else text_width(text.encoder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"recipe {recipe.name}: generator.text.encoder.model: {error}") from error
    except ValueError as error:
        raise ValueError(f"recipe {recipe.name}: generator.text.encoder: {error}") from error


def _bounds(recipe: Recipe, latent: _Latent, store: Path) -> Iterator[_Bound]:
    """By what is surely needed: weights with AdamW's two moments, gradients and averages; a batch as it is drawn."""
    import torch

    from derm_pipeline.models.runtime import free_bytes, pick_device

    size_px, side = recipe.latents.size_px, recipe.latents.size_px // latent.downsampling
    pixels, cells, memory = 3 * size_px**2, latent.channels * side**2, free_bytes(torch.device("cpu"))
    noise = 2 * cells * _FLOAT_BYTES  # of the latents, and of the law
    for stage, weights in _weights_of(recipe, latent).items():
        config = getattr(recipe, stage).training
        yield from _bounds_of_training(stage, config, weights, noise if stage == "generator" else pixels)
    encoded = recipe.latents.batch_size * pixels * (1 + _FLOAT_BYTES)  # as read, and for the network
    yield _Bound("latents.batch_size", encoded, memory, "a smaller batch_size, which changes no latent")
    sampling, device = recipe.synthetic_dataset, pick_device()
    samples = sampling.least_samples * pixels
    yield _Bound("synthetic_dataset.num_samples", samples, memory, "fewer samples, and more with `derm generate`")
    yield _Bound("synthetic_dataset.num_samples", samples, _free_disk(store), "fewer samples or a larger disk")
    halves = 1 if sampling.guidance == 1 else 2
    at_once = min(sampling.batch_size, sampling.least_samples)
    drawn = at_once * (pixels + halves * cells) * _FLOAT_BYTES if device.type == "cuda" else at_once * pixels
    yield _Bound("synthetic_dataset.batch_size", drawn, free_bytes(device), "a smaller batch_size")


def _weights_of(recipe: Recipe, latent: _Latent) -> dict[str, int]:
    """The number of weights of each network that is to be trained."""
    import torch

    from derm_pipeline.models.generator import build_network, obtain_autoencoder
    from derm_pipeline.training.settings import AutoencoderTraining

    config, networks = recipe.generator, dict[str, "nn.Module"]()
    with torch.device("meta"):  # takes no memory
        if isinstance(recipe.autoencoder, AutoencoderTraining):
            networks["autoencoder"] = obtain_autoencoder(recipe.autoencoder.network, torch.device("meta"))
        if config.kind != "pretrained":
            conditions: dict[str, int] = dict.fromkeys(config.conditions, 10)
            side = recipe.latents.size_px // latent.downsampling
            shape = config.network(side, latent.channels, conditions, text_width=latent.text_width)
            networks["generator"] = build_network(shape)
    return {name: sum(weight.numel() for weight in network.parameters()) for name, network in networks.items()}


def _bounds_of_training(stage: str, config: TrainingConfig, weights: int, example_bytes: int) -> Iterator[_Bound]:
    import torch

    from derm_pipeline.models.runtime import free_bytes, pick_device

    states, drawn = weights * _FLOAT_BYTES * (4 + len(config.decays)), config.batch_size * example_bytes
    smaller = "a smaller network or fewer averages (ema_decays)"
    yield _Bound(f"{stage}.network", states, free_bytes(pick_device()), smaller)
    yield _Bound(f"{stage}.training.batch_size", drawn, free_bytes(torch.device("cpu")), "a smaller batch_size")


def _refuse(recipe: Recipe, bounds: Iterator[_Bound] | tuple[_Bound, ...]) -> None:
    for bound in bounds:
        if bound.need > bound.there:
            raise ValueError(
                f"recipe {recipe.name}: {bound.key}: at least {bound.need / 1e9:,.1f} GB are needed and "
                f"{bound.there / 1e9:,.1f} GB are free; take {bound.change}"
            )


def _rehearse(recipe: Recipe, latent: _Latent, stages: tuple[str, ...] | list[str]) -> None:
    from derm_pipeline.training.fine_tuning_rehearsal import rehearse_fine_tuning
    from derm_pipeline.training.rehearsal import rehearse_autoencoder, rehearse_generator
    from derm_pipeline.training.settings import AutoencoderTraining

    size_px, config = recipe.latents.size_px, recipe.generator
    side = size_px // latent.downsampling
    if config.kind == "pretrained":
        if "generator" in stages:
            try:
                rehearse_fine_tuning(config, side)
            except ValueError as error:
                raise ValueError(f"recipe {recipe.name}: generator: {error}") from error
        return
    for stage in stages:
        try:
            if stage == "generator":
                rehearse_generator(config, side, latent.channels, latent.text_width)
            if stage == "autoencoder" and isinstance(recipe.autoencoder, AutoencoderTraining):
                rehearse_autoencoder(recipe.autoencoder, size_px)
        except ValueError as error:
            raise ValueError(f"recipe {recipe.name}: {stage}.training: {error}") from error


def _free_disk(store: Path) -> int:
    folder = next(path for path in (store, *store.parents) if path.exists())
    return shutil.disk_usage(folder).free
