"""Recipes that start from a pretrained base, through the whole graph in miniature, as `--models tiny` writes them."""

import dagster as dg
import pytest
import yaml
from click.testing import CliRunner

from derm_pipeline.cli import main
from derm_pipeline.defs.jobs import RecipeRun
from derm_pipeline.defs.stages.evaluation import sample_images
from derm_pipeline.defs.stages.exporting import export_recipe
from derm_pipeline.defs.stages.sets import TRAINING_SET
from derm_pipeline.defs.stages.watching import LOSSES
from derm_pipeline.latents import open_embeddings
from derm_pipeline.models.learned_embeddings import load_embeddings
from derm_pipeline.recipes.tiny import write_tiny_recipe
from derm_pipeline_tests.conftest import RECIPE_ASSETS, new_project

pytestmark = pytest.mark.slow

CUT = {
    "fidelity": {"num_repeats": 2},
    "group_metrics": {"num_bootstrap": 100},
    "classifiers": {"num_seeds": 1, "width": 8, "num_steps": 10, "batch_size": 16},
}


def run(tmp_path, phantoms, name, changes):
    """A project in which the recipe `<name>_tiny`, cut further, ran to its end; and its workspace."""
    project = new_project(tmp_path / "project", phantoms)
    workspace = project.workspace
    path = write_tiny_recipe(name, workspace.recipe_files, project.data, known=workspace.sources, there=[])
    settings = yaml.safe_load(path.read_text()) | CUT
    for stage in settings["generator"]["stages"]:
        stage["training"] |= {"num_steps": 6, "checkpoint_every_steps": 2}
    settings["synthetic_dataset"] |= changes.pop("synthetic_dataset", {})
    path.write_text(yaml.safe_dump(settings | changes))
    again(project, name)
    return project, project.workspace


def again(project, name):
    with dg.DagsterInstance.ephemeral() as instance:
        one = RecipeRun(f"{name}_tiny", project.workspace, instance, lambda *_: None)
        list(one.materialise_sources())
        list(one.materialise_stages())


def artifacts_of(project, name):
    return {asset: project.workspace.store.current(asset, f"{name}_tiny") for asset in RECIPE_ASSETS}


def generate(project, name, *arguments):
    paths = ["--data", str(project.data), "--raw", str(project.raw)]
    return CliRunner().invoke(main, ["generate", "--recipe", f"{name}_tiny", *arguments, *paths])


def test_lesiongens_lora_goes_from_source_to_report_and_answers_prompts(tmp_path, phantoms):
    sampling = {"num_samples": 14, "guidances": [1, 3], "steps": [2, 3]}
    project, workspace = run(tmp_path, phantoms, "lesiongen_lora", {"synthetic_dataset": sampling})
    artifacts = artifacts_of(project, "lesiongen_lora")
    assert workspace.store.verify() == []
    assert "in miniature" in artifacts["report"].path("report.html").read_text()
    told = artifacts["training_set"].table(TRAINING_SET)["told"].to_pylist()
    embeddings = open_embeddings(artifacts["latents"].path("text"))
    assert all(text in embeddings for text in ["", *told])
    assert artifacts["autoencoder"].json("autoencoder.json")["kind"] == "pretrained"
    counts = artifacts["generator"].counts
    assert (counts["num_steps"], counts["num_captions_cut"]) == (6, 0)
    assert counts["num_weights"] > 0
    losses = artifacts["generator"].table(LOSSES)
    assert losses["step"].to_pylist() == list(range(1, 7))
    files = set(artifacts["generator"].manifest.files)
    assert {"lora/denoiser.safetensors", "generator.json", "null.safetensors"} <= files
    assert not {"weights.safetensors", "lora/text_encoder.safetensors"} & files

    metadata, images = sample_images(artifacts["synthetic_dataset"])
    rows = metadata.to_pylist()
    assert images.shape == (14, 64, 64, 3)
    assert {row["diagnosis"]: row["prompt"].split(" ")[0] for row in rows}["mel"] == "Melanoma"
    assert {row["guidance"] for row in rows} <= {1, 3}
    assert {row["num_steps"] for row in rows} <= {2, 3}
    assert all(row["target_tone"] and row["measured_tone"] for row in rows)

    before = {asset: artifact.reference for asset, artifact in artifacts.items()}
    again(project, "lesiongen_lora")
    assert {asset: artifact.reference for asset, artifact in artifacts_of(project, "lesiongen_lora").items()} == before

    for arguments in (["--prompt", "Melanoma on a dark skin tone"], ["--diagnosis", "melanoma"]):
        done = generate(project, "lesiongen_lora", *arguments, "--count", "2", "--steps", "2")
        assert done.exit_code == 0, done.output
        assert "2 images" in done.output
    done = generate(project, "lesiongen_lora", "--prompt", "very " * 100)
    assert done.exit_code == 1
    assert "more than the 77 that can be told: shorten it" in done.output
    done = generate(project, "lesiongen_lora", "--tell", "sex=female", "--prompt", "Melanoma")
    assert done.exit_code == 1
    assert "the generator is told ['text'] only" in done.output
    for form in ("diffusers", "peft", "kohya"):
        assert export_recipe(workspace, "lesiongen_lora_tiny", tmp_path / form, form)
    check_that_another_base_makes_new_latents_and_generator(project, before)


def check_that_another_base_makes_new_latents_and_generator(project, before):
    from derm_pipeline.defs.stages.generator import autoencoder, generator, latents
    from derm_pipeline.models.pretrained.tiny import write_tiny

    kept = project.data / "models" / "tiny" / "sd" / "vae" / "diffusion_pytorch_model.safetensors"
    vae = kept.read_bytes()
    write_tiny("sd", project.data / "models" / "tiny" / "sd", seed=1)
    kept.write_bytes(vae)  # all else is another
    done = generate(project, "lesiongen_lora", "--prompt", "another prompt")
    assert done.exit_code == 1
    assert "not the one that was used before" in done.output
    autoencoder(project.workspace, "lesiongen_lora_tiny")
    fresh = latents(project.workspace, "lesiongen_lora_tiny")
    assert fresh.reference != before["latents"]
    assert generator(project.workspace, "lesiongen_lora_tiny").reference != before["generator"]


def test_skin_diff_learns_tokens_and_then_draws_training_images_anew(tmp_path, phantoms):
    changes = {
        "training_set": {"split": "groups"},  # 140 drawn images are too few for eight dark ones of each condition
        "synthetic_dataset": {"max_images": 12, "samples_each": 2, "num_steps": 4},
    }
    project, workspace = run(tmp_path, phantoms, "skin_diff", changes)
    artifacts = artifacts_of(project, "skin_diff")
    assert workspace.store.verify() == []
    assert not [name for name in artifacts["latents"].manifest.files if name.startswith("text/")]
    counts = artifacts["generator"].counts
    assert counts["num_steps"] == 12
    losses = artifacts["generator"].table(LOSSES).to_pylist()
    assert [row["step"] for row in losses] == list(range(1, 13))
    assert [row["num_images"] for row in losses] == [4 * step for step in range(1, 13)]
    learned = load_embeddings(artifacts["generator"].path("learned_embeds.safetensors"))
    shown = {row["diagnosis"] for row in artifacts["training_set"].table(TRAINING_SET).to_pylist()}
    assert len(learned) == len(shown)
    images = {row["sha256"]: row for row in artifacts["training_set"].table(TRAINING_SET).to_pylist()}
    rows = sample_images(artifacts["synthetic_dataset"])[0].to_pylist()
    assert len(rows) == 24
    for row in rows:
        origin = images[row["source_sha256"]]
        assert row["diagnosis"] == origin["diagnosis"]
        assert row["skin_type"] in (5, 6)
        assert any(token in row["prompt"] for token in learned)
        assert row["strength"] == 0.8
        assert row["measured_tone"]
        assert row["tone_changed"] in (True, False)
    counts = artifacts["synthetic_dataset"].counts
    assert counts["num_tone_asked"] == 24
    assert counts["num_tone_unchanged"] <= counts["num_tone_to_change"] <= 24
    done = generate(project, "skin_diff", "--prompt", "An image of mel-class on dark skin", "--steps", "2")
    assert done.exit_code == 0, done.output
