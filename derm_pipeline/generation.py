"""Prompts x seeds -> images, with one provenance row each.

Sample i depends on its own seed and prompt only: noise comes from the sample's seed, the samplers are deterministic,
and every batch has the same size (the last one is padded).
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import BaseModel, ConfigDict, Field

from derm_pipeline.captions.metadata import MetadataCaptionConfig, metadata_captions
from derm_pipeline.images import Pixels
from derm_pipeline.latents import to_pixels
from derm_pipeline.models.diffusion import guided, noise_for, sample
from derm_pipeline.models.generator import class_index, load_autoencoder, load_network
from derm_pipeline.models.runtime import autocast, pick_device
from derm_pipeline.records import Diagnosis, SkinType, canonical
from derm_pipeline.store import digest_of_json, replacing

Cell = tuple[Diagnosis, SkinType | None]
"""What can be asked of a generator: a diagnosis, and a skin type where it is told one."""


class SamplingConfig(BaseModel):
    """Which samples a recipe asks for, and how they are drawn."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan: Literal["balanced", "fill"] = "balanced"
    """balanced: every diagnosis (and skin type) equally often; fill: more of what the training set has few of."""
    num_samples: int = Field(default=700, ge=1)
    """Samples in all."""
    skin_types: tuple[SkinType, ...] = tuple(SkinType)
    """Skin types to ask for; none where the generator is not told the skin type."""
    num_steps: int = Field(default=15, ge=1)
    """Evaluations of the network for a sample."""
    solver: Literal["dpm2m", "euler", "heun"] = "dpm2m"
    """The sampler."""
    guidance: float = Field(default=1.5, ge=0)
    """Classifier-free guidance; 1 is none."""
    batch_size: int = Field(default=64, ge=1)
    """Samples drawn at once."""
    seed: int = 0
    """Every sample's own seed follows from it and the sample's number."""


@dataclass(frozen=True)
class SampleRequest:
    """One sample to be drawn."""

    number: int
    seed: int
    diagnosis: Diagnosis
    skin_type: SkinType | None

    @property
    def prompt(self) -> str:
        """What the generator is told, in full."""
        told = f"diagnosis={self.diagnosis.value}"
        return told if self.skin_type is None else f"{told}, skin_type={self.skin_type.value}"

    @property
    def file_name(self) -> str:
        return f"images/{self.number:06d}.png"


def plan_samples(
    config: SamplingConfig, diagnoses: Sequence[Diagnosis], train_counts: Mapping[Cell, int]
) -> list[SampleRequest]:
    """The samples of these diagnoses to draw, in order, given how many training images each cell has.

    balanced spreads `num_samples` evenly over the diagnoses and, within each, over the skin types. fill gives every
    cell a part in proportion to what it lacks of the fullest cell that is asked for; where none lacks anything, it is
    balanced. Without skin types to ask for, a diagnosis' images of every skin type count together.
    """
    skin_types: tuple[SkinType | None, ...] = config.skin_types or (None,)
    cells: list[Cell] = [(diagnosis, skin_type) for diagnosis in diagnoses for skin_type in skin_types]
    lacking = dict.fromkeys(cells, 1.0)
    if config.plan == "fill":
        there = {cell: _num_there(cell, train_counts) for cell in cells}
        most = max(there.values())
        if any(count < most for count in there.values()):
            lacking = {cell: float(most - count) for cell, count in there.items()}
    counts = _apportion(config.num_samples, lacking)
    requests: list[SampleRequest] = []
    for cell in cells:
        for _ in range(counts[cell]):
            number = len(requests)
            requests.append(SampleRequest(number, sample_seed(config.seed, number), *cell))
    return requests


def _num_there(cell: Cell, train_counts: Mapping[Cell, int]) -> int:
    diagnosis, skin_type = cell
    if skin_type is not None:
        return train_counts.get(cell, 0)
    return sum(count for (other, _), count in train_counts.items() if other == diagnosis)


def _apportion(total: int, weights: Mapping[Cell, float]) -> Counter[Cell]:
    """Whole numbers in proportion to the weights that sum to `total`: largest remainders, diagnoses taking turns."""
    scale = total / sum(weights.values())
    shares = {cell: weight * scale for cell, weight in weights.items()}
    counts = Counter({cell: int(share) for cell, share in shares.items()})
    turn = {cell: place for place, cell in enumerate(sorted(shares, key=lambda cell: (cell[1] or 0, cell[0])))}
    order = sorted(shares, key=lambda cell: (-round(shares[cell] - int(shares[cell]), 9), turn[cell]))
    for cell in order[: total - sum(counts.values())]:
        counts[cell] += 1
    return counts


def sample_seed(seed: int, number: int) -> int:
    """The seed of sample `number`: 63 bits of a digest, so that neighbours are unrelated."""
    return int(digest_of_json(["sample", seed, number])[:16], 16) >> 1


@torch.no_grad()
def draw_samples(
    requests: Sequence[SampleRequest],
    config: SamplingConfig,
    *,
    generator: Path,
    autoencoder: Path,
    work: Path,
    on_progress: Callable[[int, int], None] | None = None,
) -> Pixels:
    """Draw the samples: uint8 (n, h, w, 3), in the order of the requests.

    Finished batches lie in `work` and are not drawn again.

    Raises:
        ValueError: the generator is not told what is asked for.
    """
    device = pick_device()
    spec, network = load_network(generator, device)
    decoder = load_autoencoder(autoencoder, device)
    asked = {"diagnosis"} | ({"skin_type"} if any(request.skin_type for request in requests) else set())
    if not asked <= spec.network.conditions.keys():
        raise ValueError(f"asked for {sorted(asked)}, but the generator is told {sorted(spec.network.conditions)} only")
    shape = (spec.network.channels, spec.network.latent_size, spec.network.latent_size)
    done: list[Pixels] = []
    for start in range(0, len(requests), config.batch_size):
        batch = requests[start : start + config.batch_size]
        path = work / f"samples-{start:08d}.npy"
        if not path.exists():
            padded = [*batch, *[batch[-1]] * (config.batch_size - len(batch))]
            conditions = {
                name: torch.tensor(
                    [class_index(spec.classes, name, getattr(request, name)) for request in padded], device=device
                )
                for name in spec.network.conditions
            }
            denoise = guided(network, conditions, config.guidance)
            noise = noise_for([request.seed for request in padded], shape).to(device)
            with autocast(device):
                latents = sample(denoise, spec.law, noise, config.num_steps, solver=config.solver)
                images = decoder.decode(spec.unwhiten(latents.float()))
            with replacing(path) as aside, aside.open("wb") as handle:
                np.save(handle, to_pixels(images)[: len(batch)], allow_pickle=False)
        done.append(np.load(path, allow_pickle=False))
        if on_progress:
            on_progress(start + len(batch), len(requests))
    return np.concatenate(done)


def captions_of(requests: Sequence[SampleRequest]) -> list[str]:
    """The caption of every sample: what is known of it, in the words of the metadata captions."""
    rows = [{"diagnosis": request.diagnosis.value, "skin_type": request.skin_type} for request in requests]
    return metadata_captions(rows, [None] * len(rows), MetadataCaptionConfig())


def write_dataset(
    requests: Sequence[SampleRequest],
    images: Pixels,
    config: SamplingConfig,
    *,
    recipe: str,
    generator_digest: str,
    autoencoder_digest: str,
    write_bytes: Callable[[str, bytes], None],
) -> pa.Table:
    """Write the images in the imagefolder convention and return the metadata: one provenance row per image.

    Every PNG carries its own row's essentials as text chunks, so that a single file that left the folder still tells.
    """
    rows = []
    for request, image, text in zip(requests, images, captions_of(requests), strict=True):
        row = {
            "file_name": request.file_name,
            "text": text,
            "sample_id": f"{recipe}/{request.number:06d}",
            "recipe": recipe,
            "prompt": request.prompt,
            "diagnosis": request.diagnosis.value,
            "skin_type": request.skin_type.value if request.skin_type else None,
            "seed": request.seed,
            "guidance": config.guidance,
            "num_steps": config.num_steps,
            "solver": config.solver,
            "generator_digest": generator_digest,
            "autoencoder_digest": autoencoder_digest,
        }
        write_bytes(request.file_name, _png_with_text(image, row))
        rows.append(row)
    schema = pa.schema(
        [
            *[
                pa.field(name, pa.string())
                for name in ("file_name", "text", "sample_id", "recipe", "prompt", "diagnosis")
            ],
            pa.field("skin_type", pa.int32()),
            pa.field("seed", pa.int64()),
            pa.field("guidance", pa.float64()),
            pa.field("num_steps", pa.int32()),
            *[pa.field(name, pa.string()) for name in ("solver", "generator_digest", "autoencoder_digest")],
        ]
    )
    return pa.Table.from_pylist(rows, schema=schema)


def _png_with_text(image: Pixels, row: Mapping[str, object]) -> bytes:
    chunks = PngInfo()
    for name in ("sample_id", "text", "prompt", "seed", "guidance", "num_steps", "solver", "generator_digest"):
        chunks.add_text(f"derm_pipeline:{name}", str(row[name]))
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()


def dataset_card(recipe: str, requests: Sequence[SampleRequest], *, licences: Sequence[str], size_px: int) -> str:
    """The README of a synthetic dataset, with the front matter that dataset hubs read."""
    counts = Counter(request.diagnosis for request in requests)
    table = "\n".join(
        f"| {diagnosis.phrase} (`{diagnosis.value}`) | {counts[diagnosis]} |" for diagnosis in canonical(counts)
    )
    return f"""---
pretty_name: Synthetic skin lesions ({recipe})
tags: [synthetic, dermatology]
task_categories: [image-classification, text-to-image]
---
# Synthetic skin lesions: {recipe}

{len(requests)} images of {size_px} x {size_px} px, drawn by a generator, of nobody. Made by `derm_pipeline`, recipe
`{recipe}`. Each row of `metadata.parquet` says what the generator was told (`prompt`), the sample's seed and settings,
and the digest of the generator; `derm lineage {recipe}/000000` walks from an image to the source files.

| diagnosis | images |
|---|---|
{table}

Trained on sources under: {"; ".join(licences)}. Use it under terms that all of them allow.

Not for diagnosis, not for training a device without evidence of its benefit: see the recipe's report for who it helps
and whom it fails.
"""
