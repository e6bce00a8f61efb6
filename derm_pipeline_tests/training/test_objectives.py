"""What is trained: an autoencoder on images, a conditional generator on latents."""

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from derm_pipeline.latents import Moments, orient, to_model_range
from derm_pipeline.models.autoencoder import Autoencoder, AutoencoderConfig, autoencoder_loss
from derm_pipeline.models.generator import build_network
from derm_pipeline.models.laws import DDPM, RectifiedFlow
from derm_pipeline.models.runtime import autocast
from derm_pipeline.training.grids import GridConfig, draw_grid, told_in_grid
from derm_pipeline.training.loop import CheckpointError, Interrupted, TrainingConfig, step_seed, train
from derm_pipeline.training.objectives import (
    AutoencoderObjective,
    GeneratorObjective,
    example_chances,
    latents_of,
    psnr_db,
    reconstruct,
    train_autoencoder,
    train_generator,
)
from derm_pipeline.training.settings import AutoencoderTraining, DiTTraining
from derm_pipeline_tests.training.small import NoWaiting


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
    latents = latents_of(moments, torch.randn(20_000, 3, 2, 2, generator=torch.Generator().manual_seed(1)))
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
    return DiTTraining(**defaults | changes, training=budget(num_steps, batch_size=16, ema_decay=0.9))


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


def test_one_draw_is_what_it_always_was(tmp_path):
    """The order of the random choices: a recipe that names nothing new gets the weights that it always got."""
    moments, labels = two_kinds()
    spec, model, trained = train_generator(moments, labels, CLASSES, generator(1), work=tmp_path)
    config = generator(1)
    stream = torch.Generator().manual_seed(step_seed(0, 0))
    chances = example_chances(labels["diagnosis"], 1.0).cumsum(0)
    rows = torch.searchsorted(chances, torch.rand(16, generator=stream, dtype=torch.float64))
    orientations = torch.randint(2, (16,), generator=stream)
    chosen = moments[rows, orientations]
    shape = (len(chosen), chosen.shape[1] // 2, *chosen.shape[2:])
    latents = spec.whiten(latents_of(chosen, torch.randn(shape, generator=stream)))
    hidden = torch.rand(16, generator=stream) < 0.1
    told = {name: torch.where(hidden, len(CLASSES[name]), labels[name][rows]) for name in CLASSES}
    torch.manual_seed(0)
    fresh = build_network(spec.network)
    with autocast(torch.device("cpu")):
        loss = config.law.training_loss(lambda x, time: fresh(x, time, told), latents, stream).mean()
    assert trained.losses == [float(loss.detach())]


def test_one_draw_of_the_autoencoder_is_what_it_always_was(tmp_path):
    images = discs(20)
    _, trained = train_autoencoder(images, autoencoder(1), work=tmp_path)
    stream = torch.Generator().manual_seed(step_seed(0, 0))
    chosen = torch.randint(20, (8,), generator=stream)
    orientation = int(torch.randint(8, (1,), generator=stream))
    batch = orient(to_model_range(torch.from_numpy(images)[chosen]), orientation)
    torch.manual_seed(0)
    model = Autoencoder(autoencoder(1).network)
    with autocast(torch.device("cpu")):
        loss = autoencoder_loss(model, batch, stream)[0]
    assert trained.losses == pytest.approx([float(loss.detach())], rel=1e-6)


def objectives():
    """Both, with fresh networks."""
    moments, labels = two_kinds()
    spec, model, _ = train_generator(moments, labels, CLASSES, generator(1), work=Path(tempfile.mkdtemp()))
    pixels = Autoencoder(AutoencoderConfig(width=8, num_blocks=1))
    yield GeneratorObjective(model.train(), spec, moments, labels, generator(1))
    yield AutoencoderObjective(pixels, discs(20), 16)


def test_an_examples_loss_does_not_depend_on_the_others():
    for objective in objectives():
        batch = objective.draw(3, torch.Generator().manual_seed(9))
        assert {len(tensor) for tensor in batch.values()} == {16}
        whole = objective.loss(batch)
        assert whole.shape == (16,)
        parts = [
            objective.loss({name: tensor[part] for name, tensor in batch.items()}) for part in (slice(5), slice(5, 16))
        ]
        assert (torch.cat(parts) - whole).abs().max() < 1e-5


@pytest.mark.parametrize("law", [RectifiedFlow(), DDPM(), DDPM(learned_variance=True)], ids=["flow", "ddpm", "learned"])
def test_no_step_of_a_generator_waits_for_the_device(tmp_path, law):
    moments, labels = two_kinds()
    spec = train_generator(moments, labels, CLASSES, generator(1, law), work=tmp_path / "a")[0]
    model = build_network(spec.network)
    config = generator(12, law)
    objective = GeneratorObjective(model, spec, moments, labels, config)
    with NoWaiting() as seen:
        train(model, objective, config.training, work=tmp_path / "b")
    assert seen.num_seen > 500


def test_no_step_of_an_autoencoder_waits_for_the_device(tmp_path):
    model = Autoencoder(AutoencoderConfig(width=8, num_blocks=1, adversarial_weight=0.1))
    objective = AutoencoderObjective(model, discs(20), 8)
    with NoWaiting() as seen:
        train(model, objective, budget(9), work=tmp_path)
    assert seen.num_seen > 500


def test_moments_that_are_mapped_train_the_same_generator(tmp_path):
    moments, labels = two_kinds()
    moments = moments + 0.1 * torch.randn(moments.shape).half()
    mapped = Moments([moments], np.zeros(len(moments), np.int64), np.arange(len(moments)))
    one, two = (
        train_generator(each, labels, CLASSES, generator(5), work=tmp_path / name)
        for each, name in ((moments, "a"), (mapped, "b"))
    )
    assert one[2].losses == two[2].losses
    assert all(torch.equal(value, two[2].ema[name]) for name, value in one[2].ema.items())


def test_examples_that_are_held_out_are_measured_and_not_learnt(tmp_path):
    moments, labels = two_kinds()
    options = {"work": tmp_path / "a"}
    _, _, without = train_generator(moments, labels, CLASSES, generator(40), **options)
    options = {"work": tmp_path / "b", "held_out": two_kinds(24)}
    config = generator(40)
    training = config.training.model_copy(update={"validate_every_steps": 20})
    _, _, trained = train_generator(
        moments, labels, CLASSES, config.model_copy(update={"training": training}), **options
    )
    assert trained.losses == without.losses
    assert [step for step, _ in trained.validation] == [20, 40]
    images = discs(30)
    _, pixels = train_autoencoder(images[:20], autoencoder(5), work=tmp_path / "c", held_out=images[20:])
    assert [step for step, _ in pixels.validation] == [1, 2, 3, 4, 5]


VALIDATION = 0x76616C6964617465
"""What the seeds of a validation's draws are apart from those of steps by."""


def streams(num=4):
    return [torch.Generator().manual_seed(step_seed(VALIDATION, number)) for number in range(num)]


def test_the_validation_loss_of_a_generator_is_that_of_the_held_out_rows_by_the_weights_as_they_are(tmp_path):
    moments, labels = two_kinds()
    held_out, told_of = two_kinds(24)
    held_out = held_out + 0.2 * torch.randn(held_out.shape).half()
    spec, model, trained = train_generator(
        moments, labels, CLASSES, generator(3), work=tmp_path, held_out=(held_out, told_of)
    )
    losses = []
    for stream in streams():
        chances = example_chances(told_of["diagnosis"], 1.0).cumsum(0)
        rows = torch.searchsorted(chances, torch.rand(16, generator=stream, dtype=torch.float64))
        chosen = held_out[rows, torch.randint(2, (16,), generator=stream)]
        latents = spec.whiten(latents_of(chosen, torch.randn((16, 4, 4, 4), generator=stream)))  # as training rows are
        hidden = torch.rand(16, generator=stream) < 0.1
        told = {name: torch.where(hidden, len(CLASSES[name]), told_of[name][rows]) for name in CLASSES}
        with torch.no_grad(), autocast(torch.device("cpu")):
            loss = generator(3).law.training_loss(lambda x, time: model(x, time, told), latents, stream)  # noqa: B023
        losses.append(float(loss.mean()))
    assert trained.validation[-1] == (3, pytest.approx(np.mean(losses), rel=1e-6))


@pytest.mark.parametrize("start", [2, 3], ids=["resisted", "not yet"])
def test_the_validation_loss_of_an_autoencoder_is_weighed_as_the_step_before_it(tmp_path, start):
    images = discs(30)
    network = AutoencoderConfig(width=8, num_blocks=1, adversarial_weight=0.3, adversarial_start=start)
    config = AutoencoderTraining(network=network, training=budget(3))
    model, trained = train_autoencoder(images[:20], config, work=tmp_path, held_out=images[20:])
    losses = []
    for stream in streams():
        chosen = torch.randint(10, (8,), generator=stream)
        orientation = int(torch.randint(8, (1,), generator=stream))
        batch = orient(to_model_range(torch.from_numpy(images[20:])[chosen]), orientation)
        with torch.no_grad(), autocast(torch.device("cpu")):
            loss = autoencoder_loss(model, batch, stream, adversarial_scale=float(start <= 2))[0]
        losses.append(float(loss))
    assert trained.validation[-1] == (3, pytest.approx(np.mean(losses), rel=1e-6))


def test_to_be_watched_changes_no_weight_of_a_generator(tmp_path):
    moments, labels = two_kinds()
    config, seen = generator(9), []

    def on_samples(step, model, spec):
        told = told_in_grid(labels, config.conditions, 2)
        seen.append((step, draw_grid(model, spec, lambda latents: latents[:, :3], told, GridConfig(num_steps=2))))
        return seen[-1][1]

    _, plain, _ = train_generator(moments, labels, CLASSES, config, work=tmp_path / "a")
    _, watched, trained = train_generator(
        moments,
        labels,
        CLASSES,
        config,
        work=tmp_path / "b",
        held_out=two_kinds(24),
        on_samples=on_samples,
        tensorboard=tmp_path / "events",
    )
    assert all(torch.equal(weight, watched.state_dict()[name]) for name, weight in plain.state_dict().items())
    assert [step for step, _ in trained.validation] == list(range(1, 10))
    assert [step for step, _ in seen] == [3, 6, 9]
    assert len({picture.tobytes() for _, picture in seen}) == 3


def test_labels_outside_their_classes_are_refused_before_any_step(tmp_path):
    moments, labels = two_kinds(16)
    for wrong, message in (
        ({"skin_type": torch.full((16,), 7)}, "skin_type is 7 in row 0"),
        ({"skin_type": torch.full((16,), -1)}, "skin_type is -1"),
        ({"diagnosis": labels["diagnosis"][:9]}, "9 rows, and there are moments of 16"),
    ):
        with pytest.raises(ValueError, match=message):
            train_generator(moments, labels | wrong, CLASSES, generator(2), work=tmp_path)
    with pytest.raises(ValueError, match="told site, of which no classes"):
        train_generator(moments, labels, CLASSES, generator(2, conditions=("site",)), work=tmp_path)
    with pytest.raises(ValueError, match="no image"):
        train_autoencoder(discs(4)[:0], autoencoder(2), work=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_generator_may_be_told_sex_age_and_site_each_hidden_by_itself(tmp_path):
    moments, labels = two_kinds()
    classes = CLASSES | {"sex": ("f", "m"), "age_band": ("a", "b", "c"), "site": ("x", "y")}
    labels |= {name: torch.randint(len(classes[name]) + 1, (96,)) for name in ("sex", "age_band", "site")}
    config = generator(2, conditions=tuple(classes), condition_dropout_each=0.5)
    spec, model, trained = train_generator(moments, labels, classes, config, work=tmp_path)
    assert spec.network.conditions == {name: len(values) for name, values in classes.items()}
    draw = GeneratorObjective(model, spec, moments, labels, config).draw(0, torch.Generator().manual_seed(0))
    hidden = torch.stack([draw[f"hidden.{name}"] for name in classes])
    assert 0.2 < hidden.float().mean() < 0.9
    assert not (hidden == hidden[:1]).all()


def test_a_generator_resumes_and_refuses_another_recipes_checkpoint(tmp_path):
    moments, labels = two_kinds()
    looks = iter(range(99))
    options = {"work": tmp_path, "stop_when": lambda: next(looks) == 3}
    with pytest.raises(Interrupted, match="after step 4 of 8"):
        train_generator(moments, labels, CLASSES, generator(8), **options)
    with pytest.raises(CheckpointError, match="balance was 1.0, is 0.5"):
        train_generator(moments, labels, CLASSES, generator(8, balance=0.5), work=tmp_path)
    with pytest.raises(CheckpointError, match="law"):
        train_generator(moments, labels, CLASSES, generator(8, DDPM()), work=tmp_path)
    assert train_generator(moments, labels, CLASSES, generator(8), work=tmp_path)[2].resumed_from_step == 4


def test_a_generator_keeps_what_its_training_images_showed_together(tmp_path):
    config = generator(1, conditions=("skin_type", "diagnosis"))
    rows = torch.randn(40, 2, 8, 8, 8) * 0.1
    labels = {"diagnosis": torch.randint(0, 2, (40,)), "skin_type": torch.randint(0, 7, (40,))}
    classes = {"diagnosis": ("mel", "nv"), "skin_type": tuple("123456")}
    spec, *_ = train_generator(rows, labels, classes, config, work=tmp_path)
    pairs = zip(labels["skin_type"].tolist(), labels["diagnosis"].tolist(), strict=True)
    skin_types = (*classes["skin_type"], None)
    counts = Counter((skin_types[skin], classes["diagnosis"][diagnosis]) for skin, diagnosis in pairs)
    assert dict(spec.seen) == counts
    assert len(spec.seen) == len(counts)
