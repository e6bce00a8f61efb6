from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from derm_pipeline.captions.descriptors import Measurements
from derm_pipeline.captions.known import known
from derm_pipeline.captions.lesiongen import CONDITIONS, lesiongen_caption, lesiongen_prompts
from derm_pipeline.captions.metadata import MetadataCaptionConfig, metadata_caption, names_unknown
from derm_pipeline.captions.visual import DescriptorConfig
from derm_pipeline.records import Diagnosis

STYLE = MetadataCaptionConfig(style="lesiongen")


def caption(row, measured=None):
    return metadata_caption(row, None, STYLE, measured)


@pytest.mark.parametrize("condition", CONDITIONS.values())
def test_there_are_48_prompts_in_the_published_words(condition):
    prompts = lesiongen_prompts(condition)
    texts = {
        f"{condition} small size on a dark skin tone",
        f"{condition} large size on a light skin tone",
        f"{condition} medium size on a medium skin tone",
    }
    assert len(prompts) == 48
    assert set(prompts) == set(itertools.product(texts, (3, 5, 7.5, 10), (30, 50, 70, 100)))
    assert prompts[0] == ("Melanoma small size on a dark skin tone".replace("Melanoma", condition), 3, 30)


def test_an_empty_condition_is_refused():
    with pytest.raises(ValueError, match="condition is empty"):
        lesiongen_prompts(" ")


@given(st.sampled_from(list(CONDITIONS)))
def test_every_prompt_is_a_caption_that_some_image_has(diagnosis):
    fractions, types = {"small": 0.05, "medium": 0.2, "large": 0.5}, {"dark": 6, "medium": 3, "light": 1}
    captions = {
        caption({"diagnosis": diagnosis, "skin_type": types[tone]}, {"lesion_fraction": fractions[size]})
        for size, tone in itertools.product(fractions, types)
    }
    assert {prompt.text for prompt in lesiongen_prompts(CONDITIONS[diagnosis])} <= captions


@pytest.mark.parametrize(
    ("row", "measured", "words"),
    [
        ({}, None, "Melanoma"),
        ({"skin_tone": "medium"}, None, "Melanoma on a medium skin tone"),
        ({"skin_type": 2, "skin_tone": "light"}, None, "Melanoma on a light skin tone"),
        ({"site": "front of the trunk"}, {"lesion_fraction": 0.1}, "Melanoma medium size, on the front of the trunk"),
        ({}, {"lesion_fraction": 0.3}, "Melanoma medium size"),
        ({}, {"lesion_fraction": np.float32(0.31), "has_lesion": np.True_}, "Melanoma large size"),
        ({}, {"lesion_fraction": 0.2, "has_lesion": False, "black": 0.5}, "Melanoma"),
        ({}, {"lesion_fraction": math.nan, "black": None, "red": math.nan}, "Melanoma"),
        (
            {"skin_type": 5, "site": "palm or sole"},
            {"lesion_fraction": 0.05, "dark_brown": 0.6, "blue_grey": 0.3, "black": 0.08, "red": 0.02},
            "Melanoma small size on a dark skin tone, dark brown, blue-grey and black, on a palm or sole",
        ),
        ({"diagnosis": "ak"}, None, "Actinic keratosis"),
        ({"diagnosis": None, "source_label": "mycosis fungoides"}, None, "Mycosis fungoides"),
        ({"diagnosis": None}, None, "Skin lesion"),
    ],
)
def test_captions_say_condition_size_tone_colours_site(row, measured, words):
    assert caption({"diagnosis": "mel"} | row, measured) == words


# The values of derm7pt's meta.csv.
@pytest.mark.parametrize(
    ("concepts", "words"),
    [
        ({"pigment_network": "atypical"}, "atypical pigment network"),
        ({"pigment_network": "typical"}, "typical pigment network"),
        ({"streaks": "irregular"}, "irregular streaks"),
        ({"pigmentation": "diffuse irregular"}, "diffuse irregular pigmentation"),
        ({"regression_structures": "blue areas"}, "regression with blue areas"),
        ({"regression_structures": "combinations"}, "regression with white and blue areas"),
        ({"dots_and_globules": "regular"}, "regular dots and globules"),
        ({"blue_whitish_veil": "present"}, "blue-whitish veil"),
        ({"vascular_structures": "arborizing"}, "arborizing vessels"),
        ({"vascular_structures": "linear irregular"}, "linear irregular vessels"),
        ({"vascular_structures": "within regression"}, "vessels within regression"),
        ({"elevation": "palpable"}, "palpable lesion"),
        (
            {"elevation": "flat", "streaks": "Irregular ", "pigment_network": "absent", "blue_whitish_veil": ""},
            "irregular streaks, flat lesion",
        ),
    ],
)
def test_the_7_point_criteria_are_said_in_words(concepts, words):
    assert caption({"diagnosis": "mel", "concepts": concepts}) == f"Melanoma, {words}"
    assert caption({"diagnosis": "mel", "concepts": list(concepts.items())}) == f"Melanoma, {words}"


def test_a_clinical_photograph_shows_no_dermoscopic_criteria():
    concepts = {"pigment_network": "atypical", "blue_whitish_veil": "present", "elevation": "nodular"}
    assert caption({"diagnosis": "mel", "modality": "clinical", "concepts": concepts}) == "Melanoma, nodular lesion"


@pytest.mark.parametrize("value", ["absent", "", " ", None, math.nan, "unknown", "Absent"])
def test_a_criterion_that_is_absent_is_not_said(value):
    names = ["pigment_network", "streaks", "pigmentation", "regression_structures", "dots_and_globules"]
    names += ["blue_whitish_veil", "vascular_structures", "elevation", "level_of_diagnostic_difficulty"]
    assert caption({"diagnosis": "nv", "concepts": dict.fromkeys(names, value)}) == "Melanocytic nevi"
    assert caption({"diagnosis": "nv", "concepts": {"management": "excision"}}) == "Melanocytic nevi"


@given(
    st.sampled_from([None, *Diagnosis]),
    st.dictionaries(
        st.sampled_from(sorted(Measurements.__dataclass_fields__)),
        st.floats() | st.floats(0, 1) | st.booleans() | st.none() | st.just("nan"),
    ),
)
def test_whatever_was_measured_no_caption_names_what_is_not_known(diagnosis, measured):
    words = caption({"diagnosis": diagnosis}, measured)
    assert not names_unknown(words)
    assert words[0].isupper()


def test_size_and_colour_mean_the_same_as_in_the_visual_captions():
    assert lesiongen_caption(known({}), {"lesion_fraction": 0.2}, DescriptorConfig(small_fraction=0.25)) == (
        "Skin lesion small size"
    )


def test_of_an_endoscopic_image_neither_size_nor_colour_nor_hair_is_said():
    seen = {"has_lesion": True, "lesion_fraction": 0.2, "red": 0.9}
    row = {"modality": "endoscopic", "source_label": "polyps"}
    assert metadata_caption(row, True, MetadataCaptionConfig(style="lesiongen"), seen) == "Polyps"
    assert metadata_caption(row, True, MetadataCaptionConfig(style="isic2020")) == "photo of skin, polyps"
    assert metadata_caption(row, True) == "endoscopic image of polyps"
