"""What SCIN's dermatologists and graders said of a case: weighted conditions and skin types."""

from __future__ import annotations

import ast
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from derm_pipeline.records import SkinType
from derm_pipeline.sources.conditions import diagnoses_of
from derm_pipeline.sources.listing import BadRowError, parse_mapped
from derm_pipeline.sources.tables import Row
from derm_pipeline.sources.words import known_cells, known_or_none

WEIGHTS = "weighted_skin_condition_label"
SKIN_TYPES = tuple(f"dermatologist_fitzpatrick_skin_type_label_{number}" for number in (1, 2, 3))
MONK_TONES = {"monk_us": "monk_skin_tone_label_us", "monk_india": "monk_skin_tone_label_india"}

MAX_WEIGHTS_CHARS = 10_000
"""Length of a cell of weights that is read; published ones have a few hundred."""

_LABELS = """
abrasion, scrape, or scab; abscess; acne; actinic keratosis; acute and chronic dermatitis; acute dermatitis, nos;
allergic contact dermatitis; angiokeratoma of skin; atypical nevus; basal cell carcinoma; cd - contact dermatitis;
cellulitis; chronic dermatitis, nos; condyloma acuminatum; cutaneous lupus; cutaneous t cell lymphoma; dermatofibroma;
drug rash; eczema; erythema multiforme; folliculitis; granuloma annulare; hemangioma; herpes simplex; herpes zoster;
hypersensitivity; impetigo; infected eczema; inflicted skin lesions; insect bite; intertrigo; inverse psoriasis;
irritant contact dermatitis; keratosis pilaris; lentigo; leukocytoclastic vasculitis; lichen nitidus;
lichen planus/lichenoid eruption; lichen simplex chronicus; melanocytic nevus; melanoma; miliaria;
molluscum contagiosum; o/e - ecchymoses present; onychomycosis; perioral dermatitis; photodermatitis;
pigmented purpuric eruption; pityriasis lichenoides; pityriasis rosea; post-inflammatory hyperpigmentation;
prurigo nodularis; psoriasis; purpura; pyogenic granuloma; rosacea; scabies; scc/sccis; seborrheic dermatitis; sk/isk;
stasis dermatitis; syphilis; tinea; tinea versicolor; urticaria; verruca vulgaris; viral exanthem; vitiligo
"""
DIAGNOSES = diagnoses_of(" ".join(label.split()) for label in _LABELS.split(";"))
"""The commonest of the publisher's labels and what each means here; others are looked up by `find_diagnosis`."""

_SKIN_TYPES: dict[str, SkinType | None] = {f"fst{number}": SkinType(number) for number in SkinType}
_SKIN_TYPES |= {"none_selected": None, "none_identified": None}
_MONK = {f"{number}{tail}": str(number) for number in range(1, 11) for tail in ("", ".0")}


def parse_weights(text: str) -> dict[str, float]:
    """Read a cell of weighted conditions, written as Python writes a dict; none for a blank cell and for `{}`.

    Raises:
        BadRowError: it is no such dict, or a weight is not a number from 0 to 1 (their sum is 1).
    """
    if known_or_none(text) is None:
        return {}
    if len(text) > MAX_WEIGHTS_CHARS:
        raise BadRowError(f"{WEIGHTS} has {len(text):,} characters; at most {MAX_WEIGHTS_CHARS:,} are read")
    try:
        weights = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise BadRowError(f"{WEIGHTS} {text[:80]!r} is not a dict of conditions and weights") from None
    if not isinstance(weights, dict) or not all(_is_weighted(*item) for item in weights.items()):
        raise BadRowError(f"{WEIGHTS} {text[:80]!r} is not a dict of conditions and weights from 0 to 1")
    return {condition.strip(): float(weight) for condition, weight in weights.items()}


def _is_weighted(condition: object, weight: object) -> bool:
    if not isinstance(condition, str) or not condition.strip() or not condition.isprintable():
        return False  # an escape in the literal may make a text that is no Unicode
    return isinstance(weight, int | float) and not isinstance(weight, bool) and 0 <= weight <= 1


def top_labels(weights: Mapping[str, float]) -> list[str]:
    """The conditions with the largest weight, in the publisher's order; the first is the label, more than one a tie."""
    largest = max(weights.values(), default=0)
    return [condition for condition, weight in weights.items() if weight == largest]


@dataclass(frozen=True)
class Said:
    """What was said of a case; all of it stays in `concepts`, also what gave way to something else."""

    label: str = ""
    """The condition with the largest weight; "" where there is none."""
    skin_type: SkinType | None = None
    """The lower median of what up to three dermatologists said: of three types the middle one, which is the majority's
    where there is one; of two the lower. So it is always one that somebody gave."""
    concepts: Mapping[str, str] = field(default_factory=dict)
    """The weights and the tied labels as JSON, every skin type as it stands, and the Monk tones ("1" to "10")."""


def read_labels(row: Row | None) -> Said:
    """Read a case's row of scin_labels.csv; None for a case that has none.

    Raises:
        BadRowError: a cell that cannot be read; the message names the line.
    """
    if row is None:
        return Said()
    try:
        return _read(row)
    except BadRowError as error:
        raise BadRowError(f"scin_labels.csv, line {row.line}: {error}") from None


def _read(row: Row) -> Said:
    if row.problem:
        raise BadRowError(row.problem)
    weights = parse_weights(row.cells[WEIGHTS])
    tied = top_labels(weights)
    given = [parse_skin_type(column, row.cells.get(column, "")) for column in SKIN_TYPES]
    known = [skin_type for skin_type in given if skin_type is not None]
    tones = {concept: parse_mapped(_MONK, name, row.cells.get(name, "")) for concept, name in MONK_TONES.items()}
    concepts = known_cells(row.cells, SKIN_TYPES) | {concept: tone for concept, tone in tones.items() if tone}
    if weights:
        concepts["weighted_labels"] = json.dumps(weights, ensure_ascii=False)
    if len(tied) > 1:
        concepts["label_tie"] = json.dumps(tied, ensure_ascii=False)
    return Said(tied[0] if tied else "", statistics.median_low(known) if known else None, concepts)


def parse_skin_type(column: str, text: str) -> SkinType | None:
    """FST1 to FST6; None for the spellings of unknown and for a person who finds none fitting.

    Raises:
        BadRowError: another word.
    """
    return parse_mapped(_SKIN_TYPES, column, text)
