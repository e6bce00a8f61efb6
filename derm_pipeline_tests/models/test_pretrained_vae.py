import json
import re
import shutil
import types

import pytest
import torch
from diffusers import AutoencoderKL
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from derm_pipeline.models.pretrained_vae import PretrainedVae, PretrainedVaeConfig, load_pretrained_vae, load_reference
from derm_pipeline.store import digest_of_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAMES = ("config.json", "diffusion_pytorch_model.safetensors")


def tiny(**changes) -> AutoencoderKL:
    """Random, of 4 px a cell."""
    torch.manual_seed(7)
    settings = {
        "block_out_channels": (32, 32, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "latent_channels": 4,
        "norm_num_groups": 32,
    }
    return AutoencoderKL(**settings | changes).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    tiny().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(saved, tmp_path / "vae")


def load(model, **settings) -> PretrainedVae:
    return load_pretrained_vae(PretrainedVaeConfig(model=str(model), **{"dtype": "float32"} | settings))


def images(n: int = 2, height: int = 32, width: int = 48) -> torch.Tensor:
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(n)) * 2 - 1


def original_name(name: str) -> str:
    """A diffusers name of an AutoencoderKL's tensor in the original (CompVis) names."""
    for pattern, replacement in (
        (r"(en|de)coder\.mid_block\.resnets\.0", r"\1coder.mid.block_1"),
        (r"(en|de)coder\.mid_block\.resnets\.1", r"\1coder.mid.block_2"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_(q|k|v)", r"mid.attn_1.\1"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
        (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
        (r"up_blocks\.(\d)\.upsamplers\.0", r"up_blocks.\1.upsample"),
        (r"up_blocks\.(\d)\.resnets", r"up_blocks.\1.block"),
        (r"up_blocks\.(\d)", lambda found: f"up.{2 - int(found[1])}"),
        (r"conv_shortcut", "nin_shortcut"),
        (r"conv_norm_out", "norm_out"),
    ):
        name = re.sub(pattern, replacement, name)
    return name


def in_original_names(prefix: str = "") -> dict[str, torch.Tensor]:
    state = tiny().state_dict()
    return {
        prefix + original_name(name): tensor[..., None, None].contiguous()
        if re.search(r"attentions.*to_\w+.*weight", name)
        else tensor
        for name, tensor in state.items()
    }


def test_it_encodes_and_decodes_as_diffusers_does(saved):
    model, theirs = load(saved), tiny()
    theirs.enable_slicing()  # float32 rounds otherwise in a batch
    with torch.no_grad():
        mean, logvar = model.encode(images())
        expected = theirs.encode(images()).latent_dist
        torch.testing.assert_close(mean, expected.mean)
        torch.testing.assert_close(logvar, expected.logvar)
        torch.testing.assert_close(model.decode(mean), theirs.decode(expected.mean).sample)
    assert mean.shape == logvar.shape == (2, 4, 8, 12)
    assert not model.training


def test_its_shape_and_scaling_are_those_of_its_config(saved, tmp_path):
    config = load(saved).config
    assert (config.kind, config.downsampling, config.latent_channels) == ("pretrained", 4, 4)
    assert config.latent_mean == (0.0,) * 4
    assert config.latent_std == pytest.approx(
        (1 / 0.18215,) * 4
    )  # diffusers' default: Stable Diffusion's configs have none
    changes = {"block_out_channels": (32, 32), "latent_channels": 3, "scaling_factor": 0.5, "shift_factor": 0.25}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    tiny(**changes, **blocks).save_pretrained(tmp_path / "other")
    config = load(tmp_path / "other").config
    assert (config.downsampling, config.latent_channels) == (2, 3)
    assert (config.latent_mean, config.latent_std) == ((0.25,) * 3, (2.0,) * 3)
    tiny(latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[0.5] * 4, scaling_factor=0.25).save_pretrained(
        tmp_path / "own"
    )
    config = load(tmp_path / "own").config
    assert (config.latent_mean, config.latent_std) == ((1.0, 2.0, 3.0, 4.0), (2.0,) * 4)
    assert load(saved, scaling_factor=0.5).config.latent_std == (2.0,) * 4


def test_its_weights_are_fixed_and_gradients_pass_through(saved):
    model = load(saved)
    latents = torch.randn(1, 4, 4, 4, requires_grad=True)
    model.decode(latents).square().sum().backward()
    assert latents.grad is not None
    assert float(latents.grad.abs().sum()) > 0
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_callers_autocast_changes_nothing(saved):
    model = load(saved)
    with torch.no_grad():
        plain = model.encode(images())[0]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model.encode(images())[0], plain)


def test_bfloat16_is_near_float32_and_gives_float32(saved):
    with torch.no_grad():
        plain, rounded = load(saved).encode(images())[0], load(saved, dtype="bfloat16").encode(images())[0]
    assert rounded.dtype == torch.float32
    assert 0 < float((rounded - plain).abs().max()) < 0.05 * float(plain.abs().max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_cpu_a_row_is_the_same_to_the_bit_in_every_batch(saved, dtype):
    model, batch = load(saved, dtype=dtype), images(5)
    with torch.no_grad():
        moments = torch.stack(model.encode(batch))
        alone = [torch.stack(model.encode(image[None])) for image in batch]
        assert torch.equal(torch.cat(alone, dim=1), moments)
        assert torch.equal(torch.cat([model.decode(rows[0]) for rows in alone]), model.decode(moments[0]))


def test_values_too_large_for_float16_are_refused_with_what_to_do(folder):
    path = folder / NAMES[1]
    state = load_file(path)
    for name in ("encoder.conv_in.weight", "decoder.conv_in.weight"):
        state[name] = 2e5 * state[name]  # the weights fit, what they make does not
    save_file(state, path)
    with torch.no_grad():
        latents = load(folder, dtype="float32").encode(images())[0]
        assert latents.isfinite().all()
        half = load(folder, dtype="float16", force_upcast=False)
        for call, given in ((half.encode, images()), (half.decode, latents)):
            with pytest.raises(
                ValueError, match="not finite in float16.*dtype: bfloat16 or float32.*force_upcast: true"
            ):
                call(given)
        upcast = load(folder, dtype="float16")  # as its config says
        assert torch.equal(upcast.encode(images())[0], latents)


def test_float16_is_used_where_the_config_or_the_settings_allow_it(folder):
    settings = json.loads((folder / NAMES[0]).read_text())
    assert load(folder, dtype="float16").dtype == torch.float32
    assert load(folder, dtype="float16", force_upcast=False).dtype == torch.float16
    (folder / NAMES[0]).write_text(json.dumps(settings | {"force_upcast": False}))
    assert load(folder, dtype="float16").dtype == torch.float16
    assert load(folder, dtype="float16", force_upcast=True).dtype == torch.float32
    assert load(folder, dtype="bfloat16", force_upcast=True).dtype == torch.bfloat16


def test_an_image_that_does_not_divide_is_refused_with_its_size(saved):
    with pytest.raises(ValueError, match="50 x 32 px.*4 px"):
        load(saved).encode(images(width=50))


def test_a_subfolder_and_the_old_names_of_attention_are_read(saved, tmp_path):
    """The hub's sd-vae-ft-ema and -mse still have the old names."""
    inside = shutil.copytree(saved, tmp_path / "whole" / "vae")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(inside / NAMES[1])
    for new, name in old.items():
        state = {key.replace(f".{new}.", f".{name}."): tensor for key, tensor in state.items()}
    assert any(".proj_attn." in key for key in state)
    save_file(state, inside / NAMES[1], metadata={"format": "pt"})
    model = load(tmp_path / "whole", subfolder="vae")
    with torch.no_grad():
        torch.testing.assert_close(model.encode(images())[0], tiny().encode(images()).latent_dist.mean)


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_one_file_with_the_original_names_is_read_without_a_config(prefix, tmp_path):
    path = tmp_path / "vae-ft-mse.safetensors"
    save_file(in_original_names(prefix) | {"model_ema.decay": torch.ones(1)}, path)
    model = load(path)
    theirs = tiny()
    with torch.no_grad():
        mean = model.encode(images())[0]
        torch.testing.assert_close(mean, theirs.encode(images()).latent_dist.mean)
        torch.testing.assert_close(model.decode(mean), theirs.decode(mean).sample)
    assert model.config.files == {path.name: digest_of_file(path)}
    assert (model.config.downsampling, model.config.latent_std) == (4, None)  # no tensor tells the scaling
    assert load(path, scaling_factor=0.5).config.latent_std == (2.0,) * 4


def test_one_file_with_its_config_beside_it_is_read_under_any_name(folder):
    path = (folder / NAMES[1]).rename(folder / "sdxl_vae.safetensors")
    model = load(path)
    assert model.config.files.keys() == {"config.json", "sdxl_vae.safetensors"}
    with torch.no_grad():
        torch.testing.assert_close(model.encode(images())[0], tiny().encode(images()).latent_dist.mean)


def test_a_reference_finds_the_very_same_autoencoder_again_and_no_other(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    model = load("vae")  # a relative path is kept in full
    reference = model.config
    assert reference.settings.model == str(folder)
    monkeypatch.chdir("/")
    again = load_reference(reference)
    assert again.config == reference
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    state = load_file(folder / NAMES[1])
    state["encoder.conv_in.bias"][0] += 1
    save_file(state, folder / NAMES[1])
    with pytest.raises(
        ValueError, match=r"not the one that was used before \(diffusion_pytorch_model.safetensors differ"
    ):
        load_reference(reference)
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match=re.escape(str(folder))):
        load_reference(reference)


def test_settings_count_by_what_a_folder_holds_not_by_where_it_lies(folder, saved):
    def identity(where, **settings):
        return PretrainedVaeConfig(model=str(where), **settings).identity()

    assert identity(folder) == identity(saved) == identity(saved, offline=True)
    assert identity(saved, dtype="float32") != identity(saved)
    (folder / NAMES[0]).write_text((folder / NAMES[0]).read_text() + "\n")
    assert identity(folder) != identity(saved)
    assert PretrainedVaeConfig(model="a/b").identity()["model"] == "a/b"


def test_what_is_no_such_autoencoder_is_refused_by_name(folder):
    config, weights = folder / NAMES[0], folder / NAMES[1]
    good, state = json.loads(config.read_text()), load_file(weights)

    def refused(error, message):
        with pytest.raises(error, match=message):
            load(folder)

    config.write_text(json.dumps(good | {"_class_name": "VQModel"}))
    refused(ValueError, "'?VQModel'?; an AutoencoderKL is needed")
    config.write_text("{")
    refused(ValueError, "config.json is no JSON")
    config.write_text(json.dumps(good))
    save_file({name: tensor for name, tensor in state.items() if name != "decoder.conv_out.bias"}, weights)
    refused(ValueError, "missing are decoder.conv_out.bias")
    save_file(state | {"decoder.conv_out.bias": torch.tensor([0.0, torch.nan, 0.0])}, weights)
    refused(ValueError, "not finite, in decoder.conv_out.bias")
    weights.write_bytes(b"\x08" + weights.read_bytes()[1:200])
    refused(ValueError, "safetensors are broken.*get them again")
    weights.rename(folder / "diffusion_pytorch_model.bin")
    refused(FileNotFoundError, "has no diffusion_pytorch_model.safetensors.*holds config.json, .*model.bin")
    gray = tiny(in_channels=1, out_channels=1)
    gray.save_pretrained(folder)
    refused(ValueError, "takes 1 and gives 1 channels")


def test_a_single_file_that_cannot_be_an_autoencoder_is_refused(tmp_path):
    (tmp_path / "vae.ckpt").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"vae.ckpt is no .safetensors file"):
        load(tmp_path / "vae.ckpt")
    save_file({"lora.up": torch.ones(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"lora.safetensors has neither .* it holds lora.up"):
        load(tmp_path / "lora.safetensors")
    incomplete = in_original_names()
    del incomplete["decoder.norm_out.weight"]
    save_file(incomplete, tmp_path / "some.safetensors")
    with pytest.raises(ValueError, match=r"some.safetensors is not complete: missing are decoder.conv_norm_out.weight"):
        load(tmp_path / "some.safetensors")


@pytest.mark.parametrize("subfolder", ["../other", "/etc", "vae/../..", ""])
def test_a_subfolder_stays_inside_the_model(subfolder):
    with pytest.raises(ValidationError, match="no folder inside"):
        PretrainedVaeConfig(subfolder=subfolder)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def put_in_cache(cache, saved):
    repository = cache / "models--some--vae"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(saved, repository / "snapshots" / COMMIT)


def unplugged(*_, **__):
    raise ConnectionError("the plug was pulled")


def test_a_missing_model_says_at_once_where_it_was_looked_for(cache, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unplugged)
    where = re.escape(str(cache))
    with pytest.raises(
        FileNotFoundError, match=rf"some/vae .*no folder here.*{where}, and offline is set.*hf download"
    ):
        load("some/vae", offline=True)
    with pytest.raises(FileNotFoundError, match=rf"{where}, and cannot be downloaded \(the plug was pulled\)"):
        load("some/vae")
    with pytest.raises(FileNotFoundError, match=re.escape(f"in the folder {tmp_path / 'none'}, which is not there")):
        load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"in the file .*none.safetensors, which is not there"):
        load(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match=r"has no config.json and no .*it holds nothing"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"the folder .*vae, which is not there"):
        load(tmp_path, subfolder="vae")


def test_a_cached_model_serves_without_a_network_and_is_pinned_to_its_commit(cache, saved, monkeypatch):
    put_in_cache(cache, saved)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unplugged)
    for offline in (False, True):
        config = load("some/vae", offline=offline).config
        assert (config.settings.model, config.settings.revision) == ("some/vae", COMMIT)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", None)  # a pinned one that is cached is not asked for
    assert load_reference(config).config == config


def test_the_hub_is_asked_for_two_files_at_one_commit(cache, saved, monkeypatch):
    asked = []

    def model_info(_, name, revision, timeout):
        asked.append((name, revision, timeout))
        return types.SimpleNamespace(
            sha=COMMIT, siblings=[types.SimpleNamespace(rfilename=f"vae/{name}") for name in (*NAMES, "weights.bin")]
        )

    def hf_hub_download(name, file_name, revision, cache_dir):
        asked.append((name, file_name, revision, cache_dir))
        return str(saved / file_name.removeprefix("vae/"))

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    config = load("some/vae", subfolder="vae", revision="v2").config
    assert config.settings.revision == COMMIT
    assert asked == [("some/vae", "v2", 10), *(("some/vae", f"vae/{name}", COMMIT, str(cache)) for name in NAMES)]
    with pytest.raises(FileNotFoundError, match=r"on the hub has no config.json and no .*; it holds vae/config.json"):
        load("some/vae")
