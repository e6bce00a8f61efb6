"""The stages of a recipe up to its synthetic dataset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from derm_pipeline.defs.stages.data import CAPTIONS, HAIR, RECORDS, SPLITS, decode_mask, image_files
from derm_pipeline.defs.stages.fitting import autoencoder_of, check_fits, labels_of, train_counts
from derm_pipeline.defs.workspace import Workspace
from derm_pipeline.records import Diagnosis, Split, canonical
from derm_pipeline.splits import light_dark_split
from derm_pipeline.store import Artifact, Build, Reference, Request

if TYPE_CHECKING:
    from pathlib import Path

    from derm_pipeline.images import Pixels
    from derm_pipeline.latents import ImageFile, LatentConfig, Restore
    from derm_pipeline.models.generator import AnyAutoencoder
    from derm_pipeline.recipes.model import Recipe
    from derm_pipeline.training.training_set import Selection

TRAINING_SET, EVALUATION_SET = "training_set.parquet", "evaluation_set.parquet"
LOSSES = "losses.parquet"
METADATA = "metadata.parquet"

CODE_VERSIONS = {
    "training_set": "1",
    "evaluation_set": "1",
    "autoencoder": "2",
    "latents": "2",
    "generator": "3",
    "synthetic_dataset": "1",
}
"""Raised when a stage's result changes for the same inputs and settings; then that stage alone is made again."""

OnProgress = Callable[[int, int], None]
OnStep = Callable[[int, int, float], None]


def training_set(workspace: Workspace, name: str) -> Artifact:
    """The rows, captions and classes that the recipe's generator may see: train split only."""
    from derm_pipeline.training.training_set import diagnosis_counts, with_captions

    recipe, store = workspace.recipe(name), workspace.store
    style = recipe.training_set.caption
    asset, column = ("visual_captions", "text") if style == "visual" else ("metadata_captions", style)
    captions = {source: store.current(asset, source) for source in recipe.sources}
    inputs = _inputs_by_source(workspace, recipe, "records") | {
        f"{asset}/{source}": artifact.reference for source, artifact in captions.items()
    }
    inputs["splits"] = store.current("splits").reference
    settings = _selection_settings(recipe) | {"caption": style}
    request = Request("training_set", name, inputs, settings, CODE_VERSIONS["training_set"])

    def make(build: Build) -> None:
        names = ["source", "image_id", column]
        texts = pa.concat_tables(artifact.table(CAPTIONS, names) for artifact in captions.values())
        selected = rows_of(workspace, recipe, Split.TRAIN)
        rows = with_captions(selected.rows, texts.rename_columns(["source", "image_id", "text"]))
        build.write_table(TRAINING_SET, rows)
        build.counts.update(
            num_images=rows.num_rows,
            diagnoses=diagnosis_counts(rows),
            left_out=dict(selected.left_out),
            joined=dict(selected.joined),
            rare_diagnoses=dict(selected.rare),
        )

    return store.obtain(request, make)


def evaluation_set(workspace: Workspace, name: str) -> Artifact:
    """The held-out rows of the recipe's sources: what it is judged on, and no stage of the generator reads."""
    from derm_pipeline.training.training_set import diagnosis_counts

    recipe, store = workspace.recipe(name), workspace.store
    inputs = _inputs_by_source(workspace, recipe, "records")
    inputs["splits"] = store.current("splits").reference
    request = Request("evaluation_set", name, inputs, _selection_settings(recipe), CODE_VERSIONS["evaluation_set"])

    def make(build: Build) -> None:
        named = recipe.training_set.diagnoses if recipe.training_set.min_images == 1 else ()
        learnt = named or canonical(rows_of(workspace, recipe, Split.TRAIN).rows["diagnosis"].to_pylist())
        found = {split: rows_of(workspace, recipe, split, learnt) for split in (Split.VAL, Split.TEST)}
        parts = {split: selection.rows for split, selection in found.items()}
        empty = [split.value for split, rows in parts.items() if rows.num_rows == 0]
        if empty:
            raise ValueError(f"no image of {', '.join(recipe.sources)} is in the split {empty[0]}: add lesions")
        tables = [
            rows.append_column("split", pa.array([split.value] * rows.num_rows, pa.string()))
            for split, rows in parts.items()
        ]
        build.write_table(EVALUATION_SET, pa.concat_tables(tables))
        build.counts.update(
            num_val=parts[Split.VAL].num_rows,
            num_test=parts[Split.TEST].num_rows,
            test_diagnoses=diagnosis_counts(parts[Split.TEST]),
            left_out={split.value: dict(selection.left_out) for split, selection in found.items()},
        )

    return store.obtain(request, make)


def _inputs_by_source(workspace: Workspace, recipe: Recipe, asset: str) -> dict[str, Reference]:
    return {f"{asset}/{source}": workspace.store.current(asset, source).reference for source in recipe.sources}


def _selection_settings(recipe: Recipe) -> dict[str, object]:
    deciding = {"split", "diagnoses"} | ({"min_images"} if recipe.training_set.min_images > 1 else set())
    config = recipe.training_set.model_dump(mode="json", include=deciding)
    return {"training_set": config, "sources": list(recipe.sources)}


def rows_of(
    workspace: Workspace, recipe: Recipe, split: Split, diagnoses: Sequence[Diagnosis] | None = None
) -> Selection:
    """The images of one split that the recipe uses; of these diagnoses, where some are given."""
    from derm_pipeline.training.training_set import select_rows

    config = recipe.training_set
    if diagnoses is not None:
        config = config.model_copy(update={"diagnoses": tuple(diagnoses), "min_images": 1})
    return select_rows(_records_of(workspace, recipe), splits_of(workspace, recipe), split, config)


def splits_of(workspace: Workspace, recipe: Recipe) -> pa.Table:
    """Which side every image of the recipe's sources is on, by the law that the recipe names."""
    if recipe.training_set.split == "light_dark":
        return light_dark_split(_records_of(workspace, recipe))
    return workspace.store.current("splits").table(SPLITS)


def _records_of(workspace: Workspace, recipe: Recipe) -> pa.Table:
    return pa.concat_tables(workspace.store.current("records", source).table(RECORDS) for source in recipe.sources)


def pixel_inputs(workspace: Workspace, recipe: Recipe) -> dict[str, Reference]:
    """What else than its rows decides an image's pixels: the hair masks, where the recipe removes hair."""
    return _inputs_by_source(workspace, recipe, "hair") if recipe.training_set.remove_hair else {}


def squares(workspace: Workspace, recipe: Recipe, rows: pa.Table, on_progress: OnProgress | None = None) -> Pixels:
    """The images of these rows as the recipe sees them: (n, size_px, size_px, 3) uint8."""
    return square_reader(workspace, recipe)(image_files(workspace, rows), on_progress)


def square_reader(workspace: Workspace, recipe: Recipe) -> Callable[[Sequence[ImageFile], OnProgress | None], Pixels]:
    """A function that reads image files as the recipe sees them."""
    from derm_pipeline.latents import read_squares

    config, restore = recipe.latents, _restore(workspace, recipe)

    def read(files: Sequence[ImageFile], on_progress: OnProgress | None = None) -> Pixels:
        return read_squares(
            files, size_px=config.size_px, geometry=config.geometry, restore=restore, on_progress=on_progress
        )

    return read


def _restore(workspace: Workspace, recipe: Recipe) -> Restore | None:
    if not recipe.training_set.remove_hair:
        return None
    from derm_pipeline.hair import remove_hair

    masks: dict[str, bytes] = {}
    for source in recipe.sources:
        table = workspace.store.current("hair", source).table(HAIR, ["sha256", "is_hairy", "mask_png"])
        masks |= {row["sha256"]: row["mask_png"] for row in table.to_pylist() if row["is_hairy"]}

    def restore(image: Pixels, sha256: str) -> Pixels:
        return remove_hair(image, decode_mask(masks[sha256])) if sha256 in masks else image

    return restore


def autoencoder(workspace: Workspace, name: str, on_step: OnStep | None = None) -> Artifact:
    """The autoencoder: trained on the training set, or a pretrained one by reference; and how well images come back."""
    recipe, store = workspace.recipe(name), workspace.store
    rows = store.current("training_set", name)
    settings = {
        "autoencoder": _autoencoder_settings(recipe),
        "pixels": _pixel_settings(recipe.latents),
        "remove_hair": recipe.training_set.remove_hair,
    }
    inputs = {"training_set": rows.reference} | pixel_inputs(workspace, recipe)
    request = Request("autoencoder", name, inputs, settings, CODE_VERSIONS["autoencoder"])

    def make(build: Build) -> None:
        import torch

        from derm_pipeline.latents import to_model_range
        from derm_pipeline.models.generator import obtain_autoencoder, save_autoencoder
        from derm_pipeline.models.reconstruction import measure_reconstruction
        from derm_pipeline.models.runtime import pick_device
        from derm_pipeline.training.objectives import reconstruct, train_autoencoder
        from derm_pipeline.training.settings import AutoencoderTraining
        from derm_pipeline.training.stopping import stop_on_signal

        check_fits(recipe, rows.table(TRAINING_SET))
        images = squares(workspace, recipe, rows.table(TRAINING_SET))
        losses: list[float] = []
        model: AnyAutoencoder
        if isinstance(recipe.autoencoder, AutoencoderTraining):
            with stop_on_signal() as stop_when:
                model, trained = train_autoencoder(
                    images, recipe.autoencoder, work=build.work, on_progress=on_step, stop_when=stop_when
                )
            losses = trained.losses
            build.counts["resumed_from_step"] = trained.resumed_from_step
        else:
            model = obtain_autoencoder(recipe.autoencoder, pick_device())
        some = to_model_range(torch.from_numpy(images[:: max(1, len(images) // 256)]))
        found = measure_reconstruction(reconstruct(model, some), some)
        save_autoencoder(model, build.directory)
        build.write_table(LOSSES, _loss_table(losses))
        build.counts.update(
            num_images=len(images),
            num_steps=len(losses),
            train_psnr_db=round(found.means["psnr_db"], 2),
            train_ssim=round(found.means["ssim"], 4),
        )

    return store.obtain(request, make)


def _autoencoder_settings(recipe: Recipe) -> dict[str, object]:
    """A pretrained autoencoder counts by what its files hold, one that is trained here by its settings."""
    from derm_pipeline.models.pretrained_vae import PretrainedVaeConfig

    config = recipe.autoencoder
    return config.identity() if isinstance(config, PretrainedVaeConfig) else config.model_dump(mode="json")


def _pixel_settings(config: LatentConfig) -> dict[str, object]:
    return {"size_px": config.size_px, "geometry": config.geometry}


def _loss_table(losses: Sequence[float]) -> pa.Table:
    return pa.table({"step": pa.array(range(1, len(losses) + 1), pa.int32()), "loss": pa.array(losses, pa.float64())})


def latents(workspace: Workspace, name: str, on_progress: OnProgress | None = None) -> Artifact:
    """The moments of the training set, in every orientation."""
    recipe, store = workspace.recipe(name), workspace.store
    rows, encoder = store.current("training_set", name), store.current("autoencoder", name)
    inputs = {"training_set": rows.reference, "autoencoder": encoder.reference} | pixel_inputs(workspace, recipe)
    settings = {
        "latents": recipe.latents.model_dump(mode="json"),
        "remove_hair": recipe.training_set.remove_hair,
    }
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

        num_reused = encode_images(
            image_files(workspace, rows.table(TRAINING_SET)),
            lambda files: read(files, None),
            encode,
            recipe.latents,
            out=build.directory,
            previous=_same_encoder(build, encoder),
            device=device,
            on_progress=on_progress,
        )
        build.counts.update(
            num_images=rows.counts["num_images"], num_orientations=recipe.latents.orientations, num_reused=num_reused
        )

    return store.obtain(request, make)


def _same_encoder(build: Build, encoder: Artifact) -> Path | None:
    """The previous latents, if the same autoencoder made them."""
    previous = build.previous
    if previous is None:
        return None
    used = previous.manifest.inputs["autoencoder"].content_digest
    return previous.directory if used == encoder.manifest.content_digest else None


def generator(workspace: Workspace, name: str, on_step: OnStep | None = None) -> Artifact:
    """The generator: weights, their moving average, what it is, and its loss curve."""
    recipe, store = workspace.recipe(name), workspace.store
    rows, moments = store.current("training_set", name), store.current("latents", name)
    inputs = {"training_set": rows.reference, "latents": moments.reference}
    settings = {"generator": recipe.generator.model_dump(mode="json")}
    request = Request("generator", name, inputs, settings, CODE_VERSIONS["generator"])

    def make(build: Build) -> None:
        from derm_pipeline.latents import open_moments
        from derm_pipeline.models.conditions import condition_classes
        from derm_pipeline.models.runtime import save_weights
        from derm_pipeline.training.objectives import train_generator
        from derm_pipeline.training.stopping import stop_on_signal

        table = rows.table(TRAINING_SET)
        check_fits(recipe, table)
        names = list(dict.fromkeys(("diagnosis", *recipe.generator.conditions)))
        classes = condition_classes(names, canonical(table["diagnosis"].to_pylist()))
        digests, tensors = open_moments(moments.directory)
        if digests != table["sha256"].to_pylist():
            raise ValueError(f"the latents of {name} are not those of its training set: materialise latents again")
        with stop_on_signal() as stop_when:
            spec, model, trained = train_generator(
                tensors,
                labels_of(table, classes),
                classes,
                recipe.generator,
                work=build.work,
                on_progress=on_step,
                stop_when=stop_when,
            )
        spec.save(build.directory)
        save_weights(build.path("weights.safetensors"), model.state_dict())
        if trained.ema is not None:
            save_weights(build.path("ema.safetensors"), trained.ema)
        build.write_table(LOSSES, _loss_table(trained.losses))
        build.counts.update(
            num_weights=sum(weight.numel() for weight in model.parameters()),
            num_steps=len(trained.losses),
            resumed_from_step=trained.resumed_from_step,
            final_loss=round(float(np.mean(trained.losses[-100:])), 4),
        )

    return store.obtain(request, make)


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
    inputs = {asset: artifact.reference for asset, artifact in used.items()}
    settings = {"synthetic_dataset": recipe.synthetic_dataset.model_dump(mode="json")}
    request = Request("synthetic_dataset", name, inputs, settings, CODE_VERSIONS["synthetic_dataset"])

    def make(build: Build) -> None:
        from derm_pipeline.generation import dataset_card, draw_samples, plan_samples, write_dataset

        config = recipe.synthetic_dataset
        learnt = used["training_set"].table(TRAINING_SET)
        requests = plan_samples(config, canonical(learnt["diagnosis"].to_pylist()), train_counts(learnt))
        images = draw_samples(
            requests,
            config,
            generator=used["generator"].directory,
            autoencoder=used["autoencoder"].directory,
            work=build.work,
            on_progress=on_progress,
        )
        metadata = write_dataset(
            requests,
            images,
            config,
            recipe=name,
            generator_digest=used["generator"].manifest.content_digest,
            autoencoder_digest=used["autoencoder"].manifest.content_digest,
            write_bytes=build.write_bytes,
        )
        build.write_table(METADATA, metadata)
        sources = [workspace.sources[source] for source in recipe.sources]
        licences = [f"{source.title}: {source.licence}" for source in sources]
        card = dataset_card(name, requests, licences=licences, size_px=images.shape[1])
        build.write_bytes("README.md", card.encode())
        asked = [request.diagnosis.value for request in requests]
        build.counts.update(
            num_samples=len(requests),
            diagnoses={diagnosis.value: asked.count(diagnosis.value) for diagnosis in canonical(asked)},
        )

    return store.obtain(request, make)
