"""What a row of an imagefolder's table, or a path without one, says of an image."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from derm_pipeline.records import Diagnosis, Modality, Sex, Site, SkinTone, SkinType, Split
from derm_pipeline.sources.listing import (
    UNKNOWN_WORDS,
    BadRowError,
    Candidate,
    parse_age,
    parse_mapped,
    parse_word_or_none,
)
from derm_pipeline.sources.words import known_cells, known_or_none

if TYPE_CHECKING:
    from derm_pipeline.sources.imagefolder import ImageFolderConfig

SPLITS = {split.value: split for split in Split} | {"validation": Split.VAL, "valid": Split.VAL}
_SITES: dict[str, Site | None] = {site.value: site for site in Site}
_SEXES = {"female": Sex.FEMALE, "male": Sex.MALE, "f": Sex.FEMALE, "m": Sex.MALE}
_SKIN_TYPES: dict[str, SkinType | None] = {
    "-1": None,  # Fitzpatrick17k's spelling of unknown
    **{str(skin_type.value): skin_type for skin_type in SkinType},
    **{skin_type.name.lower(): skin_type for skin_type in SkinType},
}
_MALIGNANT = {
    **dict.fromkeys(("true", "1", "yes", "malignant"), True),
    **dict.fromkeys(("false", "0", "no", "benign"), False),
}


class CellReader:
    """Reads the rows of one table.

    Args:
        settings: how the words are to be understood.
        columns: our name of a column -> the table's, for those that the table has.
        diagnoses: a label in lower case -> what it means here.
    """

    def __init__(
        self,
        settings: ImageFolderConfig,
        columns: Mapping[str, str],
        diagnoses: Mapping[str, Diagnosis | None],
    ) -> None:
        self.columns = columns
        self._settings = settings
        self._diagnoses = diagnoses
        self._sites = _SITES | settings.sites
        self._used = frozenset(columns.values())

    def candidate(self, cells: Mapping[str, str], file: str | None, image_id: str | None = None) -> Candidate:
        """What a row says; `image_id` where it is not that of the table.

        Raises:
            BadRowError: a word that is not understood.
        """
        source_label, diagnosis = self._labels(cells)
        malignant = parse_mapped(_MALIGNANT, *self._cell(cells, "malignant"))
        modality = parse_word_or_none(Modality, *self._cell(cells, "modality", lower=True))
        skin_type = parse_mapped(_SKIN_TYPES, *self._cell(cells, "skin_type"))
        skin_tone = parse_word_or_none(SkinTone, *self._cell(cells, "skin_tone", lower=True))
        if skin_type is not None and skin_tone not in (None, skin_type.tone):
            raise BadRowError(f"skin type {skin_type.value} is {skin_type.tone}, and the skin tone says {skin_tone}")
        return Candidate(
            image_id=cells[self.columns["image_id"]] if image_id is None else image_id,
            file=file,
            source_label=source_label,
            diagnosis=diagnosis,
            modality=self._settings.modality if modality is None else modality,
            malignant=self._settings.malignant if malignant is None else malignant,
            age_years=parse_age(*self._cell(cells, "age_years")),
            age_range=_age_range(*self._cell(cells, "age_range")),
            sex=parse_mapped(_SEXES, *self._cell(cells, "sex")),
            site=parse_mapped(self._sites, *self._cell(cells, "site")),
            skin_type=skin_type,
            skin_tone=skin_tone,
            skin_type_origin=self._settings.skin_type_origin if skin_type or skin_tone else None,
            ethnicity=self._known(cells, "ethnicity"),
            lesion_id=self._known(cells, "lesion_id"),
            patient_id=self._known(cells, "patient_id"),
            official_split=parse_mapped(SPLITS, *self._cell(cells, "split")),
            concepts=known_cells(cells, tuple(name for name in cells if name not in self._used)),
            text=self._known(cells, "text"),
        )

    def from_path(self, image_id: str, file: str, text: str | None) -> Candidate:
        """What an image's folders say of it: the nearest is its label; train, val or test is its official split.

        Raises:
            BadRowError: the label is not understood, and the settings refuse such.
        """
        folders = file.split("/")[:-1]
        splits = [SPLITS[name.lower()] for name in folders if name.lower() in SPLITS]
        label = folders[-1] if folders and folders[-1].lower() not in SPLITS else ""
        return Candidate(
            image_id=image_id,
            file=file,
            source_label=label,
            diagnosis=self._meaning(label),
            modality=self._settings.modality,
            malignant=self._settings.malignant,
            official_split=splits[0] if splits else None,
            text=text,
        )

    def _cell(self, cells: Mapping[str, str], name: str, *, lower: bool = False) -> tuple[str, str]:
        """The column's name in the table and the row's cell; a whole number that pandas made a float is one again."""
        column = self.columns.get(name)
        if column is None:
            return name, ""
        text = cells.get(column, "")
        if "." in text:
            text = re.sub(r"^(-?[0-9]+)\.0+$", r"\1", text)
        return column, text.lower() if lower else text

    def _known(self, cells: Mapping[str, str], name: str) -> str | None:
        return known_or_none(cells.get(self.columns[name], "")) if name in self.columns else None

    def _labels(self, cells: Mapping[str, str]) -> tuple[str, Diagnosis | None]:
        told = [self._cell(cells, name)[1] for name in ("diagnosis", "source_label")]
        known = [text if text.lower() in self._diagnoses else known_or_none(text) or "" for text in told]
        diagnosis, label = known
        return label or diagnosis, self._meaning(diagnosis or label)

    def _meaning(self, label: str) -> Diagnosis | None:
        if label.lower() in self._diagnoses:
            return self._diagnoses[label.lower()]
        if label and self._settings.unmapped == "refuse":
            allowed = ", ".join(self._diagnoses)
            raise BadRowError(f"the label {label[:80]!r} means no diagnosis here; known: {allowed}")
        return None


def _age_range(column: str, text: str) -> str | None:
    if text.lower() in UNKNOWN_WORDS:
        return None
    found = re.fullmatch(r"([0-9]{1,3})\s*[-\u2013]\s*([0-9]{1,3})", text)
    if found is None or not int(found[1]) <= int(found[2]) <= 120:
        raise BadRowError(f"{column} {text[:80]!r} is not a range of years such as 30-39")
    return f"{int(found[1])}-{int(found[2])}"
