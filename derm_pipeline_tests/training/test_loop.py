"""The loop: learns, averages, validates, waits for nothing, stops before a bad update."""

import json
import math
import multiprocessing
import random
import signal
import sys

import cv2
import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from derm_pipeline.training.curve import CURVE, LOSS_SCHEMA, images_per_s, loss_table, read_curve
from derm_pipeline.training.loop import (
    CHECKPOINT,
    Interrupted,
    NonFiniteLossError,
    TrainingConfig,
    lr_factor,
    step_seed,
    train,
)
from derm_pipeline.training.stopping import stop_on_signal
from derm_pipeline_tests.training.small import NoWaiting, Regression, config, network, train_until_signal


def run(work, model=None, objective=None, **options):
    """Train; options of `train`, all others are of the config."""
    own = {name: options.pop(name) for name in list(options) if name not in TrainingConfig.model_fields}
    model = model or network()
    return model, train(model, objective or Regression(model), config(**options), work=work, **own)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def test_it_learns(tmp_path):
    _, trained = run(tmp_path)
    assert len(trained.losses) == 300
    assert trained.losses[-1] < 0.05 * trained.losses[0]


def test_it_is_the_plain_loop_to_the_bit(tmp_path):
    """Written out: AdamW, warm-up, plateau, decay, clipping and an average, one batch a step."""
    settings = config(num_steps=60, weight_decay=0.01)
    model = network()
    objective, losses = Regression(model), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    average = {name: value.detach().clone() for name, value in model.named_parameters()}
    for step in range(60):
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, (step + 1) / 50) * max(0.02, min(1, (1 - step / 60) / 0.5))
        loss = objective.loss(objective.draw(step, torch.Generator().manual_seed(step_seed(0, step)))).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        for name, value in model.named_parameters():
            average[name].lerp_(value.detach(), 1 - min(0.99, (1 + step) / (10 + step)))
    ours = network()
    trained = train(ours, Regression(ours), settings, work=tmp_path)
    assert trained.losses == losses
    assert same(ours.state_dict(), model.state_dict())
    assert same(trained.ema, average)


@pytest.mark.parametrize("changes", [{}, {"micro_batch_size": 4}, {"precision": "fp16"}, {"clip_norm": None}], ids=str)
def test_no_step_waits_for_the_device(tmp_path, changes):
    with NoWaiting() as seen:
        run(tmp_path, num_steps=30, checkpoint_every_steps=100, ema_decays=(0.9,), **changes)
    assert seen.num_seen > 500
    with pytest.raises(AssertionError, match="makes the host wait"), NoWaiting():
        torch.ones(1).item()


class Named(nn.Module):
    """With a forward of its own."""

    def __init__(self):
        super().__init__()
        self.layers = network()

    def forward(self, x):
        return self.layers(x)


@pytest.mark.slow
@pytest.mark.parametrize("build", [Named, network])
def test_a_compiled_network_is_the_same_and_is_given_back_as_it_was(tmp_path, build):
    from torch._dynamo.utils import counters

    plain, straight = run(tmp_path / "a", *with_objective(build), num_steps=20)
    counters.clear()
    model, trained = run(tmp_path / "b", *with_objective(build), num_steps=20, compile=True)
    assert counters["stats"]["unique_graphs"] == 1
    assert trained.losses == pytest.approx(straight.losses, rel=1e-4)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert model._compiled_call_impl is None


def with_objective(build):
    torch.manual_seed(0)
    model = build()
    return model, Regression(model)


def test_accumulated_batches_give_the_same_losses(tmp_path):
    whole, straight = run(tmp_path / "a", num_steps=80)
    for micro in (1, 8):
        model, trained = run(tmp_path / str(micro), num_steps=80, micro_batch_size=micro)
        assert trained.losses == pytest.approx(straight.losses, abs=1e-5)
        for name, weight in whole.state_dict().items():
            assert (weight - model.state_dict()[name]).abs().max() < 1e-5


def spoilt_loss(factor):
    return lambda losses, step: losses * factor if step >= 30 else losses


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_non_finite_loss_stops_before_the_weights_are_touched(tmp_path, bad, precision):
    model = network()
    with pytest.raises(NonFiniteLossError, match="step 30"):
        run(tmp_path, model, Regression(model, spoil=spoilt_loss(bad)), precision=precision)
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
    untouched = network()
    looks = iter(range(31))
    with pytest.raises(Interrupted):
        run(tmp_path / "b", untouched, precision=precision, stop_when=lambda: next(looks) == 29)
    assert same(untouched.state_dict(), model.state_dict())


def test_a_gradient_that_is_not_finite_stops_it_even_where_the_loss_is(tmp_path):
    model = network()

    def spoil(losses, step):
        flat = next(model.parameters()).sum() * 0  # 0, whose root has an infinite slope
        return losses + (flat.abs().sqrt() if step >= 30 else 0)

    with pytest.raises(NonFiniteLossError, match="step 30"):
        run(tmp_path, model, Regression(model, spoil=spoil))
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


def test_a_gradient_that_never_fits_fp16_stops_it(tmp_path):
    model = network()

    def spoil(losses, step):
        flat = next(model.parameters()).sum() * 0
        return losses + flat.abs().sqrt()

    with pytest.raises(NonFiniteLossError, match="step 16"):  # 2^16 was halved sixteen times
        run(tmp_path, model, Regression(model, spoil=spoil), precision="fp16")


def test_fp16_halves_its_scale_until_gradients_fit_and_learns(tmp_path, monkeypatch):
    monkeypatch.setattr("derm_pipeline.training.scaling._INITIAL", 2.0**40)
    model, _ = run(tmp_path / "a", precision="fp16", num_steps=3)
    assert same(model.state_dict(), network().state_dict())  # overflowed: the weights stand still
    _, trained = run(tmp_path / "b", precision="fp16")
    assert trained.losses[-1] < 0.05 * trained.losses[0]


def test_every_average_follows_the_weights_at_its_own_pace(tmp_path):
    model, trained = run(tmp_path, num_steps=200, ema_decay=0.9, ema_decays=(0.5, 0.999))
    assert list(trained.emas) == [0.9, 0.5, 0.999]
    assert trained.ema is trained.emas[0.9]

    def distance(average):
        return sum((value - model.state_dict()[name]).abs().sum() for name, value in average.items())

    assert 0 < distance(trained.emas[0.5]) < distance(trained.emas[0.9]) < distance(trained.emas[0.999])
    _, single = run(tmp_path / "b", num_steps=200, ema_decay=0.9)
    assert same(single.ema, trained.ema)


def test_without_an_average_there_is_none(tmp_path):
    _, trained = run(tmp_path, num_steps=3, ema_decay=None)
    assert trained.ema is None
    assert trained.emas == {}


def test_the_validation_loss_is_that_of_fixed_draws_and_changes_nothing(tmp_path):
    plain, before = run(tmp_path / "a", num_steps=40)
    model = network()
    held_out = Regression(model)
    options = {"num_steps": 40, "validate_every_steps": 15, "validation_batches": 3}
    _, trained = run(tmp_path / "b", model, validation=held_out, **options)
    assert [step for step, _ in trained.validation] == [15, 30, 40]
    assert trained.losses == before.losses
    assert same(plain.state_dict(), model.state_dict())
    losses = [loss for _, loss in trained.validation]
    assert losses == sorted(losses, reverse=True)
    other = network()
    _, again = run(tmp_path / "c", other, validation=Regression(other), **options)
    assert again.validation == trained.validation


def test_samples_are_drawn_of_the_average_and_change_nothing(tmp_path):
    _, before = run(tmp_path / "a", num_steps=40)
    seen = []

    def on_samples(step, model):
        torch.rand(7)
        seen.append((step, model.training, {name: value.clone() for name, value in model.state_dict().items()}))

    model, trained = run(tmp_path / "b", num_steps=40, samples_every_steps=20, on_samples=on_samples)
    assert [(step, training) for step, training, _ in seen] == [(20, False), (40, False)]
    assert same(seen[-1][2], trained.ema)
    assert not same(seen[-1][2], model.state_dict())
    assert trained.losses == before.losses


def test_the_callers_random_stream_is_left_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    model = network(dropout=0.5)
    torch.manual_seed(5)
    run(tmp_path, model, num_steps=5)
    assert torch.equal(torch.rand(3), expected)


def test_the_curve_can_be_followed_while_it_is_drawn(tmp_path):
    seen = []

    def on_progress(step, steps, loss):
        line = json.loads((tmp_path / CURVE).read_text().splitlines()[-1])
        seen.append((step, steps, loss))
        assert (line["step"], line["loss"], line["num_images"]) == (step, loss, step * 16)

    _, trained = run(tmp_path, num_steps=45, report_every_steps=10, checkpoint_every_steps=100, on_progress=on_progress)
    assert [step for step, _, _ in seen] == [10, 20, 30, 40, 45]
    assert seen[-1][2] == pytest.approx(sum(trained.losses[40:]) / 5)
    assert [line["step"] for line in read_curve(tmp_path)] == [10, 20, 30, 40, 45]


def test_the_budget_may_be_told_in_images(tmp_path):
    _, trained = run(tmp_path, num_steps=None, num_images=100)
    assert len(trained.losses) == 7
    for budget in ({"num_images": 9}, {"num_steps": None}):
        with pytest.raises(ValueError, match="give the budget once"):
            config(**budget)
    assert config(checkpoint_every_images=100).steps_between_checkpoints == 6


def test_weight_decay_may_spare_biases(tmp_path):
    settings = {"num_steps": 30, "weight_decay": 10.0, "lr": 1e-2}
    everything, _ = run(tmp_path / "a", **settings)
    plain, _ = run(tmp_path / "b", **settings | {"weight_decay": 0.0})
    matrices, _ = run(tmp_path / "c", **settings, decay_matrices_only=True)
    norms = [[float(value.norm()) for value in model.state_dict().values()] for model in (everything, plain, matrices)]
    assert norms[2][0] < norms[1][0]
    assert norms[2][1] > norms[0][1]


def rates(**changes):
    settings = config(**{"num_steps": 1000, "warmup_steps": 100} | changes)
    return [lr_factor(step, settings) for step in range(1000)]


def test_the_rate_warms_up_holds_and_decays():
    linear = rates(decay_fraction=0.4, final_lr_fraction=0.02)
    assert linear[0] == pytest.approx(0.01)
    assert linear[99:600] == [1.0] * 501
    assert linear[800] == pytest.approx(0.5)
    assert linear[-1] == pytest.approx(0.02)


def test_the_rate_may_hold_fall_as_a_cosine_or_drop():
    assert rates(schedule="constant")[99:] == [1.0] * 901
    cosine = rates(schedule="cosine", final_lr_fraction=0.1)
    assert cosine[100] == pytest.approx(1)
    assert cosine[550] == pytest.approx(0.55)
    assert cosine[-1] == pytest.approx(0.1, abs=1e-4)
    # 10 epochs of 320 images, 16 a step: a tenth after every 200 steps, as torch's StepLR
    drops = rates(schedule="step", drop_every_images=3200, warmup_steps=0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.1)
    for epoch in range(50):
        assert drops[epoch * 20 : epoch * 20 + 20] == pytest.approx([reference.get_last_lr()[0]] * 20)
        optimizer.step()
        reference.step()
    with pytest.raises(ValueError, match="drop_every_images"):
        config(schedule="step")


def test_step_seeds_do_not_collide():
    assert len({step_seed(seed, step) for seed in range(20) for step in range(500)}) == 10_000


def test_an_objective_that_draws_another_number_of_rows_is_refused(tmp_path):
    model = network()
    with pytest.raises(ValueError, match="16 examples"):
        run(tmp_path, model, Regression(model, batch_size=15))


def test_a_model_without_anything_to_train_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no parameter to train"):
        run(tmp_path, network().requires_grad_(False))


def test_sizes_that_do_not_divide_are_refused_with_one_that_does():
    with pytest.raises(ValueError, match="micro_batch_size 5; take one that divides it, as 4"):
        config(micro_batch_size=5)
    with pytest.raises(ValueError, match="as 16"):
        config(micro_batch_size=32)
    with pytest.raises(ValueError, match="between 0 and 1"):
        config(ema_decays=(1.5,))


def test_it_stops_when_asked_and_goes_on_as_if_it_had_not(tmp_path):
    whole, straight = run(tmp_path / "a", num_steps=50)
    for number in range(2):
        stop_after = random.randrange(1, 20)
        looks = iter(range(1000))
        with pytest.raises(Interrupted) as stopped:
            run(tmp_path / "b", num_steps=50, stop_when=lambda: next(looks) + 1 == stop_after)  # noqa: B023
        assert number or stopped.value.step == stop_after
        assert (tmp_path / "b" / CHECKPOINT).is_file()
    model, trained = run(tmp_path / "b", num_steps=50)
    assert trained.resumed_from_step == stopped.value.step
    assert trained.losses == straight.losses
    assert same(whole.state_dict(), model.state_dict())
    assert same(straight.ema, trained.ema)


def test_a_signal_is_noted_and_the_handler_of_before_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signal() as stop_when:
        assert not stop_when()
        signal.raise_signal(signal.SIGTERM)
        assert stop_when()
    assert signal.getsignal(signal.SIGTERM) is before


def num_saved(path):
    if not path.is_file():
        return 0
    with safe_open(path, "pt") as file:
        return len(file.get_tensor("losses"))


def test_killed_by_any_signal_at_any_step_it_ends_with_the_same_weights(tmp_path):
    num_steps = 90
    _, straight = run(tmp_path / "a", num_steps=num_steps)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["accelerate", "derm_pipeline_tests.training.small"])
    steps = sorted(random.sample(range(1, num_steps - 1), 4))
    done_before = 0
    for step in steps:
        number = random.choice([signal.SIGKILL, signal.SIGTERM])
        process = context.Process(target=train_until_signal, args=(tmp_path / "b", num_steps, step, number))
        process.start()
        process.join(60)
        assert process.exitcode == (-signal.SIGKILL if number == signal.SIGKILL else 1), (steps, step, number)
        done = num_saved(tmp_path / "b" / CHECKPOINT)
        assert done == (step + 1 if number == signal.SIGTERM else max(done_before, step // 20 * 20))
        done_before = done
    _, trained = run(tmp_path / "b", num_steps=num_steps)
    assert trained.losses == straight.losses
    assert same(straight.ema, trained.ema)


def test_event_files_are_written_where_tensorboard_is_there(tmp_path):
    picture = torch.randint(0, 255, (8, 9, 3), dtype=torch.uint8).numpy()
    model = network()
    options = {"num_steps": 10, "report_every_steps": 2, "samples_every_steps": 5, "validate_every_steps": 4}
    run(
        tmp_path,
        model,
        validation=Regression(model),
        on_samples=lambda *_: picture,
        tensorboard=tmp_path / "events",
        **options,
    )
    found = events(tmp_path / "events")
    assert set(found.Tags()["scalars"]) == {"loss", "lr", "images_per_s", "validation_loss"}
    lines = read_curve(tmp_path)
    for name in ("loss", "lr", "validation_loss"):
        told = {event.step: event.value for event in found.Scalars(name)}
        assert told == pytest.approx({line["step"]: line[name] for line in lines if name in line}, rel=1e-6)
    assert [event.step for event in found.Images("samples")] == [5, 10]
    shown = cv2.imdecode(np.frombuffer(found.Images("samples")[0].encoded_image_string, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert (shown == picture).all()


def test_a_resumed_training_tells_tensorboard_every_step_once(tmp_path):
    options = {"num_steps": 30, "report_every_steps": 5, "checkpoint_every_steps": 10, "tensorboard": tmp_path / "e"}
    model = network()

    def spoil(losses, step):
        if step == 27:
            raise KeyboardInterrupt  # killed, with three lines more than its checkpoint knows
        return losses

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, model, Regression(model, spoil=spoil), **options)
    _, trained = run(tmp_path, **options)
    assert trained.resumed_from_step == 20
    assert [event.step for event in events(tmp_path / "e").Scalars("loss")] == [5, 10, 15, 20, 25, 30]
    assert [line["step"] for line in read_curve(tmp_path)] == [5, 10, 15, 20, 25, 30]


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def test_the_finished_curve_has_a_row_a_step_and_knows_nothing_of_the_clock(tmp_path):
    settings = config(num_steps=25, validate_every_steps=10)
    model = network()
    trained = train(model, Regression(model), settings, work=tmp_path, validation=Regression(model))
    table = loss_table(trained.losses, trained.validation, settings)
    assert table.schema.equals(LOSS_SCHEMA)
    assert table["loss"].to_pylist() == trained.losses
    assert table["num_images"].to_pylist() == [16 * step for step in range(1, 26)]
    assert table["lr"].to_pylist() == [1e-2 * lr_factor(step, settings) for step in range(25)]
    measured = table.filter(table["validation_loss"].is_valid()).select(["step", "validation_loss"])
    assert [tuple(row.values()) for row in measured.to_pylist()] == trained.validation
    rates = [line["images_per_s"] for line in read_curve(tmp_path)]
    assert images_per_s(tmp_path) == pytest.approx(np.median(rates))
    assert images_per_s(tmp_path / "nowhere") is None


def test_unless_told_it_validates_ten_times_and_at_least_every_500_steps_and_draws_three_times():
    settings = config(num_steps=1000)
    assert (settings.steps_between_validations, settings.steps_between_samples) == (100, 334)
    settings = config(num_steps=10**6)
    assert (settings.steps_between_validations, settings.steps_between_samples) == (500, 333334)
    settings = config(num_steps=1, validate_every_steps=7, samples_every_steps=3)
    assert (settings.steps_between_validations, settings.steps_between_samples) == (7, 3)


def test_without_tensorboard_event_files_are_refused_before_any_step(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"derm_pipeline\[tensorboard\]"):
        run(tmp_path, tensorboard=tmp_path / "events")
    assert list(tmp_path.iterdir()) == []
