"""How right the descriptor's words are, against images whose truth is known because they were drawn.

The words are read back from the captions themselves; the truth is in the records' concepts (`sources.phantom.truth`),
measured on the painting before light, hair, artefacts and compression.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from derm_pipeline.captions.descriptors import COLOURS
from derm_pipeline.captions.visual import DescriptorConfig
from derm_pipeline.records import SkinType
from derm_pipeline.sources.phantom.truth import TRUTHS

NEAR = 0.25
"""Shape words (symmetric, irregular) are a matter of taste near their threshold: images whose truth lies within this
part of it are left out."""
_CUT_OFF = 0.1
"""A lesion with more of its outline on the edge of the view has neither a shape nor a border to speak of."""

_SKINS = {skin_type.phrase: skin_type for skin_type in SkinType}

ACCURACY_SCHEMA = pa.schema(
    [
        pa.field("attribute", pa.string(), nullable=False),
        pa.field("n", pa.int64(), nullable=False),
        pa.field("num_left_out", pa.int64(), nullable=False),
        pa.field("accuracy", pa.float64(), nullable=False),
        pa.field("low", pa.float64(), nullable=False),
        pa.field("high", pa.float64(), nullable=False),
        pa.field("balanced_accuracy", pa.float64()),
        pa.field("majority", pa.float64(), nullable=False),
    ]
)
"""One row an attribute: images judged and left out; share right with its 95 % interval (Wilson 1927); mean over the
true words of the share right, null where only one occurs; and what always saying the commonest word would score."""


@dataclass(frozen=True)
class Words:
    """What one caption of the descriptor says; None where it does not say."""

    size: str | None
    is_symmetric: bool | None
    border: str | None
    """smooth or irregular."""
    colours: frozenset[str]
    skin_type: SkinType | None
    """The type whose phrase is said of the skin."""
    has_hair: bool


def words_of(text: str) -> Words:
    """Read a caption of the descriptor."""
    scene, _, artefacts = text.partition("; ")
    size = re.search(r"image of an? (small|medium-sized|large)\b", scene)
    symmetry = re.search(r"\b((?:slightly )?asymmetric|symmetric) lesion", scene)
    border = re.search(r"lesion with an? (smooth|irregular)\b[^;]*? border", scene)
    skin = re.search(rf"\b({'|'.join(_SKINS)}) skin\b", scene)
    # What lies between the skin and the structures ("with rounded red areas") is said of the lesion's colour.
    colours = re.search(r" skin, (.*?)(?:, with .*)?$", scene)
    named = re.findall(rf"\b({'|'.join(COLOURS)})\b", colours[1]) if colours else []
    return Words(
        size=size[1] if size else None,
        is_symmetric=symmetry[1] == "symmetric" if symmetry else None,
        border=border[1] if border else None,
        colours=frozenset(named),
        skin_type=_SKINS[skin[1]] if skin else None,
        has_hair=bool(re.search(r"\bhairs\b", artefacts)),
    )


def descriptor_accuracy(records: pa.Table, captions: pa.Table, config: DescriptorConfig | None = None) -> pa.Table:
    """Hold every caption that the descriptor wrote against the truth of its record.

    Args:
        records: the `records` table, or its columns image_id, skin_type and concepts.
        captions: the `visual_captions` table of the same source, or its columns image_id, captioner and text.
            Captions by others than the descriptor are passed over.
        config: from which measurement on a word holds.

    Returns:
        A table with `ACCURACY_SCHEMA`; without rows where no record was drawn with its truth.
    """
    config = config or DescriptorConfig()
    truths = _truths(records)
    outcomes: dict[str, list[tuple[object, bool] | None]] = {}
    for row in captions.select(["image_id", "captioner", "text"]).to_pylist():
        truth = truths.get(row["image_id"])
        if truth is None or row["captioner"] != DESCRIPTOR:
            continue
        for attribute, outcome in _judged(words_of(row["text"]), truth, config):
            outcomes.setdefault(attribute, []).append(outcome)
    rows = [_summary(attribute, of_one) for attribute, of_one in outcomes.items()]
    return pa.Table.from_pylist([row for row in rows if row["n"]], schema=ACCURACY_SCHEMA)


DESCRIPTOR = "descriptor"
"""The descriptor's name in captions tables."""


def _truths(records: pa.Table) -> dict[str, dict[str, Any]]:
    """Concepts and skin type by image_id, of the records that hold the whole truth."""
    found = {}
    for row in records.select(["image_id", "skin_type", "concepts"]).to_pylist():
        concepts = dict(row["concepts"] or ())
        if {*TRUTHS, "hair"} <= concepts.keys() and row["skin_type"] is not None:
            numbers = {name: float(concepts[name]) for name in TRUTHS}
            found[row["image_id"]] = numbers | {"hair": concepts["hair"] == "yes", "skin_type": row["skin_type"]}
    return found


def _judged(
    words: Words, truth: Mapping[str, Any], config: DescriptorConfig
) -> Iterator[tuple[str, tuple[object, bool] | None]]:
    """Each attribute with what is true and whether the caption agrees; None for an image that is left out."""
    whole = truth["cut_off_fraction"] <= _CUT_OFF
    asymmetric = _beyond(truth["asymmetry"], config.slight_asymmetry) if whole else None
    yield "asymmetry", None if asymmetric is None else (asymmetric, words.is_symmetric is (not asymmetric))
    irregular = _beyond(truth["border_irregularity"], config.irregularity) if whole else None
    says_irregular = None if words.is_symmetric is None else words.border == "irregular"
    yield "border", None if irregular is None else (irregular, says_irregular is irregular)
    size = _size(truth["lesion_fraction"], config) if whole else "large"
    yield "size", (size, words.size == size)
    for colour in COLOURS:
        painted = truth[colour.replace(" ", "_").replace("-", "_")] >= config.colour_fraction
        yield colour, (painted, (colour in words.colours) == painted)
    yield "hair", (truth["hair"], words.has_hair == truth["hair"])
    known = truth["skin_type"]
    yield "skin tone within one type", (known, words.skin_type is not None and abs(words.skin_type - known) <= 1)


def _beyond(value: float, threshold: float) -> bool | None:
    """Whether a value is above its threshold; None where it is near."""
    return None if abs(value - threshold) < NEAR * threshold else value > threshold


def _size(fraction: float, config: DescriptorConfig) -> str:
    if fraction < config.small_fraction:
        return "small"
    return "large" if fraction > config.large_fraction else "medium-sized"


def _summary(attribute: str, outcomes: list[tuple[object, bool] | None]) -> dict[str, object]:
    judged = [outcome for outcome in outcomes if outcome is not None]
    n, num_right = len(judged), sum(is_right for _, is_right in judged)
    by_truth: dict[object, list[bool]] = {}
    for truth, is_right in judged:
        by_truth.setdefault(truth, []).append(is_right)
    shares = [sum(of_one) / len(of_one) for of_one in by_truth.values()]
    low, high = wilson_interval(num_right, n)
    return {
        "attribute": attribute,
        "n": n,
        "num_left_out": len(outcomes) - n,
        "accuracy": num_right / max(1, n),
        "low": low,
        "high": high,
        "balanced_accuracy": sum(shares) / len(shares) if len(shares) > 1 else None,
        "majority": max(map(len, by_truth.values()), default=0) / max(1, n),
    }


def wilson_interval(num_right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The interval of a share (Wilson 1927, doi:10.1080/01621459.1927.10502953); (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    share = num_right / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, middle - half), min(1.0, middle + half)
