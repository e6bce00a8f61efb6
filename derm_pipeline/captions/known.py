"""What a row of the `records` table says that is known: every caption starts from here.

What a value "unknown" may look like is decided in this one place; a field that says it reads as one that is absent.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real
from typing import Any

from derm_pipeline.records import Diagnosis, Modality, Sex, SkinTone, SkinType

_MAX_AGE_YEARS = 120
_MISSING_WORDS = (
    r"nan|nat|none|null|nil|n/?a|n\.a\.?|unknown|unk|undefined|unspecified|undisclosed|missing|no data|unlabell?ed|"
    r"not (?:specified|reported|available|known|applicable|given)|prefer not to (?:say|answer)"
)
_NAMES_UNKNOWN = re.compile(
    rf"(?<![\w-])(?:{_MISSING_WORDS}|(?:nan|nul|unk)-class|"
    r"(?:at )?aged? 0+(?:\.0+)?|aged -\d+|0+(?:\.0+)?-year-old|skin type (?:0|-1))(?![\w-])|"
    r"\b(?:image|photograph|photo) of\W*$",
    re.IGNORECASE,
)
_NO_CONDITION = frozenset(
    {
        "misc",
        "miscellaneous",
        "other",
        "others",
        "indeterminate",
        "undetermined",
        "unclassified",
        "ungradable",
        "no label",
    }
)
"""Labels that sort an image in without saying what it shows."""
_EDGES = " .,;:-"
"""What a value may end with that has no place inside a sentence."""


def names_unknown(caption: str) -> bool:
    """Whether a caption says something that is not known: "nan", "none", "unknown", an age of 0, or nothing at all.

    Whole words count: "nonexistent", "non-melanoma" and "banana" name nothing unknown. Nor may a caption end where the
    word that matters should come ("An image of").
    """
    return not caption.strip() or _NAMES_UNKNOWN.search(caption) is not None


@dataclass(frozen=True, slots=True)
class Known:
    """The known fields of one row; None, or an empty mapping, where nothing is."""

    modality: Modality
    diagnosis: Diagnosis | None
    label: str | None
    """The source's own label on one line, lower case but for abbreviations."""
    age_years: int | None
    age_range: tuple[int, int] | None
    """First and last year; None where `age_years` says more."""
    sex: Sex | None
    site: str | None
    skin_type: SkinType | None
    skin_tone: SkinTone | None
    """That of the skin type where there is one."""
    concepts: Mapping[str, str]
    """Lower case, on one line each."""
    text: str | None
    """The source's own caption on one line."""
    is_hairy: bool
    """False also where it is not known, and of an endoscopic image: what looks for hair looks for dark lines."""

    @property
    def condition(self) -> str | None:
        """The diagnosis in words, else the source's own label; None when there is neither."""
        return self.diagnosis.phrase if self.diagnosis else self.label


def known(row: Mapping[str, Any], is_hairy: bool | None = None) -> Known:
    """Read one row of the `records` table.

    A field that is absent or holds None, NaN, "", "unknown" and its like, an age outside 1 to 120 or a skin type
    outside 1 to 6 is not known. A row without a modality is dermoscopic, as all records were before they named it.

    Raises:
        ValueError: the diagnosis or the modality is given and is not in the vocabulary.
    """
    modality = _modality(row)
    skin_type = _skin_type(row.get("skin_type"))
    age = _age(row.get("age_years"))
    return Known(
        modality=modality,
        diagnosis=_diagnosis(row),
        label=_label(row.get("source_label")),
        age_years=age,
        age_range=None if age else _age_range(row.get("age_range")),
        sex=_SEXES.get(_words(row.get("sex"))),
        site=_words(row.get("site")),
        skin_type=skin_type,
        skin_tone=skin_type.tone if skin_type else _TONES.get(_words(row.get("skin_tone"))),
        concepts=_concepts(row.get("concepts")),
        text=_sentence(row.get("text")),
        is_hairy=_is_true(is_hairy) and modality is not Modality.ENDOSCOPIC,
    )


_SEXES: dict[str | None, Sex] = {sex.value: sex for sex in Sex}
_TONES: dict[str | None, SkinTone] = {tone.value: tone for tone in SkinTone}
_MODALITIES: dict[str, Modality] = {modality.value: modality for modality in Modality}
_DIAGNOSES: dict[str, Diagnosis] = {diagnosis.value: diagnosis for diagnosis in Diagnosis}


def one_line(text: str) -> str:
    """The text in Unicode normal form C on one line: single blanks, no control characters, no byte order marks."""
    if not text.isprintable():
        text = "".join(" " if unicodedata.category(char) == "Cc" else char for char in text).replace("\ufeff", "")
    return " ".join(unicodedata.normalize("NFC", text).split())


def _words(value: Any) -> str | None:
    """The words on one line in lower case, None when it is not a text or says that it is not known."""
    return _known_words(value) if isinstance(value, str) else None


@lru_cache(maxsize=4096)
def _known_words(value: str) -> str | None:
    words = one_line(str(value)).strip(_EDGES).lower()
    return words if any(letter.isalpha() for letter in words) and not names_unknown(words) else None


def _label(value: Any) -> str | None:
    return _own_label(value) if isinstance(value, str) else None


@lru_cache(maxsize=4096)
def _own_label(value: str) -> str | None:
    label = one_line(str(value).replace("_", " ")).strip(_EDGES)
    words = _known_words(label)
    if words is None or words in _NO_CONDITION:
        return None
    if label.isupper() and len(label) > 5 and not _ABBREVIATIONS.fullmatch(label):  # a table that shouts
        return words
    return " ".join(map(_in_lower_case, label.split()))


_ABBREVIATIONS = re.compile(r"[A-Z]{2,5}(?:[/-][A-Z]{2,5})+")
_LETTER_OF_A_NAME = re.compile(r"[A-Z]-[a-z]")


def _in_lower_case(word: str) -> str:
    """The word in lower case, but for abbreviations ("SCC", "SCC/BCC") and letters that name something ("T-cell")."""
    is_short = (word.isupper() and 2 <= len(word) <= 5) or _ABBREVIATIONS.fullmatch(word)
    return word if is_short or _LETTER_OF_A_NAME.match(word) else word.lower()


def _sentence(value: Any) -> str | None:
    """A caption that stands as its source wrote it, unless it says nothing, or nothing that is known."""
    if not isinstance(value, str):
        return None
    sentence = one_line(value)
    return sentence if any(letter.isalpha() for letter in sentence) and not names_unknown(sentence) else None


def _diagnosis(row: Mapping[str, Any]) -> Diagnosis | None:
    code = _words(row.get("diagnosis"))
    if code is None:
        return None
    if code not in _DIAGNOSES:
        raise ValueError(
            f"diagnosis {code!r} of image {row.get('image_id')!r} is not in the vocabulary; "
            f"it must be one of {', '.join(_DIAGNOSES)}"
        )
    return _DIAGNOSES[code]


def _modality(row: Mapping[str, Any]) -> Modality:
    word = _words(row.get("modality"))
    if word is None:
        return Modality.DERMOSCOPIC
    if word not in _MODALITIES:
        raise ValueError(
            f"modality {word!r} of image {row.get('image_id')!r} is not known; "
            f"it must be one of {', '.join(_MODALITIES)}"
        )
    return _MODALITIES[word]


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (Real, str)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _age(value: Any) -> int | None:
    age = _number(value)
    return int(age) if age is not None and 1 <= age <= _MAX_AGE_YEARS else None


def _age_range(value: Any) -> tuple[int, int] | None:
    match = re.fullmatch(r"\s*(\d{1,3})\s*-\s*(\d{1,3})\s*", value) if isinstance(value, str) else None
    if match is None:
        return None
    first, last = int(match[1]), min(int(match[2]), _MAX_AGE_YEARS)
    says_something = last >= 1 and first <= last and (first, last) != (0, _MAX_AGE_YEARS)
    return (first, last) if says_something else None


def _skin_type(value: Any) -> SkinType | None:
    number = _number(value)
    return SkinType(int(number)) if number in _SKIN_TYPES else None


_SKIN_TYPES = frozenset(float(skin_type) for skin_type in SkinType)


def _concepts(value: Any) -> dict[str, str]:
    """The concepts that are known; they come as a mapping or, from pyarrow, as pairs."""
    if isinstance(value, Mapping):
        pairs: Iterable[Any] = value.items()
    elif isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        pairs = value
    else:
        return {}
    return {str(name): words for name, given in pairs if (words := _words(given)) is not None}


def _is_true(is_hairy: bool | None) -> bool:
    """True only for a true truth value: NaN, as pandas writes a missing flag, is not hair."""
    return is_hairy is not None and bool(is_hairy == True)  # noqa: E712  numpy's bool too, NaN not
