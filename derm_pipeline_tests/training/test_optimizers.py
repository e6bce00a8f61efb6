"""AdamW in 8 bits: refused where it cannot be, resumed to the bit where it can."""

import sys

import pytest
import torch
from torch import nn

from derm_pipeline.training.loop import Interrupted, NonFiniteLossError, train
from derm_pipeline_tests.training.small import Regression, config, network


def wide():
    """With a layer that is large enough for moments of 8 bits."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 1024), nn.SiLU(), nn.Linear(1024, 8), nn.Linear(8, 1))


def test_without_bitsandbytes_it_is_refused_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    model = network()
    with pytest.raises(ValueError, match=r"derm_pipeline\[bitsandbytes\]"):
        train(model, Regression(model), config(num_steps=2, optimizer="adamw8bit"), work=tmp_path)


def test_it_is_refused_in_fp16():
    with pytest.raises(ValueError, match="bf16 or fp32"):
        config(optimizer="adamw8bit", precision="fp16")


def test_settings_name_the_optimiser_only_where_it_is_not_the_usual():
    assert "optimizer" not in config().model_dump()
    assert "optimizer" not in config().deciding()
    assert config(optimizer="adamw8bit").deciding()["optimizer"] == "adamw8bit"


def test_a_training_in_8_bits_resumes_to_the_same_bits(tmp_path):
    pytest.importorskip("bitsandbytes")
    settings = config(num_steps=30, optimizer="adamw8bit", checkpoint_every_steps=10)
    straight = wide()
    expected = train(straight, Regression(straight), settings, work=tmp_path / "a")
    looks = iter(range(1, 100))
    stopped = wide()
    with pytest.raises(Interrupted):
        train(stopped, Regression(stopped), settings, work=tmp_path / "b", stop_when=lambda: next(looks) == 17)
    resumed = wide()
    found = train(resumed, Regression(resumed), settings, work=tmp_path / "b")
    assert found.resumed_from_step == 17
    assert found.losses == expected.losses
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in straight.state_dict().items())
    assert sum(found.losses[-5:]) < sum(found.losses[:5])


def test_in_8_bits_no_weight_becomes_nan(tmp_path):
    pytest.importorskip("bitsandbytes")
    model = wide()
    objective = Regression(model, spoil=lambda losses, step: losses * torch.nan if step == 3 else losses)
    with pytest.raises(NonFiniteLossError, match="step 3"):
        train(model, objective, config(num_steps=6, optimizer="adamw8bit"), work=tmp_path)
    assert all(value.isfinite().all() for value in model.state_dict().values())
