"""The vocabulary as types: what one image is, and what may be known of it.

Everything else speaks in these words. No file access and no array code belongs here.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum, StrEnum
from typing import Annotated

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field


class Modality(StrEnum):
    """How an image was taken; its words open every caption."""

    DERMOSCOPIC = "dermoscopic"
    CLINICAL = "clinical"
    ENDOSCOPIC = "endoscopic"


class Diagnosis(StrEnum):
    """The canonical diagnoses: HAM10000's seven (Tschandl et al. 2018, doi:10.1038/sdata.2018.161), then the others.

    The last eight are the findings of Kvasir's endoscopic images, which Med-Art learns.

    The order is fixed and grows only at its end: classes of every classifier and generator are in this order. The
    source's own label stands beside it in every record (`source_label`); one without a place here gives no diagnosis.

    akiec is not ak: HAM10000's akiec holds actinic keratoses and intraepithelial carcinomas, which ISIC 2019 tells
    apart as AK and SCC. bkl is HAM10000's umbrella of seborrheic keratosis, solar lentigo and lichen-planus-like
    keratosis; vasc that of angioma, angiokeratoma, pyogenic granuloma and haemorrhage.
    """

    AKIEC = "akiec"
    BCC = "bcc"
    BKL = "bkl"
    DF = "df"
    MEL = "mel"
    NV = "nv"
    VASC = "vasc"
    AK = "ak"
    SCC = "scc"
    ACNE = "acne"
    ALLERGIC_CONTACT_DERMATITIS = "allergic_contact_dermatitis"
    CUTANEOUS_LYMPHOMA = "cutaneous_lymphoma"
    DRUG_ERUPTION = "drug_eruption"
    ECZEMA = "eczema"
    ERYTHEMA_MULTIFORME = "erythema_multiforme"
    FOLLICULITIS = "folliculitis"
    GRANULOMA_ANNULARE = "granuloma_annulare"
    HERPES_SIMPLEX = "herpes_simplex"
    HERPES_ZOSTER = "herpes_zoster"
    IMPETIGO = "impetigo"
    INSECT_BITE = "insect_bite"
    IRRITANT_CONTACT_DERMATITIS = "irritant_contact_dermatitis"
    KAPOSI_SARCOMA = "kaposi_sarcoma"
    KELOID = "keloid"
    KERATOSIS_PILARIS = "keratosis_pilaris"
    LICHEN_PLANUS = "lichen_planus"
    LICHEN_SIMPLEX = "lichen_simplex"
    LUPUS = "lupus"
    MOLLUSCUM = "molluscum"
    NEMATODE_INFECTION = "nematode_infection"
    NEUTROPHILIC_DERMATOSIS = "neutrophilic_dermatosis"
    PITYRIASIS_ROSEA = "pityriasis_rosea"
    PRURIGO_NODULARIS = "prurigo_nodularis"
    PSORIASIS = "psoriasis"
    ROSACEA = "rosacea"
    SCABIES = "scabies"
    SEBORRHEIC_DERMATITIS = "seborrheic_dermatitis"
    STASIS_DERMATITIS = "stasis_dermatitis"
    TINEA = "tinea"
    TINEA_VERSICOLOR = "tinea_versicolor"
    URTICARIA = "urticaria"
    VASCULITIS = "vasculitis"
    VITILIGO = "vitiligo"
    WART = "wart"
    DYED_LIFTED_POLYPS = "dyed_lifted_polyps"
    DYED_RESECTION_MARGINS = "dyed_resection_margins"
    ESOPHAGITIS = "esophagitis"
    NORMAL_CECUM = "normal_cecum"
    NORMAL_PYLORUS = "normal_pylorus"
    NORMAL_Z_LINE = "normal_z_line"
    POLYPS = "polyps"
    ULCERATIVE_COLITIS = "ulcerative_colitis"

    @property
    def phrase(self) -> str:
        """The diagnosis in words, as it stands in a caption."""
        return _PHRASES.get(self, self.value.replace("_", " "))

    @property
    def is_malignant(self) -> bool:
        """Whether it is malignant; akiec (actinic keratosis, intraepithelial carcinoma) counts as in-situ disease."""
        return self in _MALIGNANT


_PHRASES = {
    Diagnosis.AKIEC: "actinic keratosis or intraepithelial carcinoma",
    Diagnosis.BCC: "basal cell carcinoma",
    Diagnosis.BKL: "benign keratosis-like lesion",
    Diagnosis.DF: "dermatofibroma",
    Diagnosis.MEL: "melanoma",
    Diagnosis.NV: "melanocytic nevus",
    Diagnosis.VASC: "vascular lesion",
    Diagnosis.AK: "actinic keratosis",
    Diagnosis.SCC: "squamous cell carcinoma",
    Diagnosis.KAPOSI_SARCOMA: "Kaposi sarcoma",
    Diagnosis.LUPUS: "lupus erythematosus",
    Diagnosis.MOLLUSCUM: "molluscum contagiosum",
    Diagnosis.NORMAL_Z_LINE: "normal Z-line",
}
_MALIGNANT = {
    Diagnosis.AKIEC,
    Diagnosis.BCC,
    Diagnosis.MEL,
    Diagnosis.SCC,
    Diagnosis.CUTANEOUS_LYMPHOMA,
    Diagnosis.KAPOSI_SARCOMA,
}


def canonical(diagnoses: Iterable[str]) -> tuple[Diagnosis, ...]:
    """The different diagnoses among these, in the canonical order: the classes of whatever learns from them."""
    present = set(diagnoses)
    return tuple(diagnosis for diagnosis in Diagnosis if diagnosis in present)


class SkinTone(StrEnum):
    """The coarse group of Fitzpatrick skin types: light (1-2), medium (3-4) or dark (5-6)."""

    LIGHT = "light"
    MEDIUM = "medium"
    DARK = "dark"


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
    def tone(self) -> SkinTone:
        """The coarse group: light (1-2), medium (3-4) or dark (5-6)."""
        return tuple(SkinTone)[(self - 1) // 2]


_TONES = {
    SkinType.I: "very light",
    SkinType.II: "light",
    SkinType.III: "light brown",
    SkinType.IV: "medium brown",
    SkinType.V: "dark",
    SkinType.VI: "very dark",
}


class SkinTypeOrigin(StrEnum):
    """How a record's skin type or tone is known. What is estimated from pixels never stands there: see `statistics`."""

    LABELLED = "labelled"
    SELF_REPORTED = "self_reported"
    DRAWN = "drawn"


class Sex(StrEnum):
    FEMALE = "female"
    MALE = "male"


class AgeBand(StrEnum):
    """Band of ages, in years; unknown is None, never a value."""

    TO_29 = "0-29"
    TO_49 = "30-49"
    TO_69 = "50-69"
    FROM_70 = "70+"

    @classmethod
    def of(cls, age_years: float) -> AgeBand:
        """The band that an age in years lies in.

        Raises:
            ValueError: an age that is not in 0 to 200.
        """
        if not 0 <= age_years < 201:
            raise ValueError(f"age {age_years}: 0 to 200 years are known")
        return tuple(cls)[sum(age_years >= first for first in (30, 50, 70))]

    @classmethod
    def of_range(cls, age_range: str) -> AgeBand | None:
        """The band that a range of ages ("30-39") lies in, None where it reaches over several."""
        first, last = (cls.of(int(age)) for age in age_range.split("-"))
        return first if first == last else None


class Site(StrEnum):
    """Body site, in HAM10000's words and then those of the others; unknown is None, never a value."""

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
    BUTTOCKS = "buttocks"
    FRONT_OF_TRUNK = "front of the trunk"
    HEAD_OR_NECK = "head or neck"
    ORAL_OR_GENITAL = "oral or genital"
    PALM_OR_SOLE = "palm or sole"
    SIDE_OF_TRUNK = "side of the trunk"


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
    modality: Modality
    diagnosis: Diagnosis | None
    """None where the source gives none, or one that has no place among `Diagnosis`."""
    source_label: str
    """The label as the source writes it; "" where it gives none."""
    malignant: bool | None
    """What the source says, else what follows from the diagnosis."""
    age_years: int | None = Field(default=None, ge=1, le=120)
    age_range: str | None = Field(default=None, pattern=r"^[0-9]{1,3}-[0-9]{1,3}$")
    """First and last year ("30-39") where the source gives no more than that."""
    sex: Sex | None = None
    site: Site | None = None
    skin_type: SkinType | None = None
    skin_tone: SkinTone | None = None
    """That of the skin type, or what the source says where it only tells tones apart."""
    skin_type_origin: SkinTypeOrigin | None = None
    """How skin type and tone are known; None where neither is."""
    ethnicity: str | None = None
    """Self-reported, in the source's words: a group, never a label."""
    lesion_id: str | None = None
    patient_id: str | None = None
    official_split: Split | None = None
    """The side that the publisher put it on; kept (see `splits`)."""
    concepts: dict[str, str] = Field(default_factory=dict)
    """What else the source says of the image (dx_type, 7-point criteria ...), in its own words."""
    text: str | None = None
    """The source's own caption."""
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
        pa.field("modality", pa.string(), nullable=False),
        pa.field("diagnosis", pa.string()),
        pa.field("source_label", pa.string(), nullable=False),
        pa.field("malignant", pa.bool_()),
        pa.field("age_years", pa.int32()),
        pa.field("age_range", pa.string()),
        pa.field("sex", pa.string()),
        pa.field("site", pa.string()),
        pa.field("skin_type", pa.int32()),
        pa.field("skin_tone", pa.string()),
        pa.field("skin_type_origin", pa.string()),
        pa.field("ethnicity", pa.string()),
        pa.field("lesion_id", pa.string()),
        pa.field("patient_id", pa.string()),
        pa.field("official_split", pa.string()),
        pa.field("concepts", pa.map_(pa.string(), pa.string())),
        pa.field("text", pa.string()),
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
