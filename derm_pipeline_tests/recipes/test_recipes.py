"""Recipes: what is shipped loads, what is extended is filled in, what is wrong is named."""

import re

import pytest
import torch

from derm_pipeline.generation import LesionGenSampling
from derm_pipeline.models.generator import build_network
from derm_pipeline.recipes import SHIPPED, RecipeError, load_recipe, read_recipe, recipe_files, recipe_sources

SHIPPED_NAMES = sorted(path.stem for path in SHIPPED.glob("*.yaml"))
OF_A_BASE = {"lesiongen_full", "lesiongen_lora", "med_art", "med_art_derm", "melanoma_sdxl", "skin_diff"}
FROM_SCRATCH = sorted(set(SHIPPED_NAMES) - OF_A_BASE)


@pytest.fixture
def write(tmp_path):
    def written(**texts):
        for stem, text in texts.items():
            (tmp_path / f"{stem}.yaml").write_text(text)
        return recipe_files([tmp_path])

    return written


@pytest.mark.parametrize("name", SHIPPED_NAMES)
def test_every_shipped_recipe_loads(name):
    recipe = load_recipe(name, recipe_files())
    assert recipe.name == name
    assert list(recipe.sources) == recipe_sources(name, recipe_files())
    assert load_recipe(name, recipe_files()) == recipe


def test_a_recipe_is_laid_over_what_it_extends_key_by_key(write):
    files = write(
        base="extends: quickstart\ntitle: base\ngenerator: {width: 64, heads: 2}\n",
        own="extends: base\ngenerator: {depth: 2, training: {num_steps: 7}}\nsources: [ham10000]\n",
    )
    shipped, own = load_recipe("quickstart", files), load_recipe("own", files)
    assert own.title == "base"
    assert own.sources == ("ham10000",)  # a list is replaced, not lengthened
    assert (own.generator.width, own.generator.heads, own.generator.depth) == (64, 2, 2)
    assert own.generator.training == shipped.generator.training.model_copy(update={"num_steps": 7})
    assert own.autoencoder == shipped.autoencoder


def test_another_kind_of_network_inherits_no_key_however_far_up_the_kind_was_named(write):
    files = write(
        base="extends: quickstart\ngenerator: {width: 64, heads: 2}\n",  # a dit, says quickstart
        own="extends: base\ngenerator: {kind: unet, widths: [32, 64], attention_levels: [],"
        " training: {num_steps: 3, batch_size: 2, lr: 0.1}}\n",
    )
    assert load_recipe("own", files).generator.widths == (32, 64)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("generator: {conditions: [diagnosis, skin_type, diagnosis]}", "names diagnosis more than once"),
        ("synthetic_dataset: {solver: ddpm}", 'synthetic_dataset.solver: "ddpm" needs'),
        ("synthetic_dataset: {guidance: .inf}", "synthetic_dataset.guidance: Input should be a finite number"),
        ("synthetic_dataset: {guidance: .nan}", "synthetic_dataset.guidance: Input should be a finite number"),
        ("generator: {condition_dropout: 0}", "condition_dropout must be above 0, or synthetic_dataset.guidance be 1"),
        (
            "latents: {size_px: 48}\ngenerator: {kind: unet, widths: [32, 32, 32, 32], attention_levels: [], training: "
            "{num_steps: 3, batch_size: 2, lr: 0.1}}",
            "latent_size 12 is not a multiple of 8, which the 4 levels of `widths` need: give fewer levels",
        ),
    ],
)
def test_settings_that_could_not_work_in_a_later_stage_are_refused_in_one_line(write, settings, words):
    files = write(own=f"extends: quickstart\n{settings}\n")
    with pytest.raises(RecipeError) as refused:
        load_recipe("own", files)
    assert words in str(refused.value)
    assert str(refused.value).startswith(str(files["own"]))
    assert "\n" not in str(refused.value)


def test_a_recipe_that_tells_no_text_is_written_without_it(write):
    """Its artifacts are found under the keys that they always had."""
    for name in (name for name in recipe_files() if name != "dit_text"):
        assert "text" not in load_recipe(name, recipe_files()).model_dump(mode="json")["generator"], name


def test_captions_are_told_by_an_encoder_that_the_recipe_names(write):
    files = write(
        own="extends: dit_text\ngenerator: {text: {encoder: {model: some/t5, max_tokens: 120}, mode: pooled}}\n",
        none="extends: dit_text\ngenerator: {text: null}\n",
    )
    own, shipped = load_recipe("own", files), load_recipe("dit_text", files)
    assert (own.generator.text.encoder.model, own.generator.text.mode) == ("some/t5", "pooled")
    assert (shipped.generator.text.encoder.max_tokens, shipped.generator.text.mode) == (77, "cross")
    assert load_recipe("none", files).generator.text is None


def test_guidance_may_go_by_conditions_that_are_hidden_one_by_one(write):
    files = write(own="extends: quickstart\ngenerator: {condition_dropout: 0, condition_dropout_each: 0.2}\n")
    assert load_recipe("own", files).generator.condition_dropout == 0


def test_another_kind_of_law_does_not_inherit_the_keys_of_the_first(write):
    own = load_recipe("own", write(own="extends: quickstart\ngenerator: {law: {kind: ddpm, prediction: epsilon}}\n"))
    assert own.generator.law.kind == "ddpm"
    assert own.generator.law.prediction == "epsilon"
    same = load_recipe("own", write(own="extends: quickstart\ngenerator: {law: {kind: flow, logit_std: 2}}\n"))
    assert (same.generator.law.time_law, same.generator.law.logit_std) == ("logit-normal", 2)


TEXT = "generator: {text: {encoder: {model: some/encoder}}}\n"


def test_another_plan_inherits_no_settings_of_the_first(write):
    said = f"extends: quickstart\n{TEXT}synthetic_dataset: {{plan: lesiongen, steps: [9]}}\n"
    sampling = load_recipe("own", write(own=said)).synthetic_dataset
    assert isinstance(sampling, LesionGenSampling)
    assert (sampling.steps, sampling.num_samples) == ((9,), 70)
    further = load_recipe("more", write(own=said, more="extends: own\nsynthetic_dataset: {num_samples: 7}\n"))
    assert further.synthetic_dataset == sampling.model_copy(update={"num_samples": 7})
    filled = load_recipe("own", write(own="extends: quickstart\nsynthetic_dataset: {plan: fill}\n")).synthetic_dataset
    assert (filled.plan, filled.num_steps) == ("fill", 12)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            f"extends: quickstart\n{TEXT}synthetic_dataset: {{plan: img2img, mask: 3}}\n",
            ["synthetic_dataset.mask: unknown key", "allowed here: ", "strength"],
        ),
        (
            f"extends: quickstart\n{TEXT}synthetic_dataset: {{plan: prompts, prompts: [a nevus --x 3]}}\n",
            ["synthetic_dataset.prompts: --x 3: there is no option --x"],
        ),
        (
            "extends: quickstart\nsynthetic_dataset: {plan: captions}\n",
            ["synthetic_dataset.plan captions asks in words, so generator.text must be set"],
        ),
        (
            f"extends: quickstart\n{TEXT}synthetic_dataset: {{plan: lesiongen, guidance: 3}}\n",
            ["synthetic_dataset: guidance means nothing in mode dataset: set guidances"],
        ),
        ("extends: quickstart\nwidth: 3\n", ["width: unknown key", "allowed here: title, sources, training_set"]),
        (
            "extends: quickstart\ngenerator: {wdith: 3}\n",
            ["generator.wdith: unknown key", "allowed here: ", "patch, width"],
        ),
        ("extends: quickstart\ngenerator: {training: {steps: 3}}\n", ["generator.training.steps", "num_steps"]),
        ("extends: quickstart\ngenerator: {law: {kind: ddpm, foo: 1}}\n", ["foo: unknown key", "prediction"]),
        ("extends: quickstart\ngenerator: {law: {kind: wave}}\n", ["generator.law", "'flow', 'ddpm'"]),
        ("extends: quickstart\ngenerator: {width: many}\n", ["generator.width", "valid integer"]),
        ("extends: quickstart\nsynthetic_dataset: {num_samples: 0}\n", ["num_samples", "greater than or equal to 1"]),
        (
            "extends: quickstart\nsynthetic_dataset: {plan: many}\n",
            ["synthetic_dataset: plan should be", "fill, lesiongen"],
        ),
        (
            "extends: quickstart\nsources: [mars]\n",
            ["sources", "unknown source 'mars'", "phantom, ham10000"],
        ),
        ("extends: quickstart\nsources: []\n", ["sources"]),
        ("extends: quickstart\nsources: [phantom, phantom]\n", ["sources", "phantom is named more than once"]),
        ("extends: quickstart\ntraining_set: {caption: long}\n", ["training_set.caption", "'skin_diff'", "'visual'"]),
        ("extends: quickstart\ntraining_set: {diagnoses: [mole]}\n", ["training_set.diagnoses", "'psoriasis'"]),
        ("extends: quickstart\nname: other\n", ["name", "called as its file is"]),
        ("extends: quickstart\ngenerator: {training: {lr: .inf}}\n", ["generator.training.lr", "finite"]),
        (
            "extends: quickstart\ngenerator: {training: {betas: [1.5, 0.9]}}\n",
            ["generator.training.betas.0", "less than 1"],
        ),
        ("extends: quickstart\nlatents: {size_px: 70}\n", ["latents.size_px 70 is not a multiple of 8"]),
        ("extends: quickstart\ngenerator: {width: 100}\n", ["generator: width 100", "heads 3", "take width 96 or 108"]),
        ("extends: quickstart\ngenerator: {conditions: [diagnosis]}\n", ["generator.conditions", "skin_types be []"]),
        ("extends: quickstart\ngenerator: {conditions: [skin_type]}\n", ["generator.conditions must name that"]),
        ("extends: quickstart\nclassifiers: {arms: [synthetic]}\n", ["classifiers.arms must name real"]),
        ("extends: quickstart\nclassifiers: {width: 12}\n", ["classifiers.width 12 is not a multiple of 8"]),
        ("extends: nothing\n", ["extends 'nothing' is not a recipe; there are dit"]),
        ("extends: [quickstart]\n", ["extends", "name of one recipe"]),
        ("extends: own\n", ["circle (own -> own)"]),
        ("a: 1\nb: [\n", ["not YAML", "line 3"]),
        ("just words\n", ["a recipe is a mapping"]),
        ("", ["a recipe is a mapping"]),
        ("sources: [phantom]\n", ["title: Field required"]),
    ],
)
def test_a_wrong_recipe_is_an_error_that_names_the_file_the_key_and_what_is_allowed(write, tmp_path, text, words):
    files = write(own=text)
    with pytest.raises(RecipeError) as caught:
        load_recipe("own", files)
    message = str(caught.value)
    assert str(tmp_path / "own.yaml") in message
    assert all(word in message for word in words), message
    assert len(message.splitlines()) == 1 or "Field required" in message


def test_circles_through_several_files_are_found(write):
    files = write(a="extends: b\n", b="extends: c\n", c="extends: a\n")
    with pytest.raises(RecipeError, match="a -> b -> c -> a"):
        read_recipe("a", files)


def test_bytes_that_are_no_text_are_named_with_their_file(tmp_path):
    (tmp_path / "own.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match=r"own\.yaml: not YAML"):
        load_recipe("own", recipe_files([tmp_path]))


def test_an_unknown_recipe_is_an_error_that_names_those_there_are():
    with pytest.raises(RecipeError, match=r"'nothing' is not a recipe; there are dit, dit_b, dit_scin, dit_text, dit"):
        load_recipe("nothing", recipe_files())


def test_a_shipped_name_may_not_be_taken(write):
    with pytest.raises(RecipeError, match="quickstart exists already"):
        write(quickstart="extends: ham10000\n")


@pytest.mark.parametrize("stem", ["My recipe", "1st", "a-b", "Ä"])
def test_a_file_whose_name_cannot_be_a_partition_is_named(write, stem):
    with pytest.raises(RecipeError, match="rename it"):
        write(**{stem: "extends: quickstart\n"})


def test_a_recipe_without_sources_of_its_own_has_those_of_what_it_extends(write):
    files = write(own="extends: ham10000\n", broken="extends: quickstart\nsources: phantom\n")
    assert recipe_sources("own", files) == ["ham10000"]
    with pytest.raises(RecipeError, match="list of source names"):
        recipe_sources("broken", files)


@pytest.mark.parametrize(("name", "num_weights"), [("dit", 16_593_040), ("dit_b", 64_472_464), ("dit_xl", 673_985_696)])
def test_the_recipes_of_published_networks_have_their_number_of_weights(name, num_weights):
    from derm_pipeline.models.dit import num_parameters

    recipe = load_recipe(name, recipe_files())
    network = recipe.generator.network(recipe.latents.size_px // 8, 4, {"diagnosis": 7})
    assert num_parameters(network) == num_weights


@pytest.mark.parametrize("name", FROM_SCRATCH)
def test_a_shipped_recipe_fits_its_autoencoder_and_has_the_number_of_weights_that_its_comment_says(name):
    recipe, text = load_recipe(name, recipe_files()), (SHIPPED / f"{name}.yaml").read_text()
    choice = recipe.autoencoder
    downsampling, channels = (8, 4) if choice.kind == "pretrained" else (choice.network.downsampling, 4)
    classes = {"diagnosis": 7, "skin_type": 6}
    told = {condition: classes[condition] for condition in recipe.generator.conditions}
    with torch.device("meta"):
        side = recipe.latents.size_px // downsampling
        network = build_network(recipe.generator.network(side, channels, told, text_width=768))  # CLIP ViT-L/14's
    num_weights = sum(tensor.numel() for tensor in network.state_dict().values())
    said = re.findall(r"([\d.]+) M weights", text)
    assert said == [f"{num_weights / 1e6:.1f}"] * len(said)
    assert said or name not in ("quickstart", "dit", "dit_b", "dit_scin", "dit_text", "dit_xl", "ldm")


@pytest.mark.parametrize("name", ["dit_scin", "ldm_scin"])
def test_recipes_of_scin_are_told_condition_and_skin_type_and_ask_for_both(name):
    recipe = load_recipe(name, recipe_files())
    assert recipe.sources == ("scin",)
    assert recipe.generator.conditions == ("diagnosis", "skin_type")
    assert len(recipe.synthetic_dataset.skin_types) == 6
    assert recipe.training_set.min_images == 100
    assert recipe.generator.law == load_recipe(name.removesuffix("_scin"), recipe_files()).generator.law


def test_a_u_net_takes_the_place_of_the_transformer_with_settings_of_its_own(write):
    recipe = load_recipe("ldm", recipe_files())
    assert recipe.generator.network(32, 4, {"diagnosis": 7}).kind == "unet"
    files = write(own="extends: ldm\ngenerator: {patch: 2}\n")
    with pytest.raises(RecipeError, match="generator.patch: unknown key; allowed here: .*widths"):
        load_recipe("own", files)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("generator: {bse: {model: x}}", ["generator.bse: unknown key", "base, stages"]),
        ("generator: {base: {mdoel: x}}", ["generator.base.mdoel: unknown key", "model, family"]),
        ("generator: {stages: []}", ["generator.stages", "at least 1"]),
        (
            "generator: {stages: [{kind: lora, training: {}}]}",
            ["generator.stages.0.training.batch_size: Field required"],
        ),
        (
            "generator: {stages: [{kind: full, dora: true, training: {num_steps: 1, batch_size: 1, lr: 1}}]}",
            ["generator.stages.0.dora: unknown key; allowed here: training, kind"],
        ),
        ("generator: {stages: [{kind: dreambooth}]}", ["generator.stages.0", "'lora', 'full', 'inversion'"]),
        ("autoencoder: {kind: trained, training: {num_steps: 1, batch_size: 1, lr: 1}}", ["take {kind: base}"]),
        ("synthetic_dataset: {plan: balanced}", ["synthetic_dataset.plan balanced", "lesiongen, prompts, captions"]),
        ("synthetic_dataset: {plan: prompts, promts: []}", ["synthetic_dataset.promts: unknown key", "prompts, file"]),
    ],
)
def test_a_wrong_recipe_of_a_base_is_an_error_that_names_the_key_as_it_is_written(write, text, words):
    files = write(own=f"extends: lesiongen_lora\n{text}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe("own", files)
    message = str(caught.value)
    assert all(word in message for word in words), message


def test_a_base_has_no_autoencoder_to_lend_to_a_generator_from_scratch(write):
    files = write(own="extends: quickstart\nautoencoder: {kind: base}\n")
    with pytest.raises(RecipeError, match="kind base goes with a generator of kind pretrained"):
        load_recipe("own", files)
