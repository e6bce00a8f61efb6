from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from derm_pipeline.captions.metadata import MetadataCaptionConfig, metadata_caption, metadata_captions, names_unknown
from derm_pipeline.records import Diagnosis, Sex, Site, SkinType

STYLES = ["rich", "label", "isic2020"]
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
    ]
)
ROWS = st.fixed_dictionaries(
    {},
    optional={
        "diagnosis": st.sampled_from([None, *Diagnosis]),
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
    assert not caption.endswith((",", "."))
    assert "None" not in caption
    assert "nan" not in caption.split()


@given(ROWS, HAIRY, st.sampled_from(STYLES))
def test_a_missing_value_reads_as_an_absent_field(row, is_hairy, style):
    config = MetadataCaptionConfig(style=style)
    known = {key: value for key, value in row.items() if isinstance(value, (Diagnosis, Sex, Site, SkinType, int))}
    unknown = dict.fromkeys(("diagnosis", "sex", "site", "age_years", "skin_type"))
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
    ],
)
def test_rich_captions_are_natural_english(row, is_hairy, caption):
    assert metadata_caption({"diagnosis": "mel"} | row, is_hairy) == caption


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
    ],
)
def test_a_caption_that_names_the_unknown_is_found(caption):
    assert names_unknown(caption)


@pytest.mark.parametrize(
    "caption", ["an image of a nanny's banana", "at age 10", "a 50-year-old man", "at age 100", "nonexistent"]
)
def test_a_word_that_only_looks_like_it_is_not(caption):
    assert not names_unknown(caption)


def test_captions_come_in_the_order_of_the_rows():
    rows = [{"diagnosis": diagnosis} for diagnosis in Diagnosis]
    captions = metadata_captions(rows, [True] * 7)
    assert captions == [metadata_caption(row, True) for row in rows]
    assert len(set(captions)) == 7


def test_wrong_input_is_refused_by_name():
    with pytest.raises(ValueError, match="'melanoma'.*ISIC_1.*akiec"):
        metadata_captions([{"diagnosis": "melanoma", "image_id": "ISIC_1"}])
    with pytest.raises(ValueError, match="2 values for 1 rows"):
        metadata_captions([{"diagnosis": "mel"}], [True, False])
