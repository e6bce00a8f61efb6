"""Samples as files: images that carry where they came from, metadata, the imagefolder, parquet shards, a card.

PNG tells in text chunks `derm_pipeline:<name>`. JPEG and WebP tell in EXIF: ImageDescription is a JSON object of the
same names, Software is `derm_pipeline`. Either way a single file that left its folder still tells.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from derm_pipeline.captions.metadata import MetadataCaptionConfig, metadata_captions
from derm_pipeline.generation.origins import ReadOrigin
from derm_pipeline.generation.plan import ImageFormat, SampleRequest, Sampling, manner_of, num_train_images
from derm_pipeline.generation.tones import measured_of
from derm_pipeline.images import Pixels
from derm_pipeline.models.generator import GeneratorSpec
from derm_pipeline.records import canonical
from derm_pipeline.sources.base import num_cores
from derm_pipeline.store import replacing

Row = Mapping[str, Any]
"""What the metadata says of one sample."""

_SIGNED = "derm_pipeline"
_ESSENTIALS = ("sample_id", "text", "prompt", "seed", "guidance", "num_steps", "solver", "generator_digest")
_ENCODED_AT_ONCE = 256
_DESCRIPTION, _SOFTWARE = 0x010E, 0x0131  # EXIF tags

_TOLD = ("negative_prompt", "source_sha256", "strength", "target_tone", "measured_tone")
"""What the file of a sample that a prompt asked for tells besides, where there is something to tell."""

_SCHEMA = pa.schema(
    [
        *[pa.field(name, pa.string()) for name in ("file_name", "text", "sample_id", "recipe", "prompt", "diagnosis")],
        pa.field("skin_type", pa.int32()),
        pa.field("seed", pa.int64()),
        pa.field("guidance", pa.float64()),
        pa.field("num_steps", pa.int32()),
        *[pa.field(name, pa.string()) for name in ("solver", "generator_digest", "autoencoder_digest")],
        pa.field("pixels_sha256", pa.string()),
        pa.field("num_train_images", pa.int64()),
    ]
)

_PROMPTED_SCHEMA = pa.schema(
    [
        *_SCHEMA,
        *[pa.field(name, pa.string()) for name in ("negative_prompt", "source_sha256")],
        *[pa.field(name, pa.float64()) for name in ("strength", "kept_fraction")],
        *[pa.field(name, pa.string()) for name in ("target_tone", "source_tone", "measured_tone")],
        pa.field("measured_ita_deg", pa.float64()),
        pa.field("measured_skin_type", pa.int32()),
        pa.field("tone_changed", pa.bool_()),
    ]
)
"""Of samples that prompts ask for; see `tones.measured_columns`."""

_DTYPES = {
    pa.string(): "string",
    pa.int32(): "int32",
    pa.int64(): "int64",
    pa.float64(): "float64",
    pa.bool_(): "bool",
}


def captions_of(requests: Sequence[SampleRequest]) -> list[str]:
    """The caption of every sample: that which it was told, else what is known of it, as the metadata captions say."""
    rows = [{"diagnosis": request.told("diagnosis"), "skin_type": request.skin_type} for request in requests]
    written = metadata_captions(rows, [None] * len(rows), MetadataCaptionConfig())
    return [words if one.text is None else one.text for one, words in zip(requests, written, strict=True)]


def provenance_rows(
    requests: Sequence[SampleRequest],
    config: Sampling,
    *,
    recipe: str,
    generator_digest: str,
    autoencoder_digest: str,
    pixels: Iterable[str],
    spec: GeneratorSpec | None = None,
    sample_ids: Callable[[SampleRequest], str] | None = None,
    file_names: Callable[[SampleRequest], str] | None = None,
    measured: Sequence[Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """What is said of every sample in the metadata, in the order of the requests.

    Args:
        requests: What was asked for.
        config: How it was drawn, where a request does not say so itself.
        recipe: Whose generator it is.
        generator_digest: Content digest of the generator.
        autoencoder_digest: Content digest of its autoencoder.
        pixels: Of every sample, `digest_of_pixels`.
        spec: The generator, for `num_train_images`: how many training images show all that the sample was told; without
            it, and of a generator that does not say, None.
        sample_ids: Names the samples; by default recipe and number.
        file_names: Names their files.
        measured: What was measured in each; see `tones.measured_of`.
    """
    shown = {request.prompt: num_train_images(request, spec) for request in requests} if spec else {}
    rows: list[dict[str, Any]] = [
        {
            "file_name": file_names(request) if file_names else request.file_as(config.image_format),
            "text": text,
            "sample_id": sample_ids(request) if sample_ids else f"{recipe}/{request.number:06d}",
            "recipe": recipe,
            "prompt": request.prompt,
            "diagnosis": request.told("diagnosis"),
            "skin_type": request.skin_type.value if request.skin_type else None,
            "seed": request.seed,
            "guidance": manner_of(request, config).guidance,
            "num_steps": manner_of(request, config).num_steps,
            "solver": config.solver,
            "generator_digest": generator_digest,
            "autoencoder_digest": autoencoder_digest,
            "pixels_sha256": digest,
            "num_train_images": shown.get(request.prompt),
        }
        for request, text, digest in zip(requests, captions_of(requests), pixels, strict=True)
    ]
    if measured is None:
        return rows
    return [row | _prompted(request) | dict(seen) for row, request, seen in zip(rows, requests, measured, strict=True)]


def _prompted(request: SampleRequest) -> dict[str, Any]:
    how, origin = request.prompting, request.origin
    return {
        "negative_prompt": request.negative_prompt,
        "source_sha256": origin.sha256 if origin else None,
        "strength": origin.strength if origin else None,
        "target_tone": how.target_tone if how else None,
    }


def digest_of_pixels(image: Pixels) -> str:
    """sha256 of an image's pixels (h, w, 3), uint8, row by row: as drawn, whatever file holds them.

    A JPEG's own pixels are others.
    """
    return hashlib.sha256(np.ascontiguousarray(image).data).hexdigest()


def metadata_table(rows: Sequence[Row]) -> pa.Table:
    """The rows of `provenance_rows` as a table."""
    return pa.Table.from_pylist([dict(row) for row in rows], schema=_schema_of(rows))


def _schema_of(rows: Sequence[Row]) -> pa.Schema:
    return _PROMPTED_SCHEMA if rows and "negative_prompt" in rows[0] else _SCHEMA


def write_dataset(
    requests: Sequence[SampleRequest],
    images: Pixels,
    config: Sampling,
    *,
    recipe: str,
    generator_digest: str,
    autoencoder_digest: str,
    spec: GeneratorSpec | None = None,
    write_bytes: Callable[[str, bytes], None],
    read_origin: ReadOrigin | None = None,
) -> pa.Table:
    """Write the images in the imagefolder convention and return the metadata: one provenance row per image.

    Every file carries its own row's essentials, so that a single file that left the folder still tells. `read_origin`
    reads the images that samples begin from, to hold their tones beside each other.
    """
    rows = provenance_rows(
        requests,
        config,
        recipe=recipe,
        generator_digest=generator_digest,
        autoencoder_digest=autoencoder_digest,
        pixels=map(digest_of_pixels, images),
        spec=spec,
        measured=measured_of(requests, images, read_origin),
    )
    for row, content in encoded(images, rows, config.image_format, config.jpeg_quality):
        write_bytes(row["file_name"], content)
    return metadata_table(rows)


def encoded(
    images: Iterable[Pixels], rows: Iterable[Row], image_format: ImageFormat = "png", jpeg_quality: int = 95
) -> Iterator[tuple[Row, bytes]]:
    """Every row with its sample as a file, in order; encoded on all cores, a few hundred at a time.

    Raises:
        ValueError: not as many images as rows.
    """

    def encode(pair: tuple[Pixels, Row]) -> bytes:
        return encode_sample(*pair, image_format, jpeg_quality)

    pairs = zip(images, rows, strict=True)
    with ThreadPoolExecutor(num_cores()) as pool:
        while block := list(islice(pairs, _ENCODED_AT_ONCE)):
            yield from zip((row for _, row in block), pool.map(encode, block), strict=True)


def encode_sample(image: Pixels, row: Row, image_format: ImageFormat = "png", jpeg_quality: int = 95) -> bytes:
    """An image (h, w, 3) as a file that tells where it came from; png and webp keep every pixel."""
    told = {name: str(row[name]) for name in _ESSENTIALS}
    told |= {name: str(row[name]) for name in _TOLD if row.get(name) is not None}
    buffer, picture = io.BytesIO(), Image.fromarray(image)
    if image_format == "png":
        chunks = PngInfo()
        for name, value in told.items():
            chunks.add_text(f"{_SIGNED}:{name}", value)
        picture.save(buffer, "PNG", pnginfo=chunks)
        return buffer.getvalue()
    exif = Image.Exif()
    exif[_DESCRIPTION], exif[_SOFTWARE] = json.dumps(told), _SIGNED
    if image_format == "jpeg":
        picture.save(buffer, "JPEG", quality=jpeg_quality, subsampling=0, exif=exif.tobytes())
    else:
        picture.save(buffer, "WEBP", lossless=True, exact=True, exif=exif.tobytes())
    return buffer.getvalue()


def read_provenance(path: Path) -> dict[str, str]:
    """What a sample's file tells of where it came from; nothing if it is no sample of ours."""
    with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
        if image.format == "PNG":
            texts: Mapping[str, str] = getattr(image, "text", {})
            marked = {name: text for name, text in texts.items() if name.startswith(f"{_SIGNED}:")}
            return {name.removeprefix(f"{_SIGNED}:"): text for name, text in marked.items()}
        exif = image.getexif()
    if exif.get(_SOFTWARE) != _SIGNED:
        return {}
    told = json.loads(exif[_DESCRIPTION])
    return {str(name): str(value) for name, value in told.items()}


def write_shards(files: Iterable[tuple[Row, bytes]], folder: Path, *, shard_size: int = 500) -> list[Path]:
    """Write parquet shards of a few hundred samples: the metadata with the image files' bytes in a column `image`.

    The column is what `datasets` writes itself, so `load_dataset("parquet", ...)` gives pictures. One shard is held in
    memory at a time.

    Args:
        files: What is said of every sample, with its file's bytes; see `encoded`.
        folder: Where shards go, `samples-00000.parquet` first.
        shard_size: Samples of a shard.
    """
    paths: list[Path] = []
    remaining = iter(files)
    while shard := list(islice(remaining, shard_size)):
        schema = _shard_schema(_schema_of([row for row, _ in shard]))
        filled = [dict(row) | {"image": {"bytes": content, "path": row["file_name"]}} for row, content in shard]
        paths.append(folder / f"samples-{len(paths):05d}.parquet")
        with replacing(paths[-1]) as aside:
            pq.write_table(pa.Table.from_pylist(filled, schema=schema), aside, compression="none", row_group_size=100)
    return paths


def _shard_schema(columns: pa.Schema) -> pa.Schema:
    schema = columns.insert(0, pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])))
    features = {field.name: {"dtype": _DTYPES[field.type], "_type": "Value"} for field in columns}
    described = {"info": {"features": {"image": {"_type": "Image"}} | features}}
    return schema.with_metadata({"huggingface": json.dumps(described)})


def dataset_card(
    recipe: str,
    requests: Sequence[SampleRequest],
    *,
    licences: Sequence[str],
    size_px: int | tuple[int, int],
    num_unseen: int | None = None,
    lineage_of: str | None = None,
    tones: Mapping[str, int] | None = None,
) -> str:
    """The README of a synthetic dataset, with the front matter that dataset hubs read.

    Args:
        recipe: Whose it is.
        requests: What was asked for.
        licences: Those of the sources that the generator learnt from.
        size_px: Side of the images, pixels; or their width and height.
        num_unseen: Samples that were told what no single training image shows together; None where not known.
        lineage_of: What `derm lineage` is asked for; None is the recipe's own dataset.
        tones: How often the skin tone asked for was reached; see `tones.tone_counts`.
    """
    width, height = (size_px, size_px) if isinstance(size_px, int) else size_px
    further = _unseen(num_unseen, len(requests)) + _tones_in_words(tones or {})
    walked = lineage_of or f"{recipe}/000000"
    counts = Counter(request.diagnosis for request in requests if request.diagnosis is not None)
    table = "\n".join(
        f"| {diagnosis.phrase} (`{diagnosis.value}`) | {counts[diagnosis]} |" for diagnosis in canonical(counts)
    )
    return f"""---
pretty_name: Synthetic skin lesions ({recipe})
tags: [synthetic, dermatology]
task_categories: [image-classification, text-to-image]
---
# Synthetic skin lesions: {recipe}

{len(requests)} images of {width} x {height} px, drawn by a generator, of nobody. Made by `derm_pipeline`, recipe
`{recipe}`. Each row of `metadata.parquet` says what the generator was told (`prompt`), the sample's seed and settings,
and the digest of the generator; `derm lineage {walked}` walks from there to the source files.

| diagnosis | images |
|---|---|
{table}

{further}Trained on sources under: {"; ".join(licences)}. Use it under terms that all of them allow.

Not for diagnosis, not for training a device without evidence of its benefit: see the recipe's report for who it helps
and whom it fails.
"""


def _unseen(num: int | None, num_samples: int) -> str:
    if not num:
        return ""
    return (
        f"{num} of the {num_samples} samples are of cells without a training image: each of their conditions was "
        "learnt, their combination (say, a diagnosis on a skin type) never seen. `num_train_images` is 0 in their "
        "rows; only other combinations tell what they should look like.\n\n"
    )


def _tones_in_words(tones: Mapping[str, int]) -> str:
    """How often the tone that was asked for was reached, as a paragraph; nothing where none was asked for."""
    if not tones:
        return ""
    said = (
        f"Skin tone, measured in each image (`measured_tone`): of {tones['num_tone_asked']} images that were asked for "
        f"by tone, {tones['num_tone_reached']} have it, and in {tones['num_tone_unseen']} no skin was seen."
    )
    if "num_tone_to_change" in tones:
        said += (
            f" Of {tones['num_tone_to_change']} that began from an image of another tone, "
            f"**{tones['num_tone_unchanged']} did not change it** (`tone_changed` is false): for these, `skin_type` is "
            "what was asked for and not what they show."
        )
    return f"{said}\n\n"
