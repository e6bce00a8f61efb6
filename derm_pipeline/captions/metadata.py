"""Record -> caption: what is known of an image in words, and nothing else.

Three styles: our own (`rich`), the label alone, and that of the ISIC 2020 melanoma captions. A caption is a pure
function of the row. What a value "unknown" may look like is decided here, in one place.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from derm_pipeline.records import Diagnosis, Sex, Site, SkinType

CaptionStyle = Literal["rich", "label", "isic2020"]

TRIGGER_WORD = "me1anoma"
"""The rare word, with a digit one, by which the ISIC 2020 captions name melanoma."""

_ADULT_AGE_YEARS = 18
_MAX_AGE_YEARS = 120
_MISSING_WORDS = (
    r"nan|nat|none|null|nil|n/?a|unknown|unk|undefined|unspecified|missing|not specified|not reported|not available"
)
_NAMES_UNKNOWN = re.compile(
    rf"(?<![\w-])(?:{_MISSING_WORDS}|(?:at )?age 0+(?:\.0+)?|0+(?:\.0+)?-year-old|skin type (?:0|-1))(?![\w-])",
    re.IGNORECASE,
)

_PLACES: dict[str, str] = {
    Site.ACRAL: "on the acral skin",
    Site.GENITAL: "in the genital area",
}
_ISIC_SITES: dict[str, str] = {Site.TRUNK: "torso"}


class MetadataCaptionConfig(BaseModel):
    """How a record becomes a caption."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    style: CaptionStyle = "rich"
    """rich: a sentence of every known field; label: the diagnosis alone; isic2020: as the ISIC 2020 captions."""


def metadata_captions(
    rows: Sequence[Mapping[str, Any]],
    hairy: Sequence[bool | None] | None = None,
    config: MetadataCaptionConfig | None = None,
) -> list[str]:
    """One caption a row, in order; see `metadata_caption`.

    Args:
        rows: Rows of the `records` table as mappings.
        hairy: Whether each image shows hair, None where that is not known; None for all when left out.
        config: The style; the default when left out.

    Raises:
        ValueError: `hairy` has another length than `rows`, or a row names a diagnosis outside the vocabulary.
    """
    if hairy is None:
        hairy = [None] * len(rows)
    if len(hairy) != len(rows):
        raise ValueError(f"hairy has {len(hairy)} values for {len(rows)} rows; give one for each row")
    return [metadata_caption(row, is_hairy, config) for row, is_hairy in zip(rows, hairy, strict=True)]


def metadata_caption(
    row: Mapping[str, Any], is_hairy: bool | None = None, config: MetadataCaptionConfig | None = None
) -> str:
    """The caption of one row of the `records` table.

    Fields read: diagnosis, age_years, sex, site, skin_type. A field that is absent or holds None, NaN, "", "unknown"
    and its like, an age outside 1 to 120 or a skin type outside 1 to 6 drops its clause.

    Raises:
        ValueError: the diagnosis is neither missing nor one of `Diagnosis`.
    """
    style = (config or MetadataCaptionConfig()).style
    if style == "label":
        return f"An image of {_diagnosis_phrase(row)}"
    if style == "isic2020":
        return _isic2020(row, is_hairy)
    return _rich(row, is_hairy)


def names_unknown(caption: str) -> bool:
    """Whether a caption says something that is not known: "nan", "none", "unknown", an age of 0, or nothing at all."""
    return not caption.strip() or _NAMES_UNKNOWN.search(caption) is not None


def _rich(row: Mapping[str, Any], is_hairy: bool | None) -> str:
    caption = f"dermoscopic image of {_with_article(_diagnosis_phrase(row))}"
    place, person = _place(row), _person(row)
    if place:
        caption += f" {place}"
    if person:
        caption += f" {'of' if place else 'in'} {person}"
    return caption + ", with hair" * _is_true(is_hairy)


def _isic2020(row: Mapping[str, Any], is_hairy: bool | None) -> str:
    """The captions of the ISIC 2020 melanoma images: "photo of male skin, me1anoma on torso, at age 70, hairy"."""
    sex, site, age = _sex(row), _text(row, "site"), _age(row)
    phrase = _diagnosis_phrase(row)
    caption = f"photo of {sex.value} skin" if sex else "photo of skin"
    caption += f", {TRIGGER_WORD if phrase == Diagnosis.MEL.phrase else phrase}"
    if site:
        caption += f" on {_ISIC_SITES.get(site, site)}"
    if age:
        caption += f", at age {age}"
    return caption + ", hairy" * _is_true(is_hairy)


def _place(row: Mapping[str, Any]) -> str | None:
    site = _text(row, "site")
    if site is None:
        return None
    return _PLACES.get(site, f"on the {site}")


def _person(row: Mapping[str, Any]) -> str | None:
    """The person with every known trait, or None when nothing is known of them."""
    age, sex, skin_type = _age(row), _sex(row), _skin_type(row)
    if age is None and sex is None and skin_type is None:
        return None
    noun = _noun(sex, is_child=age is not None and age < _ADULT_AGE_YEARS)
    person = _with_article(f"{age}-year-old {noun}" if age else noun)
    return f"{person} with {skin_type.phrase} skin" if skin_type else person


def _noun(sex: Sex | None, *, is_child: bool) -> str:
    if sex is None:
        return "child" if is_child else "person"
    if is_child:
        return "girl" if sex is Sex.FEMALE else "boy"
    return "woman" if sex is Sex.FEMALE else "man"


def _with_article(words: str) -> str:
    """The words with "a" or "an"; numbers as they are spoken (an 8, an 11, an 18, an 80)."""
    is_vowel = words[0].lower() in "aeiou" or re.match(r"8|1[18]\b", words) is not None
    return f"{'an' if is_vowel else 'a'} {words}"


def _diagnosis_phrase(row: Mapping[str, Any]) -> str:
    code = _text(row, "diagnosis")
    if code is None:
        return "skin lesion"
    if code not in set(Diagnosis):
        known = ", ".join(Diagnosis)
        raise ValueError(
            f"diagnosis {code!r} of image {row.get('image_id')!r} is not in the vocabulary; it must be one of {known}"
        )
    return Diagnosis(code).phrase


def _text(row: Mapping[str, Any], field: str) -> str | None:
    """The field's words on one line, None when it is not a text or says that it is not known."""
    value = row.get(field)
    if not isinstance(value, str):
        return None
    words = " ".join(value.split()).lower()
    return words if any(letter.isalpha() for letter in words) and not names_unknown(words) else None


def _number(row: Mapping[str, Any], field: str) -> float | None:
    value = row.get(field)
    if isinstance(value, bool) or not isinstance(value, (Real, str)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _age(row: Mapping[str, Any]) -> int | None:
    age = _number(row, "age_years")
    return int(age) if age is not None and 1 <= age <= _MAX_AGE_YEARS else None


def _skin_type(row: Mapping[str, Any]) -> SkinType | None:
    number = _number(row, "skin_type")
    return SkinType(int(number)) if number is not None and number in set(SkinType) else None


def _sex(row: Mapping[str, Any]) -> Sex | None:
    word = _text(row, "sex")
    return Sex(word) if word in set(Sex) else None


def _is_true(is_hairy: bool | None) -> bool:
    """True only for a true truth value: NaN, as pandas writes a missing flag, is not hair."""
    return is_hairy is not None and bool(is_hairy == True)  # noqa: E712  numpy's bool too, NaN not
