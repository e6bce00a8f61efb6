"""The report of a recipe and the leaderboard of all: what lies in the store, put before people."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from derm_pipeline.defs.stages.data import CAPTIONS, HAIR, LABELS, QUARANTINED, RECORDS, decode_mask, image_files
from derm_pipeline.defs.stages.evaluation import CODE_VERSIONS, COPIES, FIDELITY, GROUP_TABLES, sample_images
from derm_pipeline.defs.stages.sets import EVALUATION_SET, TRAINING_SET, squares
from derm_pipeline.defs.stages.summary import loss_curve, reconstructed
from derm_pipeline.defs.stages.watching import some_grids
from derm_pipeline.defs.workspace import Workspace
from derm_pipeline.images import Pixels, decode, read_bytes, to_square
from derm_pipeline.records import Diagnosis, Split, canonical
from derm_pipeline.sources import Source
from derm_pipeline.store import WHOLE, Artifact, Build, Node, Request, StoreError

if TYPE_CHECKING:
    from derm_pipeline.evaluation.report_content import (
        AttributeAccuracy,
        CaptionExample,
        ComparisonRow,
        HairExamples,
        NearestPair,
        ReportContent,
    )
    from derm_pipeline.recipes.model import Recipe

REPORT = "report.html"
LEADERBOARD, LEADERBOARD_PAGE = "leaderboard.parquet", "leaderboard.html"

_OF_A_RECIPE = (
    "training_set",
    "evaluation_set",
    "autoencoder",
    "generator",
    "synthetic_dataset",
    "classifiers",
    "fidelity",
    "group_metrics",
)
_OF_A_SOURCE = ("records", "hair", "descriptors", "visual_captions", "metadata_captions")
_EXAMPLE_PX = 128


def report(workspace: Workspace, name: str) -> Artifact:
    """The recipe's page."""
    recipe, store = workspace.recipe(name), workspace.store
    used = {asset: store.current(asset, name) for asset in _OF_A_RECIPE}
    used |= {f"{asset}/{source}": store.current(asset, source) for asset in _OF_A_SOURCE for source in recipe.sources}
    inputs = {role: artifact.reference for role, artifact in used.items()}
    request = Request("report", name, inputs, {"recipe": recipe.model_dump(mode="json")}, CODE_VERSIONS["report"])

    def make(build: Build) -> None:
        from derm_pipeline.evaluation.report import render_report

        page = render_report(_content(workspace, recipe, used))
        build.write_bytes(REPORT, page.encode())
        build.counts["num_bytes"] = len(page.encode())

    return store.obtain(request, make)


def _content(workspace: Workspace, recipe: Recipe, used: dict[str, Artifact]) -> ReportContent:
    from derm_pipeline.evaluation.report_content import Reconstructions, ReportContent, SampleGrid

    train, held_out = used["training_set"].table(TRAINING_SET), used["evaluation_set"].table(EVALUATION_SET)
    test = _test_rows(held_out)
    metadata, samples = sample_images(used["synthetic_dataset"])
    fidelity, judged = used["fidelity"], used["classifiers"].counts
    images, rebuilt = reconstructed(workspace, recipe.name, test, 14)
    tables = {
        name: used["group_metrics"].table(f"{name}.parquet").to_pandas()
        for name in GROUP_TABLES
        if f"{name}.parquet" in used["group_metrics"].manifest.files
    }
    synthetic_counts = used["synthetic_dataset"].counts
    return ReportContent(
        recipe=recipe.name,
        title=recipe.title,
        size_px=recipe.latents.size_px,
        sources=[_source_facts(workspace.sources[source], used[f"records/{source}"]) for source in recipe.sources],
        quarantined=[
            row for source in recipe.sources for row in used[f"records/{source}"].table(QUARANTINED).to_pylist()
        ],
        labels=[
            {"source": workspace.sources[source].title, **row}
            for source in recipe.sources
            for row in used[f"records/{source}"].table(LABELS).to_pylist()
        ],
        split_counts=_split_counts(train, held_out),
        left_out_of_training=used["training_set"].counts["left_out"],
        joined=used["training_set"].counts["joined"],
        hair=_hair_examples(workspace, recipe, used),
        captions=_caption_examples(workspace, train, recipe, used),
        caption_verdicts=_verdicts(recipe, used),
        caption_accuracy=_caption_accuracy(recipe, used),
        reconstructions=Reconstructions(
            images, rebuilt, fidelity.counts["reconstruction_psnr_db"], fidelity.counts["num_test"]
        ),
        comparison=comparison(workspace, recipe, train, metadata, samples),
        losses={asset: loss_curve(used[asset]) for asset in ("autoencoder", "generator")},
        grids=[SampleGrid(step, image) for step, image in some_grids(used["generator"]).items()],
        grid_rows=[diagnosis.value for diagnosis in canonical(train["diagnosis"].to_pylist())],
        agreement=judged["agreement"],
        num_samples={"all": synthetic_counts["num_samples"], **synthetic_counts["diagnoses"]},
        num_unseen=synthetic_counts["num_in_cells_without_a_training_image"],
        num_agreement_seeds=judged["num_seeds"],
        fidelity=fidelity.table(FIDELITY).to_pandas(),
        copies=fidelity.counts["copies"],
        nearest_pairs=_nearest_pairs(workspace, recipe, used, train, samples),
        min_group_size=recipe.group_metrics.min_group_size,
        confidence=recipe.group_metrics.confidence,
        lineage=lineage_of_contents(workspace.store.lineage(used["group_metrics"])),
        settings=recipe.model_dump(mode="json"),
        libraries=used["generator"].manifest.libraries,
        **tables,
    )


def _test_rows(held_out: pa.Table) -> pa.Table:
    return held_out.filter(pa.array([split == Split.TEST.value for split in held_out["split"].to_pylist()]))


def _source_facts(source: Source, records: Artifact) -> dict[str, Any]:
    names = ("num_records", "num_quarantined", "num_lesions", "diagnoses")
    return {"name": source.title, "licence": source.licence} | {name: records.counts[name] for name in names}


def _split_counts(train: pa.Table, held_out: pa.Table) -> dict[str, dict[str, int]]:
    diagnoses: dict[str, list[str]] = {split.value: [] for split in Split}
    diagnoses[Split.TRAIN.value] = train["diagnosis"].to_pylist()
    for split, diagnosis in zip(held_out["split"].to_pylist(), held_out["diagnosis"].to_pylist(), strict=True):
        diagnoses[split].append(diagnosis)
    return {
        split: {diagnosis.value: values.count(diagnosis.value) for diagnosis in canonical(diagnoses["train"])}
        for split, values in diagnoses.items()
    }


def _evenly(rows: pa.Table, count: int) -> pa.Table:
    return rows.take(np.linspace(0, rows.num_rows - 1, min(count, rows.num_rows)).round().astype(int))


def _hair_examples(workspace: Workspace, recipe: Recipe, used: dict[str, Artifact]) -> HairExamples:
    from derm_pipeline.evaluation.report_content import HairExamples

    source = recipe.sources[0]
    records, hair = used[f"records/{source}"].table(RECORDS), used[f"hair/{source}"].table(HAIR)
    is_hairy = hair["is_hairy"].to_numpy()
    chosen = _evenly(records.filter(pa.array(is_hairy)) if is_hairy.any() else records, 7)
    masks = dict(zip(hair["sha256"].to_pylist(), hair["mask_png"].to_pylist(), strict=True))
    images, overlaid = [], []
    for file in image_files(workspace, chosen):
        image = decode(read_bytes(file.path))
        marked = image.copy()
        marked[decode_mask(masks[file.sha256])] = (0, 255, 0)
        images.append(to_square(image, _EXAMPLE_PX))
        overlaid.append(to_square(marked, _EXAMPLE_PX))
    return HairExamples(np.stack(images), np.stack(overlaid), float(is_hairy.mean()), len(is_hairy))


def _caption_examples(
    workspace: Workspace, train: pa.Table, recipe: Recipe, used: dict[str, Artifact]
) -> list[CaptionExample]:
    from derm_pipeline.evaluation.report_content import CaptionExample

    texts: dict[str, dict[tuple[str, str], str]] = {}
    style = recipe.training_set.caption
    columns = {"metadata_captions": "rich" if style == "visual" else style, "visual_captions": "text"}
    for asset, column in columns.items():
        for source in recipe.sources:
            table = used[f"{asset}/{source}"].table(CAPTIONS, ["image_id", column])
            for image_id, text in zip(table["image_id"].to_pylist(), table[column].to_pylist(), strict=True):
                texts.setdefault(asset, {})[source, image_id] = text
    examples = []
    for diagnosis in canonical(train["diagnosis"].to_pylist()):
        rows = train.filter(pa.array([value == diagnosis.value for value in train["diagnosis"].to_pylist()]))
        for row, file in zip(_evenly(rows, 1).to_pylist(), image_files(workspace, _evenly(rows, 1)), strict=True):
            identity = row["source"], row["image_id"]
            image = to_square(decode(read_bytes(file.path)), _EXAMPLE_PX)
            said = (texts[asset].get(identity) for asset in ("metadata_captions", "visual_captions"))
            examples.append(CaptionExample(image, *said))
    return examples


def _verdicts(recipe: Recipe, used: dict[str, Artifact]) -> dict[str, int]:
    verdicts: Counter[str] = Counter()
    for source in recipe.sources:
        verdicts.update(used[f"visual_captions/{source}"].counts["verdicts"])
    return dict(sorted(verdicts.items()))


def _caption_accuracy(recipe: Recipe, used: dict[str, Artifact]) -> list[AttributeAccuracy]:
    """Of the descriptor's words, over the drawn images of the recipe; none where no truth is known."""
    from derm_pipeline.captions.accuracy import descriptor_accuracy
    from derm_pipeline.evaluation.report_content import AttributeAccuracy

    if "phantom" not in recipe.sources:
        return []
    captions = used["visual_captions/phantom"].table(CAPTIONS)
    found = descriptor_accuracy(used["records/phantom"].table(RECORDS), captions)
    names = AttributeAccuracy.__dataclass_fields__
    return [AttributeAccuracy(**{name: row[name] for name in names}) for row in found.to_pylist()]


def comparison(
    workspace: Workspace, recipe: Recipe, train: pa.Table, metadata: pa.Table, samples: Pixels, count: int = 6
) -> list[ComparisonRow]:
    """Of each diagnosis some real images and samples, light to dark skin where that is known."""
    from derm_pipeline.evaluation.report_content import ComparisonRow

    rows = []
    for diagnosis in canonical(train["diagnosis"].to_pylist()):
        real = _evenly(_of(train, diagnosis), count)
        chosen = _evenly(_of(metadata.append_column("place", pa.array(range(len(samples)))), diagnosis), count)
        if real.num_rows and chosen.num_rows:
            rows.append(
                ComparisonRow(
                    diagnosis.value,
                    squares(workspace, recipe, real),
                    [_skin(value) for value in real["skin_type"].to_pylist()],
                    samples[chosen["place"].to_numpy()],
                    [_skin(value) for value in chosen["skin_type"].to_pylist()],
                )
            )
    return rows


def _of(table: pa.Table, diagnosis: Diagnosis) -> pa.Table:
    found = table.filter(pa.array([value == diagnosis.value for value in table["diagnosis"].to_pylist()], pa.bool_()))
    return found.sort_by("skin_type") if found.num_rows else found


def _skin(skin_type: int | None) -> str:
    return f"skin type {skin_type}" if skin_type else ""


def _nearest_pairs(
    workspace: Workspace,
    recipe: Recipe,
    used: dict[str, Artifact],
    train: pa.Table,
    samples: Pixels,
    count: int = 12,
) -> list[NearestPair]:
    """The samples that are nearest to a training image, beside it: what a person should look at."""
    from derm_pipeline.evaluation.report_content import NearestPair

    table = used["fidelity"].table(COPIES).to_pandas().reset_index(drop=True)
    if "is_copy" not in table:  # too few held-out images for a verdict
        table["is_copy"] = False
    table = table.sort_values(["is_copy", "pixel_correlation"], ascending=False, kind="stable").head(count)
    nearest = squares(workspace, recipe, train.take(pa.array(table.pixel_nearest.to_numpy())))
    return [
        NearestPair(
            samples[place],
            nearest[position],
            row.pixel_correlation,
            row.sample_id,
            row.nearest_image_id,
            bool(row.is_copy),
        )
        for position, (place, row) in enumerate(table.iterrows())
    ]


def reported(workspace: Workspace, name: str) -> dict[str, Artifact]:
    """The artifacts that the recipe's current report shows: they belong together, which the current ones need not.

    Raises:
        StoreError: there is no report, or what it shows is no longer in the store.
    """
    report = workspace.store.current("report", name)
    found = {asset: workspace.store.get(report.manifest.inputs[asset]) for asset in _OF_A_RECIPE}
    gone = [asset for asset, artifact in found.items() if artifact is None]
    if gone:
        raise StoreError(f"the report of {name} shows a {gone[0]} that is no longer in the store: run {name} again")
    return {asset: artifact for asset, artifact in found.items() if artifact is not None}


def leaderboard(workspace: Workspace) -> Artifact:
    """All recipes that have a report, side by side."""
    store = workspace.store
    names = [name for name in store.partitions("report") if name in workspace.recipe_files]
    assets = ("evaluation_set", "synthetic_dataset", "classifiers", "fidelity", "group_metrics")
    used = {name: reported(workspace, name) for name in names}
    inputs = {f"{asset}/{name}": found[asset].reference for name, found in used.items() for asset in assets}
    titles = {name: workspace.recipe(name).title for name in names}
    sources = {name: list(workspace.recipe(name).sources) for name in names}
    settings = {"titles": titles, "sources": sources}
    request = Request("leaderboard", WHOLE, inputs, settings, CODE_VERSIONS["leaderboard"])

    def make(build: Build) -> None:
        from derm_pipeline.evaluation.leaderboard import render_leaderboard

        rows = [_leaderboard_row(name, titles[name], sources[name], used[name]) for name in names]
        build.write_bytes(LEADERBOARD_PAGE, render_leaderboard(rows).encode())
        build.write_table(LEADERBOARD, pa.Table.from_pylist([_short_row(row) for row in rows]))
        build.counts["num_recipes"] = len(rows)

    return store.obtain(request, make)


def headline_axis(groups: dict[str, Any]) -> str | None:
    """The axis whose worst group stands for a recipe, given the counts of its group_metrics."""
    from derm_pipeline.evaluation.report_headline import HEADLINE_AXES

    return next((axis for axis in HEADLINE_AXES if axis in groups.get("worst", {})), None)


def _leaderboard_row(name: str, title: str, sources: list[str], used: dict[str, Artifact]) -> dict[str, Any]:
    groups, judged, fidelity = (used[asset].counts for asset in ("group_metrics", "classifiers", "fidelity"))
    axis = headline_axis(groups)
    gain = groups.get("worst_gain", {}).get(axis, {}).get("real+synthetic")
    return {
        "recipe": name,
        "title": title,
        "sources": sources,
        "num_samples": used["synthetic_dataset"].counts["num_samples"],
        "num_test": used["evaluation_set"].counts["num_test"],
        "agreement": judged["agreement"]["all"],
        "fidelity": {metric: fidelity[metric] for metric in ("fd_classifier", "kid_classifier")},
        "copies": fidelity["copies"],
        "balanced_accuracy": groups.get("balanced_accuracy", {}),
        "worst": groups["worst"][axis] if axis else {},
        "gain": {"axis": axis, **gain} if gain else None,
    }


def _short_row(row: dict[str, Any]) -> dict[str, Any]:
    """One flat row of the leaderboard's table."""
    short = {name: row[name] for name in ("recipe", "num_samples", "num_test", "agreement")}
    for metric, score in row["fidelity"].items():
        short |= {metric: score["value"], f"{metric}_floor": score["floor"]}
    short["num_copies"] = row["copies"]["num_copies"]
    for arm, figure in row["balanced_accuracy"].items():
        short[f"balanced_accuracy/{arm}"] = figure["value"]
    for arm, figure in row["worst"].items():
        short[f"worst_group/{arm}"] = figure["value"]
    return short


def lineage_dict(node: Node) -> dict[str, Any]:
    """A lineage walk as JSON."""
    manifest = node.manifest
    found: dict[str, Any] = {
        "reference": str(node.reference),
        "asset": node.reference.asset,
        "partition": node.reference.partition,
        "key": node.reference.key,
        "content_digest": node.reference.content_digest,
        "inputs": {role: lineage_dict(below) for role, below in sorted(node.inputs.items())},
    }
    if manifest is not None:
        found |= {"code_version": manifest.code_version, "settings": manifest.settings, "counts": manifest.counts}
    return found


def lineage_of_contents(node: Node) -> dict[str, Any]:
    """A lineage walk that depends on contents only: not on file times (keys, raw_images) or on interruptions (counts).

    That is what a report shows, so that the same contents give the same page.
    """
    below = {role: child for role, child in sorted(node.inputs.items()) if child.reference.asset != "raw_images"}
    return {
        "reference": f"{node.reference.asset}/{node.reference.partition}",
        "content_digest": node.reference.content_digest,
        "inputs": {role: lineage_of_contents(child) for role, child in below.items()},
    }
