"""Image -> caption: what is visible.

The descriptor writes one sentence from what `descriptors` measured; it names no diagnosis and needs no weights.
Captioners that are neural networks are asked with a prompt instead (`prompted`, `symptoms`), and where their answers
are refused the descriptor's sentence stands in. All of them give a table with `VISUAL_CAPTION_SCHEMA`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from derm_pipeline.captions.descriptors import COLOURS, Colour, Measurements
from derm_pipeline.records import Modality


class DescriptorConfig(BaseModel):
    """From which measurement on a word is said."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["descriptor"] = "descriptor"
    """Which captioner."""
    colour_fraction: float = Field(default=0.08, gt=0, le=1)
    """A colour is named when it covers at least this fraction of the lesion."""
    small_fraction: float = Field(default=0.1, ge=0, le=1)
    """A lesion below this fraction of the view is small."""
    large_fraction: float = Field(default=0.3, ge=0, le=1)
    """A lesion above this fraction of the view is large."""
    slight_asymmetry: float = Field(default=0.09, ge=0, le=1)
    """A mirror image that misses more than this part of the lesion makes it slightly asymmetric."""
    asymmetry: float = Field(default=0.18, ge=0, le=1)
    """A mirror image that misses more than this part of the lesion makes it asymmetric."""
    colour_asymmetry: float = Field(default=14.0, ge=0)
    """A mean Lab distance between mirrored halves above this makes it unevenly coloured."""
    irregularity: float = Field(default=0.07, ge=0, le=1)
    """A border whose hull is empty by more than this part is irregular, below half of it smooth."""
    sharpness: float = Field(default=0.6, ge=0)
    """A border across which more than this part of the contrast falls is sharp."""
    network_fraction: float = Field(default=0.35, ge=0, le=1)
    """A mesh that covers more than this part of the lesion is a network."""
    network_holes: int = Field(default=12, ge=1)
    """A network encloses at least this number of holes."""
    network_density: float = Field(default=0.25, ge=0)
    """And at least this number in a thousandth of a square picture width."""
    num_spots: int = Field(default=8, ge=1)
    """This many dark dots, or bright spots, are worth a word."""
    num_red_blobs: int = Field(default=4, ge=1)
    """This many rounded red areas in a red lesion are worth a word."""
    centre_lightness: float = Field(default=8.0, ge=0)
    """A centre lighter than the rim by more than this, in L*, is pale."""
    hair_fraction: float = Field(default=0.008, ge=0, le=1)
    """Hair over more than this part of the view is hair, where nothing better is known."""
    dark_corner_fraction: float = Field(default=0.02, ge=0, le=1)
    """Dark corners over more than this part of the picture are worth a word."""

    def identity(self) -> dict[str, Any]:
        """The settings on which the captions depend, as JSON."""
        return self.model_dump(mode="json")


def sentence(
    measured: Measurements,
    is_hairy: bool | None = None,
    config: DescriptorConfig | None = None,
    modality: Modality = Modality.DERMOSCOPIC,
) -> str:
    """The measurements in words; what is below its threshold is not said.

    Args:
        measured: of one picture.
        is_hairy: whether the image counts as hairy, if known; it overrules what was measured.
        config: from which measurement on a word is said.
        modality: how the image was taken. Skin is all that is measured, so of an endoscopic image nothing is said.

    Returns:
        One sentence of fewer than 60 words, lower case, without a full stop; it names no diagnosis.
    """
    if modality is Modality.ENDOSCOPIC:
        return "endoscopic image"
    config = config or DescriptorConfig()
    skin = f"{measured.skin_type.phrase} skin"
    artefacts = _artefacts(measured, is_hairy, config)
    ending = f"; {listed(artefacts)} visible" if artefacts else ""
    if not measured.has_lesion:
        return f"{modality} image of {skin} on which no lesion stands out{ending}"
    parts = [f"{modality} image of a {_outline(measured, config)} on {skin}", _colours(measured, config)]
    structures = _structures(measured, config)
    if structures:
        parts.append(f"with {listed(structures)}")
    return ", ".join(parts) + ending


def _outline(measured: Measurements, config: DescriptorConfig) -> str:
    """Size, symmetry and border; a lesion that the view cuts off has neither a shape nor a border to speak of."""
    if measured.cut_off_fraction > 0.1:
        return "large lesion that reaches beyond the view"
    size = "medium-sized"
    if measured.lesion_fraction < config.small_fraction:
        size = "small"
    elif measured.lesion_fraction > config.large_fraction:
        size = "large"
    symmetry = "symmetric"
    if measured.asymmetry > config.asymmetry:
        symmetry = "asymmetric"
    elif measured.asymmetry > config.slight_asymmetry:
        symmetry = "slightly asymmetric"
    border = []
    if measured.border_irregularity > config.irregularity:
        border.append("irregular")
    elif measured.border_irregularity < config.irregularity / 2:
        border.append("smooth")
    if measured.border_sharpness > config.sharpness:
        border.append("sharp")
    ending = ""
    if border:
        ending = f" with {'an' if border[0] == 'irregular' else 'a'} {', '.join(border)} border"
    return f"{size}, {symmetry} lesion{ending}"


def _colours(measured: Measurements, config: DescriptorConfig) -> str:
    shares = {colour: measured.colour_fraction(colour) for colour in COLOURS}
    named: list[Colour] = [colour for colour in COLOURS if shares[colour] >= config.colour_fraction]
    named.sort(key=lambda colour: -shares[colour])
    if not named:
        return "close to the colour of the skin"
    if measured.colour_asymmetry > config.colour_asymmetry and len(named) > 1:
        return f"unevenly coloured in {listed(named)}"
    if shares[named[0]] < 0.5 or len(named) == 1:
        return listed(named)
    return f"mostly {named[0]} with {listed(named[1:])}"


def _structures(measured: Measurements, config: DescriptorConfig) -> list[str]:
    found = []
    has_network = (
        measured.network_fraction > config.network_fraction
        and measured.num_mesh_holes >= config.network_holes
        and measured.mesh_density >= config.network_density
    )
    if has_network:
        found.append("a network-like texture")
    # The cells and nodes of a network are spots too; they are named once.
    if measured.num_dark_dots >= config.num_spots and not has_network:
        found.append("dark dots")
    if measured.num_bright_spots >= config.num_spots and not has_network:
        found.append("small bright spots")
    if measured.num_red_blobs >= config.num_red_blobs and measured.red > 0.4:
        found.append("rounded red areas")
    if measured.centre_lightness > config.centre_lightness:
        found.append("a paler centre")
    return found


def _artefacts(measured: Measurements, is_hairy: bool | None, config: DescriptorConfig) -> list[str]:
    if is_hairy is None:
        is_hairy = measured.hair_fraction > config.hair_fraction
    corners = measured.dark_corner_fraction > config.dark_corner_fraction
    return ["hairs"] * is_hairy + ["dark corners"] * corners


def listed(words: Sequence[str]) -> str:
    """The words as English lists them: "a", "a and b", "a, b and c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


_ARROW_TYPES = {"bool": pa.bool_(), "float": pa.float64(), "int": pa.int64()}
DESCRIPTOR_SCHEMA = pa.schema(
    [
        pa.field("ita_class", pa.string(), nullable=False),
        pa.field("estimated_skin_type", pa.int32(), nullable=False),
        *(pa.field(field.name, _ARROW_TYPES[str(field.type)], nullable=False) for field in fields(Measurements)),
    ]
)
"""Column names and types of what is measured: the fields of `Measurements`, and the words for the skin's colour."""

VISUAL_CAPTION_SCHEMA = pa.schema(
    [
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("captioner", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("model", pa.string()),
        pa.field("verdict", pa.string()),
        pa.field("raw_answer", pa.string()),
        pa.field("gate_reasons", pa.list_(pa.string())),
        pa.field("attempts", pa.int32()),
        pa.field("seed", pa.int64()),
        pa.field("num_tokens", pa.int32()),
        pa.field("prompt", pa.string()),
        pa.field("question_digest", pa.string()),
    ]
)
"""Column names and types of the `visual_captions` table, whatever the captioner; the caller adds source and image_id.

From `model` on: how a prompted captioner came to the text (see `symptoms`), null for the descriptor."""


def descriptors_table(measured: Sequence[Measurements]) -> pa.Table:
    """The measurements as a table with `DESCRIPTOR_SCHEMA`, in the order given."""
    rows = [{"ita_class": one.ita_class, "estimated_skin_type": int(one.skin_type), **asdict(one)} for one in measured]
    return pa.Table.from_pylist(rows, schema=DESCRIPTOR_SCHEMA)


def measurements_of(table: pa.Table) -> list[Measurements]:
    """The measurements in a table with (at least) the columns of `DESCRIPTOR_SCHEMA`."""
    return [Measurements(**row) for row in table.select([field.name for field in fields(Measurements)]).to_pylist()]


def described_table(digests: Sequence[str], sentences: Sequence[str]) -> pa.Table:
    """The descriptor's sentences as a table with `VISUAL_CAPTION_SCHEMA`, in the order given."""
    rows = [
        {"sha256": digest, "captioner": "descriptor", "text": text}
        for digest, text in zip(digests, sentences, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=VISUAL_CAPTION_SCHEMA)
