import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL
from pydantic import TypeAdapter, ValidationError

from derm_pipeline.models.autoencoder import Autoencoder, AutoencoderConfig
from derm_pipeline.models.diffusion import RectifiedFlow
from derm_pipeline.models.dit import DiT, DiTConfig
from derm_pipeline.models.generator import (
    AutoencoderChoice,
    GeneratorSpec,
    build_network,
    class_index,
    load_autoencoder,
    load_network,
    obtain_autoencoder,
    save_autoencoder,
)
from derm_pipeline.models.pretrained_vae import PretrainedVae, PretrainedVaeConfig
from derm_pipeline.models.runtime import load_weights, save_weights
from derm_pipeline.models.unet import UNet, UNetConfig

CPU = torch.device("cpu")
CLASSES = {"diagnosis": ("melanoma", "nevus"), "skin_type": ("1", "2", "3")}
TOLD = {name: len(values) for name, values in CLASSES.items()}
DIT = DiTConfig(latent_size=8, width=32, depth=1, heads=2, conditions=TOLD)
UNET = UNetConfig(
    latent_size=8, widths=(8, 16), layers=1, attention_levels=(), head_size=8, norm_groups=4, conditions=TOLD
)


def spec_of(network) -> GeneratorSpec:
    return GeneratorSpec(
        network=network, law=RectifiedFlow(), classes=CLASSES, latent_mean=(0.5,) * 4, latent_std=(2.0,) * 4
    )


def images(n: int = 2) -> torch.Tensor:
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(n)) * 2 - 1


@pytest.mark.parametrize(("config", "kind"), [(DIT, DiT), (UNET, UNet)])
def test_either_network_is_saved_and_loaded_by_its_kind(config, kind, tmp_path):
    network = build_network(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.1)
    spec_of(config).save(tmp_path)
    save_weights(tmp_path / "weights.safetensors", network.state_dict())
    spec, loaded = load_network(tmp_path, CPU)
    assert isinstance(loaded, kind)
    assert spec == spec_of(config)
    assert loaded.config == config
    assert not loaded.training
    x, time = torch.randn(3, 4, 8, 8), torch.tensor([0.0, 10.0, 999.0])
    told = {name: torch.tensor([0, 1, num]) for name, num in TOLD.items()}
    torch.testing.assert_close(loaded(x, time, told), network.eval()(x, time, told))


@pytest.mark.parametrize("shape", [DIT, UNET])
def test_conditions_keep_the_order_in_which_they_were_given(shape, tmp_path):
    told = {"skin_type": 3, "diagnosis": 2, "age_band": 4}  # not that of the alphabet: the first has a table of its own
    config = shape.model_copy(update={"conditions": told})
    classes = {name: tuple(str(number) for number in range(num)) for name, num in told.items()}
    spec = spec_of(config).model_copy(update={"classes": classes})
    network = build_network(config)
    spec.save(tmp_path)
    save_weights(tmp_path / "weights.safetensors", network.state_dict())
    loaded, again = load_network(tmp_path, CPU)
    assert list(loaded.network.conditions) == list(loaded.classes) == list(told)
    for name, weight in network.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])


def test_the_averaged_weights_are_taken_where_there_are_some(tmp_path):
    network = build_network(UNET)
    spec_of(UNET).save(tmp_path)
    save_weights(tmp_path / "weights.safetensors", network.state_dict())
    save_weights(tmp_path / "ema.safetensors", {name: 0 * value for name, value in network.state_dict().items()})
    assert not any(value.any() for value in load_network(tmp_path, CPU)[1].parameters())
    assert any(value.any() for value in load_network(tmp_path, CPU, averaged=False)[1].parameters())


def test_a_generator_of_before_there_were_kinds_is_a_dit(tmp_path):
    spec_of(DIT).save(tmp_path)
    content = json.loads((tmp_path / "generator.json").read_text())
    content["network"].pop("kind", None)
    (tmp_path / "generator.json").write_text(json.dumps(content))
    assert GeneratorSpec.load(tmp_path) == spec_of(DIT)


@pytest.mark.parametrize("change", [{"kind": "gan"}, {"widths": [8, 16]}, {"kind": "unet"}])
def test_an_unknown_or_mixed_network_is_refused(change, tmp_path):
    content = spec_of(DIT).model_dump(mode="json")
    content["network"] |= change
    with pytest.raises(ValidationError, match="network"):
        GeneratorSpec.model_validate(content)


def test_whitening_is_per_channel_and_undone():
    spec = spec_of(DIT)
    latents = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(spec.whiten(latents), (latents - 0.5) / 2)
    torch.testing.assert_close(spec.unwhiten(spec.whiten(latents)), latents)


def test_a_class_has_its_index_and_the_unknown_is_the_null_class():
    assert [class_index(CLASSES, "skin_type", value) for value in (1, "3", None)] == [0, 2, 3]
    with pytest.raises(ValueError, match="'wart' is not one of melanoma, nevus"):
        class_index(CLASSES, "diagnosis", "wart")


@pytest.mark.parametrize("adversarial_weight", [0.0, 0.5])
def test_a_trained_autoencoder_comes_back_without_its_adversary(adversarial_weight, tmp_path):
    model = Autoencoder(AutoencoderConfig(width=8, num_blocks=1, adversarial_weight=adversarial_weight)).eval()
    save_autoencoder(model, tmp_path)
    assert not [name for name in load_weights(tmp_path / "weights.safetensors") if "adversary" in name]
    loaded = load_autoencoder(tmp_path, CPU)
    assert isinstance(loaded, Autoencoder)
    assert loaded.config == model.config
    assert loaded.adversary is None
    torch.testing.assert_close(loaded.encode(images())[0], model.encode(images())[0])


def test_an_autoencoder_of_before_there_were_kinds_is_a_trained_one(tmp_path):
    save_autoencoder(Autoencoder(AutoencoderConfig(width=8, num_blocks=1)), tmp_path)
    old = {"downsampling": 4, "latent_channels": 4, "width": 8, "num_blocks": 1, "kl_weight": 1e-4, "edge_weight": 0.5}
    (tmp_path / "autoencoder.json").write_text(json.dumps(old))
    assert isinstance(load_autoencoder(tmp_path, CPU), Autoencoder)


@pytest.fixture
def pretrained(tmp_path):
    torch.manual_seed(1)
    AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_of_a_pretrained_autoencoder_a_reference_is_saved_not_a_copy(pretrained, tmp_path):
    settings = PretrainedVaeConfig(model=str(pretrained), dtype="float32")
    model = obtain_autoencoder(settings, CPU)
    (tmp_path / "saved").mkdir()
    save_autoencoder(model, tmp_path / "saved")
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["autoencoder.json"]
    loaded = load_autoencoder(tmp_path / "saved", CPU)
    assert isinstance(loaded, PretrainedVae)
    assert loaded.config == model.config
    assert (loaded.config.downsampling, loaded.config.latent_channels) == (2, 4)
    torch.testing.assert_close(loaded.encode(images())[0], model.encode(images())[0])
    (pretrained / "config.json").write_text((pretrained / "config.json").read_text() + " ")
    with pytest.raises(ValueError, match=r"config.json differ"):
        load_autoencoder(tmp_path / "saved", CPU)
    shutil.rmtree(pretrained)
    with pytest.raises(FileNotFoundError, match="vae"):
        load_autoencoder(tmp_path / "saved", CPU)


def test_the_settings_of_an_autoencoder_are_told_apart_by_kind():
    choice = TypeAdapter(AutoencoderChoice)
    assert choice.validate_python({"width": 16}) == AutoencoderConfig(width=16)
    assert choice.validate_python({"kind": "pretrained", "model": "a/b"}) == PretrainedVaeConfig(model="a/b")
    assert choice.validate_python(AutoencoderConfig(downsampling=16)).downsampling == 16
    for wrong in ({"kind": "pretrained", "width": 16}, {"model": "a/b"}, {"kind": "vq"}):
        with pytest.raises(ValidationError):
            choice.validate_python(wrong)
    assert isinstance(obtain_autoencoder(AutoencoderConfig(width=8, num_blocks=1), CPU), Autoencoder)


def test_what_training_images_showed_is_counted_and_what_none_showed_is_refused(tmp_path):
    shown = ((("melanoma", "1"), 2), (("melanoma", None), 3), ((None, "2"), 5), (("nevus", "1"), 7))
    spec_of(DIT).model_copy(update={"seen": shown}).save(tmp_path)
    spec = GeneratorSpec.load(tmp_path)
    rows = [values for values, num in shown for _ in range(num)]
    for diagnosis in (None, *CLASSES["diagnosis"]):
        for skin_type in (None, *CLASSES["skin_type"]):
            asked = (diagnosis, skin_type)
            num = sum(all(a is None or a == b for a, b in zip(asked, row, strict=True)) for row in rows)
            assert spec.num_images({"diagnosis": diagnosis, "skin_type": skin_type}) == num
    for value in (None, "1", "2"):
        spec.check_seen("skin_type", value)
    with pytest.raises(ValueError, match=r"skin_type 3 was never seen: no training image has it.* ask for 1, 2$"):
        spec.check_seen("skin_type", "3")
    spec_of(DIT).check_seen("skin_type", "3")  # of before it was kept
