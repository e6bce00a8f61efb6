"""Our HAM10000 generator beside the design of tam7777/DiffusionModel, with one budget, one autoencoder and one judge.

Ours is what the recipe left in the store. Theirs is trained here, on the same training images and autoencoder: a DiT
384 wide, 6 blocks, 6 heads; images squashed to a square, in [0, 1] where the autoencoder expects [-1, 1]; one
orientation; one scale for all latent channels, that of latents of [-1, 1]; epsilon prediction, linear betas, times
uniform; AdamW 1e-4, betas 0.9 and 0.95, decay 0.9 of matrices, the rate divided by ten every ten epochs; no average of
the weights; a diagnosis drawn as often as it occurs; 1,000 ancestral steps without guidance. Its budget is ours: as
many examples as cost the processor time of our training, by the cost of a step of each, measured in turn (A-B-B-A). Not
theirs: the split, mixed precision where the machine has it (both), the number of samples, the autoencoder (theirs is a
pretrained one).

Judged alike: agreement of the recipe's real-trained classifiers, distances on their features beside the floor of real
against real at the same n, copies. Their samples are stretched back to 4:3 and cropped as ours before they are judged.

    derm run ham10000 --data DATA --raw RAW
    python benchmarks/against_diffusionmodel.py ham10000 --data DATA --raw RAW --out benchmarks/results/ham10000.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import torch
from safetensors.numpy import load_file
from torch import Tensor

from derm_pipeline.defs.stages.data import image_files
from derm_pipeline.defs.stages.evaluation import FEATURES, sample_images
from derm_pipeline.defs.stages.fitting import labels_of
from derm_pipeline.defs.stages.sets import EVALUATION_SET, TRAINING_SET, squares
from derm_pipeline.defs.workspace import Workspace
from derm_pipeline.evaluation.classifiers import agreement, load_classifier, predict, weights_name
from derm_pipeline.evaluation.demographics import demographics
from derm_pipeline.evaluation.fidelity import FeatureSet, compare
from derm_pipeline.evaluation.memorisation import ImageSet, find_copies
from derm_pipeline.generation import SamplingConfig, draw_samples, requests_of_cells, write_grid
from derm_pipeline.images import Pixels
from derm_pipeline.latents import Moments, latent_statistics, open_moments, read_squares, to_model_range
from derm_pipeline.models.conditions import condition_classes
from derm_pipeline.models.generator import Classes, GeneratorSpec, build_network, load_autoencoder, save_weights
from derm_pipeline.models.laws import DDPM
from derm_pipeline.models.runtime import autocast, pick_device
from derm_pipeline.recipes.model import Recipe
from derm_pipeline.records import Diagnosis, Split, canonical
from derm_pipeline.store import Artifact
from derm_pipeline.training.config import TrainingConfig
from derm_pipeline.training.loop import train
from derm_pipeline.training.objectives import GeneratorObjective
from derm_pipeline.training.settings import DiTTraining

TRAINED_WITH = ("training_set", "autoencoder", "latents")
JUDGED_WITH = ("evaluation_set", "synthetic_dataset", "classifiers")
ASPECT = 4 / 3
"""Width by height of HAM10000's images."""
TIMED_STEPS = 12


def main() -> None:
    options = _options()
    workspace = Workspace(options.data, options.raw)
    recipe = workspace.recipe(options.recipe)
    used = {asset: workspace.store.current(asset, options.recipe) for asset in TRAINED_WITH}
    table = used["training_set"].table(TRAINING_SET)
    classes = condition_classes(("diagnosis",), canonical(table["diagnosis"].to_pylist()))
    labels = labels_of(table, classes)
    moments, scale = _their_moments(workspace, recipe, table, used["autoencoder"])
    _, ours = open_moments(used["latents"].directory)
    budget, seconds = _budget(recipe, (ours, moments), scale, labels, classes)
    theirs = _theirs(len(moments), budget)
    options.work.mkdir(parents=True, exist_ok=True)
    spec = _spec(theirs, moments, classes, scale)
    start = time.process_time()
    _train(spec, theirs, moments, labels, options.work)
    trained_s = time.process_time() - start
    diagnoses = [Diagnosis(value) for value in classes["diagnosis"]]
    requests = requests_of_cells(diagnoses, [None], options.samples // len(diagnoses), 0)
    start = time.process_time()
    drawn = draw_samples(
        requests,
        SamplingConfig(num_steps=1000, solver="ddpm", guidance=1.0, skin_types=()),
        generator=options.work,
        autoencoder=used["autoencoder"].directory,
        work=options.work,
        on_progress=lambda done, total: print(f"samples {done} of {total}", flush=True),
    )
    drawn_s = time.process_time() - start
    used |= {asset: workspace.store.current(asset, options.recipe) for asset in JUDGED_WITH}
    metadata, all_ours = sample_images(used["synthetic_dataset"])
    asked = {
        "ours": metadata["diagnosis"].to_pylist(),
        "theirs": [str(request.told("diagnosis")) for request in requests],
    }
    samples = {"ours": all_ours, "theirs": as_cropped(drawn)}
    same = _as_many(asked["ours"], asked["theirs"])
    samples["ours, as many"], asked["ours, as many"] = all_ours[same], [asked["ours"][row] for row in same]
    result = {
        "machine": _machine(),
        "recipe": recipe.model_dump(mode="json", include={"name", "latents", "autoencoder", "generator"}),
        "theirs": theirs.model_dump(mode="json"),
        "processor_s_a_step": seconds,
        "images_trained_on": {"ours": _num_images(recipe.generator.training), "theirs": budget},
        "processor_s_of_theirs": {"training": round(trained_s, 1), "samples": round(drawn_s, 1)},
        "judged": _judged(workspace, recipe, used, samples, asked, list(classes["diagnosis"])),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
        _grid(workspace, recipe, used, samples, asked, options.out.with_suffix(".png"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a recipe of HAM10000 that was run")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--raw", type=Path, default=Path("data/raw"))
    parser.add_argument("--samples", type=int, default=210, help="of theirs; 1,000 steps each")
    parser.add_argument("--work", type=Path, default=Path("data/against_diffusionmodel"))
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


@torch.no_grad()
def _their_moments(workspace: Workspace, recipe: Recipe, table: pa.Table, encoder: Artifact) -> tuple[Tensor, float]:
    """Moments (n, 1, 2 c, h, w) of images squashed and in [0, 1], and the deviation of latents of [-1, 1]."""
    device = pick_device()
    model = load_autoencoder(encoder.directory, device)
    pixels = read_squares(image_files(workspace, table), size_px=recipe.latents.size_px, geometry="squash")
    parts, means = [], []
    for start in range(0, len(pixels), 64):
        images = to_model_range(torch.from_numpy(pixels[start : start + 64])).to(device)
        with autocast(device):
            moments = [part.float() for part in model.encode((images + 1) / 2)]
            if start % 1024 == 0:
                means.append(model.encode(images)[0].float())
        parts.append(torch.cat(moments, dim=1)[:, None].cpu())
    return torch.cat(parts), float(torch.cat(means).std())


def _num_images(config: TrainingConfig) -> int:
    return config.steps * config.batch_size


def _theirs(num_train: int, num_images: int) -> DiTTraining:
    return DiTTraining(
        patch=2,
        width=384,
        depth=6,
        heads=6,
        condition_init_std=0.02,
        conditions=("diagnosis",),
        balance=0.0,
        law=DDPM(prediction="epsilon", schedule="linear"),
        training=TrainingConfig(
            num_images=num_images,
            batch_size=32,
            lr=1e-4,
            warmup_steps=0,
            schedule="step",
            drop_every_images=10 * num_train,
            drop_factor=0.1,
            betas=(0.9, 0.95),
            weight_decay=0.9,
            decay_matrices_only=True,
            checkpoint_every_steps=500,
        ),
    )


def _spec(config: DiTTraining, moments: Tensor | Moments, classes: Classes, scale: float | None) -> GeneratorSpec:
    """With one scale for all channels, or (None) with each channel's own mean and deviation."""
    channels = moments.shape[2] // 2
    found = latent_statistics(moments) if scale is None else {"mean": [0.0] * channels, "std": [scale] * channels}
    return GeneratorSpec(
        network=config.network(moments.shape[-1], channels, {name: len(values) for name, values in classes.items()}),
        law=config.law,
        classes=dict(classes),
        latent_mean=tuple(found["mean"]),
        latent_std=tuple(found["std"]),
    )


def _budget(
    recipe: Recipe,
    moments: tuple[Moments, Tensor],
    scale: float,
    labels: dict[str, Tensor],
    classes: Classes,
) -> tuple[int, dict[str, float]]:
    """How many examples of theirs cost what our training cost, and the processor seconds of a step of each."""
    assert isinstance(recipe.generator, DiTTraining)
    settings = {"ours": recipe.generator, "theirs": _theirs(len(moments[1]), 32)}
    steps = {}
    for (name, config), own, one_scale in zip(settings.items(), moments, (None, scale), strict=True):
        assert isinstance(own, Tensor | Moments)
        spec = _spec(config, own, classes, one_scale)
        model = build_network(spec.network).to(pick_device()).train()
        steps[name] = _step(model, GeneratorObjective(model, spec, own, labels, config), config)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step(0)  # warm up
    for order in (("ours", "theirs"), ("theirs", "ours")):
        for name in order:
            start = _clock()
            for number in range(TIMED_STEPS):
                steps[name](number)
            seconds[name].append((_clock() - start) / TIMED_STEPS)
    each = {name: round(sum(values) / len(values), 4) for name, values in seconds.items()}
    ours = recipe.generator.training.steps * each["ours"]
    return round(ours / each["theirs"]) * 32, each


def _clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def _step(model: torch.nn.Module, objective: GeneratorObjective, config: DiTTraining) -> Callable[[int], None]:
    device = next(model.parameters()).device
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step(number: int) -> None:
        batch = objective.draw(number, torch.Generator().manual_seed(number))
        with autocast(device, config.training.precision):
            loss = objective.loss({name: value.to(device) for name, value in batch.items()}).mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def _train(spec: GeneratorSpec, config: DiTTraining, moments: Tensor, labels: dict[str, Tensor], folder: Path) -> None:
    torch.manual_seed(0)
    model = build_network(spec.network).to(pick_device())
    train(
        model,
        GeneratorObjective(model, spec, moments, labels, config),
        config.training,
        work=folder,
        on_progress=lambda step, steps, loss: print(f"theirs {step} of {steps}: {loss:.4f}", flush=True),
    )
    spec.save(folder)
    save_weights(folder / "weights.safetensors", model.state_dict())


def as_cropped(drawn: Pixels) -> Pixels:
    """Squashed samples (n, s, s, 3), whose [0, 1] was taken for [-1, 1], in their own range and our geometry."""
    size = drawn.shape[1]
    inside = np.clip(2 * drawn.astype(np.float32) - 255, 0, 255).round().astype(np.uint8)
    width = round(size * ASPECT)
    left = (width - size) // 2
    wide = [cv2.resize(image, (width, size), interpolation=cv2.INTER_CUBIC) for image in inside]
    return np.stack([image[:, left : left + size] for image in wide])


def _as_many(ours: Sequence[str], theirs: Sequence[str]) -> list[int]:
    """Rows of ours: the first of each diagnosis, as many as there are of theirs."""
    rows: list[int] = []
    for diagnosis in dict.fromkeys(theirs):
        of_it = [row for row, value in enumerate(ours) if value == diagnosis]
        rows += of_it[: list(theirs).count(diagnosis)]
    return rows


def _judged(
    workspace: Workspace,
    recipe: Recipe,
    used: dict[str, Artifact],
    samples: dict[str, Pixels],
    asked: dict[str, list[str]],
    classes: list[str],
) -> dict[str, Any]:
    train, held_out = used["training_set"].table(TRAINING_SET), used["evaluation_set"].table(EVALUATION_SET)
    is_test = np.array(held_out["split"].to_pylist()) == Split.TEST.value
    test = held_out.filter(pa.array(is_test))
    lesions = {name: demographics(rows).lesion_id.tolist() for name, rows in (("train", train), ("test", test))}
    features = load_file(used["classifiers"].path(FEATURES))
    of_test = features["held_out"][is_test]
    train_set = ImageSet(squares(workspace, recipe, train), features["train"], lesions["train"])
    test_set = ImageSet(squares(workspace, recipe, test), of_test, lesions["test"])
    models = [
        load_classifier(
            used["classifiers"].path(f"weights/{weights_name('real', seed)}"), recipe.classifiers, len(classes)
        )
        for seed in range(recipe.classifiers.num_seeds)
    ]
    judged = {}
    for name, images in samples.items():
        indices = np.array([classes.index(value) for value in asked[name]])
        found = [predict(model, images) for model in models]
        agreements = [agreement(one, indices, classes) for one in found]
        rows = compare(
            FeatureSet(found[0].features.astype(np.float64), asked[name]),
            FeatureSet(of_test[:, 0], test["diagnosis"].to_pylist(), lesions["test"]),
            "classifier",
            recipe.fidelity,
        )
        # copies are told by pixels (CopyConfig), so that features of one orientation serve for all eight
        turned = np.stack([found[0].features] * 8, axis=1)
        copies = find_copies(ImageSet(images, turned), train_set, test_set, recipe.copies)
        judged[name] = {
            "n": len(images),
            "agreement": {key: round(float(np.mean([one[key] for one in agreements])), 4) for key in agreements[0]},
            "distances": {
                row.metric: {
                    key: value if value is None or isinstance(value, str | int) else round(value, 4)
                    for key, value in vars(row).items()
                    if key in ("value", "low", "high", "floor", "floor_low", "floor_high", "ratio", "n", "reason")
                }
                for row in rows
                if row.group == "all"
            },
            "copies": {"flagged": copies.copies, "n": copies.n, "p_value": copies.p_value},
        }
    return judged


def _grid(
    workspace: Workspace,
    recipe: Recipe,
    used: dict[str, Artifact],
    samples: dict[str, Pixels],
    asked: dict[str, list[str]],
    path: Path,
) -> None:
    """A row a diagnosis: four training images, four samples of ours, four of theirs."""
    train = used["training_set"].table(TRAINING_SET)
    shown = []
    for diagnosis in dict.fromkeys(asked["theirs"]):
        rows = [row for row, value in enumerate(train["diagnosis"].to_pylist()) if value == diagnosis][:4]
        shown.append(squares(workspace, recipe, train.take(pa.array(rows))))
        for name in ("ours", "theirs"):
            of_it = [row for row, value in enumerate(asked[name]) if value == diagnosis][:4]
            shown.append(samples[name][of_it])
    write_grid(path, np.concatenate(shown), columns=12)


def _machine() -> dict[str, Any]:
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
    }


if __name__ == "__main__":
    main()
