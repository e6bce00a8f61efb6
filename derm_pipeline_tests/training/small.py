"""A network and an objective that train in a moment, for the loop's tests and the processes that they start."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from derm_pipeline.training.loop import TrainingConfig, train
from derm_pipeline.training.stopping import stop_on_signal

BATCH = 16


def network(*, dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Dropout(dropout), nn.Linear(8, 1))


class Regression:
    """Learn the sum of four numbers; at `signal_at` the process is sent a signal, in the midst of a step."""

    def __init__(self, model, *, batch_size=BATCH, signal_at=None, number=signal.SIGKILL, spoil=None):
        self.model, self.batch_size = model, batch_size
        self.signal_at, self.number = signal_at, number
        self.spoil = spoil

    def draw(self, step, stream):
        if step == self.signal_at:
            os.kill(os.getpid(), self.number)
        steps = torch.full((self.batch_size,), step)
        return {"x": torch.randn(self.batch_size, 4, generator=stream), "step": steps}

    def loss(self, batch):
        x = batch["x"]
        losses = (self.model(x)[:, 0].float() - x.sum(1)).square()
        if self.spoil is not None:
            losses = self.spoil(losses, int(batch["step"][0]))
        return losses


def config(**changes):
    defaults = {"num_steps": 300, "batch_size": BATCH, "lr": 1e-2, "ema_decay": 0.99, "checkpoint_every_steps": 20}
    defaults |= {"precision": "fp32"}
    return TrainingConfig(**defaults | changes)


class NoWaiting(TorchDispatchMode):
    """Fails where the host would wait for a device: a value is read, or a result's size depends on values."""

    waits = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_unique2")

    def __init__(self):
        super().__init__()
        self.num_seen = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.num_seen += 1
        name = function.overloadpacket.__name__
        assert name not in self.waits, f"{function} makes the host wait"
        return function(*arguments, **(keywords or {}))


def train_until_signal(work: Path, num_steps: int, step: int, number: int) -> None:
    """In a process of its own: ends by SIGKILL at once, by SIGTERM after the step."""
    model = network()
    objective = Regression(model, signal_at=step, number=number)
    with stop_on_signal() as stop_when:
        train(model, objective, config(num_steps=num_steps), work=work, stop_when=stop_when)


def train_as_one_of(index: int, num: int, port: int, work: Path, changes: dict[str, object], stop_after: int) -> None:
    """In a process of its own, as `accelerate launch` starts it; leaves what it got as a file."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(index),
        "LOCAL_RANK": str(index),
        "WORLD_SIZE": str(num),
        "LOCAL_WORLD_SIZE": str(num),
        "ACCELERATE_USE_CPU": "true",
    }
    train_and_leave(index, work, changes, stop_after)


def train_and_leave(index: int, work: Path, changes: dict[str, object], stop_after: int = 0) -> None:
    """Train; save losses and weights as `result-<index>.pt`. With `stop_after`, the last process asks to stop."""
    from derm_pipeline.training.loop import Interrupted

    model = network()
    looks = []

    def stop_when():
        looks.append(1)
        return bool(stop_after) and index == 1 and len(looks) == stop_after

    try:
        trained = train(
            model,
            Regression(model),
            config(**changes),
            work=work,
            validation=Regression(model),
            stop_when=stop_when,
        )
    except (Interrupted, ValueError) as stopped:
        torch.save({"stopped": str(stopped)}, work / f"result-{index}.pt")
        return
    result = {
        "losses": trained.losses,
        "validation": trained.validation,
        "weights": model.state_dict(),
        "ema": trained.ema,
        "resumed": trained.resumed_from_step,
    }
    torch.save(result, work / f"result-{index}.pt")
