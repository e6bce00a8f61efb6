import json
import shutil

import pytest
import torch

from derm_pipeline.models.conditions import POOLED, TEXT, TEXT_MASK
from derm_pipeline.models.pretrained.base import load_base, load_base_of
from derm_pipeline.models.pretrained.config import TINY_FAMILIES, PretrainedConfig
from derm_pipeline_tests.models.pretrained.conftest import settings

TEXTS = ["a dermoscopic image of Melanoma with an irregular border", "", "naïve ßtuff, 37 % of it"]


@pytest.fixture
def spoilt(tiny_folders, tmp_path):
    """A copy of the tiny Stable Diffusion that a test may spoil."""
    return shutil.copytree(tiny_folders["sd"], tmp_path / "sd")


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_embeddings_are_those_of_the_published_pipeline(name, bases):
    base = bases[name]
    told = base.embed(TEXTS, batch_size=2)
    encoded = base.pipeline().encode_prompt(
        TEXTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    torch.testing.assert_close(told[TEXT], encoded[0])
    if name == "pixart":
        assert torch.equal(told[TEXT_MASK], encoded[1].bool())
        assert not told[TEXT_MASK].all()
        null = {TEXT: encoded[2], TEXT_MASK: encoded[3].bool()}
    else:
        assert told[TEXT_MASK].all()
        null = {TEXT: encoded[1]}
    if name == "sdxl":
        torch.testing.assert_close(told[POOLED], encoded[2])
        null[POOLED] = encoded[3]
    for key, value in null.items():
        torch.testing.assert_close(base.null()[key], value[:1])


def test_a_text_that_is_too_long_is_cut_and_said(bases):
    for base in bases.values():
        short, long = "melanoma", "melanoma " * 400
        whole = [len(tokenizer(long.strip()).input_ids) for tokenizer in base.tokenizers]
        tokens = base.tokenise([short, long])
        assert tokens.num_cut == (0, max(whole) - base.max_tokens)
        assert all(ids.shape == (2, base.max_tokens) for ids in tokens.ids)


def test_fewer_tokens_may_be_asked_for(tiny_folders):
    base = load_base(settings(tiny_folders["sd"], max_tokens=7), parts=("text",))
    tokens = base.tokenise(["melanoma on skin, melanoma on skin"])
    assert tokens.ids[0].shape == (1, 7)
    assert tokens.num_cut[0] > 0
    assert int(tokens.ids[0][0, -1]) == base.tokenizers[0].eos_token_id
    with pytest.raises(ValueError, match="max_tokens is 78, and the text encoders of .* take 77"):
        load_base(settings(tiny_folders["sd"], max_tokens=78), parts=("text",))


def test_the_rows_of_a_learned_token_are_written_out(tiny_folders):
    base = load_base(settings(tiny_folders["sd"]), parts=("text",))
    base.tokenizers[0].add_tokens(["<pso>", "<pso>_1", "<pso>_2", "<mel>"])
    first = base.tokenizers[0].convert_tokens_to_ids("<pso>")
    ids = base.tokenise(["an image of <pso> and <mel>"]).ids[0][0].tolist()
    place = ids.index(first)
    assert ids[place : place + 3] == [first, first + 1, first + 2]
    assert ids.count(first + 3) == 1


def test_gradients_reach_the_text_encoders_of_tokens(tiny_folders):
    base = load_base(settings(tiny_folders["sdxl"]), parts=("text",), trained=("text",))
    told = base.embed_tokens(base.tokenise(["melanoma"]))
    (told[TEXT].sum() + told[POOLED].sum()).backward()
    assert all(encoder.get_input_embeddings().weight.grad.abs().sum() > 0 for encoder in base.text_encoders)
    assert not base.embed(["melanoma"])[TEXT].requires_grad


def test_parts_that_are_not_trained_are_fixed_and_those_that_are_stay_float32(tiny_folders):
    base = load_base(settings(tiny_folders["sd"], dtype="bfloat16"), trained=("denoiser",))
    assert {weight.dtype for weight in base.denoiser.parameters()} == {torch.float32}
    assert all(weight.requires_grad for weight in base.denoiser.parameters())
    assert {weight.dtype for weight in base.text_encoders[0].parameters()} == {torch.bfloat16}
    assert not any(weight.requires_grad for weight in base.text_encoders[0].parameters())
    assert base.embed(["melanoma"])[TEXT].dtype == torch.float32


def test_only_what_is_asked_for_is_loaded(tiny_folders):
    base = load_base(settings(tiny_folders["sd"]), parts=("text",))
    assert base.vae is None
    with pytest.raises(ValueError, match="the denoiser of .* was not loaded"):
        base.denoiser  # noqa: B018
    with pytest.raises(ValueError, match="the vae of .* was not loaded"):
        base.pipeline()
    with pytest.raises(ValueError, match="the text of .* was not loaded"):
        load_base(settings(tiny_folders["sd"]), parts=("vae",)).embed(["melanoma"])


def test_a_base_of_another_family_is_refused_by_both_names(tiny_folders):
    with pytest.raises(ValueError, match="of the family sdxl, not sd "):
        load_base(settings(tiny_folders["sdxl"], family="sd"))


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("model_index.json", "has no model_index.json"),
        ("unet/config.json", "no unet/config.json and no transformer/config.json"),
        ("tokenizer", "no tokenizer/tokenizer_config.json"),
        ("vae/config.json", "no vae/config.json"),
        ("scheduler", "no scheduler/scheduler_config.json"),
    ],
)
def test_a_missing_part_is_named(lost, message, spoilt):
    path = spoilt / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(FileNotFoundError, match=message):
        load_base(settings(spoilt), parts=("text",))


def test_pickled_weights_are_not_read(spoilt):
    (spoilt / "unet" / "diffusion_pytorch_model.safetensors").rename(spoilt / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="only safetensors are read"):
        load_base(settings(spoilt))


def test_a_model_that_is_not_there_is_looked_for_by_its_full_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"looked for in the folder {tmp_path}/models/sd,"):
        load_base(PretrainedConfig(model="./models/sd"))


def test_a_reference_finds_the_same_base_and_no_other(spoilt):
    base = load_base(settings(spoilt))
    again = load_base_of(base.reference, parts=("denoiser",))
    assert again.reference == base.reference
    assert base.reference.family == "sd"
    assert "unet/diffusion_pytorch_model.safetensors" in base.reference.files
    (spoilt / "unet" / "config.json").write_text((spoilt / "unet" / "config.json").read_text() + "\n")
    load_base_of(base.reference, parts=("text",))  # what is not loaded is not asked about
    with pytest.raises(ValueError, match=r"not the one that was used before \(unet/config.json differ\)"):
        load_base_of(base.reference, parts=("denoiser",))


def test_the_identity_is_what_files_hold_and_not_where_they_lie(tiny_folders, spoilt):
    identity = settings(tiny_folders["sd"]).identity()
    assert settings(spoilt).identity() == identity
    assert settings(tiny_folders["sd2"]).identity() != identity
    path = spoilt / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_end": 0.02}))
    assert settings(spoilt).identity() != identity


def test_a_scheduler_without_a_law_is_refused_by_what_it_says(spoilt):
    path = spoilt / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rescale_betas_zero_snr": True}))
    with pytest.raises(ValueError, match="rescale_betas_zero_snr True, for which there is no law here"):
        load_base(settings(spoilt), parts=("text",))


def test_a_model_for_another_task_is_refused(spoilt):
    path = spoilt / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"latent_channels": 16}))
    with pytest.raises(ValueError, match="takes 4 channels and its latents have 16"):
        load_base(settings(spoilt), parts=("denoiser",))
