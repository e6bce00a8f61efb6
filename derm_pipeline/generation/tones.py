"""The skin tone that a sample really has, beside the one that was asked for: img2img often keeps the image's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np

from derm_pipeline.generation.origins import Begun, ReadOrigin
from derm_pipeline.generation.plan import SampleRequest
from derm_pipeline.images import Pixels
from derm_pipeline.records import SkinTone, SkinType
from derm_pipeline.sources.statistics import ita_class, skin_ita_degrees

_MEASURED_PX = 32
"""Side of the squashed images on which `skin_ita_degrees` looks for skin."""


class Tone(NamedTuple):
    """The colour of the skin in one picture, and what we estimate from it."""

    ita_deg: float | None
    """Individual typology angle, degrees; None where hardly any skin is seen."""
    skin_type: SkinType | None
    """The Fitzpatrick type of that angle, by the convention of `sources.statistics`."""

    @property
    def tone(self) -> SkinTone | None:
        """The coarse group of that type."""
        return self.skin_type.tone if self.skin_type else None


def measured_tones(images: Iterable[Pixels]) -> list[Tone]:
    """The skin's tone in each of these images (h, w, 3), by the same measure as that of the sources' images."""
    small = [cv2.resize(image, (_MEASURED_PX, _MEASURED_PX), interpolation=cv2.INTER_AREA) for image in images]
    if not small:
        return []
    angles = skin_ita_degrees(np.stack(small).astype(np.uint8)).tolist()
    return [Tone(None, None) if np.isnan(angle) else Tone(angle, ita_class(angle)[1]) for angle in angles]


def measured_columns(
    requests: Sequence[SampleRequest], images: Iterable[Pixels], read_origin: ReadOrigin | None = None
) -> list[dict[str, Any]]:
    """What the rows of samples say of what came out, in order.

    Args:
        requests: What was asked for.
        images: The samples (h, w, 3), as many.
        read_origin: The images that samples begin from; needed where one does.

    Returns:
        measured_ita_deg, measured_skin_type and measured_tone of the sample; of the image that it began from, the
        fraction that was kept and source_tone; and tone_changed: whether these two coarse groups differ. What cannot be
        said is None.

    Raises:
        ValueError: not as many images as requests; samples begin from images, and nothing reads them.
    """
    found = measured_tones(images)
    if len(found) != len(requests):
        raise ValueError(f"{len(found)} images for {len(requests)} samples")
    began = dict.fromkeys(one.origin.sha256 for one in requests if one.origin is not None)
    if began and read_origin is None:
        raise ValueError("samples begin from images: pass what reads those")
    origins = {} if read_origin is None else {sha256: _origin_of(read_origin(sha256)) for sha256 in began}
    return [_columns(one, tone, origins) for one, tone in zip(requests, found, strict=True)]


def measured_of(
    requests: Sequence[SampleRequest], images: Iterable[Pixels], read_origin: ReadOrigin | None = None
) -> list[dict[str, Any]] | None:
    """`measured_columns` of samples that prompts ask for; None where there is no prompt, and nothing is measured."""
    if all(request.prompting is None for request in requests):
        return None
    return measured_columns(requests, images, read_origin)


def _origin_of(begun: Begun) -> tuple[SkinTone | None, float]:
    """The tone of an image, and how much of it is lesion to be kept."""
    kept = 0.0 if begun.lesion is None else float(begun.lesion.mean())
    return measured_tones([begun.pixels])[0].tone, round(kept, 4)


def _columns(
    request: SampleRequest, measured: Tone, origins: Mapping[str, tuple[SkinTone | None, float]]
) -> dict[str, Any]:
    source, kept = origins[request.origin.sha256] if request.origin else (None, None)
    is_known = measured.tone is not None and source is not None
    return {
        "measured_ita_deg": measured.ita_deg,
        "measured_skin_type": measured.skin_type.value if measured.skin_type else None,
        "measured_tone": measured.tone,
        "kept_fraction": kept,
        "source_tone": source,
        "tone_changed": measured.tone != source if is_known else None,
    }


def tone_counts(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many samples have the tone that was asked for; and of those that were to change it, how many did not.

    Returns:
        Nothing where no row says which tone was asked for; else num_tone_asked, num_tone_reached (the measured tone is
        the one asked for), num_tone_unseen (no skin to measure); and where samples begin from images,
        num_tone_to_change (the image's measured tone is another than the one asked for) and num_tone_unchanged among
        these.
    """
    asked = [row for row in rows if row.get("target_tone") is not None]
    if not asked:
        return {}
    counts = {
        "num_tone_asked": len(asked),
        "num_tone_reached": sum(row["measured_tone"] == row["target_tone"] for row in asked),
        "num_tone_unseen": sum(row["measured_tone"] is None for row in asked),
    }
    began = [row for row in asked if row["source_tone"] is not None]
    if began:
        to_change = [row for row in began if row["source_tone"] != row["target_tone"]]
        counts["num_tone_to_change"] = len(to_change)
        counts["num_tone_unchanged"] = sum(row["tone_changed"] is False for row in to_change)
    return counts
