"""The stages of a source: records, hair, captions; and the splits of all of them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from functools import partial

import cv2
import numpy as np
import pyarrow as pa

from derm_pipeline.captions.descriptors import measure
from derm_pipeline.captions.metadata import caption_styles, num_without_own
from derm_pipeline.captions.segmentation import see
from derm_pipeline.captions.symptoms import ImageToCaption, LlavaNextConfig, OpenAiConfig
from derm_pipeline.captions.visual import (
    VISUAL_CAPTION_SCHEMA,
    DescriptorConfig,
    described_table,
    descriptors_table,
    measurements_of,
    sentence,
)
from derm_pipeline.defs.stages.rowwise import OnProgress, row_wise
from derm_pipeline.defs.workspace import Workspace
from derm_pipeline.duplicates import in_two_splits, join_counts, near_duplicates, shared_images
from derm_pipeline.hair import HairConfig, detect_hair
from derm_pipeline.images import decode, encode_png, read_bytes
from derm_pipeline.latents import ImageFile
from derm_pipeline.records import Modality, Split, canonical
from derm_pipeline.sources import scan
from derm_pipeline.splits import SplitConfig, assign_splits, gone_rows
from derm_pipeline.store import WHOLE, Artifact, Build, Reference, Request, StoreError

RECORDS, QUARANTINED = "records.parquet", "quarantined.parquet"
STATISTICS, LABELS, NEAR_DUPLICATES = "statistics.parquet", "labels.parquet", "near_duplicates.parquet"
HAIR = "hair.parquet"
DESCRIPTORS, CAPTIONS = "descriptors.parquet", "captions.parquet"
SPLITS, GONE, SHARED = "splits.parquet", "gone.parquet", "shared_images.parquet"

CODE_VERSIONS = {
    "records": "3",
    "hair": "1",
    "descriptors": "2",
    "visual_captions": "3",
    "metadata_captions": "3",
    "splits": "3",
}
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
        previous = build.previous.table(STATISTICS) if build.previous else None
        found = scan(workspace.sources[source], workspace.source_folder(source), previous, on_progress=on_progress)
        near = near_duplicates(found.statistics)
        build.write_table(RECORDS, found.records)
        build.write_table(QUARANTINED, found.quarantined)
        build.write_table(STATISTICS, found.statistics)
        build.write_table(LABELS, _labels(found.records))
        build.write_table(NEAR_DUPLICATES, near.pairs)
        diagnoses = Counter(found.records["diagnosis"].to_pylist())
        num_duplicates = found.records.num_rows - found.records["duplicate_of"].null_count
        build.counts.update(
            num_records=found.records.num_rows,
            num_quarantined=found.quarantined.num_rows,
            num_processed=found.num_processed,
            num_reused=found.num_reused,
            num_lesions=len(set(found.records["lesion_id"].to_pylist()) - {None}),
            num_duplicates=num_duplicates,
            num_near_duplicates=sum(near.num_pairs.values()),
            num_alike_by_hash_only=near.num_told_apart,
            num_without_diagnosis=diagnoses[None],
            diagnoses={diagnosis.value: diagnoses[diagnosis.value] for diagnosis in canonical(diagnoses)},
            source_files_digest=_digest_of_digests(found.records["sha256"].to_pylist()),
        )

    return workspace.store.obtain(request, make)


def _labels(records: pa.Table) -> pa.Table:
    """How each of the source's own labels was understood: source_label, diagnosis, num_images; the frequent first."""
    pairs = zip(records["source_label"].to_pylist(), records["diagnosis"].to_pylist(), strict=True)
    counts = sorted(Counter(pairs).items(), key=lambda item: (-item[1], item[0][0], item[0][1] or ""))
    return pa.table(
        {
            "source_label": pa.array([label for (label, _), _ in counts], pa.string()),
            "diagnosis": pa.array([diagnosis for (_, diagnosis), _ in counts], pa.string()),
            "num_images": pa.array([count for _, count in counts], pa.int64()),
        }
    )


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


def descriptors(workspace: Workspace, source: str, on_progress: OnProgress | None = None) -> Artifact:
    """What can be measured in every image: the lesion's shape, colours and structures, the skin's colour."""
    used = current_of(workspace, source, ["hair"])
    records, hair = used["records"], used["hair"]
    inputs = {asset: artifact.reference for asset, artifact in used.items()}
    request = Request("descriptors", source, inputs, {}, CODE_VERSIONS["descriptors"])

    def make(build: Build) -> None:
        rows = records.table(RECORDS)
        compute = partial(_measured_rows, str(hair.path(HAIR)))
        found = row_wise(build, DESCRIPTORS, image_files(workspace, rows), compute, on_progress)
        build.write_table(DESCRIPTORS, found)
        has_lesion = found["has_lesion"].to_numpy(zero_copy_only=False)
        build.counts.update(num_images=found.num_rows, num_without_lesion=int((~has_lesion).sum()))

    return workspace.store.obtain(request, make)


def current_of(workspace: Workspace, source: str, assets: Sequence[str]) -> dict[str, Artifact]:
    """The current artifacts of a source's assets, made from one and the same records, row for row.

    Raises:
        StoreError: one is not made yet, or was made from other records than the current ones.
    """
    used = {asset: workspace.store.current(asset, source) for asset in ("records", *assets)}
    digest = used["records"].reference.content_digest
    for asset in assets:
        if used[asset].manifest.inputs["records"].content_digest != digest:
            raise StoreError(
                f"{asset}/{source} was made from other records than the current ones: materialise it again"
            )
    return used


def _measured_rows(hair_path: str, files: Sequence[ImageFile]) -> pa.Table:
    import pyarrow.parquet as pq

    digests = [file.sha256 for file in files]
    masks = pq.read_table(hair_path, columns=["sha256", "mask_png"], filters=[("sha256", "in", digests)])
    of_digest = dict(zip(masks["sha256"].to_pylist(), masks["mask_png"].to_pylist(), strict=True))
    return descriptors_table(
        [measure(see(decode(read_bytes(file.path)), decode_mask(of_digest[file.sha256]))) for file in files]
    )


def visual_captions(workspace: Workspace, source: str, on_progress: OnProgress | None = None) -> Artifact:
    """A caption of what is visible in every image, by the captioner that the workspace names."""
    used = current_of(workspace, source, ["hair", "descriptors"])
    inputs = {asset: artifact.reference for asset, artifact in used.items()}
    config = workspace.captioner
    settings = {"captioner": config.identity()}
    request = Request("visual_captions", source, inputs, settings, CODE_VERSIONS["visual_captions"])

    def make(build: Build) -> None:
        rows = used["records"].table(RECORDS)
        is_hairy = used["hair"].table(HAIR, ["is_hairy"])["is_hairy"].to_pylist()
        measured = measurements_of(used["descriptors"].table(DESCRIPTORS))
        words = config if isinstance(config, DescriptorConfig) else DescriptorConfig()
        modalities = [Modality(modality) for modality in rows["modality"].to_pylist()]
        sentences = [
            sentence(one, hairy, words, modality)
            for one, hairy, modality in zip(measured, is_hairy, modalities, strict=True)
        ]
        if isinstance(config, DescriptorConfig):
            found = described_table(rows["sha256"].to_pylist(), sentences)
        else:
            found = _asked(workspace, build, rows, is_hairy, sentences, config, on_progress)
        found = found.add_column(0, "image_id", rows["image_id"]).add_column(0, "source", rows["source"])
        build.write_table(CAPTIONS, found)
        texts = found["text"].to_pylist()
        verdicts = Counter(found["verdict"].to_pylist())
        build.counts.update(
            num_captions=len(texts),
            num_distinct=len(set(texts)),
            verdicts={verdict: count for verdict, count in verdicts.items() if verdict},
            example=texts[0],
        )

    return workspace.store.obtain(request, make)


def _asked(
    workspace: Workspace,
    build: Build,
    rows: pa.Table,
    is_hairy: Sequence[bool],
    sentences: Sequence[str],
    config: LlavaNextConfig | OpenAiConfig,
    on_progress: OnProgress | None,
) -> pa.Table:
    """The captions of a model that is asked about every image; the descriptor's sentences stand in for refused ones."""
    from derm_pipeline.captions.gate import Gate
    from derm_pipeline.captions.symptoms import describe_all, make_captioner

    known = zip(image_files(workspace, rows), rows.to_pylist(), is_hairy, sentences, strict=True)
    items = [ImageToCaption.of(file.path, file.sha256, row, hairy, stand_in) for file, row, hairy, stand_in in known]
    return describe_all(
        items,
        make_captioner(config, api_key=workspace.api_key(config)),
        Gate(config.gate),
        work=build.work,
        previous=_captions_before(workspace, rows["source"][0].as_py()),
        on_progress=on_progress,
    )


def _captions_before(workspace: Workspace, source: str) -> pa.Table | None:
    """The rows of all earlier captions of a source: each says itself which question it answers."""
    tables = [
        artifact.table(CAPTIONS)
        for artifact in workspace.store.artifacts()
        if (artifact.manifest.asset, artifact.manifest.partition) == ("visual_captions", source)
    ]
    names = [field.name for field in VISUAL_CAPTION_SCHEMA]
    tables = [table.select(names) for table in tables if set(names) <= set(table.column_names)]
    return pa.concat_tables(tables) if tables else None


def metadata_captions(workspace: Workspace, source: str) -> Artifact:
    """Captions of every record's known fields, a column a style; a recipe picks one."""
    used = current_of(workspace, source, ["hair", "descriptors"])
    inputs = {asset: artifact.reference for asset, artifact in used.items()}
    request = Request("metadata_captions", source, inputs, {}, CODE_VERSIONS["metadata_captions"])

    def make(build: Build) -> None:
        rows = used["records"].table(RECORDS)
        is_hairy = used["hair"].table(HAIR, ["is_hairy"])["is_hairy"].to_pylist()
        measured = used["descriptors"].table(DESCRIPTORS).to_pylist()
        records = rows.to_pylist()
        texts = caption_styles(records, is_hairy, measured)
        captions = rows.select(["source", "image_id", "sha256"])
        for style, of_style in texts.items():
            captions = captions.append_column(style, pa.array(of_style, pa.string()))
        build.write_table(CAPTIONS, captions)
        build.counts.update(
            num_captions=captions.num_rows,
            num_distinct={style: len(set(of_style)) for style, of_style in texts.items()},
            num_without_own=num_without_own(records),
            example={style: of_style[0] for style, of_style in texts.items()},
        )

    return workspace.store.obtain(request, make)


def splits(workspace: Workspace) -> Artifact:
    """Every group of every source on one side, and on the same side as before."""
    store = workspace.store
    tables = {source: store.current("records", source) for source in store.partitions("records")}
    config = SplitConfig()
    inputs = {f"records/{source}": artifact.reference for source, artifact in tables.items()}
    request = Request("splits", WHOLE, inputs, {"splits": config.model_dump(mode="json")}, CODE_VERSIONS["splits"])

    def make(build: Build) -> None:
        rows = pa.concat_tables(artifact.table(RECORDS) for artifact in tables.values())
        # Whatever settings or code assigned them: who has a side keeps it.
        before = store.current("splits") if store.has("splits") else None
        known = _known_splits(before)
        assigned = assign_splits(rows, known, config)
        build.write_table(SPLITS, assigned)
        build.write_table(GONE, gone_rows(known, assigned))
        build.write_table(SHARED, shared_images(rows))
        near = near_duplicates(pa.concat_tables(artifact.table(STATISTICS) for artifact in tables.values()))
        apart = in_two_splits(near.pairs, assigned)
        build.write_table(NEAR_DUPLICATES, apart)
        sizes = Counter(assigned["split"].to_pylist())
        build.counts.update({f"num_{split.value}": sizes[split.value] for split in Split})
        build.counts.update(
            num_withheld=sizes[None],
            num_groups=len(set(assigned["group_id"].to_pylist())),
            joined=join_counts(rows),
            num_near_duplicates_in_two_splits=apart.num_rows,
            grown_from=str(before.reference) if before else None,
        )

    return store.obtain(request, make)


def _known_splits(before: Artifact | None) -> pa.Table | None:
    """Where everybody was, also those who are gone: who comes back finds his split again."""
    if before is None:
        return None
    tables = [before.table(SPLITS)]
    if before.path(GONE).exists():  # not in artifacts of older versions
        tables.append(before.table(GONE))
    return pa.concat_tables(tables)
