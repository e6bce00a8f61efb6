"""The stages of a source: records, hair, captions; and the splits of all of them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from functools import partial

import cv2
import numpy as np
import pyarrow as pa

from derm_pipeline.captions.metadata import MetadataCaptionConfig, metadata_captions
from derm_pipeline.captions.visual import CAPTIONERS, visual_captions_table
from derm_pipeline.defs.stages.rowwise import OnProgress, row_wise
from derm_pipeline.defs.workspace import Workspace
from derm_pipeline.hair import HairConfig, detect_hair
from derm_pipeline.images import decode, encode_png, read_bytes
from derm_pipeline.latents import ImageFile
from derm_pipeline.records import Diagnosis, Split
from derm_pipeline.sources import scan
from derm_pipeline.splits import SplitConfig, assign_splits
from derm_pipeline.store import WHOLE, Artifact, Build, Reference, Request

RECORDS, QUARANTINED = "records.parquet", "quarantined.parquet"
HAIR = "hair.parquet"
CAPTIONS = "captions.parquet"
SPLITS = "splits.parquet"

CAPTIONER = "measured"

CODE_VERSIONS = {"records": "1", "hair": "1", "metadata_captions": "1", "visual_captions": "1", "splits": "1"}
"""Raised when a stage's result changes for the same inputs and settings; then that stage alone is made again."""


def raw_reference(workspace: Workspace, source: str) -> Reference:
    """The publisher's files as an input of the store: named by their cheap fingerprint.

    Raises:
        FileNotFoundError: they are not there.
    """
    fingerprint = workspace.sources[source].fingerprint(workspace.source_folder(source))
    return Reference(asset="raw_images", partition=source, key=fingerprint[:16], content_digest=fingerprint)


def prepare_source(workspace: Workspace, source: str, on_progress: OnProgress | None = None) -> None:
    """See that a source's files are there; a drawn source is drawn."""
    workspace.sources[source].prepare(workspace.source_folder(source), on_progress)


def records(workspace: Workspace, source: str, on_progress: OnProgress | None = None) -> Artifact:
    """One typed row an image; bad files and rows are quarantined with the reason."""
    prepare_source(workspace, source, on_progress)
    request = Request("records", source, {"raw_images": raw_reference(workspace, source)}, {}, CODE_VERSIONS["records"])

    def make(build: Build) -> None:
        previous = build.previous.table(RECORDS) if build.previous else None
        found = scan(workspace.sources[source], workspace.source_folder(source), previous, on_progress=on_progress)
        build.write_table(RECORDS, found.records)
        build.write_table(QUARANTINED, found.quarantined)
        diagnoses = Counter(found.records["diagnosis"].to_pylist())
        build.counts.update(
            num_records=found.records.num_rows,
            num_quarantined=found.quarantined.num_rows,
            num_reused=found.num_reused,
            num_lesions=len(set(found.records["lesion_id"].to_pylist()) - {None}),
            diagnoses={diagnosis.value: diagnoses[diagnosis.value] for diagnosis in Diagnosis},
            source_files_digest=_digest_of_digests(found.records["sha256"].to_pylist()),
        )

    return workspace.store.obtain(request, make)


def _digest_of_digests(digests: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def image_files(workspace: Workspace, rows: pa.Table) -> list[ImageFile]:
    """The files of rows of the records, with the digests that they must have."""
    columns = (rows[name].to_pylist() for name in ("source", "file", "sha256"))
    return [
        ImageFile(workspace.source_folder(source) / file, sha256) for source, file, sha256 in zip(*columns, strict=True)
    ]


def hair(workspace: Workspace, source: str, on_progress: OnProgress | None = None) -> Artifact:
    """Where every image shows hair, how much, and whether that counts."""
    records = workspace.store.current("records", source)
    config = HairConfig()
    request = Request(
        "hair", source, {"records": records.reference}, {"hair": config.model_dump(mode="json")}, CODE_VERSIONS["hair"]
    )

    def make(build: Build) -> None:
        rows = records.table(RECORDS)
        found = row_wise(build, HAIR, image_files(workspace, rows), partial(_hair_rows, config), on_progress)
        build.write_table(HAIR, found)
        is_hairy = found["is_hairy"].to_numpy()
        build.counts.update(
            num_images=found.num_rows,
            num_hairy=int(is_hairy.sum()),
            hairy_fraction=round(float(is_hairy.mean()), 4),
            mean_coverage=round(float(found["coverage"].to_numpy().mean()), 5),
        )

    return workspace.store.obtain(request, make)


def _hair_rows(config: HairConfig, files: Sequence[ImageFile]) -> pa.Table:
    found = [detect_hair(decode(read_bytes(file.path)), config) for file in files]
    return pa.table(
        {
            "score": pa.array([one.score for one in found], pa.float64()),
            "coverage": pa.array([one.coverage for one in found], pa.float64()),
            "is_hairy": pa.array([one.is_hairy for one in found], pa.bool_()),
            "mask_png": pa.array([encode_png(one.mask.astype(np.uint8) * 255) for one in found], pa.binary()),
        }
    )


def decode_mask(png: bytes) -> np.ndarray:
    """A mask (h, w) bool, as the hair stage stores it."""
    return np.asarray(cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_GRAYSCALE)) > 127


def metadata_captions_of(workspace: Workspace, source: str) -> Artifact:
    """A caption of every record's known fields."""
    records, hair = (workspace.store.current(asset, source) for asset in ("records", "hair"))
    config = MetadataCaptionConfig()
    request = Request(
        "metadata_captions",
        source,
        {"records": records.reference, "hair": hair.reference},
        {"captions": config.model_dump(mode="json")},
        CODE_VERSIONS["metadata_captions"],
    )

    def make(build: Build) -> None:
        rows = records.table(RECORDS)
        is_hairy = hair.table(HAIR, ["is_hairy"])["is_hairy"].to_pylist()
        texts = metadata_captions(rows.drop_columns(["concepts"]).to_pylist(), is_hairy, config)
        captions = rows.select(["source", "image_id", "sha256"]).append_column("text", pa.array(texts, pa.string()))
        build.write_table(CAPTIONS, captions)
        build.counts.update(num_captions=len(texts), num_distinct=len(set(texts)), example=texts[0])

    return workspace.store.obtain(request, make)


def visual_captions(workspace: Workspace, source: str, on_progress: OnProgress | None = None) -> Artifact:
    """A caption of what is visible in every image."""
    records, hair = (workspace.store.current(asset, source) for asset in ("records", "hair"))
    request = Request(
        "visual_captions",
        source,
        {"records": records.reference, "hair": hair.reference},
        {"captioner": CAPTIONER},
        CODE_VERSIONS["visual_captions"],
    )

    def make(build: Build) -> None:
        rows = records.table(RECORDS)
        files = image_files(workspace, rows)
        compute = partial(_caption_rows, str(hair.path(HAIR)))
        found = row_wise(build, CAPTIONS, files, compute, on_progress, added=("source", "image_id"))
        found = found.add_column(1, "image_id", rows["image_id"]).add_column(0, "source", rows["source"])
        build.write_table(CAPTIONS, found)
        texts = found["text"].to_pylist()
        build.counts.update(num_captions=len(texts), num_distinct=len(set(texts)), example=texts[0])

    return workspace.store.obtain(request, make)


def _caption_rows(hair_path: str, files: Sequence[ImageFile]) -> pa.Table:
    import pyarrow.parquet as pq

    digests = [file.sha256 for file in files]
    hair = pq.read_table(hair_path, filters=[("sha256", "in", digests)]).to_pylist()
    found = {row["sha256"]: row for row in hair}
    captions = CAPTIONERS[CAPTIONER]().describe(
        [decode(read_bytes(file.path)) for file in files],
        hair_masks=[decode_mask(found[digest]["mask_png"]) for digest in digests],
        is_hairy=[found[digest]["is_hairy"] for digest in digests],
    )
    return visual_captions_table(digests, captions, CAPTIONER).drop_columns(["image_id"])


def splits(workspace: Workspace) -> Artifact:
    """Every group of every source on one side, and on the same side as before."""
    store = workspace.store
    tables = {source: store.current("records", source) for source in store.partitions("records")}
    config = SplitConfig()
    inputs = {f"records/{source}": artifact.reference for source, artifact in tables.items()}
    request = Request("splits", WHOLE, inputs, {"splits": config.model_dump(mode="json")}, CODE_VERSIONS["splits"])

    def make(build: Build) -> None:
        rows = pa.concat_tables(artifact.table(RECORDS) for artifact in tables.values())
        previous = build.previous.table(SPLITS) if build.previous else None
        assigned = assign_splits(rows, previous, config)
        build.write_table(SPLITS, assigned)
        sizes = Counter(assigned["split"].to_pylist())
        build.counts.update({f"num_{split.value}": sizes[split.value] for split in Split})
        build.counts.update(
            num_withheld=sizes[None],
            num_groups=len(set(assigned["group_id"].to_pylist())),
            grown_from=str(build.previous.reference) if build.previous else None,
        )

    return store.obtain(request, make)
