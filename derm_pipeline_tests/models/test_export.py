"""What leaves as a folder draws in plain pipelines what the generator draws."""

import copy
import re

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from peft import PeftModel

from derm_pipeline.models.diffusion import RectifiedFlow
from derm_pipeline.models.dit_config import DiTConfig
from derm_pipeline.models.export import CARD, KOHYA_WEIGHTS, Origin, export_generator
from derm_pipeline.models.generator import GeneratorSpec
from derm_pipeline.models.learned_embeddings import add_embeddings, load_embeddings, save_embeddings
from derm_pipeline.models.lora import LoraConfig, add_lora
from derm_pipeline.models.lora_files import load_lora, save_lora
from derm_pipeline.models.pretrained.base import load_base
from derm_pipeline.models.pretrained.config import PretrainedConfig
from derm_pipeline.models.runtime import save_weights
from derm_pipeline_tests.models.lora_cases import filled

ORIGIN = Origin(
    recipe="skin_diff",
    title="Dark skin from light",
    artifact="generator/skin_diff/0123",
    licences=["Fitzpatrick17k: CC BY-NC-SA 3.0"],
    training={"kind": "pretrained", "base": {"model": "/home/someone/sd"}, "stages": [{"kind": "lora", "rank": 4}]},
)
TOKENS = {"pso-class": 1, "squ-class": 2}
PROMPT = "pso-class squ-class squ-class_1 on very dark skin"


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def learnt(request, tiny_pipelines, tmp_path_factory):
    """A base's folder, a generator's folder with all that can be learnt but whole weights, and what it draws."""
    base_folder, folder = tiny_pipelines[request.param], tmp_path_factory.mktemp("generator")
    base = load_base(PretrainedConfig(model=str(base_folder), dtype="float32"))
    write_spec(folder, base)
    pipeline = base.pipeline()
    parts = ("denoiser", "text_encoder", "text_encoder_2")
    networks = dict(zip(parts, (base.denoiser, *base.text_encoders), strict=False))
    for part, tokenizer in zip(list(networks)[1:], base.tokenizers, strict=True):
        vectors = {token: torch.randn(num, networks[part].config.hidden_size) for token, num in TOKENS.items()}
        save_embeddings(folder / f"learned_embeds{part.removeprefix('text_encoder')}.safetensors", vectors)
        add_embeddings(tokenizer, networks[part], vectors)
    for part, network in networks.items():
        targets = ("to_q", "proj_in") if part == "denoiser" else ("q_proj", "out_proj")
        add_lora(network, LoraConfig(rank=2, alpha=3, targets=targets))
        save_lora(folder / "lora" / f"{part}.safetensors", filled(network))
    return base_folder, folder, drawn(pipeline)


def write_spec(folder, base):
    GeneratorSpec(
        network=base.network_config(latent_size=8),
        law=base.law,
        classes={},
        latent_mean=(0.0,) * 4,
        latent_std=(1.0,) * 4,
    ).save(folder)


def drawn(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"prompt": PROMPT, "num_inference_steps": 2, "height": 64, "width": 64}
    return pipeline(**arguments, generator=torch.Generator().manual_seed(0), output_type="latent").images


def used(card: str, base_folder, monkeypatch, folder) -> DiffusionPipeline:
    """The pipeline of the code in a card, run in the folder as a reader would."""
    code = re.search(r"```python\n(.+?)```", card, re.S)[1]
    monkeypatch.chdir(folder)
    names = {}
    exec(code.replace(f'"{base_folder.name}"', repr(str(base_folder))), names)  # noqa: S102
    return names["pipeline"]


@pytest.mark.parametrize("form", ["diffusers", "peft", "kohya"])
def test_a_card_says_how_a_plain_pipeline_draws_the_same(form, learnt, tmp_path, monkeypatch):
    base_folder, folder, expected = learnt
    files = export_generator(folder, tmp_path / "out", form, ORIGIN)
    assert sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file()) == sorted(
        tmp_path / "out" / path for path in files
    )
    card = (tmp_path / "out" / CARD).read_text()
    pipeline = used(card, base_folder, monkeypatch, tmp_path / "out")
    torch.testing.assert_close(drawn(pipeline), expected, rtol=1e-5, atol=1e-5)
    assert isinstance(pipeline.unet, PeftModel) == (form == "peft")


def test_what_is_exported_loads_again_here(learnt, tmp_path):
    base_folder, folder, expected = learnt
    export_generator(folder, tmp_path / "out", "kohya", ORIGIN)
    pipeline = DiffusionPipeline.from_pretrained(base_folder)
    networks = {"denoiser": pipeline.unet, "text_encoder": pipeline.text_encoder}
    networks |= {"text_encoder_2": pipeline.text_encoder_2} if hasattr(pipeline, "text_encoder_2") else {}
    for part, network in list(networks.items())[1:]:
        suffix = part.removeprefix("text_encoder")
        embeddings = load_embeddings(tmp_path / "out" / f"learned_embeds{suffix}.safetensors")
        add_embeddings(getattr(pipeline, f"tokenizer{suffix}"), network, embeddings)
    load_lora(tmp_path / "out" / KOHYA_WEIGHTS, networks)
    torch.testing.assert_close(drawn(pipeline), expected, rtol=1e-5, atol=1e-5)


def test_the_card_tells_base_licences_settings_and_no_paths_of_here(learnt, tmp_path):
    base_folder, folder, _ = learnt
    export_generator(folder, tmp_path / "out", "diffusers", ORIGIN, dtype="float16")
    card = (tmp_path / "out" / CARD).read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "other"
    assert "base_model" not in front  # it is no model of the hub
    assert {"lora", "dermatology", "synthetic"} <= set(front["tags"])
    for words in (
        "# Dark skin from light",
        f"**Base**: {base_folder.name}",
        "licence is not known here",
        "Fitzpatrick17k: CC BY-NC-SA 3.0",
        "LoRA of rank 2 on",
        "`pso-class`, `squ-class`",
        "derm lineage generator/skin_diff/0123",
        "**Figures**: n/a",
        "rank: 4",
    ):
        assert words in card
    assert str(base_folder.parent) not in card
    assert "/home/someone" not in card


@pytest.fixture
def sd(tiny_pipelines, tmp_path):
    base = load_base(PretrainedConfig(model=str(tiny_pipelines["sd"]), dtype="float32"))
    folder = tmp_path / "generator"
    folder.mkdir()
    write_spec(folder, base)
    return base, folder


def test_a_denoiser_that_was_trained_whole_is_a_folder_of_diffusers(sd, tmp_path, tiny_pipelines, monkeypatch):
    base, folder = sd
    weights = {name: tensor + 0.01 for name, tensor in base.denoiser.state_dict().items()}
    save_weights(folder / "weights.safetensors", weights)
    save_weights(folder / "ema.safetensors", {name: tensor + 0.02 for name, tensor in weights.items()})
    for form in ("peft", "kohya"):
        with pytest.raises(ValueError, match=f"the {form} form holds adapters only: take diffusers"):
            export_generator(folder, tmp_path / "out", form, ORIGIN)
    export_generator(folder, tmp_path / "out", "diffusers", ORIGIN)
    card = (tmp_path / "out" / CARD).read_text()
    pipeline = used(card, tiny_pipelines["sd"], monkeypatch, tmp_path / "out")
    found = pipeline.unet.state_dict()
    assert all(torch.equal(found[name], tensor + 0.02) for name, tensor in weights.items())
    assert "All weights of the denoiser, averaged." in card


def test_what_a_form_has_no_place_for_is_refused_and_nothing_is_left(tiny_pipelines, tmp_path):
    base = load_base(PretrainedConfig(model=str(tiny_pipelines["pixart"]), dtype="float32"))
    folder = tmp_path / "generator"
    folder.mkdir()
    write_spec(folder, base)
    with pytest.raises(ValueError, match="nothing was learnt"):
        export_generator(folder, tmp_path / "out", "peft", ORIGIN)
    add_lora(base.denoiser, LoraConfig(rank=2, targets=("to_q",)))
    save_lora(folder / "lora" / "denoiser.safetensors", base.denoiser)
    with pytest.raises(ValueError, match="PixArt pipelines read no LoRA files: take peft"):
        export_generator(folder, tmp_path / "out", "diffusers", ORIGIN)
    with pytest.raises(ValueError, match="U-Nets of Stable Diffusion only"):
        export_generator(folder, tmp_path / "out", "kohya", ORIGIN)
    assert [path.name for path in tmp_path.iterdir()] == ["generator"]
    export_generator(folder, tmp_path / "out", "peft", ORIGIN)
    PeftModel.from_pretrained(copy.deepcopy(base.denoiser), tmp_path / "out" / "denoiser")


def test_a_folder_with_other_files_is_not_written_to(sd, tmp_path):
    _, folder = sd
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for out in (tmp_path / "out", tmp_path / "out" / "mine.txt"):
        with pytest.raises(ValueError, match="holds other files"):
            export_generator(folder, out, "diffusers", ORIGIN)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_a_generator_that_was_trained_from_nothing_is_refused(tmp_path):
    GeneratorSpec(
        network=DiTConfig(latent_size=8, channels=4, conditions={"diagnosis": 1}, width=8, depth=1, heads=1),
        law=RectifiedFlow(),
        classes={"diagnosis": ("mel",)},
        latent_mean=(0.0,) * 4,
        latent_std=(1.0,) * 4,
    ).save(tmp_path)
    with pytest.raises(ValueError, match="is a dit that was trained here, of no pretrained base"):
        export_generator(tmp_path, tmp_path / "out", "diffusers", ORIGIN)
