"""The vocabulary as types: what one image is, and what may be known of it.

Everything else speaks in these words. No file access and no array code belongs here.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import Annotated

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field


class Diagnosis(StrEnum):
    """The canonical diagnoses: HAM10000's seven (Tschandl et al. 2018, doi:10.1038/sdata.2018.161).

    The order is alphabetical by code and fixed: it is the class index of every classifier and generator.
    """

    AKIEC = "akiec"
    BCC = "bcc"
    BKL = "bkl"
    DF = "df"
    MEL = "mel"
    NV = "nv"
    VASC = "vasc"

    @property
    def phrase(self) -> str:
        """The diagnosis in words, as it stands in a caption."""
        return _PHRASES[self]

    @property
    def is_malignant(self) -> bool:
        """Whether it is malignant; akiec (actinic keratosis, intraepithelial carcinoma) counts as in-situ disease."""
        return self in {Diagnosis.AKIEC, Diagnosis.BCC, Diagnosis.MEL}

    @property
    def class_index(self) -> int:
        """Position in the canonical order, from 0."""
        return list(Diagnosis).index(self)


_PHRASES = {
    Diagnosis.AKIEC: "actinic keratosis or intraepithelial carcinoma",
    Diagnosis.BCC: "basal cell carcinoma",
    Diagnosis.BKL: "benign keratosis-like lesion",
    Diagnosis.DF: "dermatofibroma",
    Diagnosis.MEL: "melanoma",
    Diagnosis.NV: "melanocytic nevus",
    Diagnosis.VASC: "vascular lesion",
}


class SkinType(IntEnum):
    """Fitzpatrick skin type, 1 (very light) to 6 (very dark)."""

    I = 1  # noqa: E741  the scale is written in roman numerals
    II = 2
    III = 3
    IV = 4
    V = 5
    VI = 6

    @property
    def phrase(self) -> str:
        """The skin type in words, as it stands in a caption."""
        return _TONES[self]

    @property
    def tone(self) -> str:
        """The coarse group: light (1-2), medium (3-4) or dark (5-6)."""
        return ("light", "medium", "dark")[(self - 1) // 2]


_TONES = {
    SkinType.I: "very light",
    SkinType.II: "light",
    SkinType.III: "light brown",
    SkinType.IV: "medium brown",
    SkinType.V: "dark",
    SkinType.VI: "very dark",
}


class SkinTypeOrigin(StrEnum):
    """How a record's skin type is known."""

    LABELLED = "labelled"
    ESTIMATED = "estimated"
    DRAWN = "drawn"


class Sex(StrEnum):
    FEMALE = "female"
    MALE = "male"


class Site(StrEnum):
    """Body site, in HAM10000's words; unknown is None, never a value."""

    ABDOMEN = "abdomen"
    ACRAL = "acral"
    BACK = "back"
    CHEST = "chest"
    EAR = "ear"
    FACE = "face"
    FOOT = "foot"
    GENITAL = "genital"
    HAND = "hand"
    LOWER_EXTREMITY = "lower extremity"
    NECK = "neck"
    SCALP = "scalp"
    TRUNK = "trunk"
    UPPER_EXTREMITY = "upper extremity"


class Split(StrEnum):
    TRAIN = "train"
    VAL = "val"
    TEST = "test"


ImageId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,127}$")]
"""An image's name within its source: letters, digits, dot, dash, underscore, so that it can never be a path."""


class Record(BaseModel):
    """One image and what is known of it; what is not known is None."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    image_id: ImageId
    file: str
    """Path relative to the source's folder, with forward slashes."""
    sha256: str
    size_bytes: int
    width_px: int
    height_px: int
    diagnosis: Diagnosis
    source_label: str
    """The label as the source writes it."""
    malignant: bool
    age_years: int | None = Field(default=None, ge=1, le=120)
    sex: Sex | None = None
    site: Site | None = None
    skin_type: SkinType | None = None
    skin_type_origin: SkinTypeOrigin | None = None
    lesion_id: str | None = None
    patient_id: str | None = None
    concepts: dict[str, str] = Field(default_factory=dict)
    """What else the source says of the image (dx_type, 7-point criteria ...), in its own words."""
    duplicate_of: str | None = None
    """image_id of the first record of this source with the same bytes."""


class Quarantined(BaseModel):
    """One row or file that could not become a record, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    image_id: str | None
    file: str | None
    reason: str


RECORD_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("file", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("width_px", pa.int32(), nullable=False),
        pa.field("height_px", pa.int32(), nullable=False),
        pa.field("diagnosis", pa.string(), nullable=False),
        pa.field("source_label", pa.string(), nullable=False),
        pa.field("malignant", pa.bool_(), nullable=False),
        pa.field("age_years", pa.int32()),
        pa.field("sex", pa.string()),
        pa.field("site", pa.string()),
        pa.field("skin_type", pa.int32()),
        pa.field("skin_type_origin", pa.string()),
        pa.field("lesion_id", pa.string()),
        pa.field("patient_id", pa.string()),
        pa.field("concepts", pa.map_(pa.string(), pa.string())),
        pa.field("duplicate_of", pa.string()),
    ]
)
"""Column names and types of the `records` table: those of `Record`."""

QUARANTINE_SCHEMA = pa.schema([pa.field(name, pa.string()) for name in Quarantined.model_fields])


def records_table(records: list[Record]) -> pa.Table:
    """The records as a table with `RECORD_SCHEMA`, in the order given."""
    return pa.Table.from_pylist(
        [record.model_dump() | {"concepts": list(record.concepts.items())} for record in records],
        schema=RECORD_SCHEMA,
    )


def quarantine_table(rows: list[Quarantined]) -> pa.Table:
    """The quarantined rows as a table with `QUARANTINE_SCHEMA`."""
    return pa.Table.from_pylist([row.model_dump() for row in rows], schema=QUARANTINE_SCHEMA)
