"""Plans of prompts: what the four systems asked their generators for, sample by sample."""

import random
from collections import Counter

import pytest
from pydantic import TypeAdapter, ValidationError

from derm_pipeline.captions.lesiongen import CONDITIONS
from derm_pipeline.captions.skin_diff import skin_diff_prompt
from derm_pipeline.generation import (
    AnySampling,
    CaptionSampling,
    Img2ImgSampling,
    LesionGenSampling,
    Prompt,
    PromptListSampling,
    SampleRequest,
    SamplingConfig,
    TrainingImage,
    plan_requests,
    plan_samples,
    sample_seed,
)
from derm_pipeline.records import Diagnosis, SkinTone, SkinType
from derm_pipeline_tests.generation.networks import SEVEN
from derm_pipeline_tests.generation.test_prompt_file import MELANOMA

READ = TypeAdapter(AnySampling)


def plan(config, diagnoses=SEVEN, images=()):
    return plan_requests(config, diagnoses, {}, images)


def training_images(num=30):
    rng = random.Random()
    types = [None, *SkinType]
    return [
        TrainingImage(
            f"{rng.getrandbits(256):064x}", SEVEN[place % 7], types[place % 7 - place % 2], f"caption {place}"
        )
        for place in range(num)
    ]


def test_a_plan_is_told_by_its_name_and_what_was_there_stays_as_it_was():
    for said, kind in (
        ({}, SamplingConfig),
        ({"plan": "fill"}, SamplingConfig),
        ({"plan": "lesiongen"}, LesionGenSampling),
        ({"plan": "prompts", "prompts": ["a nevus"]}, PromptListSampling),
        ({"plan": "captions"}, CaptionSampling),
        ({"plan": "img2img"}, Img2ImgSampling),
    ):
        config = READ.validate_python(said)
        assert type(config) is kind
        assert READ.validate_python(config.model_dump()) == config
        assert READ.validate_python(config) is config
    with pytest.raises(ValidationError, match="plan should be one of balanced, fill, lesiongen, prompts"):
        READ.validate_python({"plan": "many"})
    assert SamplingConfig().model_dump(mode="json") == {
        "plan": "balanced",
        "num_samples": 700,
        "skin_types": [1, 2, 3, 4, 5, 6],
        "num_steps": 15,
        "solver": "dpm2m",
        "guidance": 1.5,
        "guidance_interval": None,
        "precision": "auto",
        "compile": False,
        "batch_size": 64,
        "seed": 0,
        "image_format": "png",
        "jpeg_quality": 95,
    }
    assert plan(SamplingConfig(num_samples=20)) == plan_samples(SamplingConfig(num_samples=20), SEVEN, {})
    request = SampleRequest(3, 9, Diagnosis.MEL, SkinType.V)
    assert request.identity == [9, "diagnosis=mel, skin_type=5"]


def test_lesiongen_draws_every_combination_by_the_samples_own_seed():
    config = LesionGenSampling(num_samples=7 * 600, seed=random.randrange(2**31))
    requests = plan(config)
    assert Counter(request.diagnosis for request in requests) == dict.fromkeys(SEVEN, 600)
    for diagnosis in SEVEN:
        condition, of_it = CONDITIONS[diagnosis], [one for one in requests if one.diagnosis == diagnosis]
        drawn = Counter((one.text, one.prompting.guidance, one.prompting.num_steps) for one in of_it)
        texts = {
            f"{condition} small size on a dark skin tone": SkinTone.DARK,
            f"{condition} large size on a light skin tone": SkinTone.LIGHT,
            f"{condition} medium size on a medium skin tone": SkinTone.MEDIUM,
        }
        assert len(drawn) > 41  # of 48, each of which 600 draws miss with a chance of 3e-6
        assert drawn.keys() <= {(text, g, s) for text in texts for g in (3, 5, 7.5, 10) for s in (30, 50, 70, 100)}
        assert {(text, g) for text, g, _ in drawn} == {(text, g) for text in texts for g in (3, 5, 7.5, 10)}
        assert all(one.prompting.target_tone == texts[one.text] for one in of_it)
        assert all(one.prompt == one.text for one in of_it)
        assert all(one.skin_type is None for one in of_it)
    combinations = {(one.prompting.target_tone, one.prompting.guidance, one.prompting.num_steps) for one in requests}
    assert len(combinations) == 48
    assert plan(config) == requests
    few = plan(config.model_copy(update={"num_samples": 7}))
    assert {one.seed for one in few} == {sample_seed(config.seed, number) for number in range(7)}


def test_lesiongens_single_prompt_is_its_own():
    requests = plan(LesionGenSampling(mode="single", num_samples=7))
    assert [one.text for one in requests] == [f"{CONDITIONS[one]} small size on a dark skin tone" for one in SEVEN]
    assert {(one.prompting.guidance, one.prompting.num_steps) for one in requests} == {(7.5, 50)}
    other = plan(LesionGenSampling(mode="single", num_samples=1), [Diagnosis.PSORIASIS])[0]
    assert other.text == "Psoriasis small size on a dark skin tone"


def test_what_a_mode_of_lesiongen_does_not_heed_is_refused():
    for said in ({"guidance": 3}, {"num_steps": 20}, {"mode": "single", "steps": [20]}):
        with pytest.raises(ValidationError, match="means nothing in mode"):
            LesionGenSampling(**said)
    requests = plan(LesionGenSampling(guidances=(2,), steps=(4, 5), num_samples=70))
    assert {(one.prompting.guidance, one.prompting.num_steps) for one in requests} == {(2, 4), (2, 5)}


def test_prompts_of_a_recipe_keep_their_words_seeds_and_settings():
    config = READ.validate_python(
        {
            "plan": "prompts",
            "diagnosis": "mel",
            "negative_prompt": "drawing",
            "samples_each": 2,
            "prompts": [MELANOMA.replace("1024", "64"), {"text": "a nevus", "diagnosis": "nv", "skin_type": 5}],
        }
    )
    with pytest.raises(ValueError, match=r"several sizes \(64 x 64, the generator's own\)"):
        plan(config)
    sized = [one.model_copy(update={"width_px": 64, "height_px": 64}) for one in config.prompts]
    requests = plan(config.model_copy(update={"prompts": tuple(sized)}))
    assert [one.diagnosis.value for one in requests] == ["mel", "mel", "nv", "nv"]
    assert [one.seed for one in requests][:1] == [1]
    assert len({one.seed for one in requests}) == 4
    first, other = requests[1].prompting, requests[2].prompting
    assert (first.guidance, first.num_steps, first.size_px) == (12, 28, (64, 64))
    assert first.negative_prompt == "(low quality:1.4), watermark, text, blurry, cartoon, 3d"
    assert (other.guidance, other.num_steps, other.negative_prompt) == (None, None, "drawing")
    assert (requests[2].skin_type, other.target_tone) == (SkinType.V, SkinTone.DARK)


def test_prompts_of_a_file_count_by_what_it_holds(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(MELANOMA)
    config = PromptListSampling(file=str(path))
    assert plan(config, [Diagnosis.MEL])[0].text.startswith("photo of a detailed female skin")
    identity = config.identity()
    other = tmp_path / "same.txt"
    other.write_text(MELANOMA)
    assert PromptListSampling(file=str(other)).identity() == identity
    path.write_text(MELANOMA.replace("leg", "torso"))
    assert config.identity() != identity
    with pytest.raises(ValueError, match="what does 'photo of a detailed female skin.*' show"):
        plan(config, SEVEN)
    for said in ({}, {"file": str(path), "prompts": [MELANOMA]}):
        with pytest.raises(ValidationError, match="one of the two"):
            PromptListSampling(**said)
    with pytest.raises(ValidationError, match="there is no option --x"):
        PromptListSampling(prompts=["a nevus --x 1"])
    assert PromptListSampling(prompts=[Prompt(text="a nevus")]).prompts[0].text == "a nevus"


def test_captions_are_those_of_training_images_of_the_diagnosis():
    images = training_images()
    requests = plan(CaptionSampling(num_samples=700), images=images)
    by_caption = {image.caption: image for image in images}
    assert {one.text for one in requests} == by_caption.keys()
    for one in requests:
        assert by_caption[one.text].diagnosis == one.diagnosis
        assert by_caption[one.text].skin_type == one.skin_type
    with pytest.raises(ValueError, match=r"no training image of vasc has a caption"):
        plan(CaptionSampling(), images=[image for image in images if image.diagnosis != Diagnosis.VASC])


def test_img2img_takes_every_training_image_to_dark_skin():
    images = training_images()
    config = Img2ImgSampling()
    requests = plan(config, images=images)
    assert [one.origin.sha256 for one in requests] == [image.sha256 for image in images for _ in range(5)]
    assert {one.origin.strength for one in requests} == {0.5}
    assert (config.num_steps, config.guidance) == (100, 2.0)
    assert len({one.seed for one in requests}) == 150
    for image, first in zip(images, requests[::5], strict=True):
        of_it = [one for one in requests if one.origin.sha256 == image.sha256]
        assert {one.skin_type for one in of_it} == {first.skin_type}
        if image.skin_type in (SkinType.V, SkinType.VI):
            assert first.skin_type == image.skin_type
        assert first.skin_type in (SkinType.V, SkinType.VI)
        assert first.text == skin_diff_prompt(image.diagnosis.value, first.skin_type)
        assert first.prompting.target_tone == SkinTone.DARK
    many = plan(config, images=training_images(200))
    assert {one.skin_type for one in many} == {SkinType.V, SkinType.VI}
    assert not any(one.origin.keeps_lesion for one in requests)
    assert all(one.origin.keeps_lesion for one in plan(Img2ImgSampling(lesion="kept"), images=images))


def test_fewer_images_are_the_same_ones_whatever_their_order():
    images = training_images()
    config = Img2ImgSampling(max_images=6, samples_each=1, seed=random.randrange(100))
    chosen = {(one.origin.sha256, one.skin_type) for one in plan(config, images=images)}
    assert len(chosen) == 6
    assert {(one.origin.sha256, one.skin_type) for one in plan(config, images=images[::-1])} == chosen


def test_a_strength_that_takes_no_step_is_refused():
    with pytest.raises(ValidationError, match="is no step at all"):
        Img2ImgSampling(strength=0.1, num_steps=9)
    assert Img2ImgSampling(strength=0.1, num_steps=10).strength == 0.1
    with pytest.raises(ValueError, match="no training image of .*mel.* to begin from"):
        plan(Img2ImgSampling())
