"""The long table of predictions as arrays, and the figures that can be made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from derm_pipeline.evaluation.bootstrap import Cell, Figure, Floats, Indices
from derm_pipeline.records import Diagnosis

if TYPE_CHECKING:
    import pandas as pd

OVERALL = "overall"
"""The axis of figures about all images."""


@dataclass(frozen=True)
class Predictions:
    """Predictions of every arm and seed on the same images, as arrays.

    true (images,), predicted (images, arms, seeds): numbers of classes. probabilities (images, arms, seeds, classes).
    clusters (images,): numbers of lesions. images: one row an image, with the columns that make groups.
    """

    images: pd.DataFrame
    arms: list[str]
    seeds: list[int]
    classes: list[str]
    clusters: Indices
    true: Indices
    predicted: Indices
    probabilities: Floats

    @property
    def correct(self) -> Floats:
        """(images, arms, seeds): 1 where the prediction is right."""
        return (self.predicted == self.true[:, None, None]).astype(np.float64)

    def rows_of(self, diagnosis: int) -> Indices:
        """The images of a class."""
        return np.flatnonzero(self.true == diagnosis)


def read_predictions(table: pd.DataFrame) -> Predictions:
    """The long table as arrays; classes are the p_<diagnosis> columns, in their order.

    Raises:
        ValueError: a missing column, an unknown diagnosis, an image twice, a probability that is not finite, or arms
            and seeds that do not predict the same images.
    """
    classes = [column[2:] for column in table.columns if column.startswith("p_")]
    needed = ["image_id", "lesion_id", "diagnosis", "arm", "seed", "predicted"]
    if missing := [column for column in needed if column not in table]:
        raise ValueError(f"the predictions have no column {', '.join(missing)}")
    if not classes or not len(table):
        raise ValueError("the predictions have no rows, or no column p_<diagnosis>")
    keys = ["source", "image_id"] if "source" in table else ["image_id"]
    ordered = table.sort_values(["arm", "seed", *keys], kind="stable")
    arms, seeds = sorted(map(str, table.arm.unique())), sorted(table.seed.unique().tolist())
    count = len(table[keys].drop_duplicates())
    _check_complete(ordered, keys, count, len(arms), len(seeds))
    images = ordered.iloc[:count].reset_index(drop=True)
    shape = (len(arms), len(seeds), count)
    true, predicted = (_codes(ordered[column], classes) for column in ("diagnosis", "predicted"))
    if (true.reshape(-1, count) != true[:count]).any():
        raise ValueError("an image has two diagnoses in the predictions")
    probabilities = ordered[[f"p_{name}" for name in classes]].to_numpy(np.float64)
    if not np.isfinite(probabilities).all():
        raise ValueError("probabilities in the predictions are not finite")
    images = images.drop(columns=["arm", "seed", "predicted", *(f"p_{name}" for name in classes)])
    if "malignant" not in images:
        images["malignant"] = _malignant(classes)[true[:count]]
    return Predictions(
        images=images,
        arms=arms,
        seeds=seeds,
        classes=classes,
        clusters=np.unique(images.lesion_id.astype(str), return_inverse=True)[1].astype(np.intp),
        true=true[:count],
        predicted=predicted.reshape(shape).transpose(2, 0, 1),
        probabilities=probabilities.reshape(*shape, -1).transpose(2, 0, 1, 3),
    )


def _check_complete(ordered: pd.DataFrame, keys: list[str], count: int, num_arms: int, num_seeds: int) -> None:
    if ordered.duplicated(["arm", "seed", *keys]).any():
        raise ValueError("an image is twice in the predictions of one arm and seed")
    sizes = ordered.groupby(["arm", "seed"]).size()
    if len(sizes) != num_arms * num_seeds or (sizes != count).any():
        found = ", ".join(f"{key}: {size}" for key, size in sizes.items())
        raise ValueError(f"every arm and seed must predict the same {count} images; found {found}")
    if ordered[["lesion_id"]].isna().any().any():
        raise ValueError("an image without lesion_id in the predictions: give it one of its own")


def _codes(column: pd.Series, classes: Sequence[str]) -> Indices:
    known = {name: number for number, name in enumerate(classes)}
    names = column.astype(str)
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"{column.name} {', '.join(unknown)}: no p_ column; the classes are {', '.join(classes)}")
    return np.array([known[name] for name in names], np.intp)


def _malignant(classes: Sequence[str]) -> npt.NDArray[np.bool_]:
    return np.array([name in set(Diagnosis) and Diagnosis(name).is_malignant for name in classes])


# --- Groups -------------------------------------------------------------------------------------------------------


def group_figures(data: Predictions, axis: tuple[str, ...]) -> list[Figure]:
    """The figure of each group on the axis: combinations of known values of its columns, in sorted order."""
    figures = []
    cells: tuple[Cell, ...]
    malignant = _malignant(data.classes)
    correct = data.correct[..., None]
    right_side = (malignant[data.predicted] == malignant[data.true][:, None, None]).astype(np.float64)[..., None]
    known = data.images.dropna(subset=list(axis))
    for values, rows in known.groupby(list(axis), sort=True).indices.items():
        chosen = known.index.to_numpy()[rows].astype(np.intp)
        named = dict(zip(axis, values if isinstance(values, tuple) else (values,), strict=True))
        if "diagnosis" not in axis and "malignant" in axis:
            metric = "malignant_sensitivity" if named["malignant"] else "malignant_specificity"
            cells = (Cell(chosen, right_side[chosen]),)
        elif "diagnosis" in axis:
            metric, cells = "recall", (Cell(chosen, correct[chosen]),)
        else:
            metric, cells = "balanced_accuracy", _by_class(data, chosen, correct)
        present = tuple(data.classes[code] for code in np.unique(data.true[chosen]))
        figures.append(Figure(" x ".join(axis), " x ".join(map(_label, named.items())), metric, cells, present))
    return figures


def _label(item: tuple[str, object]) -> str:
    column, value = item
    return ("malignant" if value else "benign") if column == "malignant" else str(value)


def _by_class(data: Predictions, rows: Indices, scores: Floats) -> tuple[Cell, ...]:
    true = data.true[rows]
    chosen = (rows[true == code] for code in np.unique(true))
    return tuple(Cell(own, scores[own]) for own in chosen)


# --- Overall ------------------------------------------------------------------------------------------------------


def overall_figures(data: Predictions, val: Predictions | None, specificity: float, bins: int) -> list[Figure]:
    """Balanced accuracy, accuracy, macro AUROC, melanoma sensitivity at a specificity, calibration error, Brier."""
    everything = np.arange(len(data.true))
    correct = data.correct[..., None]
    present = tuple(data.classes[code] for code in np.unique(data.true))

    def figure(metric: str, cells: tuple[Cell, ...], **more: object) -> Figure:
        return Figure(OVERALL, "all", metric, cells, present, **more)  # type: ignore[arg-type]  # keywords of Figure

    figures = [
        figure("balanced_accuracy", _by_class(data, everything, correct)),
        figure("accuracy", (Cell(everything, correct),)),
    ]
    if len(present) > 1:
        figures.append(figure("macro_auroc", _auroc_cells(data), kind="placements"))
    figures += _melanoma_figures(data, val, specificity)
    one_hot = np.eye(len(data.classes))[data.true][:, None, None]
    squared = ((data.probabilities - one_hot) ** 2).sum(axis=-1, keepdims=True)
    figures.append(
        figure(
            "expected_calibration_error",
            (Cell(everything, _gaps(data, bins)),),
            kind="absolute",
            higher_is_better=False,
        )
    )
    figures.append(figure("brier_score", (Cell(everything, squared),), higher_is_better=False))
    return figures


def _auroc_cells(data: Predictions) -> tuple[Cell, ...]:
    """Positives and negatives of each class that has both, with their placement values (DeLong et al. 1988)."""
    from scipy.stats import rankdata

    cells = []
    for code in np.unique(data.true):
        is_positive = data.true == code
        scores = data.probabilities[..., code]
        positives, negatives = np.flatnonzero(is_positive), np.flatnonzero(~is_positive)
        among_all = rankdata(scores, axis=0)
        # Ranks among all less ranks among one's own count the others that are below; ties count one half.
        above = (among_all[positives] - rankdata(scores[positives], axis=0)) / len(negatives)
        below = 1 - (among_all[negatives] - rankdata(scores[negatives], axis=0)) / len(positives)
        cells += [Cell(positives, above[..., None]), Cell(negatives, below[..., None])]
    return tuple(cells)


def _melanoma_figures(data: Predictions, val: Predictions | None, specificity: float) -> list[Figure]:
    if "mel" not in data.classes:
        return []
    code = data.classes.index("mel")
    sick, healthy = data.rows_of(code), np.flatnonzero(data.true != code)
    if not len(sick) or not len(healthy):
        return []
    at = f"at_{100 * specificity:g}_specificity"
    source = data if val is None else val
    if val is not None and (val.arms, val.seeds, val.classes) != (data.arms, data.seeds, data.classes):
        raise ValueError("the val predictions must be of the same arms, seeds and classes as the test predictions")
    if (source.true != code).sum() == 0:
        raise ValueError("the val predictions have only melanoma, so no threshold can be chosen on them")
    thresholds = _thresholds(source.probabilities[source.true != code][..., code], specificity)
    positive = (data.probabilities[..., code] >= thresholds).astype(np.float64)[..., None]
    if val is None:
        cells = (Cell(sick, positive[sick]),)
        return [Figure(OVERALL, "all", f"melanoma_sensitivity_on_test_roc_{at}", cells, ("mel",), "point")]
    others = tuple(name for name in data.classes if name != "mel")
    return [
        Figure(OVERALL, "all", f"melanoma_sensitivity_{at}", (Cell(sick, positive[sick]),), ("mel",)),
        Figure(
            OVERALL, "all", "melanoma_specificity_at_that_threshold", (Cell(healthy, 1 - positive[healthy]),), others
        ),
    ]


def _thresholds(negatives: Floats, specificity: float) -> Floats:
    """(arms, seeds): the least threshold below which at least that share of the negatives (n, arms, seeds) lies."""
    enough = int(np.ceil(specificity * len(negatives) - 1e-9))
    return np.nextafter(np.sort(negatives, axis=0)[enough - 1], np.inf)


def _gaps(data: Predictions, bins: int) -> Floats:
    """(images, arms, seeds, bins): confidence less correctness, by bin of confidence (Guo et al. 2017, eq. 3)."""
    confidence = data.probabilities.max(axis=-1)
    top = data.probabilities.argmax(axis=-1)
    gap = confidence - (top == data.true[:, None, None])
    which = np.clip(np.ceil(confidence * bins).astype(np.intp) - 1, 0, bins - 1)
    return gap[..., None] * (which[..., None] == np.arange(bins))
