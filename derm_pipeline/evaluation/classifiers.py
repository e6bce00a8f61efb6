"""Classifiers: what the synthetic data is good for, measured arm by arm.

Every arm gets the same network, the same number of optimiser steps and the same seeds; nothing is chosen by looking at
the test split, so the last weights are the ones that count.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from derm_pipeline.images import Pixels
from derm_pipeline.latents import orient, to_model_range
from derm_pipeline.models.runtime import autocast, load_weights, pick_device, save_weights
from derm_pipeline.sources.base import num_cores
from derm_pipeline.store import replacing

Arm = Literal["real", "synthetic", "real+synthetic", "oversampling"]


class ClassifierConfig(BaseModel):
    """The classifiers stage of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    arms: tuple[Arm, ...] = ("real", "synthetic", "real+synthetic", "oversampling")
    """What a classifier is trained on; oversampling is real data with every diagnosis drawn equally often."""
    num_seeds: int = Field(default=3, ge=1)
    """Classifiers of each arm."""
    width: int = Field(default=32, ge=8)
    """Features after the stem; doubled at each of the two halvings."""
    num_steps: int = Field(default=300, ge=1)
    """Optimiser steps of every classifier."""
    batch_size: int = Field(default=64, ge=1)
    """Images a step."""
    lr: float = Field(default=3e-3, gt=0)
    """AdamW's peak learning rate."""
    weight_decay: float = Field(default=0.05, ge=0)
    """AdamW's weight decay."""
    balance: Annotated[float, Field(ge=0, le=1)] | Literal["repeats"] = 0.0
    """How far every arm evens out the diagnoses when it draws images: 0 as they come, 1 every diagnosis equally often,
    as the arm oversampling always does; repeats: each image as often as `repeat_factors` says."""
    label_smoothing: float = Field(default=0.05, ge=0, lt=1)
    """Part of the target that is spread over all diagnoses."""


@dataclass(frozen=True)
class LabelledImages:
    """Images (n, h, w, 3) uint8, their diagnoses as class indices (n,), and how many classes there are."""

    images: Pixels
    diagnoses: npt.NDArray[np.int64]
    num_classes: int

    def __add__(self, other: LabelledImages) -> LabelledImages:
        assert self.num_classes == other.num_classes
        images = np.concatenate([self.images, other.images])
        return LabelledImages(images, np.concatenate([self.diagnoses, other.diagnoses]), self.num_classes)


@dataclass(frozen=True)
class Prediction:
    """Of n images: probabilities (n, diagnoses) and features (n, d), float32."""

    probabilities: npt.NDArray[np.float32]
    features: npt.NDArray[np.float32]


class SmallResNet(nn.Module):
    """A residual network for small images: PixelUnshuffle(4) stem, three resolutions, mean pooling."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(48, width, 3, padding=1))
        self.stages = nn.Sequential(
            _ResidualBlock(width, width),
            _ResidualBlock(width, 2 * width, stride=2),
            _ResidualBlock(2 * width, 4 * width, stride=2),
        )
        self.head = nn.Linear(4 * width, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """(n, 3, h, w) in [-1, +1] -> (n, 4 width)."""
        return F.relu(self.stages(self.stem(images))).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


class _ResidualBlock(nn.Module):
    def __init__(self, num_in: int, num_out: int, stride: int = 1) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, num_in)
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride=stride, padding=1)
        self.norm2 = nn.GroupNorm(8, num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, padding=1)
        self.skip = nn.Conv2d(num_in, num_out, 1, stride=stride) if num_in != num_out or stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.relu(self.norm2(y)))


def arm_data(arm: Arm, real: LabelledImages, synthetic: LabelledImages) -> LabelledImages:
    """What an arm is trained on."""
    if arm == "synthetic":
        return synthetic
    return real + synthetic if arm == "real+synthetic" else real


def train_classifier(
    data: LabelledImages,
    config: ClassifierConfig,
    *,
    seed: int,
    balance: float | Literal["repeats"] = 0.0,
    on_progress: Callable[[int, int], None] | None = None,
) -> SmallResNet:
    """Train one classifier; the same data, config and seed give the same weights.

    Args:
        data: training images only.
        config: network and budget.
        seed: of the initial weights, the order of examples and the augmentation.
        balance: how far the diagnoses are evened out; see `ClassifierConfig.balance`.
        on_progress: called now and then with (steps done, steps).
    """
    device = pick_device()
    torch.manual_seed(seed)
    model = SmallResNet(config.width, data.num_classes).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=config.num_steps, pct_start=0.15)
    stream = torch.Generator().manual_seed(seed)
    images = torch.from_numpy(data.images).to(device)
    diagnoses = torch.from_numpy(data.diagnoses).to(device)
    order = _draw_order(data.diagnoses, config.num_steps * config.batch_size, balance, stream)
    for step in range(config.num_steps):
        chosen = order[step * config.batch_size : (step + 1) * config.batch_size].to(device)
        batch = augment(to_model_range(images[chosen]), stream)
        with autocast(device):
            logits = model(batch)
        loss = F.cross_entropy(logits.float(), diagnoses[chosen], label_smoothing=config.label_smoothing)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if on_progress and (step + 1) % 50 == 0:
            on_progress(step + 1, config.num_steps)
    return model.eval()


def repeat_factors(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How often each image of a diagnosis is repeated: floor(largest count / its own), as LesionGen does."""
    return np.where(counts > 0, counts.max(initial=0) // np.maximum(counts, 1), 0)


def _draw_order(
    diagnoses: npt.NDArray[np.int64], num: int, balance: float | Literal["repeats"], stream: torch.Generator
) -> Tensor:
    if balance == "repeats":
        repeated = np.repeat(np.arange(len(diagnoses)), repeat_factors(np.bincount(diagnoses))[diagnoses])
        rows = torch.from_numpy(repeated)
        return torch.cat([rows[_shuffled(len(rows), stream)] for _ in range(-(-num // len(rows)))])[:num]
    if balance > 0:
        weights = np.bincount(diagnoses)[diagnoses] ** -balance
        return torch.multinomial(torch.from_numpy(weights), num, replacement=True, generator=stream)
    epochs = -(-num // len(diagnoses))
    return torch.cat([_shuffled(len(diagnoses), stream) for _ in range(epochs)])[:num]


def _shuffled(count: int, stream: torch.Generator) -> Tensor:
    return torch.randperm(count, generator=stream)


def augment(images: Tensor, stream: torch.Generator) -> Tensor:
    """Random orientation of the batch, random brightness and contrast of every image; (n, 3, h, w) in [-1, +1]."""
    oriented = orient(images, int(torch.randint(8, (1,), generator=stream)))
    jitter = torch.rand(2, len(images), 1, 1, 1, generator=stream).to(images.device) * 2 - 1
    return oriented * (1 + 0.1 * jitter[0]) + 0.1 * jitter[1]


@torch.no_grad()
def predict(model: SmallResNet, images: Pixels, *, batch_size: int = 256) -> Prediction:
    """Probabilities and features of images (n, h, w, 3) uint8, in float32 arithmetic."""
    device = next(model.parameters()).device
    probabilities, features = [], []
    for start in range(0, len(images), batch_size):
        batch = to_model_range(torch.from_numpy(images[start : start + batch_size]).to(device))
        found = model.features(batch)
        features.append(found.cpu().numpy())
        probabilities.append(model.head(found).softmax(1).cpu().numpy())
    return Prediction(np.concatenate(probabilities), np.concatenate(features))


def train_arms(
    real: LabelledImages,
    synthetic: LabelledImages,
    config: ClassifierConfig,
    *,
    out: Path,
    work: Path,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> dict[tuple[str, int], SmallResNet]:
    """Train every arm with every seed; weights already in `out` are kept.

    On processors each classifier is trained by one core, several at a time: networks this small gain little from a
    second core, and the weights then do not depend on how many there are.

    Args:
        real: training images.
        synthetic: samples, labelled with what was asked for.
        config: arms, seeds, budget.
        out: where the weights are written, one file a classifier.
        work: a folder for what is handed to other processes.
        on_progress: called with (classifiers done, classifiers, which).

    Returns:
        (arm, seed) -> classifier, ready to predict.
    """
    out.mkdir(parents=True, exist_ok=True)
    jobs = [(arm, seed) for seed in range(config.num_seeds) for arm in config.arms]
    missing = [job for job in jobs if not (out / weights_name(*job)).exists()]
    done = len(jobs) - len(missing)
    for arm, seed in _train_missing(missing, real, synthetic, config, out, work):
        done += 1
        if on_progress:
            on_progress(done, len(jobs), f"{arm}, seed {seed}")
    return {(arm, seed): load_classifier(out / weights_name(arm, seed), config, real.num_classes) for arm, seed in jobs}


def _train_missing(
    missing: list[tuple[Arm, int]],
    real: LabelledImages,
    synthetic: LabelledImages,
    config: ClassifierConfig,
    out: Path,
    work: Path,
) -> Iterator[tuple[Arm, int]]:
    if pick_device().type == "cuda":
        for arm, seed in missing:
            _train_arm(arm_data(arm, real, synthetic), config, out, arm, seed)
            yield arm, seed
        return
    files = {name: _write(work / f"{name}.npz", data) for name, data in (("real", real), ("synthetic", synthetic))}
    train_one = partial(_train_arm_of_files, files, config, out)
    # Not forked: this process holds torch's threads, whose locks a fork would copy.
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(num_cores(), mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(train_one, missing)


def _train_arm(data: LabelledImages, config: ClassifierConfig, out: Path, arm: Arm, seed: int) -> None:
    balance = 1.0 if arm == "oversampling" else config.balance
    model = train_classifier(data, config, seed=seed, balance=balance)
    save_weights(out / weights_name(arm, seed), model.state_dict())


def _train_arm_of_files(
    files: Mapping[str, Path], config: ClassifierConfig, out: Path, job: tuple[Arm, int]
) -> tuple[Arm, int]:
    arm, seed = job
    real, synthetic = (_read(files[name]) for name in ("real", "synthetic"))
    _train_arm(arm_data(arm, real, synthetic), config, out, arm, seed)
    return job


def _write(path: Path, data: LabelledImages) -> Path:
    with replacing(path) as aside, aside.open("wb") as handle:
        np.savez(handle, images=data.images, diagnoses=data.diagnoses, num_classes=data.num_classes)
    return path


def _read(path: Path) -> LabelledImages:
    with np.load(path, allow_pickle=False) as arrays:
        return LabelledImages(arrays["images"], arrays["diagnoses"], int(arrays["num_classes"]))


def weights_name(arm: str, seed: int) -> str:
    """File name of one classifier's weights."""
    return f"{arm.replace('+', '-and-')}-seed{seed}.safetensors"


def load_classifier(path: Path, config: ClassifierConfig, num_classes: int) -> SmallResNet:
    """The classifier whose weights lie at `path`."""
    device = pick_device()
    model = SmallResNet(config.width, num_classes)
    model.load_state_dict(load_weights(path))
    return model.to(device).eval()


def balanced_accuracy(diagnoses: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64]) -> float:
    """Mean recall over the diagnoses that occur (ISIC's metric)."""
    recalls = [float((predicted[diagnoses == index] == index).mean()) for index in np.unique(diagnoses)]
    return float(np.mean(recalls))


def agreement(prediction: Prediction, asked: npt.NDArray[np.int64], classes: Sequence[str]) -> Mapping[str, float]:
    """How often a classifier finds the diagnosis that was asked for: overall and by diagnosis."""
    right = prediction.probabilities.argmax(1) == asked
    by_diagnosis = {
        diagnosis: float(right[asked == index].mean())
        for index, diagnosis in enumerate(classes)
        if (asked == index).any()
    }
    return {"all": float(right.mean())} | by_diagnosis
