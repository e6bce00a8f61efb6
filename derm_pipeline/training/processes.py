"""One training in several processes: who takes which rows, and what they agree on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from derm_pipeline.models.runtime import join_processes
from derm_pipeline.training.config import TrainingConfig, largest_divisor


class Processes:
    """The processes that train one model: alone, or those that `accelerate launch` started.

    What they say to each other about a step travels between the hosts (gloo), so that no device is waited for.
    """

    def __init__(self, config: TrainingConfig) -> None:
        self._accelerator = join_processes()
        self.num = self._accelerator.num_processes
        self.index = self._accelerator.process_index
        self.share, self.micro = _shares(config, self.num)
        """Rows of a batch that a process has, and how many of them it holds at once."""
        self.rows = slice(self.index * self.share, (self.index + 1) * self.share)
        """The rows of the batch that are this process' own."""
        self.num_micro = self.share // self.micro
        """Forward and backward passes of a step."""
        self._accelerator = join_processes(self.num_micro)
        self._hosts = dist.new_group(backend="gloo") if self.num > 1 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._hosts is not None:
            dist.destroy_process_group(self._hosts)

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and reports."""
        return self.index == 0

    def check_device(self, device: torch.device) -> None:
        """Refuse a model that lies on another process' device."""
        own = self._accelerator.device
        is_there = device.type == own.type and (own.type == "cpu" or device.index == own.index)
        if self.num > 1 and not is_there:
            raise ValueError(
                f"process {self.index} trains on {own}, but its model lies on {device}: move it to "
                "join_processes().device"
            )

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module, its gradients averaged over all processes at the last backward pass of each step."""
        wrapped: nn.Module = self._accelerator.prepare_model(module)
        return wrapped

    @contextmanager
    def accumulating(self, module: nn.Module) -> Iterator[None]:
        """Around each forward and backward pass of a wrapped module: gradients are exchanged in a step's last only."""
        with self._accelerator.accumulate(module):
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one pass's mean loss: after the last, they are those of the whole batch's mean."""
        self._accelerator.backward(loss)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of all processes' values, on the device."""
        if self.num == 1:
            return value
        reduced: Tensor = self._accelerator.reduce(value, "mean")
        return reduced

    def any(self, flag: bool) -> bool:
        """Whether any process says so; all get the same answer."""
        if self._hosts is None:
            return flag
        said = torch.tensor([float(flag)])
        dist.all_reduce(said, op=dist.ReduceOp.MAX, group=self._hosts)
        return said.tolist()[0] > 0

    def agree(self, number: int) -> bool:
        """Whether all processes have the same number; a process waits here for the others."""
        if self._hosts is None:
            return True
        ends = torch.tensor([number, -number])
        dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=self._hosts)
        highest, lowest = ends.tolist()
        return highest == -lowest


def _shares(config: TrainingConfig, num: int) -> tuple[int, int]:
    """How many rows of a batch each of `num` processes has, and how many of them it holds at once."""
    if config.batch_size % num:
        above = -(-config.batch_size // num) * num
        raise ValueError(f"batch_size {config.batch_size} does not divide over {num} processes; take {above}")
    share = config.batch_size // num
    micro = config.micro_batch_size or share
    if share % micro:
        raise ValueError(
            f"micro_batch_size {micro} does not divide the {share} examples of a process (batch_size "
            f"{config.batch_size} over {num} processes); take {largest_divisor(share, micro)} or leave it out"
        )
    return share, micro
