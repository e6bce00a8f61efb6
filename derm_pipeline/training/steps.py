"""The steps of a training: forward, backward, update, average, and what follows them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from derm_pipeline.models.runtime import autocast
from derm_pipeline.training.averages import Averages
from derm_pipeline.training.checkpoint import CheckpointError, State, resume
from derm_pipeline.training.config import TrainingConfig, lr_factor, step_seed
from derm_pipeline.training.draws import Batch, Draws, Objective
from derm_pipeline.training.memory import TRIED, check_memory, estimate
from derm_pipeline.training.optimizers import make_optimizer
from derm_pipeline.training.processes import Processes
from derm_pipeline.training.scaling import LossScale


class NonFiniteLossError(ArithmeticError):
    """The loss or its gradient became NaN or infinite; the last checkpoint holds the weights of an earlier step."""


@dataclass(frozen=True)
class Due:
    """What follows a step."""

    report: bool
    validate: bool
    samples: bool
    save: bool


class _Module(nn.Module):
    """An objective as a module, so that processes exchange gradients whichever method of the model it calls."""

    def __init__(self, model: nn.Module, objective: Objective, config: TrainingConfig) -> None:
        super().__init__()
        self.model = model
        self._loss = objective.loss
        self._device = next(model.parameters()).device
        self._precision = config.precision

    def compile_loss(self) -> None:
        self._loss = torch.compile(self._loss)

    def forward(self, batch: Batch) -> Tensor:
        with autocast(self._device, self._precision):
            return self._loss(batch)


class Steps:
    """One model, its optimiser and averages, and the steps that it takes."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        validation: Objective | None,
        config: TrainingConfig,
        processes: Processes,
    ) -> None:
        """Refuses, before any work, what does not fit into memory."""
        parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        if not parameters:
            raise ValueError("the model has no parameter to train: all of them are frozen")
        self._config, self._processes = config, processes
        self._weights = list(parameters.values())
        device = self._weights[0].device
        processes.check_device(device)
        self._draws = Draws(objective, config, processes, device)
        self._held_out = Draws(validation, config, processes, device) if validation else None
        self._validation = _Module(model, validation, config) if validation else None
        self._module = _Module(model, objective, config).train()
        tried = self._draws.some(min(TRIED, 2 * processes.micro))
        num_moments = 0.5 if config.optimizer == "adamw8bit" else 2.0
        need = estimate(self._module, len(config.decays), tried, num_moments=num_moments)
        check_memory(need, processes.micro, processes.share, device, is_compiled=config.compile)
        self._wrapped = processes.wrap(self._module)
        self._pending: list[Tensor] = []
        self._held: list[Tensor | None] = []
        self._holds = device.type == "cpu"
        self.state = State(
            model,
            parameters,
            make_optimizer(self._weights, config),
            Averages(parameters, config.decays),
            LossScale(device) if config.precision == "fp16" else None,
        )

    def start(self, path: Path, settings: Mapping[str, object]) -> int:
        """Resume from the checkpoint at `path`, where there is one, and return the first step."""
        first_step = resume(path, self.state, settings)
        if not self._processes.agree(first_step):
            raise CheckpointError(
                f"the processes found different checkpoints: {path.parent} must be one folder that all of them see"
            )
        return first_step

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """Compile the network while it is trained, where that is asked for.

        One that has no forward of its own (an autoencoder, a Sequential) is compiled with the objective's loss.
        """
        model = self.state.model
        if not self._config.compile:
            yield
        elif type(model).forward.__module__.startswith("torch.nn"):
            self._module.compile_loss()
            yield
        else:
            model.compile()
            try:
                yield
            finally:
                model._compiled_call_impl = None  # as it was: a sampler compiles for its own batches

    def take(self, first_step: int) -> Iterator[int]:
        """Take every step that is left; yields how many are done."""
        self.state.model.train()
        for step, batches in self._draws.steps(first_step):
            for group in self.state.optimizer.param_groups:
                group["lr"] = self._config.lr * lr_factor(step, self._config)
            self._pending.append(self._step(step, batches))
            self.state.averages.update(step)
            yield step + 1

    def _step(self, step: int, batches: list[Batch]) -> Tensor:
        """One update. Returns its loss, NaN where it or its gradient is not finite; waits for nothing."""
        scale, losses = self.state.scale, []
        for number, batch in enumerate(batches):
            self._seed_dropout(step, number)
            with self._processes.accumulating(self._wrapped):
                loss = self._wrapped(self._draws.on_device(batch)).mean()
                self._processes.backward(loss if scale is None else scale.scaled(loss))
            losses.append(loss.detach())
        mean = self._processes.mean(losses[0] if len(losses) == 1 else torch.stack(losses).mean())
        norm = self._clip()
        is_sound = torch.isfinite(mean) & torch.isfinite(norm)
        # AdamW then skips the update on the device, without asking the host; `collect` raises at the next report.
        optimizer = self.state.optimizer
        optimizer.found_inf = (~is_sound).float()  # type: ignore[attr-defined]  # torch's GradScaler sets it so, too
        optimizer.step()
        self._drop_gradients()
        if scale is not None:  # that a gradient overflows now and then is how the scale is found
            is_sound = torch.isfinite(mean) & ~scale.update(~torch.isfinite(norm))
        return torch.where(is_sound, mean, torch.nan)

    def _drop_gradients(self) -> None:
        """Forget the gradients; on a CPU their memory is kept until those of the next step are there.

        They lie above what the backward pass frees. With nothing there, malloc gives all of that back to the system,
        and every page of it must be got and zeroed again in the next step: a tenth of a step's time, or more.
        """
        if self._holds:
            self._held = [weight.grad for weight in self._weights]
        self.state.optimizer.zero_grad(set_to_none=True)

    def _clip(self) -> Tensor:
        """Scale gradients down to the norm allowed; their norm before."""
        gradients = [parameter.grad for parameter in self._weights if parameter.grad is not None]
        if self.state.scale is not None:
            self.state.scale.unscale(gradients)
        if self._config.clip_norm is None:
            return nn.utils.get_total_norm(gradients)
        return nn.utils.clip_grad_norm_(self._weights, self._config.clip_norm)

    def _seed_dropout(self, step: int, number: int) -> None:
        """Make what a network itself draws (dropout) a function of the step, too, and of the place in its batch."""
        place = self._processes.index * self._processes.num_micro + number
        torch.manual_seed(step_seed(step_seed(self._config.seed, step), place))

    def due(self, done: int, *, may_sample: bool) -> Due:
        """What follows now that so many steps are done."""
        config, is_last = self._config, done == self._config.steps
        saves = done % config.steps_between_checkpoints == 0 and not is_last
        validates = self._validation is not None and (is_last or done % config.steps_between_validations == 0)
        return Due(
            report=saves or validates or is_last or done % config.report_every_steps == 0,
            validate=validates,
            samples=may_sample and (is_last or done % config.steps_between_samples == 0),
            save=saves,
        )

    def collect(self) -> float:
        """Fetch the losses since the last report from the device; their mean.

        Raises:
            NonFiniteLossError: one of them or its gradient is not finite.
        """
        values = torch.stack(self._pending).tolist()
        self._pending.clear()
        losses = self.state.losses
        for value in values:
            if not math.isfinite(value):
                raise NonFiniteLossError(
                    f"the loss or its gradient is not finite at step {len(losses)} "
                    f"(last finite loss: {losses[-1] if losses else None}); lower the learning rate"
                )
            losses.append(value)
        return sum(values) / len(values)

    @torch.no_grad()
    def validate(self, done: int) -> float | None:
        """The loss on held-out examples, by the weights as they are."""
        if self._validation is None or self._held_out is None:
            return None
        self._validation.eval()
        totals = [self._validation(self._held_out.on_device(batch)).mean() for batch in self._held_out.fixed(done)]
        self.state.model.train()
        loss = float(self._processes.mean(torch.stack(totals).mean()))
        self.state.validation.append((done, loss))
        return loss

    @contextmanager
    def lent(self) -> Iterator[nn.Module]:
        """The model, in eval mode and holding the first average, for who draws samples of it."""
        model = self.state.model
        model.eval()
        # not compiled: its batches are of another size, and compiling for them takes longer than drawing them
        with self.state.averages.in_place(), torch.compiler.set_stance("force_eager"):
            yield model
        model.train()
