"""Checkpoints: all that the next step depends on, and none of another training."""

import random

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from derm_pipeline.training.checkpoint import CheckpointError
from derm_pipeline.training.curve import CURVE, read_curve
from derm_pipeline.training.loop import CHECKPOINT, train
from derm_pipeline_tests.training.small import Regression, config, network


class Fails(Regression):
    """Ends as a killed process does, in the midst of a step."""

    def __init__(self, model, fail_at):
        super().__init__(model)
        self.fail_at = fail_at

    def draw(self, step, stream):
        if step == self.fail_at:
            raise KeyboardInterrupt
        return super().draw(step, stream)


def interrupted(work, fail_at, build=network, **options):
    own = {name: options.pop(name) for name in ("identity",) if name in options}
    model = build()
    with pytest.raises(KeyboardInterrupt):
        train(model, Fails(model, fail_at), config(**options), work=work, **own)


def trained(work, build=network, **options):
    own = {name: options.pop(name) for name in ("identity", "validate") if name in options}
    model = build()
    validation = Regression(model) if own.pop("validate", False) else None
    return model, train(model, Regression(model), config(**options), work=work, validation=validation, **own)


def with_batch_norm():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))


@pytest.mark.parametrize(
    ("build", "changes"),
    [
        (network, {}),
        (network, {"ema_decays": (0.5, 0.999), "schedule": "cosine"}),
        (lambda: network(dropout=0.5), {"micro_batch_size": 4}),
        (with_batch_norm, {"decay_matrices_only": True, "weight_decay": 0.1}),
        (network, {"precision": "fp16"}),
        (network, {"precision": "bf16", "clip_norm": None}),
    ],
    ids=["plain", "averages", "dropout", "batch-norm", "fp16", "bf16"],
)
def test_a_resumed_training_equals_an_uninterrupted_one_to_the_bit(tmp_path, monkeypatch, build, changes):
    monkeypatch.setattr("derm_pipeline.training.scaling._GROWS_AFTER", 7)
    monkeypatch.setattr("derm_pipeline.training.scaling._INITIAL", 2.0**20)
    options = {"num_steps": 60, "checkpoint_every_steps": 9, **changes}
    whole, straight = trained(tmp_path / "a", build, **options)
    for fail_at in sorted(random.sample(range(1, 60), 2)):
        interrupted(tmp_path / "b", fail_at, build, **options)
    model, resumed = trained(tmp_path / "b", build, **options)
    assert resumed.resumed_from_step == fail_at // 9 * 9
    assert resumed.losses == straight.losses
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    assert list(resumed.emas) == list(straight.emas)
    for decay, average in straight.emas.items():
        assert all(torch.equal(value, resumed.emas[decay][name]) for name, value in average.items())


def test_the_losses_on_held_out_examples_are_resumed_too(tmp_path):
    options = {"num_steps": 50, "validate_every_steps": 10, "checkpoint_every_steps": 15}
    _, straight = trained(tmp_path / "a", validate=True, **options)
    interrupted(tmp_path / "b", 33, **options)
    _, resumed = trained(tmp_path / "b", validate=True, **options)
    assert [step for step, _ in resumed.validation] == [40, 50]
    assert resumed.validation == straight.validation[-2:]
    _, again = trained(tmp_path / "b", validate=True, **options)
    assert again.validation == resumed.validation


def test_settings_that_change_no_weight_may_change(tmp_path):
    _, straight = trained(tmp_path / "a", num_steps=40)
    interrupted(tmp_path / "b", 25, num_steps=40)
    changes = {"micro_batch_size": 8, "checkpoint_every_steps": 11, "report_every_steps": 3}
    _, resumed = trained(tmp_path / "b", num_steps=None, num_images=640, **changes)
    assert resumed.resumed_from_step == 20
    assert resumed.losses == pytest.approx(straight.losses, abs=1e-5)


def test_a_checkpoint_of_another_training_is_refused_with_what_differs(tmp_path):
    interrupted(tmp_path, 25, num_steps=40, identity={"law": {"kind": "flow", "t": 1}})
    for options, message in (
        ({"lr": 0.5}, "lr was 0.01, is 0.5"),
        ({"num_steps": 41}, "steps was 40, is 41"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"identity": {"law": {"kind": "ddpm", "t": 1}}}, 'identity.law.kind was "flow", is "ddpm"'),
    ):
        with pytest.raises(CheckpointError, match=message) as refused:
            trained(tmp_path, **{"num_steps": 40, "identity": {"law": {"kind": "flow", "t": 1}}} | options)
        assert str(tmp_path / CHECKPOINT) in str(refused.value)


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    interrupted(tmp_path, 25)
    with pytest.raises(CheckpointError, match=r"network\.0\.bias was \[8\], is \[9\]"):
        trained(tmp_path, lambda: nn.Sequential(nn.Linear(4, 9), nn.SiLU(), nn.Dropout(0), nn.Linear(9, 1)))


@pytest.mark.parametrize("part", [0, 5, 0.5, 0.999], ids=str)
def test_a_torn_checkpoint_is_refused_by_name(tmp_path, part):
    interrupted(tmp_path, 25)
    path = tmp_path / CHECKPOINT
    content = path.read_bytes()
    path.write_bytes(content[: part if part > 1 else int(part * len(content))])
    with pytest.raises(CheckpointError, match="damaged.*remove it") as refused:
        trained(tmp_path)
    assert str(path) in str(refused.value)
    path.unlink()
    assert trained(tmp_path)[1].resumed_from_step == 0


def test_a_file_of_something_else_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"losses": torch.zeros(3)}, tmp_path / CHECKPOINT)
    with pytest.raises(CheckpointError, match="another version"):
        trained(tmp_path)


def test_a_checkpoint_that_was_being_written_is_not_taken_for_one(tmp_path):
    interrupted(tmp_path, 25)
    (tmp_path / f".{CHECKPOINT}.aside").write_bytes(b"half")
    assert trained(tmp_path)[1].resumed_from_step == 20


def test_the_checkpoint_is_plain_tensors_and_leaves_frozen_weights_out(tmp_path):
    def partly_frozen():
        model = network()
        model[0].requires_grad_(False)
        return model

    interrupted(tmp_path, 45, partly_frozen)
    tensors = load_file(tmp_path / CHECKPOINT)
    assert len(tensors["losses"]) == 40
    assert {name for name in tensors if name.startswith("model.")} == {"model.3.weight", "model.3.bias"}
    model, resumed = trained(tmp_path, partly_frozen)
    assert resumed.resumed_from_step == 40
    assert resumed.ema.keys() == model.state_dict().keys()


def test_the_curve_goes_on_where_the_checkpoint_is(tmp_path):
    interrupted(tmp_path, 55, report_every_steps=10, checkpoint_every_steps=20, num_steps=70)
    assert [line["step"] for line in read_curve(tmp_path)] == [10, 20, 30, 40, 50]
    with (tmp_path / CURVE).open("a") as handle:
        handle.write('{"step": 6')  # killed while it wrote
    trained(tmp_path, report_every_steps=10, checkpoint_every_steps=20, num_steps=70)
    assert [line["step"] for line in read_curve(tmp_path)] == [10, 20, 30, 40, 50, 60, 70]
