"""What is trained: an autoencoder on images, a conditional generator on latents."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from derm_pipeline.latents import to_model_range
from derm_pipeline.models.autoencoder import AutoencoderConfig
from derm_pipeline.models.laws import DDPM, RectifiedFlow
from derm_pipeline.training.loop import TrainingConfig
from derm_pipeline.training.objectives import (
    AutoencoderTraining,
    GeneratorTraining,
    draw_latents,
    example_chances,
    psnr_db,
    reconstruct,
    train_autoencoder,
    train_generator,
)


def budget(num_steps, **changes):
    defaults = {"batch_size": 8, "lr": 3e-3, "warmup_steps": 5, "checkpoint_every_steps": 10}
    return TrainingConfig(num_steps=num_steps, **defaults | changes)


def discs(num):
    """Discs of random size, place and colour on a skin-like ground, (num, 16, 16, 3)."""
    rng = np.random.default_rng()
    y, x = np.mgrid[:16, :16]
    images = np.full((num, 16, 16, 3), (220, 180, 150), np.uint8)
    for image in images:
        row, column, radius = rng.uniform(5, 11, 2).tolist() + [rng.uniform(2, 5)]
        image[(y - row) ** 2 + (x - column) ** 2 < radius**2] = rng.integers(20, 200, 3)
    return images


def autoencoder(num_steps):
    return AutoencoderTraining(network=AutoencoderConfig(width=8, num_blocks=1), training=budget(num_steps))


def test_the_autoencoder_learns_to_give_images_back(tmp_path):
    images = discs(64)
    some = to_model_range(torch.from_numpy(images))
    before, _ = train_autoencoder(images, autoencoder(1), work=tmp_path / "a")
    after, trained = train_autoencoder(images, autoencoder(80), work=tmp_path / "b")
    assert np.mean(trained.losses[-10:]) < 0.6 * np.mean(trained.losses[:5])
    assert psnr_db(reconstruct(after, some), some) > psnr_db(reconstruct(before, some), some) + 3


def test_the_same_seed_gives_the_same_autoencoder_whatever_was_drawn_before(tmp_path):
    images = discs(16)
    models = []
    for name in ("a", "b"):
        torch.rand(torch.randint(1, 9, (1,)))
        models.append(train_autoencoder(images, autoencoder(4), work=tmp_path / name)[0].state_dict())
    assert all(torch.equal(weight, models[1][name]) for name, weight in models[0].items())


def test_reconstruction_does_not_depend_on_the_batch(tmp_path):
    images = discs(9)
    model, _ = train_autoencoder(images, autoencoder(2), work=tmp_path)
    some = to_model_range(torch.from_numpy(images))
    whole, parts = reconstruct(model, some), reconstruct(model, some, batch_size=2)
    assert whole.shape == some.shape
    assert whole.abs().max() <= 1
    assert (whole - parts).abs().max() < 0.02


def test_psnr_is_that_of_its_definition():
    a = torch.rand(5, 3, 4, 4) * 2 - 1
    assert psnr_db(a, a + 0.02) == pytest.approx(10 * np.log10(4 / 0.02**2), abs=0.01)
    assert psnr_db(a, a) == pytest.approx(10 * np.log10(4 / 1e-10))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=200), st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_the_chances_of_a_diagnosis_follow_its_count_to_the_power_of_one_less_balance(diagnoses, balance):
    chances = example_chances(torch.tensor(diagnoses), balance)
    assert float(chances.sum()) == pytest.approx(1)
    counts = {diagnosis: diagnoses.count(diagnosis) for diagnosis in set(diagnoses)}
    total = sum(count ** (1 - balance) for count in counts.values())
    for diagnosis, count in counts.items():
        share = float(chances[torch.tensor(diagnoses) == diagnosis].sum())
        assert share == pytest.approx(count ** (1 - balance) / total)


def test_latents_are_drawn_with_the_moments_given():
    mean, std = torch.randn(3, 2, 2), torch.rand(3, 2, 2) + 0.1
    moments = torch.cat([mean, 2 * std.log()]).half().expand(20_000, -1, -1, -1)
    latents = draw_latents(moments, torch.Generator().manual_seed(1))
    assert latents.shape == (20_000, 3, 2, 2)
    assert latents.dtype == torch.float32
    assert (latents.mean(0) - mean).abs().max() < 0.05
    assert (latents.std(0) / std - 1).abs().max() < 0.05


CLASSES = {"diagnosis": ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"), "skin_type": tuple("123456")}


def two_kinds(num=96):
    """Moments (num, 2, 8, 4, 4) of latents that are -1 or +1 throughout, by diagnosis; hardly any noise."""
    diagnoses = torch.arange(num) % 2 * 5  # akiec and nv
    mean = torch.where(diagnoses == 0, -1.0, 1.0).view(-1, 1, 1, 1, 1).expand(-1, 2, 4, 4, 4)
    return torch.cat([mean, torch.full_like(mean, -12.0)], dim=2).half(), {
        "diagnosis": diagnoses,
        "skin_type": torch.full((num,), 6),  # unknown
    }


def generator(num_steps, law=None, **changes):
    defaults = {"width": 32, "depth": 1, "heads": 2, "law": law or RectifiedFlow()}
    return GeneratorTraining(**defaults | changes, training=budget(num_steps, batch_size=16, ema_decay=0.9))


@pytest.mark.parametrize("law", [RectifiedFlow(), DDPM()], ids=["flow", "ddpm"])
def test_the_generator_learns_and_tells_the_diagnoses_apart(tmp_path, law):
    moments, labels = two_kinds()
    spec, model, trained = train_generator(moments, labels, CLASSES, generator(120, law), work=tmp_path)
    assert np.mean(trained.losses[-20:]) < 0.7 * np.mean(trained.losses[:10])
    assert spec.latent_mean == pytest.approx((0.0,) * 4, abs=1e-3)
    assert spec.latent_std == pytest.approx((1.0,) * 4, rel=1e-2)
    assert spec.network.conditions == {"diagnosis": 7, "skin_type": 6}
    assert trained.ema.keys() == model.state_dict().keys()
    noise, time = torch.randn(64, 4, 4, 4, generator=torch.Generator().manual_seed(2)), torch.full((64,), 900.0)
    unknown = torch.full((64,), 6)
    with torch.no_grad():
        first, second = (
            model.eval()(noise, time, {"diagnosis": torch.full((64,), index), "skin_type": unknown}) for index in (0, 5)
        )
    # velocity is noise - data, and v is about -data where there is mostly noise: lower for the brighter kind
    assert float((first - second).mean()) > 0.5


def test_the_same_seed_gives_the_same_generator_and_another_seed_another(tmp_path):
    moments, labels = two_kinds(16)
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = generator(3)
        config = config.model_copy(update={"training": config.training.model_copy(update={"seed": seed})})
        weights.append(train_generator(moments, labels, CLASSES, config, work=tmp_path / name)[1].state_dict())
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    assert any(not torch.equal(weight, weights[2][name]) for name, weight in weights[0].items())


def test_a_generator_is_told_only_what_its_recipe_names(tmp_path):
    moments, labels = two_kinds(16)
    spec, model, _ = train_generator(moments, labels, CLASSES, generator(2, conditions=("diagnosis",)), work=tmp_path)
    assert set(spec.network.conditions) == set(spec.classes) == {"diagnosis"}
    with torch.no_grad():
        assert (
            model(torch.randn(2, 4, 4, 4), torch.tensor([1.0, 999.0]), {"diagnosis": torch.tensor([0, 7])})
            .isfinite()
            .all()
        )
