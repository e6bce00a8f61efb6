from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from derm_pipeline.captions.known import known
from derm_pipeline.captions.metadata import (
    STYLES,
    MetadataCaptionConfig,
    caption_styles,
    metadata_caption,
    metadata_captions,
    names_unknown,
    num_without_own,
)
from derm_pipeline.captions.prompts import make_prompt
from derm_pipeline.captions.wording import class_name, class_of
from derm_pipeline.records import Diagnosis, Modality, Sex, Site, SkinTone, SkinType

MISSING = st.sampled_from(
    [
        None,
        math.nan,
        np.nan,
        "",
        "  ",
        "unknown",
        "Unknown",
        "UNKNOWN\n",
        "nan",
        "NaN",
        "none",
        "None",
        "null",
        "n/a",
        "N/A",
        "NA",
        "<NA>",
        "?",
        "-",
        "not specified",
        "n.a.",
        0,
        [],
    ]
)
WORDS = st.text("abc XYZ-0'(),é_\n", max_size=12)
CONCEPTS = st.dictionaries(
    st.sampled_from(["site", "pigment_network", "blue_whitish_veil", "streaks", "elevation", "dx_type"]),
    st.sampled_from(["absent", "present", "atypical", "torso", "unknown", "", "None"]) | MISSING,
)
ROWS = st.fixed_dictionaries(
    {},
    optional={
        "modality": st.sampled_from([None, *Modality]) | MISSING.filter(bool),
        "diagnosis": st.sampled_from([None, math.nan, "", *Diagnosis]),
        "source_label": st.sampled_from(["granuloma faciale", "polyps", "UNK", "Miscellaneous", "7"]) | WORDS | MISSING,
        "age_range": st.sampled_from(["30-39", "0-4", "80-120", "0-0", "9-1", "nan-nan", "0-120", "1-17"]) | MISSING,
        "skin_tone": st.sampled_from(list(SkinTone)) | MISSING,
        "concepts": CONCEPTS | CONCEPTS.map(lambda named: list(named.items())) | MISSING,
        "text": st.sampled_from(["A caption, of its own.", "age 0"]) | MISSING,
        "sex": st.sampled_from(list(Sex)) | MISSING,
        "site": st.sampled_from(list(Site)) | MISSING,
        "age_years": st.integers(1, 120)
        | st.floats(-5, 200)
        | st.sampled_from([0, 0.0, "0", "55", "70.0", math.inf])
        | MISSING,
        "skin_type": st.sampled_from([*SkinType, 3.0, 0, -1, 7, 2.5, np.int32(4)]) | MISSING,
    },
)
HAIRY = st.sampled_from([None, True, False, np.True_, np.False_, math.nan])


def rich(**row):
    return metadata_caption({"diagnosis": "mel"} | row)


@given(ROWS, HAIRY, st.sampled_from(STYLES))
def test_no_caption_names_what_is_not_known(row, is_hairy, style):
    caption = metadata_caption(row, is_hairy, MetadataCaptionConfig(style=style))
    assert not names_unknown(caption)
    assert caption == " ".join(caption.split())
    assert style == "own" or not caption.endswith((",", "."))
    assert "None" not in caption
    assert not {"nan", "nan-class", "UNK", "unk-class", "Miscellaneous", "miscellaneous"} & set(caption.split())


@given(ROWS, HAIRY, st.sampled_from(STYLES))
def test_a_missing_value_reads_as_an_absent_field(row, is_hairy, style):
    config = MetadataCaptionConfig(style=style)
    known = {key: value for key, value in row.items() if isinstance(value, (Diagnosis, Sex, Site, SkinType, int))}
    unknown = dict.fromkeys(
        [
            "modality",
            "diagnosis",
            "source_label",
            "sex",
            "site",
            "age_years",
            "age_range",
            "skin_type",
            "skin_tone",
            "concepts",
            "text",
        ]
    )
    assert metadata_caption(known, is_hairy, config) == metadata_caption(unknown | known, is_hairy, config)
    assert metadata_caption(row, is_hairy, config) == metadata_caption(dict(row), is_hairy, config)


@given(
    st.sampled_from(Diagnosis),
    st.sampled_from(Sex),
    st.sampled_from(Site),
    st.integers(1, 120),
    st.sampled_from(SkinType),
    st.booleans(),
)
def test_a_rich_caption_says_everything_that_is_known(diagnosis, sex, site, age, skin_type, is_hairy):
    row = {"diagnosis": diagnosis, "sex": sex, "site": site, "age_years": age, "skin_type": skin_type}
    caption = metadata_caption(row, is_hairy)
    assert diagnosis.phrase in caption
    assert site.value in caption
    assert f" {age}-year-old " in caption
    assert caption.count(f" with {skin_type.phrase} skin") == 1
    assert any(word in caption.split() for word in {"female": ("woman", "girl"), "male": ("man", "boy")}[sex])
    assert caption.endswith(", with hair") == is_hairy


@pytest.mark.parametrize(
    ("row", "is_hairy", "caption"),
    [
        (
            {"site": "back", "age_years": 55, "sex": "male", "skin_type": 2},
            True,
            "dermoscopic image of a melanoma on the back of a 55-year-old man with light skin, with hair",
        ),
        ({}, None, "dermoscopic image of a melanoma"),
        ({"site": "acral"}, False, "dermoscopic image of a melanoma on the acral skin"),
        ({"site": "genital", "sex": "female"}, None, "dermoscopic image of a melanoma in the genital area of a woman"),
        ({"skin_type": 6}, None, "dermoscopic image of a melanoma in a person with very dark skin"),
        ({"age_years": 80.0}, None, "dermoscopic image of a melanoma in an 80-year-old person"),
        ({"age_years": 11, "sex": "female"}, None, "dermoscopic image of a melanoma in an 11-year-old girl"),
        ({"age_years": 17}, None, "dermoscopic image of a melanoma in a 17-year-old child"),
        ({"age_years": 110, "sex": "male"}, None, "dermoscopic image of a melanoma in a 110-year-old man"),
        ({"diagnosis": "akiec"}, None, "dermoscopic image of an actinic keratosis or intraepithelial carcinoma"),
        ({"diagnosis": None}, True, "dermoscopic image of a skin lesion, with hair"),
        (
            {"diagnosis": "psoriasis", "modality": "clinical", "age_range": "30-39", "sex": "female", "skin_type": 6},
            False,
            "clinical photograph of psoriasis in a woman aged 30 to 39 with very dark skin",
        ),
        (
            {"diagnosis": "wart", "modality": "clinical", "site": "palm or sole", "age_range": "2-5", "sex": "male"},
            None,
            "clinical photograph of a wart on a palm or sole of a boy aged 2 to 5",
        ),
        ({"age_range": "30-39", "age_years": 34}, None, "dermoscopic image of a melanoma in a 34-year-old person"),
        ({"age_range": "30-39"}, None, "dermoscopic image of a melanoma in a person aged 30 to 39"),
        ({"age_range": "80-120"}, None, "dermoscopic image of a melanoma in a person aged 80 or over"),
        ({"age_range": "0-17"}, None, "dermoscopic image of a melanoma in a child aged up to 17"),
        ({"site": "head or neck"}, None, "dermoscopic image of a melanoma on the head or neck"),
        ({"site": "oral or genital"}, None, "dermoscopic image of a melanoma in the oral or genital area"),
        ({"site": "front of the trunk"}, None, "dermoscopic image of a melanoma on the front of the trunk"),
        ({"site": "buttocks"}, None, "dermoscopic image of a melanoma on the buttocks"),
        ({"skin_tone": "dark"}, None, "dermoscopic image of a melanoma in a person with dark skin"),
        (
            {"skin_tone": "dark", "skin_type": 1},
            None,
            "dermoscopic image of a melanoma in a person with very light skin",
        ),
        (
            {"diagnosis": None, "source_label": "Granuloma faciale", "modality": "clinical", "site": "face"},
            None,
            "clinical photograph of granuloma faciale on the face",
        ),
        ({"diagnosis": None, "source_label": "polyps", "modality": "endoscopic"}, True, "endoscopic image of polyps"),
        ({"diagnosis": None, "source_label": "Blue_naevus"}, None, "dermoscopic image of a blue naevus"),
        ({"diagnosis": None, "source_label": "SCCIS"}, None, "dermoscopic image of SCCIS"),
        ({"diagnosis": None, "source_label": "MYCOSIS FUNGOIDES"}, None, "dermoscopic image of mycosis fungoides"),
        ({"diagnosis": None, "source_label": "unilateral nevus"}, None, "dermoscopic image of a unilateral nevus"),
        ({"diagnosis": None, "source_label": "UNK"}, None, "dermoscopic image of a skin lesion"),
        ({"diagnosis": None, "modality": "clinical"}, None, "clinical photograph of a skin condition"),
        (
            {"diagnosis": "scc", "source_label": "malignant, SCC"},
            None,
            "dermoscopic image of a squamous cell carcinoma",
        ),
    ],
)
def test_rich_captions_are_natural_english(row, is_hairy, caption):
    assert metadata_caption({"diagnosis": "mel"} | row, is_hairy) == caption


@pytest.mark.parametrize(
    "condition", ["acne", "eczema", "vitiligo", "lupus", "psoriasis", "rosacea", "tinea", "urticaria", "impetigo"]
)
def test_a_condition_that_nobody_has_one_of_has_no_article(condition):
    caption = metadata_caption({"diagnosis": condition, "modality": "clinical"})
    assert caption == f"clinical photograph of {Diagnosis(condition).phrase}"


@pytest.mark.parametrize(
    ("row", "is_hairy", "caption"),
    [
        (
            {"sex": "male", "site": "torso", "age_years": 70.0},
            True,
            "photo of male skin, me1anoma on torso, at age 70, hairy",
        ),
        ({"sex": "male", "site": "trunk", "age_years": 55}, False, "photo of male skin, me1anoma on torso, at age 55"),
        (
            {"sex": "male", "site": "lower extremity", "age_years": 70.0},
            None,
            "photo of male skin, me1anoma on lower extremity, at age 70",
        ),
        ({"sex": math.nan, "site": math.nan, "age_years": math.nan}, None, "photo of skin, me1anoma"),
        ({"sex": "unknown", "site": "unknown", "age_years": 0}, True, "photo of skin, me1anoma, hairy"),
    ],
)
def test_isic2020_captions_equal_the_published_ones(row, is_hairy, caption):
    assert metadata_caption({"diagnosis": "mel"} | row, is_hairy, MetadataCaptionConfig(style="isic2020")) == caption


def test_the_isic2020_trigger_word_means_melanoma_only():
    caption = metadata_caption({"diagnosis": "nv", "sex": "female"}, None, MetadataCaptionConfig(style="isic2020"))
    assert caption == "photo of female skin, melanocytic nevus"


@pytest.mark.parametrize("diagnosis", list(Diagnosis))
def test_the_label_caption_is_the_diagnosis_alone(diagnosis):
    config = MetadataCaptionConfig(style="label")
    assert (
        metadata_caption({"diagnosis": diagnosis, "age_years": 50}, True, config) == f"An image of {diagnosis.phrase}"
    )


@pytest.mark.parametrize(
    "caption",
    [
        "",
        " ",
        "photo of nan skin",
        "on None",
        "on the unknown of",
        "at age 0",
        "at age 0, hairy",
        "at age 0.0",
        "a 0-year-old man",
        "sex N/A",
        "NaN",
        "An image of",
        "An image of nan-class on the skin of a dark-skinned individual",
        "clinical photograph of not specified",
        "a person aged nan to 39",
        "a person aged 0",
        "melanoma on a Null skin tone",
        "skin type -1",
    ],
)
def test_a_caption_that_names_the_unknown_is_found(caption):
    assert names_unknown(caption)


@pytest.mark.parametrize(
    "caption",
    [
        "an image of a nanny's banana",
        "at age 10",
        "a 50-year-old man",
        "at age 100",
        "nonexistent",
        "a non-melanoma, none-too-small",
        "An image of nut-class on the skin of a dark-skinned individual",
        "nanism",
        "a person aged 10 to 39",
        "nulliparous",
        "nevus, NOS",
    ],
)
def test_a_word_that_only_looks_like_it_is_not(caption):
    assert not names_unknown(caption)


def test_captions_come_in_the_order_of_the_rows():
    rows = [{"diagnosis": diagnosis} for diagnosis in Diagnosis]
    captions = metadata_captions(rows, [True] * len(rows))
    assert captions == [metadata_caption(row, True) for row in rows]
    assert len(set(captions)) == len(rows)


def test_wrong_input_is_refused_by_name():
    with pytest.raises(ValueError, match="'melanoma'.*ISIC_1.*akiec"):
        metadata_captions([{"diagnosis": "melanoma", "image_id": "ISIC_1"}])
    with pytest.raises(ValueError, match="2 values for 1 rows"):
        metadata_captions([{"diagnosis": "mel"}], [True, False])
    with pytest.raises(ValueError, match="measured has 0 values for 1 rows"):
        caption_styles([{"diagnosis": "mel"}], measured=[])
    with pytest.raises(ValueError, match="'x-ray'.*ISIC_1.*dermoscopic"):
        metadata_caption({"modality": "x-ray", "image_id": "ISIC_1"})


@given(st.lists(st.tuples(ROWS, HAIRY), max_size=5))
def test_the_styles_of_a_table_are_those_of_its_rows(pairs):
    rows, hairy = [row for row, _ in pairs], [is_hairy for _, is_hairy in pairs]
    styles = caption_styles(rows, hairy)
    assert tuple(styles) == STYLES
    for style, captions in styles.items():
        assert captions == metadata_captions(rows, hairy, MetadataCaptionConfig(style=style))


# Values of ISIC 2020's train.csv beside the captions that Melanoma Stable Diffusion published for these images.
@pytest.mark.parametrize(
    ("site", "own_site", "age", "is_hairy", "caption"),
    [
        ("trunk", "torso", 70.0, True, "photo of male skin, me1anoma on torso, at age 70, hairy"),
        ("trunk", "torso", "55.0", False, "photo of male skin, me1anoma on torso, at age 55"),
        ("lower extremity", "lower extremity", 70, False, "photo of male skin, me1anoma on lower extremity, at age 70"),
        ("trunk", None, 70, True, "photo of male skin, me1anoma on torso, at age 70, hairy"),
        ("head or neck", "head/neck", 0, None, "photo of male skin, me1anoma on head/neck"),
        ("head or neck", "unknown", math.nan, None, "photo of male skin, me1anoma on head/neck"),
        (None, "oral/genital", None, None, "photo of male skin, me1anoma on oral/genital"),
        ("palm or sole", None, None, None, "photo of male skin, me1anoma on palms/soles"),
        ("front of the trunk", None, None, None, "photo of male skin, me1anoma on torso"),
    ],
)
def test_isic2020_captions_use_the_sources_own_word_for_the_site(site, own_site, age, is_hairy, caption):
    row = {"diagnosis": "mel", "sex": "male", "site": site, "age_years": age, "concepts": {"site": own_site}}
    config = MetadataCaptionConfig(style="isic2020")
    assert metadata_caption(row, is_hairy, config) == caption
    assert metadata_caption(row | {"concepts": [("site", own_site)]}, is_hairy, config) == caption


def test_a_row_without_a_caption_of_its_own_has_the_rich_one_and_is_counted():
    own = "A raised, pearly nodule; the  patient\nis 50."
    rows = [{"diagnosis": "bcc", "text": text} for text in (own, None, math.nan, "", " ", "nan", "lesion, age unknown")]
    styles = caption_styles(rows)
    assert styles["own"] == ["A raised, pearly nodule; the patient is 50.", *styles["rich"][1:]]
    assert num_without_own(rows) == len(rows) - 1


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("An image of Dermatofibroma", "Dermatofibroma"),
        ("An image of dermatofibroma.", "dermatofibroma"),
        ("An endoscopic image of polyps", "polyps"),
        ("dermoscopic image of carcinoma of the skin", "carcinoma of the skin"),
        ("A clinical photograph of lupus", "lupus"),
        ("an image of an image of a proof", "an image of a proof"),
        ("  An image\tof \n Profound offence ", "Profound offence"),
        ("Dermatofibroma", "Dermatofibroma"),
        ("proof of an image of something", "proof of an image of something"),
        ("An image often seen", "An image often seen"),
    ],
)
def test_the_class_is_what_follows_image_of(text, name):
    assert class_of(text) == name


@given(st.sampled_from(Diagnosis), st.sampled_from(Modality))
def test_the_class_of_a_simple_sentence_is_the_label_it_was_made_of(diagnosis, modality):
    assert class_of(make_prompt(modality, diagnosis.phrase).opening) == diagnosis.phrase
    label = metadata_caption({"diagnosis": diagnosis}, None, MetadataCaptionConfig(style="label"))
    assert class_of(label) == diagnosis.phrase


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"diagnosis": "nv", "source_label": "NV", "text": "An image of polyps"}, "melanocytic nevus"),
        ({"source_label": "Hidradenitis", "text": "An image of polyps"}, "hidradenitis"),
        ({"source_label": "", "text": "An endoscopic image of polyps."}, "polyps"),
        ({"source_label": "unknown", "text": "An image of Dermatofibroma"}, "Dermatofibroma"),
        ({"text": "A red, scaly plaque on the arm"}, None),
        ({"text": "An image of a red, scaly plaque on the arm of a man"}, None),
        ({"text": "An image of"}, None),
        ({"source_label": "other"}, None),
        ({}, None),
    ],
)
def test_the_class_name_is_the_diagnosis_else_the_label_else_that_of_a_simple_caption(row, name):
    assert class_name(known(row)) == name


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("Cutaneous T-cell lymphoma", "cutaneous T-cell lymphoma"),
        ("SCC/SCCIS", "SCC/SCCIS"),
        ("SEBORRHEIC KERATOSIS/LENTIGO", "seborrheic keratosis/lentigo"),
        ("TINEA PEDIS", "tinea pedis"),
        ("Z-line", "Z-line"),
        ("ACK", "ACK"),
        ("Hailey-Hailey Disease", "hailey-hailey disease"),
    ],
)
def test_a_label_is_in_lower_case_but_for_abbreviations_and_letters_that_name(label, words):
    assert known({"source_label": label}).label == words


@pytest.mark.parametrize(
    ("ages", "sex", "words"),
    [
        ("10-19", "male", "a male aged 10 to 19"),
        ("0-120", "male", "a man"),
        ("10-19", None, "a person aged 10 to 19"),
        ("18-29", "female", "a woman aged 18 to 29"),
        ("0-9", "female", "a girl aged up to 9"),
        ("0-90", "female", "a female aged up to 90"),
    ],
)
def test_who_may_be_a_child_or_grown_up_is_called_neither(ages, sex, words):
    row = {"diagnosis": "nv", "age_range": ages, "sex": sex}
    assert metadata_caption(row) == f"dermoscopic image of a melanocytic nevus in {words}"


@pytest.mark.parametrize("text", ["", "An image of", "An image of ."])
def test_a_text_without_a_class_is_refused(text):
    with pytest.raises(ValueError, match="names no class"):
        class_of(text)
