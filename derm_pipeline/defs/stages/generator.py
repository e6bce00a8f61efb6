"""The stages of a recipe up to its synthetic dataset."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from derm_pipeline.defs.stages.beforehand import check_conditions, check_recipe, check_rows
from derm_pipeline.defs.stages.data import image_files
from derm_pipeline.defs.stages.fine_tuning import make_fine_tuned
from derm_pipeline.defs.stages.fitting import autoencoder_of, labels_of, stage_settings
from derm_pipeline.defs.stages.prompted import origin_inputs, origin_reader, plan_of
from derm_pipeline.defs.stages.sets import TRAINING_SET, VALIDATION_SET, pixel_inputs, square_reader, squares
from derm_pipeline.defs.stages.texts import (
    embed_captions,
    embeddings_of,
    requests_in_words,
    text_rows,
    text_settings,
)
from derm_pipeline.defs.stages.watching import (
    VALIDATION,
    event_folder,
    grid_writer,
    validation_images,
    validation_moments,
    write_losses,
)
from derm_pipeline.defs.workspace import Workspace
from derm_pipeline.latents import INDEX
from derm_pipeline.records import canonical
from derm_pipeline.store import Artifact, Build, Request, Store

if TYPE_CHECKING:
    from pathlib import Path

    import pyarrow as pa

    from derm_pipeline.latents import LatentConfig
    from derm_pipeline.models.generator import AnyAutoencoder
    from derm_pipeline.recipes.model import Recipe

METADATA = "metadata.parquet"

CODE_VERSIONS = {
    "autoencoder": "2",
    "latents": "2",
    "generator": "4",
    "synthetic_dataset": "2",
}
"""Raised when a stage's result changes for the same inputs and settings; then that stage alone is made again."""

OnProgress = Callable[[int, int], None]
OnStep = Callable[[int, int, float], None]


def autoencoder(workspace: Workspace, name: str, on_step: OnStep | None = None) -> Artifact:
    """The autoencoder: trained on the training set, or a pretrained one by reference; and how well images come back."""
    recipe, store = workspace.recipe(name), workspace.store
    rows = store.current("training_set", name)
    settings = {
        **stage_settings(recipe, "autoencoder"),
        "pixels": _pixel_settings(recipe.latents),
        "remove_hair": recipe.training_set.remove_hair,
    }
    inputs = {"training_set": rows.reference} | pixel_inputs(workspace, recipe)
    if recipe.autoencoder.kind == "trained":
        inputs["validation_set"] = store.current("validation_set", name).reference
    request = Request("autoencoder", name, inputs, settings, CODE_VERSIONS["autoencoder"])

    def make(build: Build) -> None:
        import torch

        from derm_pipeline.latents import to_model_range
        from derm_pipeline.models.generator import obtain_autoencoder, save_autoencoder
        from derm_pipeline.models.pretrained_vae import PretrainedVaeConfig
        from derm_pipeline.models.reconstruction import measure_reconstruction
        from derm_pipeline.models.runtime import pick_device
        from derm_pipeline.training.objectives import reconstruct, train_autoencoder
        from derm_pipeline.training.settings import AutoencoderTraining
        from derm_pipeline.training.stopping import stop_on_signal

        check_recipe(recipe, store.root)
        check_rows(recipe, rows.table(TRAINING_SET), store.root)
        images = squares(workspace, recipe, rows.table(TRAINING_SET))
        model: AnyAutoencoder
        if isinstance(recipe.autoencoder, AutoencoderTraining):
            held_out = validation_images(workspace, recipe, store.current("validation_set", name))
            with stop_on_signal() as stop_when:
                model, trained = train_autoencoder(
                    images,
                    recipe.autoencoder,
                    work=build.work,
                    held_out=held_out,
                    on_progress=on_step,
                    stop_when=stop_when,
                    tensorboard=event_folder(workspace, name, "autoencoder"),
                )
            write_losses(build, trained, recipe.autoencoder.training, 0 if held_out is None else len(held_out))
        else:
            choice = recipe.resolved_autoencoder()
            assert isinstance(choice, PretrainedVaeConfig)
            model = obtain_autoencoder(choice, pick_device())
            write_losses(build, None, None, 0)
        some = to_model_range(torch.from_numpy(images[:: max(1, len(images) // 256)]))
        found = measure_reconstruction(reconstruct(model, some), some)
        save_autoencoder(model, build.directory)
        build.counts.update(
            num_images=len(images),
            train_psnr_db=round(found.means["psnr_db"], 2),
            train_ssim=round(found.means["ssim"], 4),
        )

    return store.obtain(request, make)


def _pixel_settings(config: LatentConfig) -> dict[str, object]:
    return {"size_px": config.size_px, "geometry": config.geometry}


def latents(workspace: Workspace, name: str, on_progress: OnProgress | None = None) -> Artifact:
    """The moments of the training set, in every orientation; apart from them, those of the validation set.

    And the embeddings of their captions, where the generator is told text.
    """
    recipe, store = workspace.recipe(name), workspace.store
    used = {asset: store.current(asset, name) for asset in ("training_set", "validation_set", "autoencoder")}
    rows, held_out, encoder = used.values()
    inputs = {asset: artifact.reference for asset, artifact in used.items()} | pixel_inputs(workspace, recipe)
    settings = {
        "latents": recipe.latents.model_dump(mode="json"),
        "remove_hair": recipe.training_set.remove_hair,
    } | text_settings(recipe)
    request = Request("latents", name, inputs, settings, CODE_VERSIONS["latents"])

    def make(build: Build) -> None:
        import torch

        from derm_pipeline.latents import encode_images
        from derm_pipeline.models.generator import load_autoencoder
        from derm_pipeline.models.runtime import autocast, pick_device

        device = pick_device()
        model = load_autoencoder(encoder.directory, device)
        read = square_reader(workspace, recipe)

        @torch.no_grad()
        def encode(batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            with autocast(device):
                mean, logvar = model.encode(batch)
            return mean.float(), logvar.float()

        def encode_rows(table: pa.Table, folder: str, on_progress: OnProgress | None) -> int:
            return encode_images(
                image_files(workspace, table),
                lambda files: read(files, None),
                encode,
                recipe.latents,
                out=build.directory / folder,
                previous=_same_encoder(build, encoder, folder),
                device=device,
                on_progress=on_progress,
            )

        watched = held_out.table(VALIDATION_SET)
        num_reused = encode_rows(rows.table(TRAINING_SET), "", on_progress)
        build.counts.update(
            num_images=rows.counts["num_images"],
            num_orientations=recipe.latents.orientations,
            num_reused=num_reused,
            num_validation_images=watched.num_rows,
        )
        if watched.num_rows:
            encode_rows(watched, VALIDATION, None)
        embed_captions(build, recipe, [rows.table(TRAINING_SET), watched], on_progress)

    return store.obtain(request, make)


def _same_encoder(build: Build, encoder: Artifact, folder: str) -> Path | None:
    """The previous latents (a folder of them), if they are there and the same autoencoder made them."""
    previous = build.previous
    if previous is None or not (previous.directory / folder / INDEX).is_file():
        return None
    used = previous.manifest.inputs["autoencoder"].content_digest
    return previous.directory / folder if used == encoder.manifest.content_digest else None


def generator(workspace: Workspace, name: str, on_step: OnStep | None = None) -> Artifact:
    """The generator: weights, their moving average, what it is, and its loss curve; of a base what was trained."""
    recipe, store = workspace.recipe(name), workspace.store
    used = {asset: store.current(asset, name) for asset in ("training_set", "validation_set", "latents")}
    rows, held_out, moments = used.values()
    inputs = {asset: artifact.reference for asset, artifact in used.items()}
    request = Request("generator", name, inputs, stage_settings(recipe, "generator"), CODE_VERSIONS["generator"])

    def make(build: Build) -> None:
        from derm_pipeline.latents import open_moments

        table, watched = rows.table(TRAINING_SET), held_out.table(VALIDATION_SET)
        check_conditions(recipe, table)
        _check_latents(store, name, moments)
        digests, _ = open_moments(moments.directory)
        if digests != table["sha256"].to_pylist():
            raise ValueError(f"the latents of {name} are not those of its training set: materialise latents again")
        make_one = make_fine_tuned if recipe.generator.kind == "pretrained" else _make_from_scratch
        make_one(workspace, recipe, build, moments, table, watched, on_step)

    return store.obtain(request, make)


def _make_from_scratch(
    workspace: Workspace,
    recipe: Recipe,
    build: Build,
    moments: Artifact,
    table: pa.Table,
    watched: pa.Table,
    on_step: OnStep | None,
) -> None:
    from derm_pipeline.latents import open_moments
    from derm_pipeline.models.conditions import condition_classes
    from derm_pipeline.models.runtime import save_weights
    from derm_pipeline.training.objectives import train_generator
    from derm_pipeline.training.settings import GeneratorTraining
    from derm_pipeline.training.stopping import stop_on_signal

    config = recipe.generator
    assert isinstance(config, GeneratorTraining)
    names = list(dict.fromkeys(("diagnosis", *config.conditions)))
    classes = condition_classes(names, canonical(table["diagnosis"].to_pylist()))
    text = embeddings_of(moments)
    labels = labels_of(table, classes) | text_rows(text, table)
    watched_labels = labels_of(watched, classes) | text_rows(text, watched)
    watched_moments = validation_moments(moments, watched)
    with stop_on_signal() as stop_when:
        spec, model, trained = train_generator(
            open_moments(moments.directory)[1],
            labels,
            classes,
            config,
            work=build.work,
            text=text,
            held_out=None if watched_moments is None else (watched_moments, watched_labels),
            on_progress=on_step,
            on_samples=grid_writer(build, config, labels, text, moments, workspace),
            stop_when=stop_when,
            tensorboard=event_folder(workspace, recipe.name, "generator"),
        )
    spec.save(build.directory)
    save_weights(build.path("weights.safetensors"), model.state_dict())
    if trained.ema is not None:
        save_weights(build.path("ema.safetensors"), trained.ema)
    write_losses(build, trained, config.training, watched.num_rows)
    build.counts.update(
        num_weights=sum(weight.numel() for weight in model.parameters()),
        final_loss=round(float(np.mean(trained.losses[-100:])), 4),
    )


def _check_latents(store: Store, name: str, moments: Artifact) -> None:
    """Refuse latents of another autoencoder than the current one: it could not decode what is learnt of them."""
    current = store.current("autoencoder", name)
    if moments.manifest.inputs["autoencoder"].content_digest != current.manifest.content_digest:
        raise ValueError(
            f"{moments.reference} are latents of another autoencoder than {current.reference}: materialise latents "
            "again"
        )


def synthetic_dataset(workspace: Workspace, name: str, on_progress: OnProgress | None = None) -> Artifact:
    """The samples that the recipe asks for, in the imagefolder convention, each with its provenance."""
    recipe, store = workspace.recipe(name), workspace.store
    used = {asset: store.current(asset, name) for asset in ("generator", "autoencoder", "training_set")}
    learnt_of = autoencoder_of(store, used["generator"]).content_digest
    if learnt_of != used["autoencoder"].manifest.content_digest:
        raise ValueError(
            f"{used['generator'].reference} learnt latents of another autoencoder than "
            f"{used['autoencoder'].reference}: materialise latents and generator again"
        )
    inputs = {asset: artifact.reference for asset, artifact in used.items()} | origin_inputs(workspace, recipe)
    settings = stage_settings(recipe, "synthetic_dataset")
    request = Request("synthetic_dataset", name, inputs, settings, CODE_VERSIONS["synthetic_dataset"])

    def make(build: Build) -> None:
        from derm_pipeline.generation import dataset_card, draw_samples, num_unseen, tone_counts, write_dataset
        from derm_pipeline.models.generator import GeneratorSpec

        config = recipe.synthetic_dataset
        spec = GeneratorSpec.load(used["generator"].directory)
        learnt = used["training_set"].table(TRAINING_SET)
        requests, embed_text = requests_in_words(store, used["generator"], plan_of(recipe, learnt))
        read_origin = origin_reader(workspace, recipe, learnt)
        images = draw_samples(
            requests,
            config,
            generator=used["generator"].directory,
            autoencoder=used["autoencoder"].directory,
            work=build.work,
            embed_text=embed_text,
            read_origin=read_origin,
            on_progress=on_progress,
        )
        metadata = write_dataset(
            requests,
            images,
            config,
            recipe=name,
            generator_digest=used["generator"].manifest.content_digest,
            autoencoder_digest=used["autoencoder"].manifest.content_digest,
            spec=spec,
            write_bytes=build.write_bytes,
            read_origin=read_origin,
        )
        build.write_table(METADATA, metadata)
        sources = [workspace.sources[source] for source in recipe.sources]
        licences = [f"{source.title}: {source.licence}" for source in sources]
        unseen, tones = num_unseen(requests, spec), tone_counts(metadata.to_pylist())
        size_px = (images.shape[2], images.shape[1])
        card = dataset_card(name, requests, licences=licences, size_px=size_px, num_unseen=unseen, tones=tones)
        build.write_bytes("README.md", card.encode())
        asked = metadata["diagnosis"].to_pylist()
        build.counts.update(
            num_samples=len(requests),
            num_in_cells_without_a_training_image=unseen,
            diagnoses={diagnosis.value: asked.count(diagnosis.value) for diagnosis in canonical(asked)},
            **tones,
        )

    return store.obtain(request, make)
