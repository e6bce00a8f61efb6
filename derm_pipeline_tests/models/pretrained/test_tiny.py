import pytest
import torch
from click.testing import CliRunner
from diffusers import DiffusionPipeline

from derm_pipeline.cli import main
from derm_pipeline.models.pretrained.config import TINY_FAMILIES
from derm_pipeline.models.pretrained.tiny import write_tiny
from derm_pipeline.store import digest_of_file

CLASSES = {
    "sd": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "pixart": "PixArtAlphaPipeline",
}


def digests(folder) -> dict[str, str]:
    return {str(path.relative_to(folder)): digest_of_file(path) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_a_tiny_pipeline_is_small_and_loads_in_a_plain_program(name, tiny_folders):
    files = [path for path in tiny_folders[name].rglob("*") if path.is_file()]
    assert 10_000 < sum(path.stat().st_size for path in files) < 2_000_000
    pipeline = DiffusionPipeline.from_pretrained(str(tiny_folders[name]), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline).__name__ == CLASSES[name]
    further = {"clean_caption": False, "use_resolution_binning": False} if name == "pixart" else {}
    images = pipeline("melanoma", num_inference_steps=2, height=64, width=64, output_type="np", **further).images
    assert images.shape == (1, 64, 64, 3)


@pytest.mark.parametrize("name", ["sd", "pixart"])
def test_a_seed_decides_the_files(name, tmp_path):
    state = torch.random.get_rng_state()
    first, again, other = (write_tiny(name, tmp_path / str(i), seed=seed) for i, seed in enumerate((5, 5, 6)))
    assert digests(first) == digests(again)
    assert digests(first) != digests(other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_latents_of_smooth_pictures_have_about_deviation_1(bases):
    pictures = torch.rand(16, 3, 1, 1, generator=torch.Generator().manual_seed(1)).expand(-1, -1, 64, 64) * 2 - 1
    for base in bases.values():
        mean, _ = base.vae.encode(pictures)
        assert 0.3 < float(mean.std()) / base.vae.config.latent_std[0] < 3


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_any_text_has_tokens(name, bases):
    for tokenizer in bases[name].tokenizers:
        ids = tokenizer("Größe: 5–7 mm, <x> \N{GRINNING FACE}").input_ids
        assert len(ids) > 5
        assert tokenizer("melanoma on torso").input_ids != tokenizer("nevus on torso").input_ids


def test_the_command_writes_one(tmp_path):
    result = CliRunner().invoke(main, ["models", "tiny", "pixart", str(tmp_path / "tiny")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "tiny" / "model_index.json").is_file()
