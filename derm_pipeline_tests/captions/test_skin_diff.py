from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from derm_pipeline.captions.metadata import MetadataCaptionConfig, metadata_caption, names_unknown
from derm_pipeline.captions.skin_diff import INITIALISER_WORD, skin_diff_prompt, skin_diff_token, skin_diff_tokens
from derm_pipeline.records import Diagnosis, SkinTone, SkinType

SEVEN = {
    "basal cell carcinoma": "bas-class",
    "folliculitis": "fol-class",
    "nematode infection": "nem-class",
    "neutrophilic dermatoses": "neu-class",
    "prurigo nodularis": "pru-class",
    "psoriasis": "pso-class",
    "squamous cell carcinoma": "squ-class",
}
STYLE = MetadataCaptionConfig(style="skin_diff")


def test_the_seven_conditions_have_the_published_tokens():
    assert {label: skin_diff_token(label) for label in SEVEN} == SEVEN
    assert skin_diff_tokens(SEVEN) == {token: label for label, token in SEVEN.items()}
    assert INITIALISER_WORD == "skin"


@pytest.mark.parametrize(
    ("tone", "phrase"),
    [
        (1, "a very light-skinned"),
        (2, "a light-skinned"),
        (3, "a medium-skinned"),
        (SkinType.IV, "a medium-skinned"),
        (5, "a dark-skinned"),
        (6, "a very dark-skinned"),
        (SkinTone.LIGHT, "a light-skinned"),
        ("dark", "a dark-skinned"),
    ],
)
def test_prompts_equal_the_published_ones(tone, phrase):
    assert skin_diff_prompt("psoriasis", tone) == f"An image of pso-class on the skin of {phrase} individual"


def test_an_unknown_tone_drops_its_clause():
    assert skin_diff_prompt("psoriasis") == "An image of pso-class"


@pytest.mark.parametrize(
    ("row", "caption"),
    [
        (
            {"diagnosis": "psoriasis", "source_label": "pustular psoriasis", "skin_type": 6},
            "An image of pso-class on the skin of a very dark-skinned individual",
        ),
        (
            {"diagnosis": "neutrophilic_dermatosis", "skin_tone": "light"},
            "An image of neu-class on the skin of a light-skinned individual",
        ),
        ({"diagnosis": "bcc", "source_label": "bcc", "skin_type": -1}, "An image of bas-class"),
        (
            {"source_label": "granuloma faciale", "skin_type": 4},
            "An image of gra-class on the skin of a medium-skinned individual",
        ),
        (
            {"source_label": "unknown", "skin_type": 5},
            "An image of a skin lesion on the skin of a dark-skinned individual",
        ),
    ],
)
def test_captions_of_records_are_the_prompts(row, caption):
    assert metadata_caption(row, None, STYLE) == caption


def test_no_two_diagnoses_are_learned_as_one():
    tokens = skin_diff_tokens(diagnosis.phrase for diagnosis in Diagnosis)
    assert sorted(tokens.values()) == sorted(diagnosis.phrase for diagnosis in Diagnosis)
    for token, phrase in tokens.items():
        letters = "".join(filter(str.isalpha, phrase.lower()))
        assert letters.startswith(token.removesuffix("-class"))
    assert tokens["mel-class"] == "melanoma"
    assert tokens["mela-class"] == "melanocytic nevus"


@given(st.sampled_from(Diagnosis))
def test_a_diagnosis_has_one_token_by_its_code_and_by_its_words(diagnosis):
    assert skin_diff_token(diagnosis) == skin_diff_token(diagnosis.phrase.upper()) == skin_diff_token(diagnosis.phrase)
    assert len(skin_diff_tokens([diagnosis.value, diagnosis.phrase])) == 1


@given(st.text("abcdefgh '-", min_size=1, max_size=9).filter(lambda label: any(map(str.isalpha, label))))
def test_any_other_label_has_its_first_three_letters(label):
    token = skin_diff_token("x" + label)
    assert token == f"{('x' + label).replace(' ', '').replace('-', '').replace(chr(39), '')[:3]}-class"
    assert not names_unknown(skin_diff_prompt("x" + label))


def test_two_labels_with_one_token_are_refused_by_name():
    with pytest.raises(ValueError, match="'lichen nitidus' and 'lichen planus'.*'lic-class'"):
        skin_diff_tokens(["psoriasis", "lichen planus", "lichen nitidus"])


def test_a_token_never_reads_as_unknown():
    assert skin_diff_token("nanukayami fever") == "nanu-class"


@pytest.mark.parametrize("label", ["", " ", "12", "nan", "UNK"])
def test_a_label_that_names_no_condition_is_refused(label):
    with pytest.raises(ValueError, match="names no condition"):
        skin_diff_prompt(label, 1)


@pytest.mark.parametrize("tone", [0, 7, -1, "green"])
def test_a_skin_type_outside_the_scale_is_refused(tone):
    with pytest.raises(ValueError, match="not a valid Skin"):
        skin_diff_prompt("psoriasis", tone)
