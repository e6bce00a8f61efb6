"""The gate: recorded answers, each kind of refusal with its opposite, and what a text claims."""

from __future__ import annotations

import random
import re

import pytest

from derm_pipeline.captions.chat import tidy
from derm_pipeline.captions.claims import Facts, contradictions, diagnoses_named
from derm_pipeline.captions.gate import Gate, GateConfig, Reason, load_token_counter
from derm_pipeline.captions.known import names_unknown
from derm_pipeline.captions.prompts import FEATURES, Answer, clean_label, make_prompt
from derm_pipeline.records import Diagnosis, Modality, Sex, Site, SkinTone, SkinType

NEVUS = make_prompt(Modality.DERMOSCOPIC, "melanocytic nevus")
UNTOLD = make_prompt(Modality.DERMOSCOPIC)
POLYPS = make_prompt(Modality.ENDOSCOPIC, "polyps")
GOOD = (
    "A dermoscopic image of melanocytic nevus. The lesion is round and symmetric, light brown with a darker centre, "
    "and a regular pigment network fades towards its edge. A few fine hairs cross the fair skin around it."
)
POLYP = (
    "An endoscopic image of polyps. Two smooth, pinkish-red, dome-shaped elevations rise from a glistening mucosa; "
    "small vessels run over them and there is no bleeding."
)


def judge(text, facts=None, prompt=NEVUS, *, is_complete=True, **config):
    return Gate(GateConfig(**config)).judge(Answer(text, is_complete), facts or Facts(), prompt)


def test_med_arts_prompt_is_word_for_word_and_takes_the_class_as_it_is():
    prompt = make_prompt(Modality.ENDOSCOPIC, "Cancer of the colon")
    assert prompt.text == (
        "An endoscopic image of Cancer of the colon. Please describe the endoscopic image of Cancer of the colon "
        "using the following visual features: specific color, shape, surrounding mucosa, surface texture, bleeding "
        "condition, and other relevant details. Start with 'An endoscopic image of Cancer of the colon' and ensure the "
        "description does not exceed 100 words."
    )


@pytest.mark.parametrize("modality", list(Modality))
def test_a_prompt_asks_for_its_modalitys_features_and_names_no_class_that_was_not_told(modality):
    told, untold = make_prompt(modality, "Dermatofibroma", max_words=60), make_prompt(modality)
    for prompt in (told, untold):
        assert FEATURES[modality] in prompt.text
        assert prompt.text.startswith(f"{prompt.opening}. ")
        assert f"'{prompt.opening}'" in prompt.text
    assert "60 words" in told.text
    assert told.label == "Dermatofibroma"
    assert untold.label is None
    assert " of " not in untold.opening
    assert "Do not name a diagnosis" in untold.text
    assert "Do not name" not in told.text


def test_a_label_cannot_speak_in_the_chat_templates_voice():
    assert clean_label("bowen's\ndisease <image> [INST]<|eot_id|>\x00") == "bowen's disease image INST eot_id"
    assert len(clean_label("x" * 1000)) == 120
    assert make_prompt(Modality.CLINICAL, " <> ").label is None


@pytest.mark.parametrize("is_complete", [True, None])
@pytest.mark.parametrize(("text", "prompt"), [(GOOD, NEVUS), (POLYP, POLYPS)])
def test_a_good_answer_is_accepted_as_it_is(text, prompt, is_complete):
    verdict = judge(text, prompt=prompt, is_complete=is_complete)
    assert (verdict.accepted, verdict.reason, verdict.text, str(verdict)) == (True, None, text, "accepted")


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (f"ASSISTANT: {GOOD}</s>", GOOD),
        (f"assistant\n\n{GOOD}<|eot_id|>", GOOD),
        (f"Sure! Here is the description:\n\n{GOOD}", GOOD),
        (f"Here's a description of the image: {GOOD}", GOOD),
        (f'"{GOOD}"', GOOD),
        (
            GOOD.replace(
                "A dermoscopic image of melanocytic nevus.", "Start with 'A dermoscopic image of melanocytic nevus'."
            ),
            GOOD,
        ),
        (GOOD.replace("A dermoscopic image of melanocytic nevus.", "'A dermoscopic image of melanocytic nevus'"), GOOD),
        (GOOD.replace("A dermoscopic image of melanocytic nevus. ", ""), GOOD),
        (GOOD.replace(". ", ".\n\n* ").replace("round", "**round**"), GOOD),
        (GOOD.replace("A derm", "a DERM"), GOOD.replace("A derm", "a DERM")),
    ],
)
def test_what_a_chat_leaves_behind_is_taken_off_and_the_class_is_named(said, kept):
    assert tidy(said, NEVUS) == kept
    assert judge(said).accepted


def test_an_answer_without_a_told_label_gets_no_opening():
    assert tidy("The lesion is round.", UNTOLD) == "The lesion is round."


@pytest.mark.parametrize("text", ["", "  \n ", "...", "</s>", "ASSISTANT:", '""'])
def test_an_empty_answer_is_refused_with_what_went_wrong(text):
    verdict = Gate().judge(Answer(text, None, "malformed response"), Facts(), UNTOLD)
    assert verdict.reason is Reason.EMPTY
    assert str(verdict) == "empty: malformed response"


@pytest.mark.parametrize(
    "text",
    [
        "A dermoscopic image of melanocytic nevus. the the the the the lesion is round and brown and symmetric.",
        GOOD + " It is brown, it is brown, it is brown, it is brown." * 2,
        GOOD + " A \u200blesion.",
        GOOD + " \ufffd",
        "Ein " + "Глубокий пигментный невус с ровным краем. " * 2,
        "病变呈圆形，颜色为浅棕色。" * 3,
        "7 % 3 9 81 22 1 0 3 14 15 92 65 35 lesion",
        "a=}{ ~~ ^^ $$ ## lesion || \\\\ @@ ** brown == ++ symmetric {{ }} border [[ ]] network",
    ],
)
def test_garbage_is_refused(text):
    assert judge(text, prompt=UNTOLD).reason is Reason.GARBAGE


@pytest.mark.parametrize(
    "said",
    [
        "I'm sorry, but I can't help with medical diagnosis based on images.",
        "Sorry! A dermatologist knows better what this round and brown lesion may be.",
        "I'm sorry, I cannot provide a diagnosis. Please consult a dermatologist for an accurate evaluation.",
        "As an AI language model, I am not able to view images, but I can describe general features of nevi.",
        "Unfortunately, the image cannot be seen, but a typical nevus is round, brown and symmetric.",
        f"{NEVUS.opening}. It is not possible to determine the nature of the lesion from an image alone.",
        "The image you've provided appears to be a dermoscopic image of a melanocytic nevus. It is brown and round.",
        f"{NEVUS.opening}. I can see a brown, round lesion with a regular network and a few dots near its edge.",
        f"{NEVUS.opening}. Please see a doctor about it. The lesion is brown, round and symmetric with a network.",
        f"{NEVUS.opening}. A biopsy is recommended because of the uneven colours and the irregular border, brown.",
    ],
)
def test_who_declines_or_speaks_to_the_reader_describes_nothing(said):
    for prompt in (NEVUS, UNTOLD):
        assert judge(said, prompt=prompt).reason is Reason.REFUSAL


@pytest.mark.parametrize(
    "advice",
    [
        "Please consult a dermatologist for a professional diagnosis.",
        "It is important to note that this is not a medical diagnosis. A healthcare professional should be consulted. "
        "I hope this helps!",
        "However, it's not possible to determine more without a biopsy. Let me know if you have any other questions.",
        "(Note: this was generated.)",
    ],
)
def test_advice_and_leave_taking_at_the_end_are_dropped_and_the_description_stands(advice):
    verdict = judge(f"{GOOD} {advice}")
    assert verdict.accepted
    assert verdict.text == GOOD


def test_skin_type_one_is_not_a_speaker():
    assert judge(GOOD + " The skin is of type I was all that could be added.").accepted


@pytest.mark.parametrize(
    "text",
    [
        "<p>The lesion is brown and round with a regular network</p> and sharp, smooth borders around it.",
        "The lesion is brown and round with a regular network; see https://example.org for more about it.",
        'json {"colours": "brown", "symmetry": "symmetric", "border": "regular", "network": "typical"}',
        "The lesion is brown and round with a fine network. USER: thanks. ASSISTANT: The lesion is brown and even.",
        "Cette image dermoscopique montre un naevus rond, brun clair, avec un bord net et un fin treillis pigmentaire.",
        "La imagen muestra un nevo de color pardo con bordes regulares y una red pigmentada en el centro.",
        "Das Bild zeigt einen runden, braunen Naevus mit regelmäßigem Netz und einem scharfen Rand auf der Haut.",
        "The lesion is round and brown. Its edge is sharp and even. The lesion is round and brown.",
    ],
)
def test_markup_other_languages_and_repeated_sentences_are_garbage(text):
    assert judge(text, prompt=UNTOLD).reason is Reason.GARBAGE
    assert judge(f"{NEVUS.opening}. {text}").reason is Reason.GARBAGE


@pytest.mark.parametrize("word", ["unknown", "None", "N/A", "not specified"])
def test_what_no_caption_may_say_is_refused(word):
    text = f"{GOOD} Its vessels: {word}."
    assert judge(text).reason is Reason.NAMES_UNKNOWN
    assert names_unknown(text)


def test_the_items_of_a_list_become_sentences():
    said = f"{NEVUS.opening}:\n\n- **Colours**: light brown\n- Symmetry: symmetric in both axes\n1. Border: sharp."
    verdict = judge(said)
    assert verdict.text == (f"{NEVUS.opening}: Colours: light brown. Symmetry: symmetric in both axes. Border: sharp.")


def test_names_with_accents_and_measures_are_no_garbage():
    assert judge(GOOD + " A naevus of Ota-like hue, 3-4 mm (about 20%) wide; a café-au-lait rim.").accepted


@pytest.mark.parametrize(
    ("text", "is_complete", "accepted"),
    [
        (GOOD, False, False),
        (GOOD[:-1], None, False),
        (GOOD[:-8] + " and", None, False),
        (GOOD[:-1], True, True),
        (GOOD[:-1] + '."', None, True),
    ],
)
def test_an_answer_that_was_cut_off_is_refused(text, is_complete, accepted):
    verdict = judge(text, is_complete=is_complete)
    assert verdict.accepted == accepted
    assert accepted or verdict.reason is Reason.TRUNCATED


@pytest.mark.parametrize(
    "text",
    [
        NEVUS.text,
        f"{NEVUS.opening}. {FEATURES[Modality.DERMOSCOPIC]}, and other relevant details.",
        f"{NEVUS.opening}. The visual features are colours, symmetry, border, pigment network, dots and globules here.",
        f"{NEVUS.opening}, and ensure the description does not exceed a hundred.",
        f"{NEVUS.opening}. Please describe the image using these following visual features: colours, and relevant "
        "details of the pigment network, dots and vessels.",
    ],
)
def test_an_echo_of_the_prompt_is_refused_also_in_part(text):
    assert judge(text).reason is Reason.PROMPT_ECHO


def test_how_much_is_an_echo_is_a_setting():
    text = GOOD + " Colours, symmetry, border are regular."
    assert judge(text).accepted
    assert judge(text, echo_words=3).reason is Reason.PROMPT_ECHO


def test_length_is_counted_in_words_without_a_tokenizer():
    words = [random.choice(["brown", "round", "pale", "network", "dots", "edge"]) + str(n) for n in range(200)]
    sentence = " ".join(f"lesion{n} {word}" for n, word in enumerate(words)) + "."
    assert judge("Round, brown and small.", prompt=UNTOLD).reason is Reason.TOO_SHORT
    assert judge("Round, brown and small.", prompt=UNTOLD, min_words=4).accepted
    assert judge(f"{NEVUS.opening}. Round, brown and small.").reason is Reason.TOO_SHORT
    count = len(GOOD.split())
    assert judge(GOOD, max_words=count).accepted
    assert judge(GOOD, max_words=count - 1).reason is Reason.TOO_LONG
    assert not judge(sentence, prompt=UNTOLD).accepted


def tokenizer_folder(folder, *, truncated_to=None, fast=True):
    """One token a letter, an end mark, and the truncation that a saved tokenizer may carry."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = {letter: number for number, letter in enumerate(["<unk>", "</s>", *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    if truncated_to:
        tokenizer.enable_truncation(truncated_to)
        tokenizer.enable_padding(length=truncated_to, pad_id=1, pad_token="</s>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    return folder


def test_length_is_counted_with_the_readers_tokenizer_end_mark_included_and_nothing_cut_off(tmp_path):
    folder = str(tokenizer_folder(tmp_path, truncated_to=20))
    num_tokens = len(GOOD) + 1
    assert Gate(GateConfig(tokenizer=folder)).count_tokens(GOOD) == num_tokens
    assert judge(GOOD, tokenizer=folder, max_tokens=num_tokens).accepted
    verdict = judge(GOOD, tokenizer=folder, max_tokens=num_tokens - 1)
    assert str(verdict) == f"too_long: {num_tokens} tokens; at most {num_tokens - 1}"
    assert judge(GOOD, tokenizer=folder, max_tokens=num_tokens, max_words=3).accepted


def test_a_missing_tokenizer_is_an_error_that_says_where(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "none"))):
        Gate(GateConfig(tokenizer=str(tmp_path / "none")))
    with pytest.raises(ValueError, match="no tokenizer in"):
        load_token_counter(tmp_path)


FACTS = Facts(
    diagnosis=Diagnosis.NV,
    sex=Sex.FEMALE,
    site=Site.BACK,
    skin_type=SkinType.II,
    skin_tone=SkinTone.LIGHT,
    is_hairy=True,
)
CONTRADICTORY = [
    "The appearance is that of a melanoma.",
    "Findings suggest basal cell carcinoma.",
    "It is a Seborrhoeic keratosis.",
    "The lesion is not symmetric and is consistent with malignant melanoma.",
    "There is no network on this melanoma.",
    "No network is seen, but the melanoma is dark.",
    "Likely skin cancer.",
    "It appears malignant.",
    "The growth is cancerous.",
    "His skin is intact.",
    "The skin around it shows that he is pale.",
    "The skin of a man is shown.",
    "Seen in a male patient.",
    "The dark skin around it is intact.",
    "It belongs to a dark-skinned person.",
    "Fitzpatrick skin type V.",
    "It lies on the left forearm.",
    "It lies on the face.",
    "There is no hair visible.",
    "The area is hairless.",
    "There are no visible dots, vessels or hairs.",
]
AGREEING = [
    "It is a melanocytic nevus.",
    "A naevus with globules.",
    "This mole is benign.",
    "There are no signs of malignancy.",
    "His/her skin is intact.",
    "Her skin is intact.",
    "It is premalignant or pre-cancerous.",
    "There is no sign of melanoma.",
    "There are no features of melanoma, basal cell carcinoma or ulceration.",
    "Melanoma is unlikely.",
    "It is a nevus rather than a melanoma.",
    "It resembles a melanoma in colour.",
    "The surface is wart-like.",
    "A keratosis-like surface.",
    "The woman's skin is fair.",
    "Seen in a female patient.",
    "The dark skin lesion stands out.",
    "A darkly pigmented, light brown lesion on light brown skin.",
    "A dark area on the skin.",
    "The skin is Fitzpatrick type III.",
    "It lies on the upper back.",
    "It lies on the trunk.",
    "Darker colour on the left of the image, against the background.",
    "A black ruler is on the right side.",
    "Hairs cross the lesion.",
    "There are no hair follicles.",
    "There is no network, hairs cross the lesion.",
    "There is no thick hair over the centre.",
    "The border is not covered by hair.",
]


@pytest.mark.parametrize("sentence", CONTRADICTORY)
def test_what_is_known_otherwise_is_a_contradiction(sentence):
    assert len(contradictions(sentence, FACTS)) == 1
    verdict = judge(f"{GOOD} {sentence}", FACTS)
    assert verdict.reason is Reason.CONTRADICTION
    assert "is known" in verdict.detail


@pytest.mark.parametrize("sentence", AGREEING)
def test_what_agrees_or_is_denied_or_vague_is_none(sentence):
    assert contradictions(sentence, FACTS) == []
    assert judge(f"{GOOD} {sentence}", FACTS).accepted


@pytest.mark.parametrize("sentence", CONTRADICTORY)
def test_where_nothing_is_known_nothing_contradicts(sentence):
    assert contradictions(sentence, Facts()) == []
    assert contradictions(sentence, Facts(is_hairy=False)) == []


@pytest.mark.parametrize("diagnosis", list(Diagnosis))
def test_every_diagnosis_agrees_with_itself_and_contradicts_an_unrelated_one(diagnosis):
    text = f"The features are those of {diagnosis.phrase}, in a classic form."
    assert contradictions(text, Facts(diagnosis=diagnosis)) == []
    other = Diagnosis.VITILIGO if diagnosis is not Diagnosis.VITILIGO else Diagnosis.MEL
    assert len(contradictions(text, Facts(diagnosis=other))) == 1
    assert contradictions(f"There is no evidence of {diagnosis.phrase} at all.", Facts(diagnosis=other)) == []


@pytest.mark.parametrize(
    ("known", "phrase", "agrees"),
    [
        (Diagnosis.AKIEC, "actinic keratosis", True),
        (Diagnosis.AKIEC, "Bowen's disease", True),
        (Diagnosis.AK, "squamous cell carcinoma", False),
        (Diagnosis.BKL, "lichen planus-like keratosis", True),
        (Diagnosis.BKL, "solar lentigo", True),
        (Diagnosis.MEL, "lentigo maligna", True),
        (Diagnosis.VASC, "haemangioma", True),
        (Diagnosis.ROSACEA, "acne rosacea", True),
        (Diagnosis.ACNE, "acne rosacea", False),
        (Diagnosis.TINEA_VERSICOLOR, "tinea versicolor", True),
        (Diagnosis.TINEA, "tinea versicolor", False),
        (Diagnosis.BCC, "skin cancer", True),
        (Diagnosis.DF, "skin cancer", False),
        (Diagnosis.SEBORRHEIC_DERMATITIS, "seborrheic dermatitis", True),
    ],
)
def test_synonyms_and_umbrellas_are_known(known, phrase, agrees):
    assert (contradictions(f"This is {phrase}.", Facts(diagnosis=known)) == []) == agrees


@pytest.mark.parametrize("skin_type", list(SkinType))
def test_only_distant_skin_tones_contradict(skin_type):
    facts = Facts(skin_type=skin_type)
    said = {word: not contradictions(f"Seen on {word} skin.", facts) for word in ("fair", "medium brown", "very dark")}
    assert said["fair"] == (skin_type <= 3)
    assert said["very dark"] == (skin_type >= 4)
    assert said["medium brown"] == (2 <= skin_type <= 5)
    for other in SkinType:
        agrees = not contradictions(f"Fitzpatrick type {other.name}.", facts)
        assert agrees == (abs(other - skin_type) <= 1)
    by_tone = Facts(skin_tone=skin_type.tone)
    assert bool(contradictions("Seen on very dark skin.", by_tone)) == (skin_type.tone is SkinTone.LIGHT)


@pytest.mark.parametrize(
    ("site", "sentence", "agrees"),
    [
        (Site.HAND, "It lies on the back of the hand.", True),
        (Site.BACK, "It lies on the back of the hand.", False),
        (Site.FACE, "It lies on the nose.", True),
        (Site.HEAD_OR_NECK, "It lies on the scalp.", True),
        (Site.FOOT, "It lies on the sole.", True),
        (Site.LOWER_EXTREMITY, "It lies on the chest.", False),
        (Site.TRUNK, "It lies on his lower back.", True),
        (Site.PALM_OR_SOLE, "It lies on the palm.", True),
        (Site.FACE, "It does not lie on the leg.", True),
    ],
)
def test_a_site_agrees_with_what_holds_it_or_lies_in_it(site, sentence, agrees):
    assert (contradictions(sentence, Facts(site=site)) == []) == agrees


def test_a_diagnosis_may_be_named_only_where_the_label_was_told():
    text = "A dermoscopic image of a round, brown lesion with a network, typical of a melanocytic nevus."
    assert diagnoses_named(text) == ["melanocytic nevus"]
    verdict = judge(text, Facts(diagnosis=Diagnosis.NV), UNTOLD)
    assert verdict.reason is Reason.DIAGNOSIS_NAMED
    assert judge(text, Facts(diagnosis=Diagnosis.NV), NEVUS).accepted
    denied = text.replace("typical of a melanocytic nevus", "without signs of melanoma")
    assert judge(denied, prompt=UNTOLD).accepted


def test_the_told_label_is_no_claim_of_the_captioners():
    prompt = make_prompt(Modality.CLINICAL, "nevus, formerly melanoma")
    text = f"{prompt.opening}. A round, brown, slightly raised lesion without scale."
    assert judge(text, Facts(diagnosis=Diagnosis.NV), prompt).accepted


def test_the_facts_of_a_row():
    row = {"modality": "clinical", "diagnosis": "scc", "sex": "male", "site": None, "skin_type": 5, "age_years": 50}
    expected = Facts(
        Modality.CLINICAL,
        Diagnosis.SCC,
        Sex.MALE,
        skin_type=SkinType.V,
        skin_tone=SkinTone.DARK,
        is_hairy=True,
        age_years=50,
    )
    assert Facts.of(row, True) == expected
    assert Facts.of(row | {"site": "back", "sex": "unknown", "age_years": None}).site is Site.BACK


@pytest.mark.parametrize(("age", "agrees"), [(45, True), (50, True), (40, True), (70, False), (9, False)])
def test_only_an_age_that_is_far_off_contradicts(age, agrees):
    for text in (f"The skin of a {age}-year-old patient.", f"A patient aged {age}."):
        assert (contradictions(text, Facts(age_years=50)) == []) == agrees
        assert contradictions(text, Facts()) == []
