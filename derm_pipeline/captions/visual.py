"""Image -> caption: what is visible.

The descriptor measures the picture and writes one sentence; it names no diagnosis and needs no weights. Captioners that
are neural networks are asked with a prompt instead (`prompted`, `symptoms`) and fall back to the descriptor. All of
them give a table with `VISUAL_CAPTION_SCHEMA`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Literal, Protocol

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from derm_pipeline.captions.descriptors import COLOURS, Colour, Measurements, measure
from derm_pipeline.captions.segmentation import Mask, see
from derm_pipeline.images import Pixels
from derm_pipeline.records import Modality


@dataclass(frozen=True)
class VisualCaption:
    """What a captioner says of one image."""

    text: str
    """One sentence, lower case, without a full stop, as the metadata captions."""
    measurements: Measurements | None = None
    """What the sentence rests on; None when the captioner measures nothing."""


class Captioner(Protocol):
    """Writes what is visible in each image of a batch."""

    name: str
    """As it stands in `CAPTIONERS` and in tables."""

    def describe(
        self,
        images: Sequence[Pixels],
        *,
        hair_masks: Sequence[Mask] | None = None,
        is_hairy: Sequence[bool] | None = None,
        modalities: Sequence[Modality] | None = None,
    ) -> list[VisualCaption]:
        """One caption an image, in order; an image's caption does not depend on the others in the batch.

        Args:
            images: uint8 RGB, each (h, w, 3); sizes may differ.
            hair_masks: Where each image shows hair, (h, w), if known.
            is_hairy: Whether each image counts as hairy, if known; it overrules what the captioner sees.
            modalities: How each image was taken; dermoscopic where left out.

        Raises:
            ValueError: an image is not uint8 RGB, or the lengths differ.
        """
        ...


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
    irregularity: float = Field(default=0.1, ge=0, le=1)
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


class DescriptorCaptioner:
    """Measures each picture and writes one deterministic sentence of fewer than 60 words."""

    name = "descriptor"

    def __init__(self, config: DescriptorConfig | None = None) -> None:
        self.config = config or DescriptorConfig()

    def describe(
        self,
        images: Sequence[Pixels],
        *,
        hair_masks: Sequence[Mask] | None = None,
        is_hairy: Sequence[bool] | None = None,
        modalities: Sequence[Modality] | None = None,
    ) -> list[VisualCaption]:
        """See `Captioner.describe`."""
        for name, given in (("hair_masks", hair_masks), ("is_hairy", is_hairy), ("modalities", modalities)):
            if given is not None and len(given) != len(images):
                raise ValueError(f"{name} has {len(given)} entries for {len(images)} images; give one for each image")
        captions = []
        for position, image in enumerate(images):
            scene = see(image, None if hair_masks is None else hair_masks[position])
            measurements = measure(scene)
            flag = None if is_hairy is None else bool(is_hairy[position])
            modality = Modality.DERMOSCOPIC if modalities is None else modalities[position]
            captions.append(VisualCaption(sentence(measurements, flag, self.config, modality), measurements))
        return captions


CAPTIONERS: dict[str, Callable[[], Captioner]] = {"descriptor": DescriptorCaptioner}
"""Every captioner by name, as a function that makes one with its default settings."""


def sentence(
    measured: Measurements,
    is_hairy: bool | None = None,
    config: DescriptorConfig | None = None,
    modality: Modality = Modality.DERMOSCOPIC,
) -> str:
    """The measurements in words; what is below its threshold is not said."""
    config = config or DescriptorConfig()
    skin = f"{measured.skin_type.phrase} skin"
    artefacts = _artefacts(measured, is_hairy, config)
    ending = f"; {_listed(artefacts)} visible" if artefacts else ""
    if not measured.has_lesion:
        return f"{modality} image of {skin} on which no lesion stands out{ending}"
    parts = [f"{modality} image of a {_outline(measured, config)} on {skin}", _colours(measured, config)]
    structures = _structures(measured, config)
    if structures:
        parts.append(f"with {_listed(structures)}")
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
        return f"unevenly coloured in {_listed(named)}"
    if shares[named[0]] < 0.5 or len(named) == 1:
        return _listed(named)
    return f"mostly {named[0]} with {_listed(named[1:])}"


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


def _listed(words: Sequence[str]) -> str:
    """The words as English lists them: "a", "a and b", "a, b and c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


_ARROW_TYPES = {"bool": pa.bool_(), "float": pa.float64(), "int": pa.int64()}
VISUAL_CAPTION_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
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
        pa.field("skin_tone", pa.string()),
        pa.field("estimated_skin_type", pa.int32()),
        *(pa.field(field.name, _ARROW_TYPES[str(field.type)]) for field in fields(Measurements)),
    ]
)
"""Column names and types of the `visual_captions` table.

From `model` to `question_digest`: how a prompted captioner came to the text (see `symptoms`), null for the descriptor.
From `skin_tone` on: what the descriptor measured, null where the text is not its own.
"""


def visual_captions_table(image_ids: Sequence[str], captions: Sequence[VisualCaption], captioner: str) -> pa.Table:
    """The captions as a table with `VISUAL_CAPTION_SCHEMA`, in the order given.

    Raises:
        ValueError: there are not as many captions as image ids.
    """
    if len(image_ids) != len(captions):
        raise ValueError(f"{len(captions)} captions for {len(image_ids)} image ids; give one for each")
    rows = []
    for image_id, caption in zip(image_ids, captions, strict=True):
        rows.append({"image_id": image_id, "captioner": captioner, "text": caption.text} | measured_columns(caption))
    return pa.Table.from_pylist(rows, schema=VISUAL_CAPTION_SCHEMA)


def measured_columns(caption: VisualCaption) -> dict[str, object]:
    """What was measured, by column of `VISUAL_CAPTION_SCHEMA`; nothing where the captioner measures nothing."""
    measured = caption.measurements
    if measured is None:
        return {}
    return {"skin_tone": measured.skin_tone, "estimated_skin_type": int(measured.skin_type)} | asdict(measured)
