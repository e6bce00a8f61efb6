"""Record -> caption: what is known of an image in words, and nothing else.

Our own style (`rich`), the label alone, and those of the systems that this one unites. A caption is a pure function of
the row (of what was measured too, for `lesiongen`): the same row gives the same words, whatever else is in its table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict

from derm_pipeline.captions.known import Known, known, names_unknown
from derm_pipeline.captions.lesiongen import lesiongen_caption
from derm_pipeline.captions.skin_diff import skin_diff_caption
from derm_pipeline.captions.wording import TRIGGER_WORD, isic2020_caption, label_caption, rich_caption

__all__ = [
    "STYLES",
    "TRIGGER_WORD",
    "CaptionStyle",
    "MetadataCaptionConfig",
    "caption_styles",
    "metadata_caption",
    "metadata_captions",
    "names_unknown",
    "num_without_own",
]

CaptionStyle = Literal["rich", "label", "isic2020", "skin_diff", "lesiongen", "own"]
STYLES: tuple[CaptionStyle, ...] = get_args(CaptionStyle)
"""Every style, in the order of the columns that hold them."""

Measured = Mapping[str, Any]
"""What was measured in one picture, by the names of `descriptors.Measurements`."""


class MetadataCaptionConfig(BaseModel):
    """How a record becomes a caption."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    style: CaptionStyle = "rich"
    """rich: a sentence of every known field; label: the diagnosis alone; isic2020: as the ISIC 2020 captions;
    skin_diff: From Majority to Minority's prompts; lesiongen: its concepts; own: the source's caption, else rich."""


def metadata_captions(
    rows: Sequence[Mapping[str, Any]],
    hairy: Sequence[bool | None] | None = None,
    config: MetadataCaptionConfig | None = None,
    measured: Sequence[Measured | None] | None = None,
) -> list[str]:
    """One caption a row, in order; see `metadata_caption`.

    Args:
        rows: Rows of the `records` table as mappings.
        hairy: Whether each image shows hair, None where that is not known; None for all when left out.
        config: The style; the default when left out.
        measured: What was measured in each picture, None where nothing was; None for all when left out.

    Raises:
        ValueError: `hairy` or `measured` has another length than `rows`, or a row names a diagnosis or a modality
            outside the vocabulary.
    """
    style = (config or MetadataCaptionConfig()).style
    return [_caption(image, style, seen) for image, seen in _images(rows, hairy, measured)]


def metadata_caption(
    row: Mapping[str, Any],
    is_hairy: bool | None = None,
    config: MetadataCaptionConfig | None = None,
    measured: Measured | None = None,
) -> str:
    """The caption of one row of the `records` table.

    Fields read: modality, diagnosis, source_label, age_years, age_range, sex, site, skin_type, skin_tone, concepts and
    text. A field that is absent or holds None, NaN, "", "unknown" and its like, an age outside 1 to 120 or a skin type
    outside 1 to 6 drops its clause. Without a diagnosis the source's own label stands in its place.

    Raises:
        ValueError: the diagnosis or the modality is neither missing nor in the vocabulary.
    """
    return metadata_captions([row], [is_hairy], config, [measured])[0]


def caption_styles(
    rows: Sequence[Mapping[str, Any]],
    hairy: Sequence[bool | None] | None = None,
    measured: Sequence[Measured | None] | None = None,
) -> dict[CaptionStyle, list[str]]:
    """The captions of every style, each as `metadata_captions` gives them; a row is read once for all of them.

    Raises:
        ValueError: as `metadata_captions`.
    """
    images = _images(rows, hairy, measured)
    return {style: [_caption(image, style, seen) for image, seen in images] for style in STYLES}


def num_without_own(rows: Iterable[Mapping[str, Any]]) -> int:
    """How many rows have no usable caption of their source's: these have their `rich` caption in the style `own`.

    A text counts as none when it is missing or empty, and when `names_unknown` finds in it what no caption may say.
    """
    return sum(known(row).text is None for row in rows)


def _images(
    rows: Sequence[Mapping[str, Any]],
    hairy: Sequence[bool | None] | None,
    measured: Sequence[Measured | None] | None,
) -> list[tuple[Known, Measured | None]]:
    hairy = _one_each("hairy", hairy, len(rows))
    measured = _one_each("measured", measured, len(rows))
    return [(known(row, is_hairy), seen) for row, is_hairy, seen in zip(rows, hairy, measured, strict=True)]


def _one_each(name: str, values: Sequence[Any] | None, num_rows: int) -> Sequence[Any]:
    if values is None:
        return [None] * num_rows
    if len(values) != num_rows:
        raise ValueError(f"{name} has {len(values)} values for {num_rows} rows; give one for each row")
    return values


def _caption(image: Known, style: CaptionStyle, measured: Measured | None) -> str:
    if style == "lesiongen":
        return lesiongen_caption(image, measured)
    if style == "own" and image.text is not None:
        return image.text
    return _LAWS[style](image)


_LAWS = {
    "rich": rich_caption,
    "label": label_caption,
    "isic2020": isic2020_caption,
    "skin_diff": skin_diff_caption,
    "own": rich_caption,  # a row without a caption of its own; `num_without_own` counts them
}
