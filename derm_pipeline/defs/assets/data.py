"""Assets of a source, and the splits of all of them."""

# No `from __future__ import annotations`: dagster reads the annotations of resources at run time.
import warnings

import dagster as dg
import numpy as np
import pyarrow as pa

from derm_pipeline.captions.metadata import STYLES, names_unknown
from derm_pipeline.defs import partitions
from derm_pipeline.defs.assets.shared import OWNERS, Asset, progress
from derm_pipeline.defs.reporting import check, materialised, thumbnail
from derm_pipeline.defs.resources import Shower
from derm_pipeline.defs.stages import data as stages
from derm_pipeline.defs.workspace import Workspace
from derm_pipeline.images import Pixels, decode, read_bytes, to_square
from derm_pipeline.splits import split_problems
from derm_pipeline.store import Artifact

_THUMBNAIL_PX = 96

# In beta in dagster 1.13; it is tested here, and the warning would greet every start.
warnings.filterwarnings("ignore", message="Function `observable_source_asset`")


def source_assets(workspace: Workspace) -> list[Asset]:  # noqa: C901  one graph, read top to bottom
    """The assets that are partitioned by source, and the splits of all of them."""
    by_source = partitions.sources(workspace)

    @dg.observable_source_asset(
        partitions_def=by_source,
        group_name="1_sources",
        description="The publisher's files as they lie; a cheap fingerprint (names, sizes, times) is the data version.",
    )
    def raw_images(
        context: dg.OpExecutionContext, workspace: dg.ResourceParam[Workspace]
    ) -> dg.DataVersionsByPartition:
        """The publisher's files as they lie."""
        versions = {}
        for source in workspace.sources:
            try:
                versions[source] = stages.raw_reference(workspace, source).content_digest
            except FileNotFoundError:
                context.log.info(f"{source}: no files in {workspace.source_folder(source)}")
            except (ValueError, OSError) as error:  # one unreadable source must not hide the others
                context.log.warning(f"{source}: {error}")
        return dg.DataVersionsByPartition(versions)

    @dg.asset(
        partitions_def=by_source,
        deps=[raw_images],
        group_name="1_sources",
        kinds={"parquet"},
        owners=OWNERS,
        code_version=stages.CODE_VERSIONS["records"],
        check_specs=[
            dg.AssetCheckSpec("every_image_has_one_row", asset="records", blocking=True),
            dg.AssetCheckSpec("no_file_is_quarantined", asset="records"),
            dg.AssetCheckSpec("every_label_means_a_diagnosis", asset="records"),
        ],
    )
    def records(
        context: dg.AssetExecutionContext, workspace: dg.ResourceParam[Workspace], shower: dg.ResourceParam[Shower]
    ) -> dg.MaterializeResult:
        """One typed row an image; bad files and rows are quarantined with the reason."""
        artifact = stages.records(workspace, context.partition_key, progress(context, shower).count)
        rows, quarantined = artifact.table(stages.RECORDS), artifact.table(stages.QUARANTINED)
        image_ids = rows["image_id"].to_pylist()
        labels = artifact.table(stages.LABELS).to_pylist()
        unmapped = [
            f"{row['source_label'] or 'no label'}: {row['num_images']:,} images have no diagnosis"
            for row in labels
            if row["diagnosis"] is None
        ]
        twice = sorted({image for image in image_ids if image_ids.count(image) > 1}) if _has_twice(image_ids) else []
        return materialised(
            artifact,
            picture=_some_images(workspace, rows),
            tables={
                "quarantined": quarantined.slice(0, 20).to_pylist(),
                "labels": labels[:40],
                "near_duplicates": artifact.table(stages.NEAR_DUPLICATES).slice(0, 20).to_pylist(),
            },
            checks=[
                check("every_image_has_one_row", [f"{image} has several" for image in twice], blocking=True),
                check(
                    "no_file_is_quarantined",
                    [f"{row['image_id'] or row['file']}: {row['reason']}" for row in quarantined.to_pylist()],
                    blocking=False,
                ),
                check("every_label_means_a_diagnosis", unmapped, blocking=False),
            ],
        )

    @dg.asset(
        partitions_def=by_source,
        deps=[records],
        group_name="1_sources",
        kinds={"opencv"},
        owners=OWNERS,
        code_version=stages.CODE_VERSIONS["hair"],
    )
    def hair(
        context: dg.AssetExecutionContext, workspace: dg.ResourceParam[Workspace], shower: dg.ResourceParam[Shower]
    ) -> dg.MaterializeResult:
        """Mask, coverage, score and flag of every image."""
        artifact = stages.hair(workspace, context.partition_key, progress(context, shower).count)
        rows = workspace.store.current("records", context.partition_key).table(stages.RECORDS)
        return materialised(artifact, picture=_overlays(workspace, rows, artifact))

    @dg.asset(
        partitions_def=by_source,
        deps=[records, hair],
        group_name="2_captions",
        kinds={"opencv"},
        owners=OWNERS,
        code_version=stages.CODE_VERSIONS["descriptors"],
    )
    def descriptors(
        context: dg.AssetExecutionContext, workspace: dg.ResourceParam[Workspace], shower: dg.ResourceParam[Shower]
    ) -> dg.MaterializeResult:
        """What can be measured in each image: the lesion's shape, colours and structures, the skin's colour."""
        return materialised(stages.descriptors(workspace, context.partition_key, progress(context, shower).count))

    @dg.asset(
        partitions_def=by_source,
        deps=[records, hair, descriptors],
        group_name="2_captions",
        kinds={"python"},
        owners=OWNERS,
        code_version=stages.CODE_VERSIONS["visual_captions"],
        check_specs=[dg.AssetCheckSpec("every_image_is_described", asset="visual_captions", blocking=True)],
    )
    def visual_captions(
        context: dg.AssetExecutionContext, workspace: dg.ResourceParam[Workspace], shower: dg.ResourceParam[Shower]
    ) -> dg.MaterializeResult:
        """A caption of what is visible in each image, by the captioner that `captioner.yaml` names."""
        artifact = stages.visual_captions(workspace, context.partition_key, progress(context, shower).count)
        rows = artifact.table(stages.CAPTIONS)
        silent = [row["image_id"] for row in rows.select(["image_id", "text"]).to_pylist() if not row["text"].strip()]
        return materialised(
            artifact,
            tables={"examples": _examples(rows, "text")},
            checks=[check("every_image_is_described", [f"{image} has no words" for image in silent], blocking=True)],
        )

    @dg.asset(
        partitions_def=by_source,
        deps=[records, hair, descriptors],
        group_name="2_captions",
        kinds={"python"},
        owners=OWNERS,
        code_version=stages.CODE_VERSIONS["metadata_captions"],
        check_specs=[dg.AssetCheckSpec("captions_name_no_unknown", asset="metadata_captions", blocking=True)],
    )
    def metadata_captions(
        context: dg.AssetExecutionContext, workspace: dg.ResourceParam[Workspace]
    ) -> dg.MaterializeResult:
        """Captions of each record's known fields, a column a style."""
        artifact = stages.metadata_captions(workspace, context.partition_key)
        rows = artifact.table(stages.CAPTIONS)
        named = [
            f"{row['image_id']}, {style}: {row[style]}"
            for row in rows.to_pylist()
            for style in STYLES
            if names_unknown(row[style])
        ]
        return materialised(
            artifact,
            tables={style: _examples(rows, style, 4) for style in STYLES},
            checks=[check("captions_name_no_unknown", named, blocking=True)],
        )

    @dg.asset(
        deps=[records],
        group_name="3_splits",
        kinds={"parquet"},
        owners=OWNERS,
        code_version=stages.CODE_VERSIONS["splits"],
        check_specs=[
            dg.AssetCheckSpec("no_lesion_in_two_splits", asset="splits", blocking=True),
            dg.AssetCheckSpec("no_near_duplicate_in_two_splits", asset="splits"),
        ],
    )
    def splits(workspace: dg.ResourceParam[Workspace]) -> dg.MaterializeResult:
        """Every lesion, patient and duplicate of every source in one split, and in the same as before."""
        artifact = stages.splits(workspace)
        problems = split_problems(artifact.table(stages.SPLITS))
        near = artifact.table(stages.NEAR_DUPLICATES).to_pylist()
        alike = [
            f"{row['source_a']}/{row['image_a']} ({row['split_a']}) looks like "
            f"{row['source_b']}/{row['image_b']} ({row['split_b']}), correlation {row['correlation']}"
            for row in near
        ]
        return materialised(
            artifact,
            tables={"near_duplicates": near[:20]},
            checks=[
                check("no_lesion_in_two_splits", problems, blocking=True),
                check("no_near_duplicate_in_two_splits", alike, blocking=False),
            ],
        )

    return [raw_images, records, hair, descriptors, visual_captions, metadata_captions, splits]


def _has_twice(values: list[str]) -> bool:
    return len(set(values)) < len(values)


def _examples(rows: pa.Table, column: str, count: int = 8) -> list[dict[str, str]]:
    step = max(1, rows.num_rows // count)
    return rows.select(["image_id", column]).take(list(range(0, rows.num_rows, step))[:count]).to_pylist()


def _some(rows: pa.Table, count: int) -> pa.Table:
    return rows.take(np.linspace(0, rows.num_rows - 1, min(count, rows.num_rows)).round().astype(int))


def _some_images(workspace: Workspace, rows: pa.Table) -> Pixels:
    files = stages.image_files(workspace, _some(rows, 21))
    images = [to_square(decode(read_bytes(file.path)), _THUMBNAIL_PX) for file in files]
    return thumbnail(np.stack(images), columns=7, rows=3)


def _overlays(workspace: Workspace, rows: pa.Table, artifact: Artifact) -> Pixels:
    """A few hairy images with their masks in green."""
    found = artifact.table(stages.HAIR)
    hairy = np.flatnonzero(found["is_hairy"].to_numpy())
    chosen = _some(rows.take(hairy) if len(hairy) else rows, 14)
    masks = dict(zip(found["sha256"].to_pylist(), found["mask_png"].to_pylist(), strict=True))
    pictures = []
    for file in stages.image_files(workspace, chosen):
        image = decode(read_bytes(file.path))
        image[stages.decode_mask(masks[file.sha256])] = (0, 255, 0)
        pictures.append(to_square(image, _THUMBNAIL_PX))
    return thumbnail(np.stack(pictures), columns=7, rows=2)
