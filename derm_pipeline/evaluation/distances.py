"""Distances between two samples of features (n, d): Fréchet, kernel (KID), precision, recall, density, coverage.

Pure functions, all in float64. They name no extractor: `fidelity` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_CHUNK = 2048


# --- Fréchet distance ---------------------------------------------------------------------------------------------


def frechet_distance(mean1: npt.ArrayLike, cov1: npt.ArrayLike, mean2: npt.ArrayLike, cov2: npt.ArrayLike) -> float:
    """Fréchet distance of two Gaussians: |m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½) (Dowson and Landau 1982; Heusel 2017).

    With C = L Lᵀ by pivoted Cholesky, tr (C1 C2)^½ is the sum of the singular values of L1ᵀ L2: as cheap as eigh of one
    root and eigvalsh of the sandwich, but rank-deficient covariances lose no digits, since nothing is squared.

    Args:
        mean1: (d,).
        cov1: (d, d), symmetric, positive semidefinite, of any rank.
        mean2: (d,).
        cov2: (d, d).

    Raises:
        ValueError: shapes that do not fit, or values that are not finite.
    """
    m1, m2 = (_finite(np.atleast_1d(np.asarray(m, np.float64)), 1, "mean") for m in (mean1, mean2))
    c1, c2 = (_finite(np.atleast_2d(np.asarray(c, np.float64)), 2, "covariance") for c in (cov1, cov2))
    if not (m1.shape == m2.shape and c1.shape == c2.shape == (m1.size, m1.size)):
        raise ValueError(f"shapes do not fit: means {m1.shape}, {m2.shape}, covariances {c1.shape}, {c2.shape}")
    return _distance(m1 - m2, float(np.trace(c1) + np.trace(c2)), _factor(c1), _factor(c2))


def frechet_distance_of_features(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Fréchet distance of the Gaussians fitted to two feature arrays (n, d), covariances unbiased.

    A sample of at most d rows is its own factor of its covariance, so that few rows cost little: with both small, only
    the nuclear norm of the centred cross-Gram matrix is needed.

    Raises:
        ValueError: fewer than 2 rows, different d, or values that are not finite.
    """
    first, second = paired_features(a, b, least=2)
    means, factors, trace = [], [], 0.0
    for rows in (first, second):
        mean = rows.mean(axis=0)
        scaled = (rows - mean) / np.sqrt(len(rows) - 1)
        means.append(mean)
        factors.append(scaled.T if len(rows) <= rows.shape[1] else _factor(scaled.T @ scaled))
        trace += float(np.sum(scaled**2))
    return _distance(means[0] - means[1], trace, factors[0], factors[1])


def _distance(shift: Floats, trace: float, root1: Floats, root2: Floats) -> float:
    import scipy.linalg

    cross = root1.T @ root2
    nuclear = float(scipy.linalg.svdvals(cross, check_finite=False).sum()) if cross.size else 0.0
    return float(shift @ shift) + trace - 2 * nuclear


def _factor(cov: Floats) -> Floats:
    """L (d, rank) with L Lᵀ = cov, by Cholesky with complete pivoting (LAPACK pstrf), which stops at the rank."""
    from scipy.linalg.lapack import dpstrf

    packed, pivots, rank, _ = dpstrf(cov, lower=1)
    factor = np.empty((len(cov), rank))
    factor[pivots - 1] = np.tril(packed)[:, :rank]
    return factor


# --- Kernel distance ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kid:
    """A kernel distance: the mean and standard deviation over subsets, and the central 95 % of them."""

    mean: float
    std: float
    low: float
    high: float
    subset_size: int
    num_subsets: int


def mmd2(a: npt.ArrayLike, b: npt.ArrayLike, *, strata: Sequence[str] | None = None) -> float:
    """Unbiased squared MMD of (n, d) and (m, d), kernel (x.y / d + 1)³ (Binkowski et al. 2018, eq. 4); may be < 0.

    Args:
        a: features (n, d).
        b: features (m, d).
        strata: the stratum of every row, where both samples were drawn with a fixed number of rows from each (at least
            2) and hold them in the same order. The usual estimator takes rows for independent draws, and is far below
            zero on such samples.
    """
    first, second = paired_features(a, b, least=2)
    within = sum(_within(x, strata) for x in (first, second))
    return within - 2 * _kernel_sum(first, second) / (len(first) * len(second))


def _within(x: Floats, strata: Sequence[str] | None) -> float:
    """The mean kernel of two independent rows of x's distribution: of its strata, each with its share of the rows."""
    size = len(x)
    if strata is None:
        return _kernel_sum(x, x, off_diagonal=True) / (size * (size - 1))
    labels = np.asarray(strata)
    total = _kernel_sum(x, x)
    for label in np.unique(labels):
        own = x[labels == label]
        # Pairs of a row with itself are no independent draws: the other pairs of the stratum stand in for them.
        pairs = _kernel_sum(own, own, off_diagonal=True)
        total += pairs * len(own) / (len(own) - 1) - _kernel_sum(own, own)
    return total / size**2


def kid(a: npt.ArrayLike, b: npt.ArrayLike, *, subset_size: int = 1000, num_subsets: int = 100, seed: int = 0) -> Kid:
    """Kernel Inception distance, as published: `mmd2` of random subsets, drawn without replacement from each side.

    Args:
        a: features (n, d).
        b: features (m, d).
        subset_size: rows of a subset; at most n and m.
        num_subsets: how many subsets.
        seed: seed of the subsets.

    Raises:
        ValueError: a sample smaller than `subset_size`.
    """
    first, second = paired_features(a, b, least=2)
    if not 2 <= subset_size <= min(len(first), len(second)):
        raise ValueError(
            f"subset_size is {subset_size}, the samples have {len(first)} and {len(second)} rows: "
            "choose a subset_size between 2 and the smaller sample"
        )
    rng = np.random.default_rng(seed)
    scores = [
        mmd2(*(x[rng.choice(len(x), subset_size, replace=False)] for x in (first, second))) for _ in range(num_subsets)
    ]
    low, high = np.quantile(scores, (0.025, 0.975))
    return Kid(float(np.mean(scores)), float(np.std(scores)), float(low), float(high), subset_size, num_subsets)


def _kernel_sum(a: Floats, b: Floats, *, off_diagonal: bool = False) -> float:
    total = 0.0
    for start in range(0, len(a), _CHUNK):
        gram = a[start : start + _CHUNK] @ b.T
        gram /= a.shape[1]
        gram += 1
        # Two products are ten times faster than a power.
        total += float(np.einsum("ij,ij,ij->", gram, gram, gram, optimize=False))
    if off_diagonal:
        total -= float(np.sum((np.einsum("ij,ij->i", a, a) / a.shape[1] + 1) ** 3))
    return total


# --- Precision, recall, density, coverage -------------------------------------------------------------------------


@dataclass(frozen=True)
class Prdc:
    """Shares of neighbourhoods hit.

    precision: fake points within a real point's k-th neighbour distance; recall: real points within a fake point's
    (Kynkäänniemi et al. 2019); density: real neighbourhoods a fake point lies in, over k (may exceed 1); coverage: real
    points whose neighbourhood holds a fake point (Naeem et al. 2020).
    """

    precision: float
    recall: float
    density: float
    coverage: float


def prdc(real: npt.ArrayLike, fake: npt.ArrayLike, k: int = 5) -> Prdc:
    """Precision, recall, density and coverage of `fake` (m, d) against `real` (n, d).

    Raises:
        ValueError: k or fewer rows on a side.
    """
    reals, fakes = paired_features(real, fake, least=k + 1)
    centre = reals.mean(axis=0)  # distances by products lose digits far from the origin
    reals, fakes = reals - centre, fakes - centre
    real_radii, fake_radii = _radii(reals, k), _radii(fakes, k)
    hits = np.zeros(len(fakes), np.int64)
    recalled = covered = 0
    for start in range(0, len(reals), _CHUNK):
        rows = slice(start, start + _CHUNK)
        squared = _squared_distances(reals[rows], fakes)
        within_real = squared < real_radii[rows, None]
        hits += within_real.sum(axis=0)
        covered += int(within_real.any(axis=1).sum())
        recalled += int((squared < fake_radii).any(axis=1).sum())
    return Prdc(float(np.mean(hits > 0)), recalled / len(reals), float(np.mean(hits) / k), covered / len(reals))


def _radii(points: Floats, k: int) -> Floats:
    """Squared distance of each point to its k-th nearest other point."""
    radii = np.empty(len(points))
    for start in range(0, len(points), _CHUNK):
        squared = _squared_distances(points[start : start + _CHUNK], points)
        rows = np.arange(len(squared))
        squared[rows, start + rows] = np.inf
        radii[start : start + len(squared)] = np.partition(squared, k - 1, axis=1)[:, k - 1]
    return radii


def _squared_distances(a: Floats, b: Floats) -> Floats:
    squared = a @ b.T
    squared *= -2
    squared += np.einsum("ij,ij->i", a, a)[:, None]
    squared += np.einsum("ij,ij->i", b, b)
    return np.maximum(squared, 0, out=squared)


def paired_features(a: npt.ArrayLike, b: npt.ArrayLike, *, least: int) -> tuple[Floats, Floats]:
    """Both as float64 (n, d), or a ValueError: not finite, different d, or fewer than `least` rows."""
    first, second = (_finite(np.asarray(x, np.float64), 2, "features") for x in (a, b))
    if first.shape[1] != second.shape[1] and min(len(first), len(second)):
        raise ValueError(f"features of different length: {first.shape} and {second.shape}; use one extractor for both")
    if min(len(first), len(second)) < least:
        raise ValueError(f"{len(first)} and {len(second)} rows; at least {least} are needed on each side")
    return first, second


def _finite(array: Floats, ndim: int, what: str) -> Floats:
    if array.ndim != ndim or not np.isfinite(array).all():
        raise ValueError(f"{what} of shape {array.shape}: {ndim} axes and finite values are needed")
    return array
