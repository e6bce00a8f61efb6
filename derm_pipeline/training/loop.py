"""One loop: optimise, average, validate, checkpoint, resume.

The random choices of a step depend on (seed, step) only and are drawn for the whole batch, on the CPU, whoever takes
which rows of it: so a resumed training equals an uninterrupted one to the bit, and neither accumulation nor the number
of processes changes its losses by more than rounding. The loop knows nothing of images or noise: it is handed a model
and an objective.

Several processes: `accelerate launch script.py` or torchrun (on CPUs torchrun, or `accelerate launch --multi_gpu`: its
`--cpu` starts more than one with mpirun only), with a script that calls `train` in every process, on the same `work`.
The first one writes; all of them resume. What a network draws itself (dropout) and what it computes over a batch (batch
norm) differ between numbers of processes; objectives draw nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from derm_pipeline.images import Pixels
from derm_pipeline.training.checkpoint import CHECKPOINT, CheckpointError, network_facts, save
from derm_pipeline.training.config import TrainingConfig, lr_factor, step_seed
from derm_pipeline.training.curve import Curve, check_tensorboard
from derm_pipeline.training.draws import Objective
from derm_pipeline.training.processes import Processes
from derm_pipeline.training.steps import NonFiniteLossError, Steps

__all__ = [
    "CHECKPOINT",
    "CheckpointError",
    "Interrupted",
    "NonFiniteLossError",
    "Objective",
    "OnProgress",
    "OnSamples",
    "Trained",
    "TrainingConfig",
    "lr_factor",
    "step_seed",
    "train",
]

OnProgress = Callable[[int, int, float], None]
"""Called now and then with (step, steps, mean loss since the last call)."""

OnSamples = Callable[[int, nn.Module], Pixels | None]
"""(steps done, the model in eval mode, holding the first average where there is one) -> a picture (h, w, 3) for
TensorBoard, or None."""


class Interrupted(RuntimeError):  # noqa: N818  # as KeyboardInterrupt, no error: what was asked for was done
    """The training was asked to stop, and its checkpoint holds every step that was done.

    Args:
        step: steps done.
        steps: steps in all.
        path: the checkpoint.
    """

    def __init__(self, step: int, steps: int, path: Path) -> None:
        super().__init__(f"stopped after step {step} of {steps}; started again, it goes on from {path}")
        self.step = step


@dataclass(frozen=True)
class Trained:
    """What a training leaves."""

    losses: list[float]
    """The loss of every step."""
    ema: dict[str, Tensor] | None
    """First moving average of the weights, by parameter name."""
    resumed_from_step: int
    """0 when it ran from the start."""
    emas: dict[float, dict[str, Tensor]] = field(default_factory=dict)
    """Every average, by its decay."""
    validation: list[tuple[int, float]] = field(default_factory=list)
    """Steps done and the loss on held-out examples then."""


def train(
    model: nn.Module,
    objective: Objective,
    config: TrainingConfig,
    *,
    work: Path,
    validation: Objective | None = None,
    identity: Mapping[str, object] | None = None,
    on_progress: OnProgress | None = None,
    on_samples: OnSamples | None = None,
    stop_when: Callable[[], bool] | None = None,
    tensorboard: Path | None = None,
) -> Trained:
    """Train `model` in place, resuming from `work` when a checkpoint lies there.

    Args:
        model: initialised from `config.seed`, so that a run without a checkpoint starts from the same network.
        objective: what is minimised; the loss of a step is the mean over its examples.
        config: budget, optimiser, precision.
        work: folder of the checkpoint and of `curve.jsonl`; the caller removes it when the result is safe.
        validation: the objective on examples that are never trained on; its draws are the same each time.
        identity: JSON values that also decide the weights (the network's settings, the law): a checkpoint of others is
            refused.
        on_progress: called at every report.
        on_samples: called every `samples_every_steps`, in the first process; changes nothing of the training.
        stop_when: looked at after every step; once it is true in any process, the training saves and raises
            `Interrupted`. For SIGTERM, where a handler may be installed:
            `with stop_on_signal() as stop_when: train(..., stop_when=stop_when)`. Give it in all processes or in none.
        tensorboard: folder for event files; needs the extra `tensorboard`.

    Raises:
        NonFiniteLossError: before the weights are touched by it.
        Interrupted: `stop_when` said so.
        CheckpointError: the checkpoint is damaged or of another training.
        ValueError: settings that cannot work or do not fit into memory, before any work.
    """
    if tensorboard is not None:
        check_tensorboard()
    device = next(model.parameters()).device
    # the loop seeds torch's global streams for every step; the caller gets them back as they were
    with Processes(config) as processes, torch.random.fork_rng([device] if device.type == "cuda" else []):
        steps = Steps(model, objective, validation, config, processes)
        settings = config.deciding() | {"network": network_facts(model), "identity": dict(identity or {})}
        first_step = steps.start(work / CHECKPOINT, settings)
        curve = Curve(work, first_step, config.batch_size, tensorboard) if processes.is_main else None
        between = _Between(
            steps, config, processes, curve, work / CHECKPOINT, settings, on_progress, on_samples, stop_when
        )
        with steps.compiled(), curve or nullcontext():
            for done in steps.take(first_step):
                between.after(done)
    model.eval()
    state = steps.state
    emas = state.averages.states(model)
    return Trained(state.losses, next(iter(emas.values()), None), first_step, emas, state.validation)


@dataclass(frozen=True)
class _Between:
    """What is written, told and asked between two steps."""

    steps: Steps
    config: TrainingConfig
    processes: Processes
    curve: Curve | None
    """In the first process."""
    path: Path
    settings: Mapping[str, object]
    on_progress: OnProgress | None
    on_samples: OnSamples | None
    stop_when: Callable[[], bool] | None

    def after(self, done: int) -> None:
        """Report, validate, show samples and save as is due after so many steps; raise where it is to stop."""
        due = self.steps.due(done, may_sample=self.on_samples is not None)
        stops = self._stops(done)
        if due.report or stops:
            self._report(done, validates=due.validate)
        if due.samples:
            self._show(done)
        if (due.save or stops) and self.processes.is_main:
            save(self.path, self.steps.state, self.settings)
        if stops:
            self.processes.agree(done)  # nobody leaves before the checkpoint is whole
            raise Interrupted(done, self.config.steps, self.path)

    def _stops(self, done: int) -> bool:
        return self.stop_when is not None and done < self.config.steps and self.processes.any(self.stop_when())

    def _report(self, done: int, *, validates: bool) -> None:
        mean = self.steps.collect()
        validation_loss = self.steps.validate(done) if validates else None
        if self.curve is not None:
            self.curve.add(done, mean, self.config.lr * lr_factor(done - 1, self.config), validation_loss)
        if self.on_progress is not None and self.processes.is_main:
            self.on_progress(done, self.config.steps, mean)

    def _show(self, done: int) -> None:
        if self.on_samples is None or self.curve is None:
            return
        with torch.no_grad(), self.steps.lent() as model:
            picture = self.on_samples(done, model)
        if picture is not None:
            self.curve.show(done, picture)
