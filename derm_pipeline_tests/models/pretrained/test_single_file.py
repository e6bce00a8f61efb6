import shutil

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from derm_pipeline.models.pretrained.base import load_base, load_base_of, vae_config
from derm_pipeline.models.pretrained_vae import load_pretrained_vae
from derm_pipeline_tests.models.pretrained.conftest import settings
from derm_pipeline_tests.models.pretrained.original_names import whole_model

TEXTS = ["a dermoscopic image of melanoma", ""]


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def model(request, bases, tmp_path_factory):
    """A pipeline, its single file and a folder with its configs and tokenizers, without weights."""
    root = tmp_path_factory.mktemp("single")
    pipeline = bases[request.param].pipeline()
    # No tensor tells the groups of its norms, and every published one has 32.
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    vae = AutoencoderKL(block_out_channels=(32,) * 3, norm_num_groups=32, scaling_factor=0.3, **levels)
    pipeline.register_modules(vae=vae.eval())
    pipeline.save_pretrained(root / "tiny")
    save_file(whole_model(pipeline), root / "tiny.safetensors")
    for path in (root / "tiny").rglob("*.safetensors"):
        path.unlink()
    return pipeline, root


@torch.no_grad()
def test_a_single_file_is_the_same_base(model):
    pipeline, root = model
    base = load_base(settings(root / "tiny.safetensors"))
    for ours, theirs in (
        (base.denoiser, pipeline.unet),
        (base.text_encoders[0], pipeline.text_encoder),
        (base.text_encoders[-1], getattr(pipeline, "text_encoder_2", pipeline.text_encoder)),
        (base.vae.network, pipeline.vae),
    ):
        expected = theirs.state_dict()
        found = ours.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert base.vae.config.latent_std == pytest.approx((1 / 0.3,) * 4)
    assert base.embed(TEXTS)["text"].shape[:2] == (2, 77)
    encoded = pipeline.encode_prompt(TEXTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    torch.testing.assert_close(base.embed(TEXTS)["text"], encoded[0])


def test_a_reference_finds_a_single_file_again(model):
    _, root = model
    base = load_base(settings(root / "tiny.safetensors"))
    again = load_base_of(base.reference, parts=("text",))
    assert again.reference == base.reference
    assert base.reference.settings.layout == str(root / "tiny")
    assert load_pretrained_vae(vae_config(base.reference.settings)).config == base.vae.config


def test_the_layout_may_lie_elsewhere_and_counts(model, tmp_path):
    _, root = model
    single = shutil.copy(root / "tiny.safetensors", tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="no folder other lies beside it"):
        load_base(settings(single))
    elsewhere = settings(single, layout=str(root / "tiny"))
    assert elsewhere.identity() == settings(root / "tiny.safetensors").identity()
    load_base(elsewhere, parts=("text",))
    with pytest.raises(ValueError, match="layout .* goes with a single file"):
        load_base(settings(root / "tiny", layout=str(root / "tiny")))


def test_a_file_that_is_no_whole_model_is_refused(model, tiny_folders, tmp_path):
    pipeline, root = model
    state = whole_model(pipeline)
    some = next(name for name in state if name.endswith("middle_block.0.in_layers.2.weight"))
    save_file({name: tensor for name, tensor in state.items() if name != some}, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match=r"not complete: missing are .*mid_block.resnets.0.conv1.weight"):
        load_base(settings(tmp_path / "part.safetensors", layout=str(root / "tiny")))
    unet = {name: tensor for name, tensor in state.items() if name.startswith("model.")}
    save_file(unet, tmp_path / "unet.safetensors")
    with pytest.raises(ValueError, match="unet.safetensors are broken or do not fit .*text_encoder"):
        load_base(settings(tmp_path / "unet.safetensors", layout=str(root / "tiny")))
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(ValueError, match="broken"):
        load_base(settings(tmp_path / "text.safetensors", layout=str(root / "tiny")))
    (tmp_path / "pickled.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match="no .safetensors file"):
        load_base(settings(tmp_path / "pickled.ckpt", layout=str(root / "tiny")))
    with pytest.raises(ValueError, match="pixart cannot be read from a single file"):
        load_base(settings(root / "tiny.safetensors", layout=str(tiny_folders["pixart"])))
