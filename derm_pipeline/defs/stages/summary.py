"""What is checked and pictured of finished artifacts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from derm_pipeline.defs.stages.generator import METADATA
from derm_pipeline.defs.stages.sets import TRAINING_SET, splits_of, squares
from derm_pipeline.defs.stages.watching import LOSSES, grids
from derm_pipeline.defs.workspace import Workspace
from derm_pipeline.images import Pixels, contact_sheet
from derm_pipeline.store import Artifact

if TYPE_CHECKING:
    from derm_pipeline.evaluation.report_content import LossCurve


def leaks(workspace: Workspace, training_set: Artifact) -> list[str]:
    """What of the training set is also held out; nothing, or something is badly wrong."""
    from derm_pipeline.training.training_set import training_set_problems

    recipe = workspace.recipe(training_set.manifest.partition)
    return training_set_problems(training_set.table(TRAINING_SET), splits_of(workspace, recipe))


def poor_reconstruction(workspace: Workspace, autoencoder: Artifact) -> list[str]:
    """Why no latents should be made with this autoencoder: its images come back worse than the recipe asks."""
    minimum = workspace.recipe(autoencoder.manifest.partition).reconstruction
    counts = autoencoder.counts
    found = {"PSNR in dB": (counts["train_psnr_db"], minimum.psnr_db), "SSIM": (counts["train_ssim"], minimum.ssim)}
    return [
        f"training images come back with a mean {name} of {value:g}; the recipe's `reconstruction` asks for {least:g}"
        for name, (value, least) in found.items()
        if not value >= least
    ]


def non_finite_moments(latents: Artifact) -> list[str]:
    """Images whose moments are not all finite (a VAE that overflows in half precision)."""
    from derm_pipeline.latents import open_moments

    digests, moments = open_moments(latents.directory)
    finite = [ok for chunk in moments.chunks() for ok in chunk.isfinite().flatten(1).all(1).tolist()]
    return [
        f"{digest[:12]} has moments that are not finite" for digest, ok in zip(digests, finite, strict=True) if not ok
    ]


def missing_provenance(dataset: Artifact) -> list[str]:
    """Samples whose row lacks what is needed to draw them again."""
    metadata = dataset.table(METADATA)
    needed = ("file_name", "text", "prompt", "seed", "guidance", "num_steps", "solver", "generator_digest")
    return [f"{metadata[name].null_count} rows have no {name}" for name in needed if metadata[name].null_count]


def copy_problems(fidelity: Artifact) -> list[str]:
    """A sentence when samples copy training images more often than chance explains, or when nobody can tell."""
    copies = fidelity.counts["copies"]
    if copies["num_copies"] is None:
        return [f"no verdict: {copies['reason']}"]
    if not copies["beyond_chance"]:
        return []
    return [
        f"{copies['num_copies']} of {copies['num_samples']} samples are as near to a training image as only "
        f"{copies['held_out_rate']:.2%} of {copies['num_held_out']} unseen real images (p = {copies['p_value']:.2g})"
    ]


def loss_curve(artifact: Artifact) -> LossCurve:
    """The losses of a training, and those on val images where they were measured."""
    from derm_pipeline.evaluation.report_content import LossCurve

    table = artifact.table(LOSSES)
    steps, losses = table["step"].to_numpy(), table["loss"].to_numpy()
    if "validation_loss" not in table.column_names:  # made before there were any
        return LossCurve(steps, losses)
    measured = table.filter(table["validation_loss"].is_valid())
    num_held_out = artifact.counts.get("num_validation_images")
    return LossCurve(steps, losses, measured["step"].to_numpy(), measured["validation_loss"].to_numpy(), num_held_out)


def loss_picture(artifact: Artifact) -> Pixels | None:
    """The curve as a picture; None of what was not trained."""
    from derm_pipeline.evaluation.plots import loss_curve_picture

    curve = loss_curve(artifact)
    validation = (curve.validation_steps, curve.validation_losses)
    if not len(curve.steps):
        return None
    return loss_curve_picture(curve.steps, curve.losses, artifact.manifest.asset, validation=validation)


def last_grid(generator: Artifact) -> Pixels | None:
    """The samples that were drawn at the end of the training."""
    return next(reversed(grids(generator).values()), None)


def reconstructions(workspace: Workspace, name: str, count: int = 14) -> Pixels:
    """Training images above what the autoencoder makes of them."""
    images, rebuilt = reconstructed(
        workspace, name, workspace.store.current("training_set", name).table(TRAINING_SET), count
    )
    return contact_sheet(np.concatenate([images, rebuilt]), columns=len(images))


def reconstructed(workspace: Workspace, name: str, rows: pa.Table, count: int) -> tuple[Pixels, Pixels]:
    """A few of the images of these rows, and what the recipe's autoencoder makes of them."""
    import torch

    from derm_pipeline.latents import to_model_range, to_pixels
    from derm_pipeline.models.generator import load_autoencoder
    from derm_pipeline.models.runtime import pick_device
    from derm_pipeline.training.objectives import reconstruct

    chosen = rows.take(np.linspace(0, rows.num_rows - 1, min(count, rows.num_rows)).round().astype(int))
    images = squares(workspace, workspace.recipe(name), chosen)
    model = load_autoencoder(workspace.store.current("autoencoder", name).directory, pick_device())
    return images, to_pixels(reconstruct(model, to_model_range(torch.from_numpy(images))))
