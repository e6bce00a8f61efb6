"""How close the synthetic images are to real ones: Fréchet distance, KID, precision, recall, density, coverage.

Pure functions of feature arrays (n, d), all in float64; where the features come from is said by the name of the
extractor, which every metric's name carries. `compare` puts each score beside the real-against-real floor at equal n.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from derm_pipeline.evaluation.distances import (
    Floats,
    Kid,
    Prdc,
    frechet_distance,
    frechet_distance_of_features,
    kid,
    mmd2,
    paired_features,
    prdc,
)

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "ALL",
    "FeatureSet",
    "FidelityConfig",
    "FidelityRow",
    "Kid",
    "Prdc",
    "compare",
    "fidelity_table",
    "frechet_distance",
    "frechet_distance_of_features",
    "kid",
    "metric_name",
    "mmd2",
    "prdc",
]

Indices = npt.NDArray[np.intp]
Triple = tuple[Indices, Indices, Indices]
"""Row numbers of synthetic images, of half A and of half B."""

KINDS = ("fd", "kid", "precision", "recall", "density", "coverage")

ALL = "all"
"""The group of a row that is about every diagnosis together."""


class FidelityConfig(BaseModel):
    """How `compare` scores, and below which sample size it refuses to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_repeats: int = Field(default=20, ge=2)
    """Random halvings of the held-out real images, and draws of synthetic ones; at least 2."""
    neighbours: int = Field(default=5, ge=1)
    """k of precision, recall, density and coverage."""
    one_image_per_lesion: bool = False
    """Whether a repeat takes one random image of each lesion. For a generator that saw every lesion once; one that saw
    every image must be held against every image. Lesions with several images differ from the rest: on HAM10000 real
    training images scored 1.2 to 1.9 times the floor with one image of each lesion, and 0.84 to 1.01 times with all,
    where the likeness within a lesion raises the floor a little."""
    min_kid_size: int = Field(default=20, ge=2)
    """Fewest images a side for a KID."""
    min_prdc_size: int = Field(default=50, ge=2)
    """Fewest images a side for precision, recall, density and coverage."""
    min_frechet_size_per_dimension: float = Field(default=1.0, gt=0)
    """Fewest images a side for a Fréchet distance, as a multiple of the features' dimension d (with 2,048 Inception
    features, the usual 2,000 images). Below d a covariance is singular and the distance mostly bias."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Central share of the repeats between `low` and `high`."""
    seed: int = Field(default=0, ge=0)
    """Seed of the halvings and draws."""


@dataclass(frozen=True)
class FidelityRow:
    """One metric of one group: the synthetic score, the real-against-real floor beside it, and on how many images.

    `value` and `floor` are means over the repeats; `low`, `high`, `floor_low`, `floor_high` their central range. That
    range shows the variation from halving and drawing, not that of collecting other real images. All are None when
    `reason` says why there is no figure; `reason` may also hold a remark beside a figure.
    """

    metric: str
    group: str
    extractor: str
    value: float | None
    low: float | None
    high: float | None
    floor: float | None
    floor_low: float | None
    floor_high: float | None
    ratio: float | None
    """value / floor; None where the floor's range reaches 0, as a KID's does: hold `value` against `floor_high`."""
    n: int
    """Images on each side of each comparison: the least over the repeats."""
    n_synthetic: int
    """Synthetic images to draw from."""
    n_reference: int
    """Held-out real images to draw from."""
    repeats: int
    reason: str | None


def metric_name(kind: str, extractor: str) -> str:
    """The metric's name with its extractor, like `kid_classifier`; "fid" only where the extractor is "inception".

    Raises:
        ValueError: an extractor that is not lower-case letters, digits and underscores.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", extractor):
        raise ValueError(f"extractor {extractor!r}: lower-case letters, digits and _ are needed, like 'classifier'")
    if kind == "fd" and extractor == "inception":
        return "fid"
    return f"{kind}_{extractor}"


@dataclass(frozen=True)
class FeatureSet:
    """Features of images, (n, d), each with the diagnosis it shows (synthetic: is meant to show) and its lesion."""

    features: Floats
    diagnosis: Sequence[str]
    lesion_id: Sequence[Hashable] | None = None
    """Needed of real images only; a synthetic image stands for itself."""


def compare(
    synthetic: FeatureSet,
    held_out: FeatureSet,
    extractor: str,
    config: FidelityConfig | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[FidelityRow, ...]:
    """The score table: synthetic against held-out real images, beside held-out real images against each other.

    In every repeat the held-out lesions are dealt into two halves A and B, and as many synthetic images are drawn.
    Synthetic and B are both scored against A. All three have the same size and the same mix of diagnoses: each
    diagnosis is cut to the fewest images that one of the three has of it. A diagnosis without synthetic images falls
    out of the group "all", and the row says so.

    Args:
        synthetic: the synthetic images.
        held_out: real images that the generator has not seen, with their lesions.
        extractor: what made the features; part of each metric's name.
        config: repeats and sample-size rules.
        on_progress: called as (done, total), in repeats.

    Returns:
        A row for each of fd (fid), kid, precision, recall, density and coverage, for "all" and for each diagnosis of
        the held-out images, in alphabetical order. A figure from too few images is None, with the reason.

    Raises:
        ValueError: features, labels and lesions of different lengths, or features that are not finite.
    """
    config = config or FidelityConfig()
    metric_name("fd", extractor)
    _check_lengths(synthetic, held_out)
    reals, fakes = paired_features(held_out.features, synthetic.features, least=0)
    rng = np.random.default_rng(config.seed)
    scores: dict[tuple[str, str], list[tuple[float, float]]] = {}
    sizes: dict[str, list[int]] = {}
    for repeat in range(config.num_repeats):
        for group, (fake, half_a, half_b) in _draw(synthetic, held_out, config, rng).items():
            sizes.setdefault(group, []).append(len(half_a))
            # One reference for both, so that only the scored side differs.
            strata = np.asarray(held_out.diagnosis, str)[half_a].tolist()
            of_fake = _scores(reals[half_a], fakes[fake], strata, config)
            of_real = _scores(reals[half_a], reals[half_b], strata, config)
            for kind, value in of_fake.items():
                scores.setdefault((kind, group), []).append((value, of_real[kind]))
        if on_progress:
            on_progress(repeat + 1, config.num_repeats)
    return tuple(
        FidelityRow(
            metric=metric_name(kind, extractor),
            group=group,
            extractor=extractor,
            **_figures(scores.get((kind, group), []), config),
            n=min(sizes[group]),
            n_synthetic=_count(synthetic, group),
            n_reference=_count(held_out, group),
            repeats=config.num_repeats,
            reason=_reason(kind, min(sizes[group]), reals.shape[1], _absent(synthetic, held_out, group), config),
        )
        for group in sizes
        for kind in KINDS
    )


def fidelity_table(rows: Sequence[FidelityRow]) -> pd.DataFrame:
    """The rows as a long table, one column a field of `FidelityRow`."""
    import pandas as pd

    return pd.DataFrame([asdict(row) for row in rows], columns=[field.name for field in fields(FidelityRow)])


def _draw(
    synthetic: FeatureSet, held_out: FeatureSet, config: FidelityConfig, rng: np.random.Generator
) -> dict[str, Triple]:
    """For "all" and each diagnosis, three equally long sets of rows; those of "all" have one mix of diagnoses."""
    fake_labels, real_labels = np.asarray(synthetic.diagnosis, str), np.asarray(held_out.diagnosis, str)
    kept, in_a = _halves(np.asarray(held_out.lesion_id, str), real_labels, config, rng)
    drawn: dict[str, Triple] = {}
    for diagnosis in np.unique(real_labels).tolist():
        own = rng.permutation(kept[real_labels[kept] == diagnosis])
        fake = rng.permutation(np.flatnonzero(fake_labels == diagnosis))
        half_a, half_b = own[in_a[own]], own[~in_a[own]]
        size = min(len(fake), len(half_a), len(half_b))
        size = size if size > 1 else 0  # one image says nothing of how images of its diagnosis differ
        drawn[diagnosis] = (fake[:size], half_a[:size], half_b[:size])
    together = [np.concatenate([np.empty(0, np.intp), *(t[side] for t in drawn.values())]) for side in range(3)]
    return {ALL: (together[0], together[1], together[2]), **drawn}


def _halves(
    lesion_ids: npt.NDArray[np.str_], labels: npt.NDArray[np.str_], config: FidelityConfig, rng: np.random.Generator
) -> tuple[Indices, npt.NDArray[np.bool_]]:
    """The rows kept, and for every row whether its lesion is in half A: half of the lesions of each diagnosis are."""
    _, lesions = np.unique(lesion_ids, return_inverse=True)
    order = rng.permutation(len(lesions))
    _, first = np.unique(lesions[order], return_index=True)
    one_each = order[first]  # a random row of each lesion, by lesion number
    dealt = rng.permutation(len(one_each))
    dealt = dealt[np.argsort(labels[one_each[dealt]], kind="stable")]
    in_a = np.empty(len(one_each), bool)
    in_a[dealt] = (np.arange(len(dealt)) + rng.integers(2)) % 2 == 0
    return (one_each if config.one_image_per_lesion else order), in_a[lesions]


def _scores(reference: Floats, sample: Floats, strata: list[str], config: FidelityConfig) -> dict[str, float]:
    """Every score that this many images allow."""
    size, dimension = reference.shape
    scores = {}
    if size >= _least("fd", dimension, config):
        scores["fd"] = frechet_distance_of_features(reference, sample)
    if size >= _least("kid", dimension, config):
        scores["kid"] = mmd2(reference, sample, strata=strata)
    if size >= _least("precision", dimension, config):
        scores |= asdict(prdc(reference, sample, config.neighbours))
    return scores


def _least(kind: str, dimension: int, config: FidelityConfig) -> int:
    if kind == "fd":
        return max(2, int(np.ceil(config.min_frechet_size_per_dimension * dimension)))
    return config.min_kid_size if kind == "kid" else max(config.min_prdc_size, config.neighbours + 1)


def _figures(pairs: Sequence[tuple[float, float]], config: FidelityConfig) -> dict[str, Any]:
    names = ("value", "low", "high", "floor", "floor_low", "floor_high", "ratio")
    if len(pairs) < config.num_repeats:  # some repeat had too few images
        return dict.fromkeys(names)
    tail = (1 - config.confidence) / 2
    fake, real = np.asarray(pairs).T
    low, high = np.quantile(fake, (tail, 1 - tail))
    floor_low, floor_high = np.quantile(real, (tail, 1 - tail))
    ratio = fake.mean() / real.mean() if floor_low > 0 else None
    figures = (fake.mean(), low, high, real.mean(), floor_low, floor_high, ratio)
    return {name: None if x is None else float(x) for name, x in zip(names, figures, strict=True)}


def _reason(kind: str, size: int, dimension: int, absent: Sequence[str], config: FidelityConfig) -> str | None:
    """Why there is no figure, or what to bear in mind with it."""
    least = _least(kind, dimension, config)
    if size < least:
        why = f", which {dimension} features ask for" if kind == "fd" else ""
        return f"{size} images a side, fewer than {least}{why}"
    remarks = []
    if absent:
        remarks.append(f"without {', '.join(absent)}: no synthetic images")
    if kind == "fd" and size < 5 * dimension:
        remarks.append(f"biased upwards at {size} images for {dimension} features: read it beside the floor only")
    return "; ".join(remarks) or None


def _count(chosen: FeatureSet, group: str) -> int:
    return sum(group in (ALL, label) for label in map(str, chosen.diagnosis))


def _absent(synthetic: FeatureSet, held_out: FeatureSet, group: str) -> list[str]:
    return sorted(set(map(str, held_out.diagnosis)) - set(map(str, synthetic.diagnosis))) if group == ALL else []


def _check_lengths(synthetic: FeatureSet, held_out: FeatureSet) -> None:
    for name, chosen in (("synthetic", synthetic), ("held-out", held_out)):
        if len(chosen.diagnosis) != len(chosen.features):
            raise ValueError(f"{name}: {len(chosen.features)} features and {len(chosen.diagnosis)} diagnoses")
    if held_out.lesion_id is None or len(held_out.lesion_id) != len(held_out.features):
        raise ValueError("held-out: a lesion id of every image is needed, so that no lesion is in both halves")
