"""What a text claims of an image, held against what is known of it.

Rules of words, on the side of caution: what is denied ("no sign of melanoma"), compared ("melanoma-like", "resembling
a melanoma") or vague claims nothing, and neighbouring values (type II and "light brown skin") do not contradict.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from derm_pipeline.captions.known import known
from derm_pipeline.records import Diagnosis, Modality, Sex, Site, SkinTone, SkinType

D = Diagnosis


@dataclass(frozen=True)
class Facts:
    """What is known of one image; None where it is not."""

    modality: Modality = Modality.DERMOSCOPIC
    diagnosis: Diagnosis | None = None
    sex: Sex | None = None
    site: Site | None = None
    skin_type: SkinType | None = None
    skin_tone: SkinTone | None = None
    is_hairy: bool | None = None
    age_years: int | None = None

    @classmethod
    def of(cls, row: Mapping[str, Any], is_hairy: bool | None = None) -> Facts:
        """The facts of one row of the `records` table, as `known` reads it.

        Raises:
            ValueError: the diagnosis or the modality is not in the vocabulary.
        """
        image = known(row)
        return cls(
            modality=image.modality,
            diagnosis=image.diagnosis,
            sex=image.sex,
            site=_NAMED_SITES.get(image.site or ""),
            skin_type=image.skin_type,
            skin_tone=image.skin_tone,
            is_hairy=is_hairy,
            age_years=image.age_years,
        )


_NAMED_SITES = {site.value: site for site in Site}


def contradictions(text: str, facts: Facts) -> list[str]:
    """The phrases of a text that say something else than is known, each with what is known; [] where none does."""
    found = []
    if facts.diagnosis is not None:
        found += _against(_claimed(text, _DIAGNOSES), {facts.diagnosis}, facts.diagnosis.phrase)
    if facts.sex is not None:
        found += _against(_claimed(text, _SEXES), {facts.sex}, facts.sex.value)
    if facts.site is not None:
        found += _against(_claimed(text, _SITES), {facts.site}, facts.site.value)
    types, words = _known_skin(facts)
    if types:
        found += _against(_claimed(text, _SKINS), types, words)
    if facts.age_years is not None:
        ages = [(match.group(), int(match[1] or match[2])) for match in _AGES.finditer(text)]
        found += [
            f"{phrase!r} where age {facts.age_years} is known"
            for phrase, age in ages
            if abs(age - facts.age_years) > _AGE_TOLERANCE_YEARS
        ]
    if facts.is_hairy:
        found += [f"{match.group()!r} where hair is known" for match in _NO_HAIR.finditer(text)]
    return found


def diagnoses_named(text: str) -> list[str]:
    """The diagnoses that a text claims, in its words."""
    return [phrase for phrase, _ in _claimed(text, _DIAGNOSES)]


def _known_skin(facts: Facts) -> tuple[set[SkinType], str]:
    if facts.skin_type is not None:
        return {facts.skin_type}, f"skin type {facts.skin_type.name}"
    if facts.skin_tone is not None:
        return {kind for kind in SkinType if kind.tone is facts.skin_tone}, f"{facts.skin_tone} skin"
    return set(), ""


def _against(claims: Iterable[tuple[str, frozenset[Any]]], agreeing: set[Any], words: str) -> list[str]:
    return [f"{phrase!r} where {words} is known" for phrase, agrees in claims if not agrees & agreeing]


@dataclass(frozen=True)
class _Vocabulary:
    """Phrases (patterns) with the values that each agrees with; the longest phrase at a place counts."""

    pattern: re.Pattern[str]
    values: tuple[frozenset[Any], ...]

    @classmethod
    def of(
        cls, phrases: Mapping[str, Iterable[Any]], before: str = r"(?<![\w-])", after: str = r"(?!\w)"
    ) -> _Vocabulary:
        ordered = sorted(phrases, key=len, reverse=True)
        alternatives = "|".join(f"({phrase})" for phrase in ordered)
        return cls(
            re.compile(f"{before}(?:{alternatives}){after}", re.IGNORECASE),
            tuple(frozenset(phrases[phrase]) for phrase in ordered),
        )


def _claimed(text: str, vocabulary: _Vocabulary) -> Iterator[tuple[str, frozenset[Any]]]:
    """Phrases that the text claims, each with the values that it agrees with."""
    for match in vocabulary.pattern.finditer(text):
        if not _is_denied(text, match.start(), match.end()):
            which = next(index for index, group in enumerate(match.groups()) if group is not None)
            yield match.group(), vocabulary.values[which]


_CLAUSE_END = re.compile(r"[.;:!?]|\b(?:but|however|although|though|while|whereas|yet)\b", re.IGNORECASE)
_DENIAL = re.compile(
    r"\b(?:no|not|non|nor|without|never|neither|lacks?|lacking|absence of|absent|rather than|instead of|unlike|"
    r"excludes?|excluding|rules? out|ruling out|negative for|free of|cannot|isn't|doesn't)\b",
    re.IGNORECASE,
)
_DENIAL_REACH = 10
"""A denial holds for at most this many words after it."""
_NEW_STATEMENT = re.compile(r"\b(?:on|in|is|are|was|were|has|have|shows?|which|this|these)\b", re.IGNORECASE)
_COMPARISON = re.compile(
    r"\b(?:resembl\w+|mimic\w*|similar to|reminiscent of|like|simulat\w+)(?:\W+(?:a|an|the|that of))*\W*$",
    re.IGNORECASE,
)
_DENIED_AFTER = re.compile(
    r"-like\b|\W+(?:(?:is|are|was|were|can be|could be|seems?|appears?|has been)\s+)"
    r"(?:not|absent|unlikely|excluded|ruled out|less likely)\b",
    re.IGNORECASE,
)


def _is_denied(text: str, start: int, end: int) -> bool:
    """Whether the phrase from start to end is denied or only compared with."""
    clause = text[:start]
    ends = list(_CLAUSE_END.finditer(clause))
    clause = clause[ends[-1].end() :] if ends else clause
    denials = list(_DENIAL.finditer(clause))
    if denials:
        between = clause[denials[-1].end() :]
        if len(between.split()) <= _DENIAL_REACH and not _NEW_STATEMENT.search(between):
            return True
    return bool(_COMPARISON.search(clause) or _DENIED_AFTER.match(text, end))


_MALIGNANT = [diagnosis for diagnosis in Diagnosis if diagnosis.is_malignant]
_BENIGN = [diagnosis for diagnosis in Diagnosis if not diagnosis.is_malignant]
_DIAGNOSIS_PHRASES: dict[str, Iterable[Diagnosis]] = {
    r"(?:malignant )?melanomas?": [D.MEL],
    r"lentigo maligna(?: melanoma)?": [D.MEL],
    r"n(?:a)?ev(?:us|i)": [D.NV],
    r"basal[ -]cell (?:carcinoma|epithelioma)s?": [D.BCC],
    r"basalioma": [D.BCC],
    r"squamous[ -]cell carcinomas?(?: in situ)?": [D.SCC, D.AKIEC],
    r"keratoacanthomas?": [D.SCC],
    r"bowen'?s? disease": [D.AKIEC, D.SCC],
    r"intra-?epi(?:thelial|dermal) carcinomas?": [D.AKIEC, D.SCC],
    r"(?:actinic|solar) keratos[ei]s": [D.AK, D.AKIEC],
    r"carcinomas?": [D.BCC, D.SCC, D.AKIEC],
    r"skin cancers?": _MALIGNANT,
    r"cancer(?:ous)?": _MALIGNANT,
    r"malignan(?:t|cy)": _MALIGNANT,
    r"benign": _BENIGN,
    r"moles?": [D.NV],
    r"benign keratos[ei]s(?:-like lesions?)?": [D.BKL],
    r"(?:seborr?h?o?eic|lichenoid|lichen planus-like) keratos[ei]s": [D.BKL],
    r"solar lentig(?:o|ines)": [D.BKL],
    r"dermatofibromas?": [D.DF],
    r"histiocytomas?": [D.DF],
    r"(?:cherry |senile )?(?:ha?em)?angiomas?": [D.VASC],
    r"angiokeratomas?": [D.VASC],
    r"pyogenic granulomas?": [D.VASC],
    r"(?:atopic dermatitis|eczema)": [
        *(D.ECZEMA, D.ALLERGIC_CONTACT_DERMATITIS, D.IRRITANT_CONTACT_DERMATITIS, D.STASIS_DERMATITIS)
    ],
    r"contact dermatitis": [D.ALLERGIC_CONTACT_DERMATITIS, D.IRRITANT_CONTACT_DERMATITIS],
    r"seborr?h?o?eic dermatitis": [D.SEBORRHEIC_DERMATITIS],
    r"acne rosacea": [D.ROSACEA],
    r"psorias[ei]s": [D.PSORIASIS],
    r"ringworm": [D.TINEA],
    r"pityriasis versicolor": [D.TINEA_VERSICOLOR],
    r"hives": [D.URTICARIA],
    r"shingles": [D.HERPES_ZOSTER],
    r"(?:mycosis fungoides|cutaneous (?:t-cell )?lymphomas?)": [D.CUTANEOUS_LYMPHOMA],
    r"kaposi'?s? sarcoma": [D.KAPOSI_SARCOMA],
    r"lupus": [D.LUPUS],
    r"molluscum": [D.MOLLUSCUM],
    r"keloids?": [D.KELOID],
    r"(?:warts?|verruca)": [D.WART],
    r"insect bites?": [D.INSECT_BITE],
    r"polyps": [D.POLYPS, D.DYED_LIFTED_POLYPS],
}
_DIAGNOSES = _Vocabulary.of(
    {re.escape(diagnosis.phrase): [diagnosis] for diagnosis in Diagnosis}
    | _DIAGNOSIS_PHRASES
    # The umbrella's own words agree with what lies under it.
    | {re.escape(D.AKIEC.phrase): [D.AKIEC, D.AK, D.SCC]}
)

_SEXES = _Vocabulary.of(
    {
        r"(?:(?:wom[ae]n|females?|lady|girl)(?:'s)?|(?<!/)(?:she|hers?))": [Sex.FEMALE],
        r"(?:(?:m[ae]n|males?|gentleman|boy)(?:'s)?|(?:he|his|him)(?!/))": [Sex.MALE],
    }
)

_HEAD = [Site.FACE, Site.EAR, Site.SCALP, Site.NECK, Site.HEAD_OR_NECK, Site.ORAL_OR_GENITAL]
_TRUNK = [Site.TRUNK, Site.ABDOMEN, Site.BACK, Site.CHEST, Site.FRONT_OF_TRUNK, Site.SIDE_OF_TRUNK, Site.BUTTOCKS]
_ARM = [Site.UPPER_EXTREMITY, Site.HAND, Site.ACRAL, Site.PALM_OR_SOLE]
_LEG = [Site.LOWER_EXTREMITY, Site.FOOT, Site.ACRAL, Site.PALM_OR_SOLE]
_SITES = _Vocabulary.of(
    {
        r"(?:face|cheeks?|forehead|nose|chin|eyelids?|lips?|temple)": [
            Site.FACE,
            Site.HEAD_OR_NECK,
            Site.ORAL_OR_GENITAL,
        ],
        r"(?:scalp|head)": _HEAD,
        r"(?:ears?|earlobe)": [Site.EAR, Site.HEAD_OR_NECK, Site.FACE],
        r"neck": [Site.NECK, Site.HEAD_OR_NECK],
        r"back": [Site.BACK, Site.TRUNK, Site.SIDE_OF_TRUNK],
        r"(?:chest|breasts?|abdomen|stomach|belly)": [
            site for site in _TRUNK if site not in (Site.BACK, Site.BUTTOCKS)
        ],
        r"(?:trunk|torso)": _TRUNK,
        r"buttocks?": [Site.BUTTOCKS, Site.TRUNK, Site.LOWER_EXTREMITY, Site.GENITAL, Site.ORAL_OR_GENITAL],
        r"shoulders?": [*_ARM, *_TRUNK],
        r"(?:(?:fore)?arms?|elbows?|wrists?|hands?|palms?|thumbs?|fingers?)": _ARM,
        r"(?:legs?|thighs?|calf|calves|knees?|shins?|ankles?|foot|feet|soles?|heels?|toes?)": _LEG,
        r"(?:genitals?|penis|vulva|scrotum)": [Site.GENITAL, Site.ORAL_OR_GENITAL],
    },
    # A place is claimed by "on the left cheek", "of his back"; "the back of the hand" is not the back.
    before=r"(?<![\w-])(?:on|of) (?:the|his|her|their|a|an|this|one)"
    r"(?: (?:patient's|person's|upper|lower|left|right|mid|inner|outer))* ",
    after=r"(?![\w-])(?! of (?:the|a|his|her|their)\b)",
)

_PALE, _MIDDLE, _DARK = list(SkinType)[:3], list(SkinType)[1:5], list(SkinType)[3:]
_SKIN_WORDS: dict[str, Iterable[SkinType]] = {
    r"(?:light|fair|pale|white|caucasian)": _PALE,
    r"(?:(?:light|medium) brown|brown|medium|intermediate|olive|tan|tanned)": _MIDDLE,
    r"(?:dark|dark brown|deep|black|deeply pigmented)": _DARK,
}
_ROMAN = {kind: kind.name for kind in SkinType}
_LESIONS = (
    r"lesion|growth|spot|patch|mark|tag|cancer|condition|tumou?r|area|region|discolou?ration|pigment|surface|fold"
)
_SKINS = _Vocabulary.of(
    {
        rf"{words}[- ](?:skinned|skin(?:[- ]ton(?:e|ed))?|complexion)(?! (?:{_LESIONS}))": kinds
        for words, kinds in _SKIN_WORDS.items()
    }
    | {
        # Two annotators often differ by one type; that is no contradiction.
        rf"(?:skin|fitzpatrick|phototype)(?: skin)?(?: type)? (?:{name}|{int(kind)})": [
            other for other in SkinType if abs(other - kind) <= 1
        ]
        for kind, name in _ROMAN.items()
    }
)

_AGES = re.compile(r"\b(\d{1,3})[- ]years?[- ]old\b|\baged? (\d{1,3})\b", re.IGNORECASE)
_AGE_TOLERANCE_YEARS = 10
"""Sources round ages, and a picture shows none: only what is far off contradicts."""

# Only that there is no hair at all: whether few hairs count as hair is a matter of a threshold.
_NO_HAIR = re.compile(
    r"(?<![\w-])(?:(?:no|without(?: any)?|absence of|lacks?(?: any)?|free of|devoid of) "
    r"(?:(?:visible|apparent|any|body) )?(?:(?:\w+, ){0,3}\w+,? n?or )?hairs?(?! follic)|hairless|hair-free)(?![\w-])",
    re.IGNORECASE,
)
