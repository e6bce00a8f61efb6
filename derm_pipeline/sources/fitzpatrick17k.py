"""Fitzpatrick17k (Groh et al. 2021), and the part of it that From Majority to Minority works on (Wang et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from derm_pipeline.records import Diagnosis, Modality, SkinTypeOrigin
from derm_pipeline.sources.base import OnProgress
from derm_pipeline.sources.conditions import SKIN_TYPES, diagnoses_of
from derm_pipeline.sources.layout import Layout
from derm_pipeline.sources.listing import BadRowError, Candidate, Listing, pair, parse_mapped
from derm_pipeline.sources.tables import Row, read_table
from derm_pipeline.sources.words import known_cells, known_or_none

COLUMNS = ("md5hash", "fitzpatrick_scale", "fitzpatrick_centaur", "label", "three_partition_label", "qc")
CONCEPTS = ("fitzpatrick_centaur", "nine_partition_label", "three_partition_label", "qc", "url")
"""Columns kept as concepts, in the publisher's words; `fitzpatrick_centaur` is the second annotator (-1: unknown)."""

_LABELS = """
acanthosis nigricans; acne; acne vulgaris; acquired autoimmune bullous diseaseherpes gestationis;
acrodermatitis enteropathica; actinic keratosis; allergic contact dermatitis; aplasia cutis; basal cell carcinoma;
basal cell carcinoma morpheiform; becker nevus; behcets disease; calcinosis cutis; cheilitis; congenital nevus;
dariers disease; dermatofibroma; dermatomyositis; disseminated actinic porokeratosis; drug eruption;
drug induced pigmentary changes; dyshidrotic eczema; eczema; ehlers danlos syndrome; epidermal nevus;
epidermolysis bullosa; erythema annulare centrifigum; erythema elevatum diutinum; erythema multiforme;
erythema nodosum; factitial dermatitis; fixed eruptions; folliculitis; fordyce spots; granuloma annulare;
granuloma pyogenic; hailey hailey disease; halo nevus; hidradenitis; ichthyosis vulgaris; incontinentia pigmenti;
juvenile xanthogranuloma; kaposi sarcoma; keloid; keratosis pilaris; langerhans cell histiocytosis; lentigo maligna;
lichen amyloidosis; lichen planus; lichen simplex; livedo reticularis; lupus erythematosus; lupus subacute;
lyme disease; lymphangioma; malignant melanoma; melanoma; milia; mucinosis; mucous cyst; mycosis fungoides; myiasis;
naevus comedonicus; necrobiosis lipoidica; nematode infection; neurodermatitis; neurofibromatosis;
neurotic excoriations; neutrophilic dermatoses; nevocytic nevus; nevus sebaceous of jadassohn;
papilomatosis confluentes and reticulate; paronychia; pediculosis lids; perioral dermatitis; photodermatoses;
pilar cyst; pilomatricoma; pityriasis lichenoides chronica; pityriasis rosea; pityriasis rubra pilaris;
porokeratosis actinic; porokeratosis of mibelli; porphyria; port wine stain; prurigo nodularis; psoriasis;
pustular psoriasis; pyogenic granuloma; rhinophyma; rosacea; sarcoidosis; scabies; scleroderma; scleromyxedema;
seborrheic dermatitis; seborrheic keratosis; solid cystic basal cell carcinoma; squamous cell carcinoma; stasis edema;
stevens johnson syndrome; striae; sun damaged skin; superficial spreading melanoma ssm; syringoma; telangiectases;
tick bite; tuberous sclerosis; tungiasis; urticaria; urticaria pigmentosa; vitiligo; xanthomas; xeroderma pigmentosum
"""
DIAGNOSES = diagnoses_of(" ".join(label.split()) for label in _LABELS.split(";"))
"""The 114 labels and what each means here."""

_SKIN_TYPES = {**SKIN_TYPES, "-1": None, "-1.0": None}
_MALIGNANT = {"malignant": True, "benign": False, "non-neoplastic": False}
_WRONGLY_LABELLED = "3"  # qc reads "1 Diagnostic" ... "3 Wrongly labelled" ... "5 Potentially"


def _layout(title: str, table: str, homepage: str, images: str = "") -> Layout:
    return Layout(
        title=title,
        expected=(
            f"Expected there: {table}, as published at {homepage}, and the images as <md5hash>.jpg in images/ (or "
            f"data/, or beside the table){images}"
        ),
        tables=((table,),),
        image_folders=(".", "images", "data"),
    )


class Fitzpatrick17k:
    """16,577 photographs from two atlases with 114 labels and the skin types that two teams of annotators gave.

    The skin type is `fitzpatrick_scale`, where -1 is unknown; the other team's stays in concepts. An image that the
    publisher's quality check found wrongly labelled has a source label and neither diagnosis nor malignancy, so that
    nothing is learnt from it. Malignancy is the publisher's partition, which counts actinic keratosis as malignant.
    """

    name = "fitzpatrick17k"
    title = "Fitzpatrick17k"
    licence = "CC BY-NC-SA 3.0"
    citation = (
        "Groh, Harris, Soenksen, Lau, Han, Kim, Koochek and Badri: Evaluating Deep Neural Networks Trained on Clinical "
        "Images in Dermatology with the Fitzpatrick 17k Dataset. CVPR Workshops (2021), arXiv:2104.09957"
    )
    homepage = "https://github.com/mattgroh/fitzpatrick17k"
    diagnoses: Mapping[str, Diagnosis | None] = DIAGNOSES
    layout = _layout(title, "fitzpatrick17k.csv", homepage)

    def prepare(self, folder: Path, on_progress: OnProgress | None = None) -> None:
        """Check that the table and at least one image file are there; see `Source.prepare`."""
        self._rows(folder)
        self.layout.require_images(folder)

    def list_images(self, folder: Path) -> Listing:
        """See `Source.list_images`."""
        # The law of From Majority to Minority draws by the order of the table, so a record says its place in it.
        rows = [replace(row, cells={**row.cells, "row": str(at)}) for at, row in enumerate(self._rows(folder))]
        return pair(self.name, rows, self.layout.find_images(folder), self._candidate, id_column="md5hash")

    def fingerprint(self, folder: Path) -> str:
        """See `Source.fingerprint`."""
        return self.layout.fingerprint(folder)

    def _rows(self, folder: Path) -> list[Row]:
        (table,) = self.layout.find_tables(folder)
        return read_table(folder / table, COLUMNS)

    def _candidate(self, cells: Mapping[str, str], file: str | None) -> Candidate:
        label = known_or_none(cells["label"]) or ""
        if label and label.lower() not in self.diagnoses:
            raise BadRowError(f"label {label[:80]!r} is none of the {len(self.diagnoses)} of {self.title}")
        skin_type = parse_mapped(_SKIN_TYPES, "fitzpatrick_scale", cells["fitzpatrick_scale"])
        malignant = parse_mapped(_MALIGNANT, "three_partition_label", cells["three_partition_label"])
        is_wrong = cells["qc"].startswith(_WRONGLY_LABELLED)
        concepts = known_cells(cells, CONCEPTS)
        if skin_type is None:
            concepts |= known_cells(cells, ("fitzpatrick_scale",))
        return Candidate(
            image_id=cells["md5hash"],
            file=file,
            source_label=label,
            diagnosis=None if is_wrong else self.diagnoses.get(label.lower()),
            modality=Modality.CLINICAL,
            malignant=None if is_wrong else malignant,
            skin_type=skin_type,
            skin_type_origin=SkinTypeOrigin.LABELLED if skin_type else None,
            concepts={**concepts, "row": cells["row"]},
        )


class FitzSubset(Fitzpatrick17k):
    """The 2,707 images of seven labels that From Majority to Minority works on; the images are Fitzpatrick17k's.

    Its authors learn from the four wrongly labelled images too; here they have no diagnosis, as in Fitzpatrick17k, and
    only their source label takes part in the authors' split.
    """

    name = "fitz_subset"
    title = "Fitz_subset (From Majority to Minority)"
    citation = (
        "Wang, Chung, Ding and Hamm: From Majority to Minority: A Diffusion-based Augmentation for Underrepresented "
        "Groups in Skin Lesion Analysis (2024), arXiv:2406.18375; images: " + Fitzpatrick17k.citation
    )
    homepage = "https://github.com/janet-sw/skin-diff"
    diagnoses: Mapping[str, Diagnosis | None] = {
        label: DIAGNOSES[label]
        for label in (
            "basal cell carcinoma",
            "folliculitis",
            "nematode infection",
            "neutrophilic dermatoses",
            "prurigo nodularis",
            "psoriasis",
            "squamous cell carcinoma",
        )
    }
    layout = _layout(
        title,
        "Fitz_subset.csv",
        homepage,
        ". The images are those of Fitzpatrick17k: copy them, or give them a second name with "
        "`cp --link ../fitzpatrick17k/images/*.jpg images/`; a symbolic link would leave the folder and is refused",
    )
