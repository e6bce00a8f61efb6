"""The stages that judge a recipe: classifiers, fidelity and copies, groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from derm_pipeline.defs.stages.generator import METADATA
from derm_pipeline.defs.stages.sets import EVALUATION_SET, TRAINING_SET, pixel_inputs, squares
from derm_pipeline.defs.workspace import Workspace
from derm_pipeline.records import Split, canonical
from derm_pipeline.store import Artifact, Build, Request

if TYPE_CHECKING:
    import pandas as pd

    from derm_pipeline.evaluation.classifiers import Prediction, SmallResNet
    from derm_pipeline.images import Pixels
    from derm_pipeline.recipes.model import Recipe

PREDICTIONS, SAMPLE_PREDICTIONS = "predictions.parquet", "sample_predictions.parquet"
FEATURES = "features.safetensors"
FIDELITY, COPIES = "fidelity.parquet", "copies.parquet"
GROUP_TABLES = ("overall", "groups", "worst", "gains", "left_out")

EXTRACTOR = "classifier"
"""The name of the features in the metrics' names: those of the first classifier of the real arm."""

CODE_VERSIONS = {"classifiers": "1", "fidelity": "1", "group_metrics": "1", "report": "2", "leaderboard": "1"}
"""Raised when a stage's result changes for the same inputs and settings; then that stage alone is made again."""

OnProgress = Callable[[int, int, str], None]


def sample_images(dataset: Artifact) -> tuple[pa.Table, Pixels]:
    """A synthetic dataset's metadata, and its images (n, h, w, 3) in the same order."""
    from derm_pipeline.images import read_image

    metadata = dataset.table(METADATA)
    return metadata, np.stack([read_image(dataset.path(name)) for name in metadata["file_name"].to_pylist()])


def class_indices(table: pa.Table, classes: Sequence[str]) -> np.ndarray:
    """The diagnoses of a table as class indices (n,)."""
    place = {diagnosis: index for index, diagnosis in enumerate(classes)}
    return np.array([place[value] for value in table["diagnosis"].to_pylist()], dtype=np.int64)


def classifiers(workspace: Workspace, name: str, on_progress: OnProgress | None = None) -> Artifact:
    """Every arm's classifiers, their predictions of held-out images, and the real ones' of the samples."""
    recipe, store = workspace.recipe(name), workspace.store
    used = {asset: store.current(asset, name) for asset in ("training_set", "evaluation_set", "synthetic_dataset")}
    inputs = {asset: artifact.reference for asset, artifact in used.items()} | pixel_inputs(workspace, recipe)
    settings = {
        "classifiers": recipe.classifiers.model_dump(mode="json"),
        "pixels": {"size_px": recipe.latents.size_px, "geometry": recipe.latents.geometry},
        "remove_hair": recipe.training_set.remove_hair,
    }
    request = Request("classifiers", name, inputs, settings, CODE_VERSIONS["classifiers"])

    def make(build: Build) -> None:
        from safetensors.numpy import save_file

        from derm_pipeline.evaluation.classifiers import LabelledImages, predict, train_arms
        from derm_pipeline.store import replacing

        train, held_out = used["training_set"].table(TRAINING_SET), used["evaluation_set"].table(EVALUATION_SET)
        classes = canonical(train["diagnosis"].to_pylist())
        metadata, samples = sample_images(used["synthetic_dataset"])
        real = LabelledImages(squares(workspace, recipe, train), class_indices(train, classes), len(classes))
        held_out_images = squares(workspace, recipe, held_out)
        models = train_arms(
            real,
            LabelledImages(samples, class_indices(metadata, classes), len(classes)),
            recipe.classifiers,
            out=build.path("weights/-").parent,
            work=build.work,
            on_progress=on_progress,
        )
        found = {which: predict(model, held_out_images) for which, model in models.items()}
        build.write_table(PREDICTIONS, _predictions_table(held_out, found, classes))
        judged = {seed: predict(model, samples) for (arm, seed), model in models.items() if arm == "real"}
        build.write_table(SAMPLE_PREDICTIONS, _sample_table(metadata, judged, classes))
        extractor = models["real", 0]
        features = {
            "train": predict(extractor, real.images).features[:, None],
            "held_out": _oriented_features(extractor, held_out_images),
            "synthetic": _oriented_features(extractor, samples),
        }
        with replacing(build.path(FEATURES)) as aside:
            save_file(features, aside)
        build.counts.update(_classifier_figures(held_out, found, metadata, judged, classes))

    return store.obtain(request, make)


def _oriented_features(model: SmallResNet, images: Pixels) -> np.ndarray:
    """(n, 8, d): of the images as they are, then turned and mirrored, since a copy may be either."""
    from derm_pipeline.evaluation.classifiers import predict

    turned = [np.rot90(images, k, axes=(1, 2)) for k in range(4)]
    turned += [batch[:, :, ::-1] for batch in turned]
    return np.stack([predict(model, np.ascontiguousarray(batch)).features for batch in turned], axis=1)


def _predictions_table(
    held_out: pa.Table, found: dict[tuple[str, int], Prediction], classes: Sequence[str]
) -> pa.Table:
    from derm_pipeline.evaluation.demographics import demographics

    facts = pa.Table.from_pandas(demographics(held_out), preserve_index=False)
    facts = facts.append_column("split", held_out["split"].combine_chunks())
    parts = []
    for (arm, seed), prediction in found.items():
        part = facts.append_column("arm", pa.array([arm] * facts.num_rows))
        part = part.append_column("seed", pa.array([seed] * facts.num_rows, pa.int32()))
        parts.append(_with_prediction(part, prediction, classes))
    return pa.concat_tables(parts)


def _sample_table(metadata: pa.Table, judged: dict[int, Prediction], classes: Sequence[str]) -> pa.Table:
    facts = metadata.select(["sample_id", "diagnosis", "skin_type"])
    parts = [
        _with_prediction(
            facts.append_column("seed", pa.array([seed] * facts.num_rows, pa.int32())), prediction, classes
        )
        for seed, prediction in judged.items()
    ]
    return pa.concat_tables(parts)


def _with_prediction(table: pa.Table, prediction: Prediction, classes: Sequence[str]) -> pa.Table:
    predicted = [classes[index] for index in prediction.probabilities.argmax(1)]
    table = table.append_column("predicted", pa.array(predicted, pa.string()))
    for index, code in enumerate(classes):
        table = table.append_column(f"p_{code}", pa.array(prediction.probabilities[:, index], pa.float32()))
    return table


def _classifier_figures(
    held_out: pa.Table,
    found: dict[tuple[str, int], Prediction],
    metadata: pa.Table,
    judged: dict[int, Prediction],
    classes: Sequence[str],
) -> dict[str, Any]:
    from derm_pipeline.evaluation.classifiers import agreement, balanced_accuracy

    is_test = np.array(held_out["split"].to_pylist()) == Split.TEST.value
    truth, asked = class_indices(held_out, classes)[is_test], class_indices(metadata, classes)
    by_arm: dict[str, list[float]] = {}
    for (arm, _), prediction in found.items():
        predicted = prediction.probabilities.argmax(1)[is_test]
        by_arm.setdefault(arm, []).append(balanced_accuracy(truth, predicted))
    agreements = [agreement(prediction, asked, classes) for prediction in judged.values()]
    return {
        "num_test": int(is_test.sum()),
        "num_seeds": len(judged),
        "balanced_accuracy": {arm: round(float(np.mean(values)), 4) for arm, values in by_arm.items()},
        "agreement": {key: round(float(np.mean([one[key] for one in agreements])), 4) for key in agreements[0]},
        "num_samples": metadata.num_rows,
    }


def fidelity(workspace: Workspace, name: str, on_progress: Callable[[int, int], None] | None = None) -> Artifact:
    """How near the samples come to held-out real images, beside the real-against-real floor; and copies."""
    recipe, store = workspace.recipe(name), workspace.store
    assets = ("training_set", "evaluation_set", "synthetic_dataset", "classifiers", "autoencoder")
    used = {asset: store.current(asset, name) for asset in assets}
    inputs = {asset: artifact.reference for asset, artifact in used.items()} | pixel_inputs(workspace, recipe)
    settings = {
        "fidelity": recipe.fidelity.model_dump(mode="json"),
        "copies": recipe.copies.model_dump(mode="json"),
        "pixels": {"size_px": recipe.latents.size_px, "geometry": recipe.latents.geometry},
        "remove_hair": recipe.training_set.remove_hair,
    }
    request = Request("fidelity", name, inputs, settings, CODE_VERSIONS["fidelity"])

    def make(build: Build) -> None:
        _make_fidelity(workspace, recipe, used, build, on_progress)

    return store.obtain(request, make)


def _make_fidelity(
    workspace: Workspace,
    recipe: Recipe,
    used: dict[str, Artifact],
    build: Build,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    from safetensors.numpy import load_file

    from derm_pipeline.evaluation.demographics import demographics
    from derm_pipeline.evaluation.fidelity import FeatureSet, compare, fidelity_table
    from derm_pipeline.evaluation.memorisation import ImageSet, find_copies

    train, held_out = used["training_set"].table(TRAINING_SET), used["evaluation_set"].table(EVALUATION_SET)
    metadata, samples = sample_images(used["synthetic_dataset"])
    features = load_file(used["classifiers"].path(FEATURES))
    is_test = np.array(held_out["split"].to_pylist()) == Split.TEST.value
    test = held_out.filter(pa.array(is_test))
    lesions = {"train": demographics(train).lesion_id.tolist(), "test": demographics(test).lesion_id.tolist()}
    test_features = features["held_out"][is_test]
    scores = fidelity_table(
        compare(
            FeatureSet(features["synthetic"][:, 0], metadata["diagnosis"].to_pylist()),
            FeatureSet(test_features[:, 0], test["diagnosis"].to_pylist(), lesions["test"]),
            EXTRACTOR,
            recipe.fidelity,
            on_progress,
        )
    )
    build.write_table(FIDELITY, figures_table(scores))
    test_images = squares(workspace, recipe, test)
    copies = find_copies(
        ImageSet(samples, features["synthetic"]),
        ImageSet(squares(workspace, recipe, train), features["train"], lesions["train"]),
        ImageSet(test_images, test_features, lesions["test"]),
        recipe.copies,
    )
    table = copies.table.assign(
        sample_id=metadata["sample_id"].to_pylist(),
        nearest_source=train["source"].take(pa.array(copies.table.pixel_nearest)).to_pylist(),
        nearest_image_id=train["image_id"].take(pa.array(copies.table.pixel_nearest)).to_pylist(),
    )
    build.write_table(COPIES, figures_table(table))
    overall = scores[scores.group == "all"].set_index("metric")
    build.counts.update(
        {
            metric: {key: _figure(overall.loc[metric, key]) for key in ("value", "low", "high", "floor", "n", "reason")}
            for metric in overall.index
        }
    )
    build.counts["copies"] = {
        "num_copies": copies.copies,
        "num_samples": copies.n,
        "num_train": copies.n_train,
        "num_held_out": copies.n_held_out,
        "copy_rate": _figure(copies.copy_rate),
        "held_out_rate": _figure(copies.held_out_rate),
        "p_value": _figure(copies.p_value),
        "beyond_chance": copies.beyond_chance,
        "reason": copies.reason,
    }
    build.counts["reconstruction_psnr_db"] = _reconstruction_psnr_db(used["autoencoder"], test_images)
    build.counts["num_test"] = test.num_rows


def figures_table(frame: pd.DataFrame) -> pa.Table:
    """A table whose figures have ten significant digits, and are zero where they are nearer to it than 1e-12.

    Sums of floats differ in their last digits from run to run, with where the arrays happen to lie in memory; what is
    the same but for that must be the same artifact.
    """
    table = pa.Table.from_pandas(frame, preserve_index=False)
    for place, field in enumerate(table.schema):
        if pa.types.is_floating(field.type):
            values = [_ten_digits(value) for value in table[field.name].to_pylist()]
            table = table.set_column(place, field.name, pa.array(values, pa.float64()))
    return table.replace_schema_metadata(None)


def _ten_digits(value: float | None) -> float | None:
    if value is None or abs(value) < 1e-12:
        return None if value is None else 0.0
    return float(f"{value:.10g}")


def _reconstruction_psnr_db(autoencoder: Artifact, images: Pixels) -> float:
    import torch

    from derm_pipeline.latents import to_model_range
    from derm_pipeline.models.generator import load_autoencoder
    from derm_pipeline.models.runtime import pick_device
    from derm_pipeline.training.objectives import psnr_db, reconstruct

    batch = to_model_range(torch.from_numpy(images))
    return round(psnr_db(reconstruct(load_autoencoder(autoencoder.directory, pick_device()), batch), batch), 2)


def _figure(value: Any) -> Any:
    """A table's value as JSON: rounded, and None where there is none."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return None
    if isinstance(value, str):
        return value
    return round(float(value), 5) if isinstance(value, float | np.floating) else int(value)


def group_metrics(workspace: Workspace, name: str) -> Artifact:
    """Per-group and worst-group figures of every arm on the test split, and each arm's gain over real data alone."""
    recipe, store = workspace.recipe(name), workspace.store
    predictions = store.current("classifiers", name)
    settings = {"group_metrics": recipe.group_metrics.model_dump(mode="json")}
    request = Request(
        "group_metrics", name, {"classifiers": predictions.reference}, settings, CODE_VERSIONS["group_metrics"]
    )

    def make(build: Build) -> None:
        from derm_pipeline.evaluation.groups import group_metrics as compute

        table = predictions.table(PREDICTIONS).to_pandas()
        found = compute(
            table[table.split == Split.TEST.value].drop(columns="split"),
            recipe.group_metrics,
            val=table[table.split == Split.VAL.value].drop(columns="split"),
        )
        for part in GROUP_TABLES:
            frame: pd.DataFrame | None = getattr(found, part)
            if frame is not None:
                figures = figures_table(frame)
                build.write_table(f"{part}.parquet", figures)
                build.write_bytes(f"{part}.csv", figures.to_pandas().to_csv(index=False).encode())
        build.counts.update(_group_figures(found))

    return store.obtain(request, make)


def _group_figures(found: Any) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    overall = found.overall
    for row in overall[overall.metric == "balanced_accuracy"].itertuples():
        figures.setdefault("balanced_accuracy", {})[row.arm] = _interval(row.value, row.low, row.high, row.n)
    for row in found.worst.itertuples():
        worst = {"group": row.group, "axis": row.axis} | _interval(row.group_min, row.low, row.high, row.n)
        figures.setdefault("worst", {}).setdefault(row.axis, {})[row.arm] = worst
    if found.gains is not None:
        for row in found.gains[found.gains.group == "worst"].itertuples():
            gain = _interval(row.gain, row.low, row.high, row.n)
            figures.setdefault("worst_gain", {}).setdefault(row.axis, {})[row.arm] = gain
    return figures


def _interval(value: float, low: float, high: float, n: int) -> dict[str, Any]:
    return {"value": _figure(value), "low": _figure(low), "high": _figure(high), "n": int(n)}
