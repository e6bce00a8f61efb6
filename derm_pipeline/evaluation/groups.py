"""Whom a classifier serves and whom it fails: overall, per-group, worst-group figures, and an arm's gain over another.

Input is one long table of predictions: image_id, lesion_id, diagnosis, arm, seed, predicted, a probability
p_<diagnosis> for each class, and the columns that make groups. Output are long tables too; `group_min`, `group_max`,
`difference` and `ratio` mean what they mean in fairlearn's MetricFrame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from derm_pipeline.evaluation.bootstrap import Estimates, Figure, effective_size, estimate, expected_minimum, interval
from derm_pipeline.evaluation.predictions import OVERALL, Predictions, group_figures, overall_figures, read_predictions

if TYPE_CHECKING:
    import pandas as pd


class GroupConfig(BaseModel):
    """Which groups are looked at, and how sure a figure of one must be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    axes: tuple[tuple[str, ...], ...] = (
        ("diagnosis",),
        ("skin_tone",),
        ("diagnosis", "skin_tone"),
        ("malignant", "skin_tone"),
        ("sex",),
        ("age_band",),
        ("site",),
        ("ethnicity",),
    )
    """Each axis is the columns whose combinations are its groups. Axes whose columns are missing are left out."""
    min_group_size: int = Field(default=30, ge=1)
    """Images below which a group is shown, but cannot be the worst. A balanced accuracy counts as the number of images
    of one class that would make it as sure: k classes of n1 ... nk images as k² / (1/n1 + ... + 1/nk)."""
    flag_below: int = Field(default=100, ge=1)
    """Images, counted in the same way, below which a group is flagged as small."""
    num_bootstrap: int = Field(default=1000, ge=100)
    """Replicates of the bootstrap; at least 100."""
    resample_seeds: bool = True
    """Whether replicates also draw the training seeds, so that intervals hold the luck of training. Without it they are
    about these very classifiers."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Of every interval."""
    specificity: float = Field(default=0.9, gt=0, lt=1)
    """Specificity at which melanoma sensitivity is given."""
    calibration_bins: int = Field(default=15, ge=2)
    """Equal-width bins of the expected calibration error."""
    seed: int = Field(default=0, ge=0)
    """Of bootstrap and simulation."""


@dataclass(frozen=True)
class GroupMetrics:
    """Long tables; every figure has its n and its interval."""

    overall: pd.DataFrame
    """arm, metric, value, low, high, interval, n, n_clusters, classes, num_seeds."""
    groups: pd.DataFrame
    """The same with axis, group, n_effective (see `GroupConfig.min_group_size`), eligible (may be the worst) and
    size_flag ("too few", "few" or "")."""
    worst: pd.DataFrame
    """For each arm, axis and metric: the worst eligible group, its group_min with low, high, n; group_max, difference,
    ratio; and null_minimum, the minimum to expect were all groups alike, with null_p_value, the chance of this low a
    minimum then. null_* rest on lesions as independent draws."""
    gains: pd.DataFrame | None
    """See `compare_arms`; None where there is no baseline arm."""
    left_out: pd.DataFrame
    """axis, n, n_left_out: images without the axis's columns, which are in no group of it."""


def group_metrics(
    predictions: pd.DataFrame,
    config: GroupConfig | None = None,
    *,
    val: pd.DataFrame | None = None,
    baseline: str = "real",
) -> GroupMetrics:
    """Overall, per-group and worst-group figures of every arm, and the gains over the baseline.

    A value is the mean over the seeds. A group's metric is recall where the axis has the diagnosis, malignant
    sensitivity (or specificity) where it has malignancy, and otherwise balanced accuracy over the diagnoses present.

    Args:
        predictions: the long table, of test images. Every arm and seed must predict the same images.
        config: axes, sizes, bootstrap.
        val: predictions of the same arms and seeds on val images. Thresholds are chosen there; without it melanoma
            sensitivity is read off the test ROC curve, which its name then says, and has no interval.
        baseline: the arm that gains are over.

    Raises:
        ValueError: missing columns, arms or seeds that predict different images, unknown diagnoses.
    """
    config = config or GroupConfig()
    data = read_predictions(predictions)
    figures, estimates = _estimates(data, config, val)
    groups = _values_table(data, figures, estimates, config)
    overall_columns = ["arm", "metric", "value", "low", "high", "interval", "n", "n_clusters", "classes", "num_seeds"]
    in_groups = groups.axis != OVERALL
    return GroupMetrics(
        overall=groups.loc[~in_groups, overall_columns].reset_index(drop=True),
        groups=groups[in_groups].reset_index(drop=True),
        worst=_worst_table(data, figures, estimates, config),
        gains=_gains_table(data, figures, estimates, config, baseline) if baseline in data.arms else None,
        left_out=_left_out(data, config),
    )


def compare_arms(
    predictions: pd.DataFrame,
    config: GroupConfig | None = None,
    *,
    val: pd.DataFrame | None = None,
    baseline: str = "real",
) -> pd.DataFrame:
    """The gain of every arm over the baseline: overall, in each eligible group, and in the worst group.

    Both arms are evaluated on the same draw of lesions in each replicate. The worst group ("worst" in the column group)
    is looked for anew in each arm and replicate, among the eligible groups.

    Returns:
        arm, baseline, axis, group, metric, value, baseline_value, gain, low, high, n, n_clusters, higher_is_better,
        worst_group, baseline_worst_group. gain is value - baseline_value, whichever direction is better.

    Raises:
        ValueError: as `group_metrics`, or no such baseline.
    """
    config = config or GroupConfig()
    data = read_predictions(predictions)
    if baseline not in data.arms:
        raise ValueError(f"no arm {baseline!r} in the predictions: choose one of {', '.join(data.arms)}")
    figures, estimates = _estimates(data, config, val)
    return _gains_table(data, figures, estimates, config, baseline)


def _estimates(data: Predictions, config: GroupConfig, val: pd.DataFrame | None) -> tuple[list[Figure], Estimates]:
    figures = overall_figures(
        data, None if val is None else read_predictions(val), config.specificity, config.calibration_bins
    )
    for axis in _axes(data, config):
        figures += group_figures(data, axis)
    return figures, estimate(
        figures, data.clusters, config.num_bootstrap, config.seed, resample_seeds=config.resample_seeds
    )


def _axes(data: Predictions, config: GroupConfig) -> list[tuple[str, ...]]:
    return [axis for axis in config.axes if set(axis) <= set(data.images.columns)]


def _values_table(
    data: Predictions, figures: Sequence[Figure], estimates: Estimates, config: GroupConfig
) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for index, figure in enumerate(figures):
        facts = _facts(data, figure, config)
        for a, arm in enumerate(data.arms):
            rows.append({"arm": arm, **facts, **_figure(data, figure, estimates, index, a, config)})
    columns = ["arm", "axis", "group", "metric", "value", "low", "high", "interval", "n", "n_clusters"]
    columns += ["n_effective", "classes", "num_seeds", "eligible", "size_flag"]
    return pd.DataFrame(rows, columns=columns)


def _figure(
    data: Predictions, figure: Figure, estimates: Estimates, index: int, arm: int, config: GroupConfig
) -> dict[str, Any]:
    value = float(estimates.values[index, arm])
    low, high, law = interval(figure, value, estimates.replicates[:, index, arm], data.clusters, config.confidence)
    return {"value": value, "low": low, "high": high, "interval": law}


def _facts(data: Predictions, figure: Figure, config: GroupConfig) -> dict[str, Any]:
    """What is true of a figure whatever the arm."""
    counted = _effective(figure)
    too_few = counted < config.min_group_size
    return {
        "axis": figure.axis,
        "group": figure.group,
        "metric": figure.metric,
        "n": len(figure.rows),
        "n_clusters": len(np.unique(data.clusters[figure.rows])),
        "n_effective": counted,
        "classes": ",".join(figure.classes),
        "num_seeds": len(data.seeds),
        "eligible": not too_few,
        "size_flag": "too few" if too_few else "few" if counted < config.flag_below else "",
    }


def _effective(figure: Figure) -> float:
    """Images of one class that would make a recall as sure as this figure."""
    return len(figure.cells) ** 2 / sum(1 / len(cell.rows) for cell in figure.cells)


def _contests(figures: Sequence[Figure], config: GroupConfig) -> dict[tuple[str, str], list[int]]:
    """For each axis and metric, which figures compete for being the worst."""
    contests: dict[tuple[str, str], list[int]] = {}
    for index, figure in enumerate(figures):
        if figure.axis != OVERALL and _effective(figure) >= config.min_group_size:
            contests.setdefault((figure.axis, figure.metric), []).append(index)
    return contests


def _worst_table(
    data: Predictions, figures: Sequence[Figure], estimates: Estimates, config: GroupConfig
) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for (axis, metric), members in _contests(figures, config).items():
        sizes = [[effective_size(data.clusters[cell.rows]) for cell in figures[i].cells] for i in members]
        for a, arm in enumerate(data.arms):
            values = estimates.values[members, a]
            worst = members[int(values.argmin())]
            null_mean, null = expected_minimum(float(values.mean()), sizes, seed=config.seed)
            figure = _figure(data, figures[worst], estimates, worst, a, config)
            facts = _facts(data, figures[worst], config)
            rows.append(
                {
                    "arm": arm,
                    "axis": axis,
                    "metric": metric,
                    "group": facts["group"],
                    "group_min": figure["value"],
                    "low": figure["low"],
                    "high": figure["high"],
                    "n": facts["n"],
                    "n_clusters": facts["n_clusters"],
                    "size_flag": facts["size_flag"],
                    "num_groups": len(members),
                    "group_max": float(values.max()),
                    "difference": float(np.ptp(values)),
                    "ratio": float(values.min() / values.max()) if values.max() > 0 else None,
                    "null_minimum": null_mean,
                    "null_p_value": float(np.mean(null <= values.min() + 1e-12)),
                }
            )
    columns = ["arm", "axis", "metric", "group", "group_min", "low", "high", "n", "n_clusters", "size_flag"]
    columns += ["num_groups", "group_max", "difference", "ratio", "null_minimum", "null_p_value"]
    return pd.DataFrame(rows, columns=columns)


def _gains_table(
    data: Predictions, figures: Sequence[Figure], estimates: Estimates, config: GroupConfig, baseline: str
) -> pd.DataFrame:
    import pandas as pd

    base = data.arms.index(baseline)
    others = [a for a in range(len(data.arms)) if a != base]
    contests = _contests(figures, config)
    eligible = {index for members in contests.values() for index in members}
    rows = []
    for index, figure in enumerate(figures):
        if figure.axis == OVERALL or index in eligible:
            for a in others:
                arms = [base, a]
                row = _gain(estimates.values[index, arms], estimates.replicates[:, index, arms], config)
                if figure.kind == "point":
                    row |= {"low": None, "high": None}
                facts = _facts(data, figure, config)
                rows.append({"arm": data.arms[a], **facts, **row, "higher_is_better": figure.higher_is_better})
    for (axis, metric), members in contests.items():
        for a in others:
            values = estimates.values[np.ix_(members, [base, a])]
            worst = [figures[members[i]] for i in values.argmin(axis=0)]
            minima = estimates.replicates[:, members][:, :, [base, a]]
            # A replicate that draws none of a group's images says nothing of it.
            minima = np.where(np.isnan(minima), np.inf, minima).min(axis=1)
            rows.append(
                {
                    "arm": data.arms[a],
                    "axis": axis,
                    "group": "worst",
                    "metric": metric,
                    **_gain(values.min(axis=0), minima, config),
                    "n": len(worst[1].rows),
                    "n_clusters": len(np.unique(data.clusters[worst[1].rows])),
                    "higher_is_better": True,
                    "worst_group": worst[1].group,
                    "baseline_worst_group": worst[0].group,
                }
            )
    columns = ["arm", "baseline", "axis", "group", "metric", "value", "baseline_value", "gain", "low", "high", "n"]
    columns += ["n_clusters", "higher_is_better", "worst_group", "baseline_worst_group"]
    return pd.DataFrame(rows, columns=[name for name in columns if name != "baseline"]).assign(baseline=baseline)[
        columns
    ]


def _gain(values: np.ndarray, replicates: np.ndarray, config: GroupConfig) -> dict[str, float | None]:
    """Of the second of two arms over the first; values (2,), replicates (b, 2)."""
    tail = (1 - config.confidence) / 2
    low, high = np.nanquantile(replicates[:, 1] - replicates[:, 0], (tail, 1 - tail))
    return {
        "value": float(values[1]),
        "baseline_value": float(values[0]),
        "gain": float(values[1] - values[0]),
        "low": float(low),
        "high": float(high),
    }


def _left_out(data: Predictions, config: GroupConfig) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for axis in _axes(data, config):
        unknown = int(data.images[list(axis)].isna().any(axis=1).sum())
        rows.append({"axis": " x ".join(axis), "n": len(data.images), "n_left_out": unknown})
    return pd.DataFrame(rows, columns=["axis", "n", "n_left_out"])
