"""Which synthetic images are copies of training images, judged by how near unseen real images come to them.

Each image is held against the training images in two views: pixels (small, high-passed, over the 8 flips and
rotations) and features of a network. In both a distance is *calibrated*: divided by the mean distance to the next
nearest images of other lesions (Carlini et al. 2023, "Extracting training data from diffusion models", sec. 4.2). A
plain nevus is near to many images, a copy is near to one only; uncalibrated, 2 to 9 % of noisy or compressed copies
pass as new.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import pandas as pd

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

_CHUNK_ELEMENTS = 8_000_000
"""Numbers in one block of distances."""


class CopyConfig(BaseModel):
    """How copies are looked for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    side_px: int = Field(default=16, ge=8, le=64)
    """Side of the images that are compared by pixels. At 16 px noise, JPEG and a 5 % crop have averaged out; at 32 px
    they hide some copies, at four times the cost."""
    percentile: float = Field(default=1.0, gt=0, le=50)
    """Percentile of the held-out real images' calibrated distances below which an image is near to a training image."""
    num_neighbours: int = Field(default=50, ge=1)
    """Training images of other lesions whose mean distance calibrates; at most a tenth of the training images."""
    use_features: bool = False
    """Whether an image that is near by features, while the pixels name the same lesion, is flagged too. It finds more
    shifted and cropped copies with features that ignore such changes; those of a small classifier do not, and only flag
    more images that are no copies."""
    min_held_out: int = Field(default=50, ge=2)
    """Fewest held-out images for a verdict; with fewer the thresholds are noise, and there is none."""
    significance: float = Field(default=0.01, gt=0, lt=0.5)
    """The p-value below which the samples' rate of copies counts as beyond chance."""


@dataclass(frozen=True)
class ImageSet:
    """Images with the features of one network.

    images: uint8 (n, h, w, 3). features: (n, d), or (n, o, d) of o flips and rotations of each image, the nearest of
    which counts (for networks to which a rotated image looks different). lesion_id: of real images only.
    """

    images: npt.NDArray[np.uint8]
    features: npt.NDArray[np.floating]
    lesion_id: Sequence[Hashable] | None = None


@dataclass(frozen=True)
class CopyReport:
    """What was found. Rates are shares of images, distances are calibrated: 0 is identical, about 1 is unremarkable."""

    table: pd.DataFrame
    """One row a sample, in order: pixel_nearest, feature_nearest (row numbers in the training set), pixel_correlation,
    feature_distance (raw, to that nearest), pixel_calibrated, feature_calibrated, near_by_pixels, near_by_features,
    same_lesion (both views name one lesion), is_copy."""
    held_out_table: pd.DataFrame
    """The same of the held-out images: what chance alone gives."""
    n: int
    n_train: int
    n_held_out: int
    pixel_threshold: float | None = None
    feature_threshold: float | None = None
    copies: int | None = None
    copy_rate: float | None = None
    near_by_both_rate: float | None = None
    held_out_rate: float | None = None
    """The false-alarm rate: held-out images that the same rule calls copies."""
    held_out_near_by_both_rate: float | None = None
    p_value: float | None = None
    """One-sided, of the samples' rate being no higher than the held-out images': Fisher's exact test, which is
    also the law of how many of n new images fall below an order statistic of the held-out ones."""
    beyond_chance: bool | None = None
    """Whether p_value is below the configured significance."""
    reason: str | None = None
    """Why there is no verdict; every figure is None then."""


def find_copies(
    samples: ImageSet,
    train: ImageSet,
    held_out: ImageSet,
    config: CopyConfig | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> CopyReport:
    """Find the samples that are copies of training images.

    A sample is flagged when it is nearer to a training image by pixels than `percentile` % of unseen real images are
    (with `use_features` also when it is so by features, while the pixels name the same lesion). About `percentile` % of
    wholly new images meet this by chance, so a single flag is a reason to look, and `beyond_chance` is the verdict on
    all. Images near by both views deserve the first look.

    Found in trials by pixels alone (64 px, 200 of 2,081 drawn training images): all copies that were flipped, rotated,
    compressed (JPEG quality 30), made noisy (sd 8 of 255), brighter, of more contrast, blurred, or rebuilt by an
    autoencoder; of those cropped by 3 % three in four, by 6 % one in ten.

    Args:
        samples: n synthetic images.
        train: the images the generator was trained on, with lesions; all its images, not only some.
        held_out: real images of the same kind with lesions, none of them in `train`.
        config: sizes and thresholds.
        on_progress: called as (done, total), in images.

    Raises:
        ValueError: a lesion in both `train` and `held_out`, arrays that do not fit together, or fewer than 2 training
            lesions.
    """
    from scipy.stats import fisher_exact

    config = config or CopyConfig()
    lesions = _check(samples, train, held_out)
    search = _Search(train, lesions, config)
    total = len(samples.images) + len(held_out.images)
    done = [0]

    def advance(count: int) -> None:
        done[0] += count
        if on_progress:
            on_progress(done[0], total)

    tables = [search.nearest(chosen, advance) for chosen in (samples, held_out)]
    n, n_held_out = map(len, tables)
    known = CopyReport(tables[0], tables[1], n, len(lesions), n_held_out)
    if n_held_out < config.min_held_out or not n:
        reason = f"{n} samples and {n_held_out} held-out images; at least 1 and {config.min_held_out} are needed"
        return replace(known, reason=reason)
    thresholds = [float(np.percentile(tables[1][f"{view}_calibrated"], config.percentile)) for view in _VIEWS]
    for table in tables:
        _judge(table, *thresholds, use_features=config.use_features)
    copies, chance = (int(table.is_copy.sum()) for table in tables)
    both = [float((table.near_by_pixels & table.near_by_features).mean()) for table in tables]
    p_value = float(fisher_exact([[copies, n - copies], [chance, n_held_out - chance]], "greater").pvalue)
    return replace(
        known,
        pixel_threshold=thresholds[0],
        feature_threshold=thresholds[1],
        copies=copies,
        copy_rate=copies / n,
        near_by_both_rate=both[0],
        held_out_rate=chance / n_held_out,
        held_out_near_by_both_rate=both[1],
        p_value=p_value,
        beyond_chance=p_value < config.significance,
    )


_VIEWS = ("pixel", "feature")


def _judge(table: pd.DataFrame, pixel_threshold: float, feature_threshold: float, *, use_features: bool) -> None:
    table["near_by_pixels"] = table.pixel_calibrated < pixel_threshold
    table["near_by_features"] = table.feature_calibrated < feature_threshold
    table["is_copy"] = table.near_by_pixels
    if use_features:
        table["is_copy"] |= table.near_by_features & table.same_lesion


def pixel_descriptors(images: npt.NDArray[np.uint8], side_px: int = 16) -> Floats:
    """Small high-passed images, zero-mean a channel and of unit norm: (n, side, side, 3); products are correlations.

    What a Gaussian of side/8 leaves over: without it, every centred dark spot is like every other one. A flat image
    becomes zero. Flips and rotations of the image are flips and rotations of its descriptor.
    """
    count, height, width, _ = images.shape
    down, across = _area_weights(height, side_px), _area_weights(width, side_px)
    smooth = _smoothing(side_px)
    descriptors = np.empty((count, side_px, side_px, 3), np.float64)
    step = max(1, _CHUNK_ELEMENTS // (height * width * 3))
    for start in range(0, count, step):
        batch = images[start : start + step].astype(np.float64)
        small = _along(_along(batch, down, 1), across, 2)
        small -= _along(_along(small, smooth, 1), smooth, 2)
        small -= small.mean(axis=(1, 2), keepdims=True)
        norms = np.sqrt(np.einsum("nijc,nijc->n", small, small))
        # Rounding of a flat image must not become a pattern: 1e-2 of 255 grey levels a value is none.
        scale = np.where(norms > 1e-2 * side_px, 1 / np.maximum(norms, 1e-12), 0)
        descriptors[start : start + step] = small * scale[:, None, None, None]
    return descriptors


def orientations(images: Floats) -> list[Floats]:
    """The 8 flips and rotations of square images (n, s, s, c), the unchanged one first."""
    return [np.rot90(turned, k, (1, 2)) for turned in (images, images[:, :, ::-1]) for k in range(4)]


class _Search:
    """Nearest training images, and the calibrated distances to them."""

    def __init__(self, train: ImageSet, lesions: Indices, config: CopyConfig) -> None:
        self.config = config
        self.lesions = lesions
        self.pixels = pixel_descriptors(train.images, config.side_px).reshape(len(lesions), -1)
        self.features = _oriented(train.features)[:, 0]
        self.centre = self.features.mean(axis=0)  # distances by products lose digits far from the origin
        self.features = self.features - self.centre
        self.norms = np.einsum("nd,nd->n", self.features, self.features)

    def nearest(self, chosen: ImageSet, advance: Callable[[int], None]) -> pd.DataFrame:
        import pandas as pd

        descriptors = pixel_descriptors(chosen.images, self.config.side_px)
        features = _oriented(chosen.features) - self.centre
        parts: list[list[npt.NDArray[np.generic]]] = []
        step = max(1, _CHUNK_ELEMENTS // len(self.lesions))
        for start in range(0, len(descriptors), step):
            rows = slice(start, start + step)
            by_pixels = self._calibrated(self._pixel_distances(descriptors[rows]))
            by_features = self._calibrated(self._feature_distances(features[rows]))
            parts.append([*by_pixels, *by_features])
            advance(len(by_pixels[0]))
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)] or [np.empty(0)] * 6
        pixel_nearest, pixel_distance, pixel_calibrated, feature_nearest, feature_distance, feature_calibrated = columns
        return pd.DataFrame(
            {
                "pixel_nearest": pixel_nearest.astype(np.int64),
                "feature_nearest": feature_nearest.astype(np.int64),
                "pixel_correlation": 1 - pixel_distance**2 / 2,
                "feature_distance": feature_distance,
                "pixel_calibrated": pixel_calibrated,
                "feature_calibrated": feature_calibrated,
                "same_lesion": self.lesions[pixel_nearest.astype(int)] == self.lesions[feature_nearest.astype(int)],
            }
        )

    def _pixel_distances(self, descriptors: Floats) -> Floats:
        """(c, N): sqrt(2 - 2 correlation), that is the Euclidean distance, at the best of 8 orientations."""
        best = np.full((len(descriptors), len(self.pixels)), -1, np.float64)
        for turned in orientations(descriptors):
            np.maximum(best, turned.reshape(len(descriptors), -1) @ self.pixels.T, out=best)
        return np.sqrt(np.maximum(2 - 2 * best, 0))

    def _feature_distances(self, features: Floats) -> Floats:
        best = np.full((len(features), len(self.features)), np.inf)
        for turned in range(features.shape[1]):
            own = features[:, turned]
            squared = np.einsum("nd,nd->n", own, own)[:, None] + self.norms - 2 * own @ self.features.T
            np.minimum(best, squared, out=best)
        return np.sqrt(np.maximum(best, 0))

    def _calibrated(self, distances: Floats) -> tuple[Indices, Floats, Floats]:
        """Nearest row, its distance, and that over the mean distance to the nearest images of other lesions."""
        rows = np.arange(len(distances))
        nearest = distances.argmin(axis=1)
        own = distances[rows, nearest]
        # Further images of the copied lesion are near as well, and would make the copy look unremarkable.
        others = np.where(self.lesions[nearest][:, None] == self.lesions, np.inf, distances)
        k = min(self.config.num_neighbours, max(1, len(self.lesions) // 10))
        around = np.partition(others, k - 1, axis=1)[:, :k]
        around = np.ma.masked_invalid(around).mean(axis=1).filled(np.inf)
        return nearest, own, np.where(own > 0, own / np.maximum(around, 1e-300), 0)


def _oriented(features: npt.NDArray[np.floating]) -> Floats:
    array = np.asarray(features, np.float64)
    return array[:, None] if array.ndim == 2 else array


def _along(batch: Floats, weights: Floats, axis: int) -> Floats:
    """Weights (out, in) applied along one axis of a batch."""
    return np.moveaxis(np.tensordot(batch, weights, axes=(axis, 1)), -1, axis)


def _area_weights(length: int, side: int) -> Floats:
    """(side, length): the mean over the part of the line that each output pixel covers."""
    edges = np.linspace(0, length, side + 1)
    pixels = np.arange(length)
    covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    weights = np.maximum(covered, 0)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float64)


def _smoothing(side: int) -> Floats:
    """(side, side): a Gaussian of side/8, normalised at the edges."""
    gap = np.subtract.outer(np.arange(side), np.arange(side))
    weights = np.exp(-0.5 * (gap / (side / 8)) ** 2)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float64)


def _check(samples: ImageSet, train: ImageSet, held_out: ImageSet) -> Indices:
    """The training lesions as numbers, once everything fits together."""
    for name, chosen in (("samples", samples), ("train", train), ("held_out", held_out)):
        if chosen.images.ndim != 4 or chosen.images.shape[3] != 3 or chosen.images.dtype != np.uint8:
            raise ValueError(f"{name}: images are {chosen.images.dtype} {chosen.images.shape}, not uint8 (n, h, w, 3)")
        if len(chosen.features) != len(chosen.images) or chosen.features.ndim not in (2, 3):
            raise ValueError(f"{name}: {len(chosen.images)} images and features of shape {chosen.features.shape}")
        if chosen.features.shape[-1] != train.features.shape[-1] or not np.isfinite(chosen.features).all():
            raise ValueError(f"{name}: features must be finite and of the length of the training images'")
    if samples.features.ndim != held_out.features.ndim:
        raise ValueError("samples and held_out: give the features of the same orientations, or thresholds mean nothing")
    for name, chosen in (("train", train), ("held_out", held_out)):
        if chosen.lesion_id is None or len(chosen.lesion_id) != len(chosen.images):
            raise ValueError(f"{name}: a lesion id of every image is needed")
    shared = set(train.lesion_id or ()) & set(held_out.lesion_id or ())
    if shared:
        raise ValueError(f"{len(shared)} lesions are in train and in held_out, {min(map(str, shared))!r} among them")
    known, lesions = np.unique(np.asarray(train.lesion_id, str), return_inverse=True)
    if len(known) < 2:
        raise ValueError(f"train: {len(known)} lesions; at least 2 are needed")
    return lesions.astype(np.intp)
