"""The laws of `rich`, `label` and `isic2020` captions, and the class that a simple sentence names.

Each law is a pure function of what is known of one image.
"""

from __future__ import annotations

import re

from derm_pipeline.captions.known import Known
from derm_pipeline.records import Diagnosis, Modality, Sex, Site

TRIGGER_WORD = "me1anoma"
"""The rare word, with a digit one, by which the ISIC 2020 captions name melanoma."""

_ADULT_AGE_YEARS = 18
_OLDEST_AGE_YEARS = 120

_OPENINGS = {
    Modality.DERMOSCOPIC: "dermoscopic image of",
    Modality.CLINICAL: "clinical photograph of",
    Modality.ENDOSCOPIC: "endoscopic image of",
}
_UNNAMED = {
    Modality.DERMOSCOPIC: "skin lesion",
    Modality.CLINICAL: "skin condition",
    Modality.ENDOSCOPIC: "finding",
}
"""What an image shows of which nothing is said."""

_PLACES: dict[str, str] = {
    Site.ACRAL: "on the acral skin",
    Site.GENITAL: "in the genital area",
    Site.ORAL_OR_GENITAL: "in the oral or genital area",
    Site.PALM_OR_SOLE: "on a palm or sole",
}
_ISIC_SITES: dict[str, str] = {
    Site.TRUNK: "torso",
    Site.FRONT_OF_TRUNK: "torso",
    Site.SIDE_OF_TRUNK: "torso",
    Site.HEAD_OR_NECK: "head/neck",
    Site.ORAL_OR_GENITAL: "oral/genital",
    Site.PALM_OR_SOLE: "palms/soles",
}
"""ISIC 2020's own words (anatom_site_general_challenge)."""

_COUNTED = frozenset(
    {
        Diagnosis.AKIEC,
        Diagnosis.BCC,
        Diagnosis.BKL,
        Diagnosis.DF,
        Diagnosis.MEL,
        Diagnosis.NV,
        Diagnosis.VASC,
        Diagnosis.AK,
        Diagnosis.SCC,
        Diagnosis.CUTANEOUS_LYMPHOMA,
        Diagnosis.DRUG_ERUPTION,
        Diagnosis.INSECT_BITE,
        Diagnosis.KAPOSI_SARCOMA,
        Diagnosis.KELOID,
        Diagnosis.NEMATODE_INFECTION,
        Diagnosis.NEUTROPHILIC_DERMATOSIS,
        Diagnosis.WART,
    }
)
"""Diagnoses that one has one of ("a wart"); the others are conditions ("psoriasis")."""

_COUNTED_NOUN = re.compile(
    r"(?:(?<!glauc)(?<!trach)oma|nevus|naevus|cyst|lesion|tumou?r|ulcer|polyp|wart|scar|abscess|keratosis|lentigo|"
    r"eruption|infection|keloid|papule|macule|plaque|nodule|proliferation|bite|burn|granuloma pyogenic|melanosis)$"
)
"""How a source's own label ends where it is something that one has one of."""

_MAX_WORDS_OF_A_CLASS = 6
_CLASS = re.compile(
    r"\s*(?:(?:an?|the)\s+(?:[\w-]+\s+){0,2}?|(?:dermoscopic|clinical|endoscopic)\s+)?"
    r"(?:image|photograph)\s+of\b(?P<name>.*)",
    re.IGNORECASE | re.DOTALL,
)


def rich_caption(image: Known) -> str:
    """A sentence of every known field: "dermoscopic image of a melanoma on the back of a man, with hair"."""
    caption = f"{_OPENINGS[image.modality]} {_finding(image)}"
    where, person = place(image.site), _person(image)
    if where:
        caption += f" {where}"
    if person:
        caption += f" {'of' if where else 'in'} {person}"
    return caption + ", with hair" * image.is_hairy


def label_caption(image: Known) -> str:
    """The diagnosis, else the source's own label, alone: "An image of melanoma"."""
    return f"An image of {condition_or_unnamed(image)}"


def isic2020_caption(image: Known) -> str:
    """The captions of the ISIC 2020 melanoma images: "photo of male skin, me1anoma on torso, at age 70, hairy".

    The site is the source's own word (concept "site") where it is kept. An age range is not said: the law has none.
    """
    condition = condition_or_unnamed(image)
    caption = f"photo of {image.sex.value} skin" if image.sex else "photo of skin"
    caption += f", {TRIGGER_WORD if condition == Diagnosis.MEL.phrase else condition}"
    site = image.concepts.get("site") or (image.site and _ISIC_SITES.get(image.site, image.site))
    if site:
        caption += f" on {site}"
    if image.age_years:
        caption += f", at age {image.age_years}"
    return caption + ", hairy" * image.is_hairy


def class_of(text: str) -> str:
    """The class that a simple sentence names: "An image of Dermatofibroma" -> "Dermatofibroma".

    It is all that follows the first "image of" (or "photograph of") at the head of the text, less a full stop; a text
    without such a head is itself the class. Med-Art's own script takes what follows the last "of", even within a word
    ("ibroma").

    Raises:
        ValueError: no class is left ("An image of", or an empty text).
    """
    match = _CLASS.match(text)
    name = " ".join((match["name"] if match else text).split()).removesuffix(".").rstrip()
    if not name:
        raise ValueError(f"{text!r} names no class; write for example 'An image of melanoma'")
    return name


def class_name(image: Known) -> str | None:
    """The condition in words, else the class that the source's own caption names in a simple sentence; None without."""
    if image.condition or image.text is None or not _CLASS.match(image.text):
        return image.condition
    try:
        name = class_of(image.text)
    except ValueError:
        return None
    is_simple = len(name.split()) <= _MAX_WORDS_OF_A_CLASS and not re.search(r"[.,;:]", name)
    return name if is_simple else None


def condition_or_unnamed(image: Known) -> str:
    """The condition in words without an article, or "skin lesion" and its like where none is known."""
    return image.condition or _UNNAMED[image.modality]


def place(site: str | None) -> str | None:
    """The site as it stands in a sentence: "on the back", "on a palm or sole"."""
    return _PLACES.get(site, f"on the {site}") if site else None


def with_article(words: str) -> str:
    """The words with "a" or "an"; numbers as they are spoken (an 8, an 11, an 18, an 80)."""
    is_vowel = re.match(r"[aeio]|u(?!ni(?!n))|8|1[18]\b", words, re.IGNORECASE) is not None
    return f"{'an' if is_vowel else 'a'} {words}"


def _finding(image: Known) -> str:
    words = condition_or_unnamed(image)
    if image.diagnosis:
        is_counted = image.diagnosis in _COUNTED
    else:
        noun = re.sub(r"\s*\([^)]*\)|\s+NOS$", "", words)
        is_counted = image.label is None or _COUNTED_NOUN.search(noun) is not None
    return with_article(words) if is_counted else words


def _person(image: Known) -> str | None:
    """The person with every known trait, or None when nothing is known of them."""
    tone = image.skin_type.phrase if image.skin_type else image.skin_tone
    if not (image.age_years or image.age_range or image.sex or tone):
        return None
    youngest, oldest = image.age_range or (image.age_years or _ADULT_AGE_YEARS,) * 2
    noun = _noun(image.sex, youngest, oldest)
    person = with_article(f"{image.age_years}-year-old {noun}" if image.age_years else noun)
    if image.age_range:
        person += f" {_aged(*image.age_range)}"
    return f"{person} with {tone} skin" if tone else person


def _aged(first: int, last: int) -> str:
    if last == _OLDEST_AGE_YEARS:
        return f"aged {first} or over"
    if first == 0:
        return f"aged up to {last}"
    return f"aged {first}" if first == last else f"aged {first} to {last}"


def _noun(sex: Sex | None, youngest: int, oldest: int) -> str:
    """What a person of these ages is called; one who may be a child or grown up is neither girl nor woman."""
    if oldest < _ADULT_AGE_YEARS:
        return {Sex.FEMALE: "girl", Sex.MALE: "boy", None: "child"}[sex]
    if youngest < _ADULT_AGE_YEARS:
        return sex.value if sex else "person"
    return {Sex.FEMALE: "woman", Sex.MALE: "man", None: "person"}[sex]
