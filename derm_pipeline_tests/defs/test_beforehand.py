"""What could only fail or mislead after hours is refused before any work, with the key to change."""

import dagster as dg
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner
from diffusers import AutoencoderKL

from derm_pipeline.cli import main
from derm_pipeline.defs.build import build_defs
from derm_pipeline.defs.stages.beforehand import check_beforehand, check_conditions, check_recipe, check_rows
from derm_pipeline.defs.stages.generator import autoencoder, generator
from derm_pipeline.recipes import load_recipe, recipe_files
from derm_pipeline.store import Request
from derm_pipeline.training.memory import check_memory
from derm_pipeline_tests.conftest import new_project
from derm_pipeline_tests.generation.networks import generator_at, with_networks

ROWS = pa.table(
    {
        "diagnosis": ["mel", "nv", "mel"],
        "skin_type": pa.array([None, 3, 5], pa.int32()),
        "sex": pa.array([None, None, "female"], pa.string()),
        "site": pa.array([None] * 3, pa.string()),
        "age_years": pa.array([None, 41.0, None], pa.float64()),
        "age_range": pa.array([None, None, None], pa.string()),
    }
)
OWN = "extends: tiny\n"


@pytest.fixture
def empty(tmp_path):
    """A project that has nothing but the recipe tiny."""
    return new_project(tmp_path / "empty")


@pytest.fixture
def refused(empty, monkeypatch):
    """What `derm run` says of a recipe that it refuses; nothing is made then, and no image drawn."""
    for name in ("DERM_DATA", "DERM_RAW", "DAGSTER_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(empty.folder)

    def said(text):
        (empty.data / "recipes" / "own.yaml").write_text(OWN + text)
        result = CliRunner().invoke(main, ["run", "own", "--data", str(empty.data), "--raw", str(empty.raw)])
        assert result.exit_code == 1, result.output
        assert not (empty.data / "store").exists() or not list(empty.workspace.store.artifacts())
        assert not empty.raw.exists()
        line = result.stderr.splitlines()[-1]
        assert line.startswith("derm: ")
        return line

    return said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("generator: {width: 100, heads: 3}", ["generator: width 100", "heads 3", "take width"]),
        ("generator: {patch: 3}", ["latents.size_px 32 is not a multiple of 12", "generator.patch 3"]),
        ("synthetic_dataset: {skin_types: [7]}", ["synthetic_dataset.skin_types", "1, 2, 3, 4, 5 or 6"]),
        ("training_set: {diagnoses: [mole]}", ["training_set.diagnoses", "'mel'"]),
        ("generator: {training: {batch_size: 1000000000}}", ["generator.training.batch_size", "a smaller batch_size"]),
        (
            "autoencoder: {training: {batch_size: 1000000000}}",
            ["autoencoder.training.batch_size", "smaller"],
        ),
        ("generator: {width: 32768, depth: 100, heads: 64}", ["generator.network", "take a smaller network"]),
        ("latents: {batch_size: 1000000000}", ["latents.batch_size", "changes no latent"]),
        ("synthetic_dataset: {num_samples: 1000000000}", ["synthetic_dataset.num_samples", "fewer samples"]),
        (
            "synthetic_dataset: {num_samples: 1000000, batch_size: 1000000}\nlatents: {size_px: 2048}",
            ["synthetic_dataset.num_samples", "GB are free"],
        ),
        ("autoencoder: {kind: pretrained, model: ./no/such/folder}", ["own: autoencoder.model", "which is not there"]),
        (
            "autoencoder: {kind: pretrained, model: nobody/nothing, offline: true}",
            ["own: autoencoder.model", "offline is set", "give a folder"],
        ),
    ],
)
def test_derm_run_refuses_before_any_artifact_is_made_and_names_the_key(refused, text, words):
    line = refused(text)
    assert all(word in line for word in words), line


def vae_at(folder, levels, channels):
    """A tiny pretrained autoencoder of 2 ** (levels - 1) pixels a cell."""
    torch.manual_seed(0)
    network = AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=32,
    )
    network.save_pretrained(folder, safe_serialization=True)
    return folder


def test_a_pretrained_autoencoder_is_asked_for_its_real_downsampling(refused, tmp_path):
    folder = vae_at(tmp_path / "vae", 5, 3)
    line = refused(f"autoencoder: {{kind: pretrained, model: {folder}}}\nlatents: {{size_px: 48}}\n")
    assert "recipe own: latents.size_px 48 is not a multiple of 32 (the autoencoder's downsampling 16 x" in line
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"broken")
    line = refused(f"autoencoder: {{kind: pretrained, model: {folder}}}\nlatents: {{size_px: 64}}\n")
    assert "own: autoencoder.model: the weights" in line
    assert "get them again" in line


def test_a_text_encoder_is_looked_for_and_asked_how_many_tokens_it_takes(refused, tmp_path):
    from derm_pipeline.models.tiny import write_tiny_clip_text

    said = refused("generator: {text: {encoder: {model: ./no/such/folder}}}")
    assert "recipe own: generator.text.encoder.model: the text encoder is looked for in the folder" in said
    clip = write_tiny_clip_text(tmp_path / "clip")
    said = refused(f"generator: {{text: {{encoder: {{model: {clip}, max_tokens: 120}}}}}}")
    assert "recipe own: generator.text.encoder: " in said
    assert "takes 77 tokens at most, and max_tokens is 120" in said
    said = refused(f"generator: {{width: 32768, depth: 100, heads: 64, text: {{encoder: {{model: {clip}}}}}}}")
    assert "take a smaller network" in said


def of_a_base(base, targets="to_q"):
    return (
        "autoencoder: {kind: base}\nsynthetic_dataset: {plan: captions, num_samples: 7}\n"
        f"generator: {{kind: pretrained, base: {{{base}}}, stages: [{{kind: lora, denoiser: {{rank: 2, "
        f"targets: [{targets}]}}, training: {{num_steps: 1, batch_size: 1, lr: 1}}}}]}}\n"
    )


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("model: ./no/such/folder", ["the base is looked for in", "no/such/folder"]),
        ("model: nobody/nothing, offline: true", ["nobody/nothing", "offline is set", "give a folder"]),
    ],
)
def test_a_base_that_is_not_there_is_named_with_where_it_was_looked_for(refused, base, words):
    line = refused(of_a_base(base))
    assert "recipe own: generator.base: " in line
    assert all(word in line for word in words), line


def test_a_base_is_asked_for_its_family_its_layers_and_the_latents_that_it_takes(refused, tmp_path, monkeypatch):
    from derm_pipeline.models.pretrained.tiny import write_tiny

    folders = {family: write_tiny(family, tmp_path / family) for family in ("sd", "pixart")}
    line = refused(of_a_base(f"model: {folders['sd']}, family: sdxl"))
    assert "recipe own: generator.base: " in line
    assert "is a base of the family sd, not sdxl as its settings say" in line
    line = refused(of_a_base(f"model: {folders['sd']}", targets="to_qq"))
    assert "recipe own: generator: LoRA target 'to_qq': no linear or convolution layer" in line
    line = refused(of_a_base(f"model: {folders['pixart']}") + "latents: {size_px: 40}\n")
    assert "the base takes latents of a multiple of 2 cells, and latents.size_px gives 5" in line
    monkeypatch.setattr("derm_pipeline.training.fine_tuning_rehearsal.free_bytes", lambda device: 100_000)
    line = refused(of_a_base(f"model: {folders['sd']}"))
    assert "recipe own: generator: stages.lora: at least" in line
    assert "optimizer: adamw8bit" in line


def test_a_batch_is_tried_on_made_up_examples_and_refused_with_one_that_fits(refused, monkeypatch):
    asked = []

    def check(need, micro_batch, share, device, *, is_compiled=False):
        asked.append(micro_batch)
        room = need.states + need.fixed + 4 * need.per_example
        monkeypatch.setattr("derm_pipeline.training.memory.free_bytes", lambda device: room)
        check_memory(need, micro_batch, share, device, is_compiled=is_compiled)

    monkeypatch.setattr("derm_pipeline.training.steps.check_memory", check)
    line = refused("autoencoder: {training: {batch_size: 4}}\ngenerator: {training: {batch_size: 48}}\n")
    assert "recipe own: generator.training: training does not fit" in line
    assert "set micro_batch_size to 4, which changes no result" in line
    assert asked == [4, 48]


def test_trying_leaves_torchs_random_stream_as_it_was(empty):
    before = torch.get_rng_state()
    check_recipe(empty.workspace.recipe("tiny"), empty.data / "store")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_job_of_a_recipe_refuses_before_its_sources_are_observed(empty):
    (empty.data / "recipes" / "own.yaml").write_text(OWN + "generator: {training: {batch_size: 1000000000}}\n")
    job = build_defs(empty.workspace).resolve_job_def("own")
    with (
        dg.DagsterInstance.ephemeral() as instance,
        pytest.raises(ValueError, match="generator.training.batch_size"),
    ):
        job.execute_in_process(instance=instance)
    assert not empty.raw.exists()
    assert not list(empty.workspace.store.artifacts())


def test_what_some_image_tells_may_be_a_condition_and_what_none_tells_may_not(empty):
    recipe = empty.workspace.recipe("tiny")
    sampling = recipe.synthetic_dataset.model_copy(update={"skin_types": (3, 5)})

    def told(*conditions):
        network = recipe.generator.model_copy(update={"conditions": ("diagnosis", *conditions)})
        return recipe.model_copy(update={"generator": network, "synthetic_dataset": sampling})

    check_conditions(told("skin_type", "sex", "age_band"), ROWS)
    with pytest.raises(ValueError, match="tiny: generator.conditions: no training image of phantom tells its site"):
        check_conditions(told("skin_type", "site"), ROWS)


def test_skin_types_that_no_training_image_has_are_not_asked_for(empty):
    with pytest.raises(ValueError, match=r"synthetic_dataset.skin_types: .* has skin type 1, .* ask for \[3, 5\]"):
        check_conditions(empty.workspace.recipe("tiny"), ROWS)


def test_a_training_set_that_no_memory_or_disk_holds_is_refused(empty, monkeypatch):
    recipe = empty.workspace.recipe("tiny")
    recipe = recipe.model_copy(
        update={"synthetic_dataset": recipe.synthetic_dataset.model_copy(update={"skin_types": (3, 5)})}
    )
    check_rows(recipe, ROWS, empty.data / "store")
    monkeypatch.setattr("derm_pipeline.defs.stages.beforehand._free_disk", lambda store: 3 * 2 * 8 * 8 * 8 * 2 - 1)
    with pytest.raises(ValueError, match="latents.orientations: at least .* a larger disk"):
        check_rows(recipe, ROWS, empty.data / "store")
    monkeypatch.setattr("derm_pipeline.models.runtime.free_bytes", lambda device: 3 * 32 * 32 * 3 - 1)
    with pytest.raises(ValueError, match="latents.size_px: at least .* smaller images"):
        check_rows(recipe, ROWS, empty.data / "store")


@pytest.mark.parametrize("name", ["quickstart", "ham10000", "ham10000_fast"])
def test_the_shipped_recipes_are_not_refused(name, tmp_path):
    check_recipe(load_recipe(name, recipe_files()), tmp_path)


def test_what_is_made_with_these_settings_is_not_asked_about(empty, monkeypatch):
    recipe, store = empty.workspace.recipe("tiny"), empty.workspace.store
    monkeypatch.setattr("derm_pipeline.models.runtime.free_bytes", lambda device: 0)
    for stage in ("autoencoder", "generator", "synthetic_dataset"):
        with pytest.raises(ValueError, match="are free"):
            check_beforehand(empty.workspace, "tiny")
        settings = {stage: getattr(recipe, stage).model_dump(mode="json")}
        store.obtain(Request(stage, "tiny", {}, settings, "1"), lambda build: None)
    check_beforehand(empty.workspace, "tiny")


def test_single_assets_are_refused_too_and_latents_of_another_autoencoder(tmp_path):
    project = with_networks(new_project(tmp_path / "project"), generator_at(tmp_path / "networks"))
    store = project.workspace.store
    digests = pa.array(["0" * 64] * 3)
    for asset in ("training_set", "validation_set"):
        request = Request(asset, "tiny", {}, {}, "1")
        rows = ROWS.append_column("sha256", digests)
        store.obtain(request, lambda build, asset=asset, rows=rows: build.write_table(f"{asset}.parquet", rows))
    with pytest.raises(ValueError, match="synthetic_dataset.skin_types"):
        autoencoder(project.workspace, "tiny")
    own = project.data / "recipes" / "tiny.yaml"
    own.write_text(own.read_text().replace("{num_samples: 84,", "{skin_types: [3, 5], num_samples: 84,"))
    store.obtain(Request("autoencoder", "tiny", {}, {"newer": True}, "1"), lambda build: build.write_json("a.json", {}))
    with pytest.raises(ValueError, match=r"latents of another autoencoder than .*: materialise latents again"):
        generator(project.workspace, "tiny")
