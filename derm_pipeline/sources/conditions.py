"""What the clinical sources' words for conditions and skin types mean here: one table for SCIN, Fitzpatrick17k and DDI.

A word has a diagnosis only where each image with that word is of that diagnosis (is-a). Left out, with None, is what is
wider (photodermatoses), what is one of several (lichen planus/lichenoid eruption, neurodermatitis), what goes with a
diagnosis without being it (stasis edema), what only sounds alike (urticaria pigmentosa, actinic porokeratosis, herpes
gestationis, epidermal nevus), and what has no place among `Diagnosis`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from derm_pipeline.records import Diagnosis, SkinType

_MEANINGS: dict[Diagnosis, tuple[str, ...]] = {
    Diagnosis.BCC: (
        "basal cell carcinoma",
        "basal cell carcinoma morpheiform",
        "basal cell carcinoma nodular",
        "basal cell carcinoma superficial",
        "solid cystic basal cell carcinoma",
    ),
    # Seborrhoeic keratosis, solar lentigo and lichen-planus-like (lichenoid) keratosis: HAM10000's umbrella.
    Diagnosis.BKL: (
        "benign keratosis",
        "lichenoid keratosis",
        "seborrheic keratosis",
        "seborrheic keratosis irritated",
        "sk/isk",
        "solar lentigo",
    ),
    Diagnosis.DF: ("dermatofibroma",),
    # In-situ and lentigo maligna as in HAM10000 and ISIC.
    Diagnosis.MEL: (
        "lentigo maligna",
        "malignant melanoma",
        "melanoma",
        "melanoma acral lentiginous",
        "melanoma in situ",
        "nodular melanoma (nm)",
        "superficial spreading melanoma ssm",
    ),
    # Melanocytic ones only: not the epidermal, sebaceous, comedonal, lipomatous and Becker's nevus.
    Diagnosis.NV: (
        "atypical nevus",
        "atypical spindle cell nevus of reed",
        "blue nevus",
        "congenital nevus",
        "dysplastic nevus",
        "halo nevus",
        "melanocytic nevi",
        "melanocytic nevus",
        "nevocytic nevus",
        "pigmented spindle cell nevus of reed",
    ),
    Diagnosis.VASC: (
        "angiokeratoma of skin",
        "angioma",
        "arteriovenous hemangioma",
        "granuloma pyogenic",
        "hemangioma",
        "pyogenic granuloma",
    ),
    Diagnosis.AK: ("actinic keratosis",),
    Diagnosis.SCC: (
        "scc/sccis",
        "squamous cell carcinoma",
        "squamous cell carcinoma in situ",
        "squamous cell carcinoma keratoacanthoma",
    ),
    Diagnosis.ACNE: ("acne", "acne cystic", "acne vulgaris"),
    Diagnosis.ALLERGIC_CONTACT_DERMATITIS: ("allergic contact dermatitis",),
    Diagnosis.CUTANEOUS_LYMPHOMA: ("cutaneous t cell lymphoma", "mycosis fungoides", "subcutaneous t cell lymphoma"),
    Diagnosis.DRUG_ERUPTION: ("drug eruption", "drug rash"),
    Diagnosis.ECZEMA: ("dyshidrotic eczema", "eczema", "eczema spongiotic dermatitis", "infected eczema"),
    Diagnosis.ERYTHEMA_MULTIFORME: ("erythema multiforme",),
    Diagnosis.FOLLICULITIS: ("folliculitis",),
    Diagnosis.GRANULOMA_ANNULARE: ("granuloma annulare",),
    Diagnosis.HERPES_SIMPLEX: ("herpes simplex",),
    Diagnosis.HERPES_ZOSTER: ("herpes zoster",),
    Diagnosis.IMPETIGO: ("impetigo",),
    Diagnosis.INSECT_BITE: ("insect bite",),  # not the tick bite: a tick is no insect
    Diagnosis.IRRITANT_CONTACT_DERMATITIS: ("irritant contact dermatitis",),
    Diagnosis.KAPOSI_SARCOMA: ("kaposi sarcoma",),
    Diagnosis.KELOID: ("keloid",),
    Diagnosis.KERATOSIS_PILARIS: ("keratosis pilaris",),
    Diagnosis.LICHEN_PLANUS: ("lichen planus",),
    Diagnosis.LICHEN_SIMPLEX: ("lichen simplex", "lichen simplex chronicus"),
    Diagnosis.LUPUS: ("cutaneous lupus", "lupus erythematosus", "lupus subacute"),
    Diagnosis.MOLLUSCUM: ("molluscum contagiosum",),
    Diagnosis.NEMATODE_INFECTION: ("nematode infection",),
    Diagnosis.NEUTROPHILIC_DERMATOSIS: ("neutrophilic dermatoses",),
    Diagnosis.PITYRIASIS_ROSEA: ("pityriasis rosea",),
    Diagnosis.PRURIGO_NODULARIS: ("prurigo nodularis",),
    Diagnosis.PSORIASIS: ("inverse psoriasis", "psoriasis", "pustular psoriasis"),
    Diagnosis.ROSACEA: ("rhinophyma", "rosacea"),  # rhinophyma is phymatous rosacea
    Diagnosis.SCABIES: ("scabies",),
    Diagnosis.SEBORRHEIC_DERMATITIS: ("seborrheic dermatitis",),
    Diagnosis.STASIS_DERMATITIS: ("stasis dermatitis",),
    Diagnosis.TINEA: ("tinea", "tinea pedis"),
    Diagnosis.TINEA_VERSICOLOR: ("tinea versicolor",),
    Diagnosis.URTICARIA: ("urticaria",),
    Diagnosis.VASCULITIS: ("leukocytoclastic vasculitis",),
    Diagnosis.VITILIGO: ("vitiligo",),
    Diagnosis.WART: ("condyloma accuminatum", "condyloma acuminatum", "verruca vulgaris", "wart"),
}

_WITHOUT_PLACE = """
abrasion, scrape, or scab; abrasions ulcerations and physical injuries; abscess; acanthosis nigricans;
acquired autoimmune bullous diseaseherpes gestationis; acquired digital fibrokeratoma; acral melanotic macule;
acrochordon; acrodermatitis enteropathica; acute and chronic dermatitis; acute dermatitis, nos; angioleiomyoma;
aplasia cutis; becker nevus; behcets disease; blastic plasmacytoid dendritic cell neoplasm; calcinosis cutis;
cd contact dermatitis; cellular neurothekeoma; cellulitis; cheilitis; chondroid syringoma; chronic dermatitis, nos;
clear cell acanthoma; coccidioidomycosis; dariers disease; dermatomyositis; disseminated actinic porokeratosis;
drug induced pigmentary changes; eccrine poroma; ehlers danlos syndrome; epidermal cyst; epidermal nevus;
epidermolysis bullosa; erythema annulare centrifigum; erythema elevatum diutinum; erythema nodosum;
factitial dermatitis; fibrous papule; fixed eruptions; focal acral hyperkeratosis; fordyce spots;
foreign body granuloma; glomangioma; graft vs host disease; hailey hailey disease; hematoma; hidradenitis;
hypersensitivity; hyperpigmentation; ichthyosis vulgaris; incontinentia pigmenti; inflicted skin lesions; intertrigo;
inverted follicular keratosis; juvenile xanthogranuloma; langerhans cell histiocytosis; lentigo; leukemia cutis;
lichen amyloidosis; lichen nitidus; lichen planus/lichenoid eruption; lipoma; livedo reticularis; lyme disease;
lymphangioma; lymphocytic infiltrations; metastatic carcinoma; milia; miliaria; morphea; mucinosis; mucous cyst;
myiasis; naevus comedonicus; necrobiosis lipoidica; neurodermatitis; neurofibroma; neurofibromatosis; neuroma;
neurotic excoriations; nevus lipomatosus superficialis; nevus sebaceous of jadassohn; o/e ecchymoses present;
onychomycosis; papilomatosis confluentes and reticulate; paronychia; pediculosis lids; perioral dermatitis;
photodermatitis; photodermatoses; pigmented purpuric eruption; pilar cyst; pilomatricoma; pityriasis lichenoides;
pityriasis lichenoides chronica; pityriasis rubra pilaris; porokeratosis actinic; porokeratosis of mibelli; porphyria;
port wine stain; post inflammatory hyperpigmentation; purpura; reactive lymphoid hyperplasia; sarcoidosis; scar;
scleroderma; scleromyxedema; sebaceous carcinoma; stasis edema; stevens johnson syndrome; striae; sun damaged skin;
syphilis; syringocystadenoma papilliferum; syringoma; telangiectases; tick bite; trichilemmoma; trichofolliculoma;
tuberous sclerosis; tungiasis; urticaria pigmentosa; verruciform xanthoma; viral exanthem; xanthogranuloma; xanthomas;
xeroderma pigmentosum
"""

CONDITIONS: Mapping[str, Diagnosis | None] = {
    **{" ".join(word.split()): None for word in _WITHOUT_PLACE.split(";")},
    **{word: diagnosis for diagnosis, words in _MEANINGS.items() for word in words},
}
"""What a condition's word means, as `condition_word` writes it; None for one that was looked at and has no place."""

SKIN_TYPES = {f"{number}{tail}": SkinType(number) for number in SkinType for tail in ("", ".0")}
"""Fitzpatrick skin types as tables write them; those that have been through pandas end in ".0"."""


def condition_word(label: str) -> str:
    """A source's label as it stands in `CONDITIONS`: lower case, single blanks, blanks for dashes."""
    return " ".join(label.lower().replace("-", " ").split())


def find_diagnosis(label: str) -> Diagnosis | None:
    """What a source's label means here; None where it has no place, and where nobody has looked at it yet."""
    return CONDITIONS.get(condition_word(label))


def diagnoses_of(labels: Iterable[str]) -> dict[str, Diagnosis | None]:
    """What each label of a source's closed list means here.

    Raises:
        KeyError: a label that is not in `CONDITIONS`: somebody has to decide on it.
    """
    return {label: CONDITIONS[condition_word(label)] for label in labels}
