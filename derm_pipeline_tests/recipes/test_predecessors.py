"""Recipes after the predecessors: what they have in common with their scripts and papers, and where they depart.

`EXPECTED` holds the predecessor's own numbers, as spec/predecessors.md states them; `DEPARTURES` what the recipe has
instead, each of which its comment gives a reason for. Whatever is in neither is not compared.
"""

import pytest

from derm_pipeline.captions.lesiongen import CONDITIONS
from derm_pipeline.captions.skin_diff import skin_diff_token
from derm_pipeline.generation import TrainingImage, plan_requests
from derm_pipeline.recipes import SHIPPED, load_recipe, recipe_files
from derm_pipeline.records import Diagnosis, SkinType
from derm_pipeline_tests.models.test_lora import ATTENTION as LISTED
from derm_pipeline_tests.models.test_lora import KOHYA, MED_ART

ATTENTION = {"to_k", "to_q", "to_v", "to_out.0"}
MED_ART_TARGETS = {
    *("to_k", "to_q", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("proj", "linear", "linear_1", "linear_2"),
}
KOHYA_TARGETS = {*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"}

EXPECTED = {
    "lesiongen_lora": {
        "sources": ("ham10000",),
        "generator.base.model": "CompVis/stable-diffusion-v1-4",
        "generator.base.family": "sd",
        "latents.size_px": 256,
        "latents.geometry": "crop",
        "latents.orientations": 2,
        "training_set.caption": "label",
        "kinds": ["lora"],
        "lora.denoiser.rank": 64,
        "lora.denoiser.alpha": 64,
        "lora.denoiser.targets": ATTENTION,
        "lora.text": None,
        "lora.training.num_steps": 15_000,
        "lora.training.micro_batch_size": 1,
        "lora.training.batch_size": 4,
        "lora.training.lr": 5e-6,
        "lora.training.schedule": "constant",
        "lora.training.warmup_steps": 0,
        "lora.training.decays": (),
        "generator.activation_checkpointing": True,
        "synthetic_dataset.plan": "lesiongen",
        "synthetic_dataset.guidances": (3, 5, 7.5, 10),
        "synthetic_dataset.steps": (30, 50, 70, 100),
        "synthetic_dataset.num_samples": 70,
    },
    "lesiongen_full": {
        "sources": ("d7p",),
        "generator.base.model": "CompVis/stable-diffusion-v1-4",
        "latents.size_px": 256,
        "kinds": ["full"],
        "full.training.num_steps": 15_000,
        "full.training.micro_batch_size": 1,
        "full.training.batch_size": 4,
        "full.training.lr": 1e-5,
        "full.training.schedule": "constant",
        "full.training.warmup_steps": 0,
        "full.training.clip_norm": 1,
        "full.training.decays": (0.9999,),
    },
    "skin_diff": {
        "sources": ("fitz_subset",),
        "training_set.split": "light_dark",
        "training_set.caption": "skin_diff",
        "generator.base.model": "stabilityai/stable-diffusion-2-1-base",
        "latents.size_px": 512,
        "latents.geometry": "squash",
        "latents.orientations": 2,
        "kinds": ["inversion", "lora"],
        "inversion.initialiser": "skin",
        "inversion.num_vectors": 1,
        "inversion.training.num_steps": 500,
        "inversion.training.batch_size": 16,
        "inversion.training.micro_batch_size": 4,
        "inversion.training.lr": 8e-3,
        "inversion.training.schedule": "constant",
        "inversion.training.weight_decay": 1e-2,
        "lora.denoiser.rank": 8,
        "lora.denoiser.alpha": 8,
        "lora.denoiser.targets": ATTENTION,
        "lora.denoiser.init": "gaussian",
        "lora.text": None,
        "lora.training.num_steps": 3000,
        "lora.training.batch_size": 4,
        "lora.training.lr": 5e-6,
        "lora.training.schedule": "constant",
        "lora.training.clip_norm": 1,
        "synthetic_dataset.plan": "img2img",
        "synthetic_dataset.strength": 0.5,
        "synthetic_dataset.num_steps": 100,
        "synthetic_dataset.guidance": 2,
        "synthetic_dataset.samples_each": 5,
        "synthetic_dataset.target_types": (5, 6),
        "classifiers.arms": ("real", "synthetic", "real+synthetic"),
        "classifiers.balance": 1,
    },
    "melanoma_sdxl": {
        "sources": ("isic2020",),
        "training_set.caption": "isic2020",
        "training_set.diagnoses": ("mel",),
        "generator.base.model": "stabilityai/stable-diffusion-xl-base-1.0",
        "generator.base.family": "sdxl",
        "autoencoder.dtype": "float32",
        "latents.size_px": 1024,
        "kinds": ["lora"],
        "lora.denoiser.rank": 128,
        "lora.denoiser.alpha": 128,
        "lora.denoiser.targets": KOHYA_TARGETS,
        "lora.text": None,
        "lora.training.num_steps": 7200,
        "lora.training.batch_size": 1,
        "lora.training.optimizer": "adamw8bit",
        "lora.training.lr": 4e-7,
        "lora.training.schedule": "constant",
        "lora.training.warmup_steps": 100,
        "lora.training.clip_norm": None,
        "generator.activation_checkpointing": True,
        "generator.base.max_tokens": 225,
        "synthetic_dataset.plan": "prompts",
        "synthetic_dataset.guidance": 12,
        "synthetic_dataset.num_steps": 28,
    },
    "med_art": {
        "sources": ("kvasir",),
        "training_set.caption": "visual",
        "generator.base.model": "PixArt-alpha/PixArt-XL-2-512x512",
        "generator.base.family": "pixart",
        "generator.base.max_tokens": 120,
        "latents.size_px": 512,
        "kinds": ["lora"],
        "lora.denoiser.rank": 8,
        "lora.denoiser.alpha": 8,
        "lora.denoiser.targets": MED_ART_TARGETS,
        "lora.denoiser.init": "gaussian",
        "lora.denoiser.dora": False,
        "lora.text.rank": 8,
        "lora.text.targets": {"q", "k", "v", "o", "wi", "wo"},
        "lora.training.num_images": 15 * 8000,
        "lora.training.batch_size": 1,
        "lora.training.optimizer": "adamw8bit",
        "lora.training.lr": 1e-4,
        "lora.training.schedule": "constant",
        "lora.training.warmup_steps": 0,
        "lora.training.betas": (0.9, 0.999),
        "lora.training.weight_decay": 1e-2,
        "lora.training.clip_norm": 1,
        "lora.training.seed": 42,
        "generator.noise_offset": 0,
        "generator.caption_dropout": 0,
        "generator.min_snr_gamma": None,
        "generator.hldf.every_steps": 500,
        "generator.hldf.num_steps": 20,
        "generator.hldf.image_weight": 1 / 20,
        "generator.hldf.guidance": 4.5,
        "generator.hldf.loss": "colour_moments",
        "generator.hldf.num_taken": 20,
        "generator.hldf.spacing": "linspace",
        "generator.hldf.num_gradient_steps": None,
        "synthetic_dataset.plan": "captions",
        "synthetic_dataset.num_steps": 50,
        "synthetic_dataset.guidance": 4.5,
    },
}
EXPECTED["med_art_derm"] = EXPECTED["med_art"] | {"sources": ("ham10000",)}

DEPARTURES = {
    "lesiongen_lora": {
        "training_set.caption": "lesiongen",
        "lora.denoiser.alpha": None,  # the rank: the same thing
        "lora.training.micro_batch_size": None,
        "generator.activation_checkpointing": False,
        "synthetic_dataset.num_samples": 700,
    },
    "lesiongen_full": {},
    "skin_diff": {
        "inversion.training.batch_size": 7 * 16,  # of all seven conditions at once
        "synthetic_dataset.strength": 0.8,
    },
    "melanoma_sdxl": {
        "training_set.diagnoses": ("mel", "nv"),
        "lora.training.num_steps": 2 * 7200,  # every second image is a nevus
        "lora.training.lr": 1e-4,
        "generator.base.max_tokens": None,  # as many as the text encoders take: 77
    },
    "med_art": {  # "proj_in" and "wi" match no layer
        "lora.denoiser.targets": MED_ART_TARGETS - {"proj_in"},
        "lora.text.targets": {"q", "k", "v", "o", "wo"},
    },
}
DEPARTURES["med_art_derm"] = DEPARTURES["med_art"]


def found(recipe, path):
    """What a recipe says, by a path whose first word may be a stage's kind."""
    first, *names = path.split(".")
    stages = {stage.kind: stage for stage in recipe.generator.stages}
    if first == "kinds":
        return list(stages)
    value = stages[first] if first in stages else getattr(recipe, first)
    for name in names:
        value = getattr(value, name)
    return set(value) if names[-1:] == ["targets"] else value


@pytest.mark.parametrize("name", EXPECTED)
def test_a_recipe_has_its_predecessors_numbers_but_for_the_departures_that_are_listed(name):
    recipe, departures = load_recipe(name, recipe_files()), DEPARTURES[name]
    assert departures.keys() <= EXPECTED[name].keys()
    wrong = {
        path: found(recipe, path)
        for path, value in (EXPECTED[name] | departures).items()
        if found(recipe, path) != value
    }
    assert wrong == {}
    needless = [path for path, value in departures.items() if EXPECTED[name][path] == value]
    assert needless == []


def test_the_adapters_are_those_whose_published_sizes_are_tested():
    recipes = {name: load_recipe(name, recipe_files()) for name in EXPECTED}
    targets = {name: found(recipe, "lora.denoiser.targets") for name, recipe in recipes.items() if "full" not in name}
    same = {"lesiongen_lora": LISTED, "skin_diff": LISTED, "melanoma_sdxl": KOHYA, "med_art": MED_ART}
    assert {name: targets[name] for name in same} == {name: set(listed) for name, listed in same.items()}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_such_recipe_starts_from_its_base_alone_and_says_where_it_departs(name):
    recipe, text = load_recipe(name, recipe_files()), (SHIPPED / f"{name}.yaml").read_text()
    assert (recipe.generator.kind, recipe.autoencoder.kind) == ("pretrained", "base")
    assert recipe.told_caption == recipe.training_set.caption
    assert "Unlike theirs" in text or "as `" in text
    assert text.startswith("#")


def test_the_prompts_of_lesiongen_are_its_three_in_all_settings():
    config = load_recipe("lesiongen_lora", recipe_files()).synthetic_dataset
    requests = plan_requests(config, tuple(CONDITIONS), {})
    assert len(requests) == 700
    ends = ("small size on a dark skin tone", "large size on a light skin tone", "medium size on a medium skin tone")
    names = {
        "mel": "Melanoma",
        "bcc": "Basal cell carcinoma",
        "bkl": "Benign keratosis-like lesions",
        "df": "Dermatofibroma",
        "nv": "Melanocytic nevi",
        "vasc": "Vascular lesions",
        "akiec": "Actinic keratoses and intraepithelial carcinoma",
    }
    allowed = {(code, f"{words} {end}") for code, words in names.items() for end in ends}
    assert {(one.diagnosis.value, one.text) for one in requests} == allowed
    drawn = {(one.prompting.guidance, one.prompting.num_steps) for one in requests}
    assert drawn == {(guidance, steps) for guidance in (3, 5, 7.5, 10) for steps in (30, 50, 70, 100)}


def test_skin_diff_tells_the_tokens_and_tones_of_its_seven_conditions():
    recipe = load_recipe("skin_diff", recipe_files())
    tokens = {
        Diagnosis.BCC: "bas-class",
        Diagnosis.FOLLICULITIS: "fol-class",
        Diagnosis.NEMATODE_INFECTION: "nem-class",
        Diagnosis.NEUTROPHILIC_DERMATOSIS: "neu-class",
        Diagnosis.PRURIGO_NODULARIS: "pru-class",
        Diagnosis.PSORIASIS: "pso-class",
        Diagnosis.SCC: "squ-class",
    }
    assert recipe.generator.tokens(tuple(diagnosis.value for diagnosis in tokens)) == {
        diagnosis.value: token for diagnosis, token in tokens.items()
    }
    inversion = recipe.generator.stages[0]
    assert len(inversion.templates) == 11
    assert all(words in " ".join(inversion.templates) for words in ("photo", "rendering", "cropped", "close-up"))
    tones = {5: "a dark-skinned", 6: "a very dark-skinned"}
    images = [
        TrainingImage(f"{place:064x}", diagnosis, SkinType(skin_type), "a caption")
        for place, (diagnosis, skin_type) in enumerate(
            (diagnosis, kind) for diagnosis in tokens for kind in (1, 2, 5, 6)
        )
    ]
    requests = plan_requests(recipe.synthetic_dataset, tuple(tokens), {}, images)
    assert len(requests) == 5 * len(images)
    for one in requests:
        image = images[int(one.origin.sha256, 16)]
        assert one.origin.strength == 0.8
        assert one.diagnosis == image.diagnosis
        assert one.skin_type == image.skin_type or (image.skin_type < 5 and one.skin_type in (5, 6))
        tone = tones[one.skin_type]
        assert one.text == f"An image of {skin_diff_token(image.diagnosis)} on the skin of {tone} individual"


def test_melanoma_sdxl_asks_with_the_sample_prompt_first_and_for_as_many_nevi():
    config = load_recipe("melanoma_sdxl", recipe_files()).synthetic_dataset
    first = "photo of a detailed female skin, me1anoma on leg, at age 30, high res, high quality"
    assert config.prompts[0].text == first
    requests = plan_requests(config, (Diagnosis.MEL, Diagnosis.NV), {})
    counts = [sum(one.diagnosis == diagnosis for one in requests) for diagnosis in (Diagnosis.MEL, Diagnosis.NV)]
    assert counts[0] == counts[1] == len(requests) / 2
    assert all(("me1anoma" in one.text) == (one.diagnosis == Diagnosis.MEL) for one in requests)
    for words in ("low quality", "watermark", "blurry", "cartoon"):
        assert words in config.negative_prompt
