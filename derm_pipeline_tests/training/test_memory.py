"""Trainings that cannot fit are refused before any work, with what to change."""

import pytest
import torch
from torch import nn

from derm_pipeline.training.loop import train
from derm_pipeline.training.memory import Need, check_memory, estimate
from derm_pipeline_tests.training.small import Regression, config, network


class Wide(nn.Module):
    """Keeps its input (n, d) for the weight's gradient and its output (n, h) for tanh's."""

    def __init__(self, d, h):
        super().__init__()
        self.linear = nn.Linear(d, h)
        self.norm = nn.BatchNorm1d(h, affine=False)

    def forward(self, batch):
        return self.linear(2 * batch["x"]).tanh().sum(1)


def test_what_is_kept_for_the_backward_pass_is_counted_by_example():
    d, h = 300, 500
    module = Wide(d, h)
    need = estimate(module, 2, {"x": torch.randn(2, d)})
    assert need.per_example == 4 * (d + h)
    assert need.states == 4 * (d * h + h) * (2 + 2 + 2)  # a CPU keeps the gradients of two steps


def test_weights_in_lower_precision_are_not_counted_by_example():
    linear = nn.Linear(2000, 2000)

    def forward(batch):
        with torch.autocast("cpu", torch.bfloat16):
            return linear(2 * batch["x"].requires_grad_()).float().tanh().sum(1)

    module = nn.Module()
    module.linear, module.forward = linear, forward
    need = estimate(module, 0, {"x": torch.randn(2, 2000)})
    assert need.per_example < 2000 * 20
    assert need.fixed >= 2 * 2000 * 2000


def test_the_trial_leaves_the_network_as_it_was():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    objective = Regression(model)

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, batch):
            return objective.loss(batch)

    estimate(Module(), 0, objective.draw(0, torch.Generator()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_batch_that_cannot_fit_is_refused_with_one_that_does(monkeypatch):
    monkeypatch.setattr("derm_pipeline.training.memory.free_bytes", lambda device: 6_000)
    need = Need(states=2_000, fixed=1_000, per_example=100)
    check_memory(need, 30, 96, torch.device("cpu"))
    with pytest.raises(ValueError, match="9.7e-06 GB for 87 .* 6e-06 GB are free on cpu; set micro_batch_size to 29"):
        check_memory(need, 87, 87, torch.device("cpu"))
    check_memory(need, 69, 69, torch.device("cpu"), is_compiled=True)
    with pytest.raises(ValueError, match="smaller network, fewer averages"):
        check_memory(Need(7_000, 0, 1), 1, 8, torch.device("cpu"))


def test_it_is_refused_before_any_step(tmp_path, monkeypatch):
    monkeypatch.setattr("derm_pipeline.training.memory.free_bytes", lambda device: 100)
    model = network()
    with pytest.raises(ValueError, match="does not fit"):
        train(model, Regression(model), config(), work=tmp_path)
    assert list(tmp_path.iterdir()) == []
