"""The loop: learns, resumes exactly, stops before a bad update."""

import math

import pytest
import torch
from torch import nn

from derm_pipeline.training.loop import CHECKPOINT, NonFiniteLossError, TrainingConfig, lr_factor, step_seed, train


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 1))


def regression(model, fail_at=None):
    def loss(step, stream):
        if step == fail_at:
            raise KeyboardInterrupt
        x = torch.randn(16, 4, generator=stream)
        return (model(x)[:, 0] - x.sum(1)).square().mean()

    return loss


def config(**changes):
    defaults = {"num_steps": 300, "batch_size": 16, "lr": 1e-2, "ema_decay": 0.99, "checkpoint_every_steps": 20}
    return TrainingConfig(**defaults | changes)


def test_it_learns(tmp_path):
    model = network()
    trained = train(model, regression(model), config(), work=tmp_path)
    assert len(trained.losses) == 300
    assert trained.losses[-1] < 0.05 * trained.losses[0]


def test_a_resumed_training_equals_an_uninterrupted_one_to_the_bit(tmp_path):
    whole = network()
    straight = train(whole, regression(whole), config(num_steps=100), work=tmp_path / "a")
    for fail_at in (53, 75):  # killed twice
        model = network()
        with pytest.raises(KeyboardInterrupt):
            train(model, regression(model, fail_at), config(num_steps=100), work=tmp_path / "b")
    model = network()
    resumed = train(model, regression(model), config(num_steps=100), work=tmp_path / "b")
    assert resumed.resumed_from_step == 60
    assert resumed.losses == straight.losses
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])
        assert torch.equal(straight.ema[name], resumed.ema[name])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_loss_stops_before_the_weights_are_touched(tmp_path, bad):
    model = network()

    def loss(step, stream):
        value = regression(model)(step, stream)
        return value * bad if step >= 30 else value

    with pytest.raises(NonFiniteLossError, match="step 30"):
        train(model, loss, config(), work=tmp_path)
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


def test_the_average_follows_the_weights(tmp_path):
    model = network()
    trained = train(model, regression(model), config(num_steps=200, ema_decay=0.9), work=tmp_path)
    x = torch.randn(64, 4)
    average = network()
    average.load_state_dict(trained.ema)
    assert (average(x) - model(x)).abs().max() < 0.2
    assert any(not torch.equal(a, b) for a, b in zip(average.parameters(), model.parameters(), strict=True))


def test_the_rate_warms_up_holds_and_decays():
    budget = config(num_steps=1000, warmup_steps=100, decay_fraction=0.4, final_lr_fraction=0.02)
    rates = [lr_factor(step, budget) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[99:600] == [1.0] * 501
    assert rates[800] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0.02)


def test_step_seeds_do_not_collide():
    assert len({step_seed(seed, step) for seed in range(20) for step in range(500)}) == 10_000


def test_the_checkpoint_is_plain_tensors(tmp_path):
    from safetensors.torch import load_file

    model = network()
    with pytest.raises(KeyboardInterrupt):
        train(model, regression(model, fail_at=45), config(), work=tmp_path)
    tensors = load_file(tmp_path / CHECKPOINT)
    assert len(tensors["losses"]) == 40


def test_a_gradient_that_is_not_finite_stops_it_even_where_the_loss_is(tmp_path):
    model = network()

    def loss(step, stream):
        value = regression(model)(step, stream)
        flat = next(model.parameters()).sum() * 0  # 0, whose root has an infinite slope
        return value + (flat.abs().sqrt() if step >= 30 else 0)

    with pytest.raises(NonFiniteLossError, match="step 30"):
        train(model, loss, config(), work=tmp_path)
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
