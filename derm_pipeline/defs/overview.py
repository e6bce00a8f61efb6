"""What the command line tells of finished work: figures of a recipe, and the walk from an image to its sources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from derm_pipeline.defs.drawn import Drawn, drawn_called, drawn_copy, drawn_file
from derm_pipeline.defs.stages.generator import METADATA
from derm_pipeline.defs.stages.reports import LEADERBOARD_PAGE, REPORT, headline_axis, lineage_dict, reported
from derm_pipeline.defs.workspace import Workspace
from derm_pipeline.store import MANIFEST, Artifact, StoreError, digest_of_file, read_artifact

FORMAT = "derm_pipeline/lineage/1"


def trace(workspace: Workspace, name: str) -> dict[str, Any]:
    """The walk from an artifact, or from one synthetic image (its file or sample_id), as JSON.

    The walk from an image that `derm generate` drew begins at its generator; that from a file of several samples too,
    with no image.

    Raises:
        StoreError: nothing is called that.
    """
    artifact, row = _sample(workspace, name) or (workspace.store.resolve(name), None)
    return {"format": FORMAT, "image": row, "artifact": lineage_dict(workspace.store.lineage(artifact))}


def _sample(workspace: Workspace, name: str) -> Drawn | None:
    store, path = workspace.store, Path(name)
    if path.is_file():
        return drawn_file(store, path) or _sample_of_file(workspace, path)
    recipe, _, number = name.partition("/")
    if not number.isdigit() or recipe not in store.partitions("synthetic_dataset"):
        return drawn_called(store, workspace.data / "samples", name)
    return _row(store.current("synthetic_dataset", recipe), "sample_id", f"{recipe}/{int(number):06d}")


def _sample_of_file(workspace: Workspace, path: Path) -> Drawn:
    """A sample by its file: where it lies in a dataset, or else, wherever it was copied to, by its content."""
    folder = path.resolve().parent.parent
    if (folder / MANIFEST).is_file():
        return _row(read_artifact(folder), "file_name", f"images/{path.name}")
    digest = digest_of_file(path)
    for artifact in workspace.store.artifacts():
        if artifact.manifest.asset == "synthetic_dataset":
            for name, entry in artifact.manifest.files.items():
                if entry.sha256 == digest:
                    return _row(artifact, "file_name", name)
    found = drawn_copy(workspace.store, workspace.data / "samples", path)
    if found is None:
        raise StoreError(
            f"{path} is no image of this pipeline's store: it was changed, or its dataset is no longer there"
        )
    return found


def _row(dataset: Artifact, column: str, value: str) -> Drawn:
    if dataset.manifest.asset != "synthetic_dataset":
        raise StoreError(f"{dataset.reference} is not a synthetic dataset")
    table = dataset.table(METADATA)
    rows: list[dict[str, Any]] = table.filter(pc.equal(table[column], value)).to_pylist()
    if not rows:
        raise StoreError(f"{dataset.reference} has no image {value}; it has {table.num_rows:,}")
    return dataset, rows[0] | {"sha256": digest_of_file(dataset.path(rows[0]["file_name"]))}


def tree_lines(walk: dict[str, Any]) -> list[str]:
    """The walk as a tree; what was shown before is named again but not unfolded."""
    lines = []
    image = walk["image"]
    if image is not None:
        lines.append(f"image {image['sample_id']}  sha256 {image['sha256'][:16]}")
        shown = ("prompt", "text", "seed", "guidance", "num_steps", "solver", "generator_digest", "autoencoder_digest")
        lines += [f"  {name}: {image[name]}" for name in shown]
    seen: set[str] = set()
    _branch(walk["artifact"], "", "", lines, seen)
    return lines


def _branch(node: dict[str, Any], lead: str, role: str, lines: list[str], seen: set[str]) -> None:
    reference = node["reference"]
    again = " (above)" if reference in seen else ""
    lines.append(f"{lead}{reference}  {node['content_digest'][:16]}{_facts(node)}{again}")
    if reference in seen:
        return
    seen.add(reference)
    below = lead.replace("├─ ", "│  ").replace("└─ ", "   ")
    inputs = list(node["inputs"].items())
    for position, (name, child) in enumerate(inputs):
        joint = "└─ " if position == len(inputs) - 1 else "├─ "
        _branch(child, below + joint, name, lines, seen)


def _facts(node: dict[str, Any]) -> str:
    counts = node.get("counts", {})
    shown = ("num_samples", "num_steps", "num_images", "num_records")
    facts = [f"{name[4:]} {counts[name]:,}" for name in shown if name in counts]
    if "source_files_digest" in counts:
        facts.append(f"source files' digest {counts['source_files_digest'][:16]}")
    return f"  [{', '.join(facts)}]" if facts else ""


def summary_lines(workspace: Workspace, name: str) -> list[str]:
    """A recipe's figures, each with its n, and where its report lies."""
    store = workspace.store
    counts = {asset: artifact.counts for asset, artifact in reported(workspace, name).items()}
    judged = counts["classifiers"]
    return [
        f"{name}: {workspace.recipe(name).title}",
        f"  images     {counts['training_set']['num_images']:,} train, {counts['evaluation_set']['num_val']:,} val, "
        f"{counts['evaluation_set']['num_test']:,} test; {counts['synthetic_dataset']['num_samples']:,} samples",
        f"  agreement  {judged['agreement']['all']:.3f} of {judged['num_samples']:,} samples show the diagnosis asked "
        f"for (mean of {judged['num_seeds']} real-trained classifiers)",
        *_fidelity_lines(counts["fidelity"]),
        *_arm_lines(counts["group_metrics"]),
        f"  report     {store.current('report', name).path(REPORT)}",
        f"  all        {store.current('leaderboard').path(LEADERBOARD_PAGE)}",
    ]


def _fidelity_lines(counts: dict[str, Any]) -> list[str]:
    lines = []
    for metric in ("fd_classifier", "kid_classifier"):
        score = counts[metric]
        if score["value"] is None:
            lines.append(f"  {metric:10} refused: {score['reason']}")
        else:
            lines.append(
                f"  fidelity   {metric} {score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}], real against "
                f"real {score['floor']:.3f}, n {score['n']:,} a side"
            )
    copies = counts["copies"]
    if copies["num_copies"] is None:
        lines.append(f"  copies     no verdict: {copies['reason']}")
    else:
        verdict = "BEYOND CHANCE" if copies["beyond_chance"] else "none beyond chance"
        lines.append(
            f"  copies     {verdict}: {copies['num_copies']} of {copies['num_samples']:,} samples are flagged as near "
            f"a training image, as are {copies['held_out_rate']:.1%} of {copies['num_held_out']:,} unseen real images "
            f"(p = {copies['p_value']:.2g})"
        )
    return lines


def _arm_lines(counts: dict[str, Any]) -> list[str]:
    lines = [
        f"  balanced accuracy  {arm:15} {_with_interval(figure)}"
        for arm, figure in counts.get("balanced_accuracy", {}).items()
    ]
    axis = headline_axis(counts)
    for arm, worst in counts["worst"][axis].items() if axis else ():
        gain = counts.get("worst_gain", {}).get(axis, {}).get(arm)
        against = f"; against real {gain['value']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]" if gain else ""
        lines.append(f"  worst {axis or '':12} {arm:15} {_with_interval(worst)}, {worst['group']}{against}")
    return lines


def _with_interval(figure: dict[str, Any]) -> str:
    if figure["low"] is None:
        return f"{figure['value']:.3f}, n {figure['n']:,}"
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}], n {figure['n']:,}"
