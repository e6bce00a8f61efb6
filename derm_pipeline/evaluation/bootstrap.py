"""Figures of several arms and seeds on the same images, and their bootstrap: clustered by lesion, paired between arms.

A figure is a mean of cell means: balanced accuracy has a cell a class, a recall is one cell. Every replicate weighs
lesions by a multinomial draw, the same for all arms, so a thousand replicates of a cell are one matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

Kind = Literal["mean", "placements", "absolute", "point"]

_CHUNK = 250
"""Replicates at a time."""


@dataclass(frozen=True)
class Cell:
    """Some images and what each scores.

    rows: (n,) of the images. scores: (n, arms, seeds, parts); parts is 1 but for "absolute" figures.
    """

    rows: Indices
    scores: Floats


@dataclass(frozen=True)
class Figure:
    """One figure for every arm: the mean over its cells of the mean score, averaged over seeds.

    kind: "mean"; "placements", an AUROC from DeLong's placement values (its cells are positives and negatives by
    turns); "absolute", the sum over parts of the absolute mean, as a calibration error is; "point", a mean without an
    interval.
    """

    axis: str
    group: str
    metric: str
    cells: tuple[Cell, ...]
    classes: tuple[str, ...] = ()
    kind: Kind = "mean"
    higher_is_better: bool = True

    @property
    def rows(self) -> Indices:
        """The images it is about, each once."""
        return np.unique(np.concatenate([cell.rows for cell in self.cells]))


@dataclass(frozen=True)
class Estimates:
    """values (figures, arms) and replicates (replicates, figures, arms); NaN where a replicate drew no image."""

    values: Floats
    replicates: Floats


def estimate(
    figures: Sequence[Figure], clusters: Indices, num_bootstrap: int, seed: int, *, resample_seeds: bool
) -> Estimates:
    """Each figure's value and its bootstrap replicates.

    Args:
        figures: at least one; all with the same arms and seeds.
        clusters: (images,) number of each image's lesion, 0 to m - 1.
        num_bootstrap: replicates.
        seed: of the draws.
        resample_seeds: whether a replicate also draws the training seeds, of each arm on its own, so that the interval
            holds the luck of training as well as that of the test images.
    """
    num_clusters = int(clusters.max()) + 1
    _, num_arms, num_seeds, _ = figures[0].cells[0].scores.shape
    even = np.full((1, num_arms, num_seeds), 1 / num_seeds)
    values = _evaluate(figures, clusters, np.ones((1, num_clusters)), even, None)[0]
    replicates = []
    for lesion_weights, seed_weights in _draws(num_bootstrap, num_clusters, num_arms, num_seeds, seed):
        if not resample_seeds:
            seed_weights = np.broadcast_to(even, seed_weights.shape)
        replicates.append(_evaluate(figures, clusters, lesion_weights, seed_weights, values))
    return Estimates(values, np.concatenate(replicates))


def _draws(
    num_bootstrap: int, num_clusters: int, num_arms: int, num_seeds: int, seed: int
) -> Iterator[tuple[Floats, Floats]]:
    """Multinomial weights of the lesions (b, lesions), and of the seeds (b, arms, seeds), which sum to 1."""
    rng = np.random.default_rng(seed)
    for start in range(0, num_bootstrap, _CHUNK):
        count = min(_CHUNK, num_bootstrap - start)
        lesions = _multinomial(rng, count, num_clusters)
        seeds = _multinomial(rng, count * num_arms, num_seeds).reshape(count, num_arms, num_seeds)
        yield lesions, seeds / num_seeds


def _multinomial(rng: np.random.Generator, draws: int, size: int) -> Floats:
    """(draws, size): how often each of `size` comes up in `size` draws with replacement."""
    picked = rng.integers(size, size=(draws, size)) + np.arange(draws)[:, None] * size
    return np.bincount(picked.ravel(), minlength=draws * size).reshape(draws, size).astype(np.float64)


def _evaluate(
    figures: Sequence[Figure], clusters: Indices, weights: Floats, seed_weights: Floats, values: Floats | None
) -> Floats:
    """(b, figures, arms) under the weights; `values` are the unweighted figures, None while they are being found."""
    out = np.empty((len(weights), len(figures), seed_weights.shape[1]))
    for index, figure in enumerate(figures):
        total = np.zeros(out[:, index].shape)
        present = np.zeros((len(weights), 1))
        for cell in figure.cells:
            own = weights[:, clusters[cell.rows]]
            mass = own.sum(axis=1)
            sums = (own @ cell.scores.reshape(len(cell.rows), -1)).reshape(len(weights), *cell.scores.shape[1:])
            parts = np.abs(sums).sum(axis=-1) if figure.kind == "absolute" else sums.sum(axis=-1)
            drawn = mass > 0
            total[drawn] += (parts * seed_weights).sum(axis=-1)[drawn] / mass[drawn, None]
            present[drawn] += 1
        # A class that a replicate did not draw leaves the mean to the others.
        mean = np.divide(total, present, out=np.full_like(total, np.nan), where=present > 0)
        if figure.kind == "placements" and values is not None:
            # AUROC is linear in positives and in negatives; to first order the two deviations add up (DeLong 1988).
            mean = 2 * mean - values[index]
        out[:, index] = mean
    return out


def interval(
    figure: Figure, value: float, replicates: Floats, clusters: Indices, confidence: float
) -> tuple[float | None, float | None, str | None]:
    """(low, high, law) of one arm's figure.

    law "bootstrap": percentiles of the replicates; "basic": those mirrored at the value, for a calibration error, whose
    replicates are biased upwards; "wilson": where the replicates cannot vary, since all or none are right (Wilson 1927,
    with lesions as draws). None for a figure that has no interval.
    """
    if figure.kind == "point":
        return None, None, None
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(replicates, (tail, 1 - tail))
    if figure.kind == "absolute":
        return max(0.0, float(2 * value - high)), max(0.0, float(2 * value - low)), "basic"
    if low == high and value in (0, 1):
        sizes = [effective_size(clusters[cell.rows]) for cell in figure.cells]
        return *wilson_interval(value, len(sizes) ** 2 / sum(1 / size for size in sizes), confidence), "wilson"
    return float(low), float(high), "bootstrap"


def wilson_interval(share: float, n: float, confidence: float) -> tuple[float, float]:
    """The interval of a share among n independent images (Wilson 1927)."""
    from statistics import NormalDist

    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5 / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def effective_size(clusters: Indices) -> float:
    """Kish's effective number of independent images, as if those of one lesion were right or wrong together."""
    sizes = np.unique(clusters, return_counts=True)[1].astype(np.float64)
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def expected_minimum(
    common: float, sizes: Sequence[Sequence[float]], num_draws: int = 10_000, seed: int = 0
) -> tuple[float, Floats]:
    """The least of several groups' figures, were the true value of all of them the same.

    The minimum of noisy figures is biased: six groups of recall 0.80 and 30 images show 0.705 on average.

    Args:
        common: the true value, 0 to 1.
        sizes: for each group the number of images of each of its classes; one class for a recall. Rounded.
        num_draws: simulated minima.
        seed: of the simulation.

    Returns:
        The mean of the simulated minima, and the minima (num_draws,).
    """
    rng = np.random.default_rng(seed)
    least = np.full(num_draws, np.inf)
    for group in sizes:
        counts = np.maximum(1, np.rint(group)).astype(np.int64)
        shares = rng.binomial(counts, common, size=(num_draws, len(counts))) / counts
        np.minimum(least, shares.mean(axis=1), out=least)
    return float(least.mean()), least
