"""What is minimised, and how the rows of its batches reach a process' device."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from derm_pipeline.training.config import TrainingConfig, step_seed
from derm_pipeline.training.processes import Processes

Batch = dict[str, Tensor]
"""Tensors of the same rows, by name."""

_VALIDATION = 0x76616C6964617465  # sets the streams of a validation apart from those of steps


class Objective(Protocol):
    """What is minimised."""

    def draw(self, step: int, stream: torch.Generator) -> Batch:
        """All that a step chooses for its whole batch: examples, times, noise, ...

        Called in every process, where a GPU trains also ahead of time and in another thread; all randomness is the
        stream's. Returns CPU tensors whose leading dimension is the config's `batch_size`.
        """
        ...

    def loss(self, batch: Batch) -> Tensor:
        """The loss (n,) of each example of n rows of a draw, which lie on the model's device; no randomness.

        It may depend on the rows' own values only, and should not make the host wait for the device (`.item()`).
        """
        ...


class Draws:
    """The batches of an objective: drawn for all processes alike, cut into this one's micro batches."""

    def __init__(
        self, objective: Objective, config: TrainingConfig, processes: Processes, device: torch.device
    ) -> None:
        self._objective, self._config, self._processes, self._device = objective, config, processes, device

    def some(self, num: int) -> Batch:
        """A few examples on the device, to try the objective on."""
        batch = self._draw(step_seed(self._config.seed, 0), 0)
        return self.on_device({name: tensor[:num] for name, tensor in batch.items()})

    def steps(self, first_step: int) -> Iterator[tuple[int, list[Batch]]]:
        """Every step left with its micro batches; drawn one step ahead where a GPU does the work."""
        left = range(first_step, self._config.steps)
        if self._device.type == "cpu":
            yield from ((step, self._of_step(step)) for step in left)
            return
        with ThreadPoolExecutor(1) as pool:
            ahead: Future[list[Batch]] | None = None
            for step in left:
                batches = ahead.result() if ahead else self._of_step(step)
                ahead = pool.submit(self._of_step, step + 1) if step + 1 in left else None
                yield step, batches

    def fixed(self, done: int) -> Iterator[Batch]:
        """The micro batches of a validation after so many steps: the same each time, weighed as the last step's."""
        for number in range(self._config.validation_batches):
            yield from self._own(self._draw(step_seed(self._config.seed ^ _VALIDATION, number), done - 1))

    def on_device(self, batch: Batch) -> Batch:
        return {name: tensor.to(self._device, non_blocking=True) for name, tensor in batch.items()}

    def _of_step(self, step: int) -> list[Batch]:
        return self._own(self._draw(step_seed(self._config.seed, step), step))

    def _draw(self, seed: int, step: int) -> Batch:
        batch = self._objective.draw(step, torch.Generator().manual_seed(seed))
        for name, tensor in batch.items():
            if tensor.ndim == 0 or len(tensor) != self._config.batch_size:
                raise ValueError(
                    f"the objective drew {name} {tuple(tensor.shape)}: a row for each of the {self._config.batch_size} "
                    "examples of a batch is needed"
                )
        return batch

    def _own(self, batch: Batch) -> list[Batch]:
        """This process' rows, in micro batches; in pinned memory where a GPU fetches them."""
        own = {name: tensor[self._processes.rows] for name, tensor in batch.items()}
        if self._device.type == "cuda":
            own = {name: tensor.pin_memory() for name, tensor in own.items()}
        parts = {name: tensor.split(self._processes.micro) for name, tensor in own.items()}
        return [{name: parts[name][number] for name in parts} for number in range(self._processes.num_micro)]
