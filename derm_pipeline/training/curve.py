"""The loss curve while it is drawn: lines of JSON to follow, and TensorBoard's event files for who wants them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa

from derm_pipeline.images import Pixels
from derm_pipeline.store import replacing
from derm_pipeline.training.config import TrainingConfig, lr_factor

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

CURVE = "curve.jsonl"


LOSS_SCHEMA = pa.schema(
    {
        "step": pa.int32(),
        "num_images": pa.int64(),
        "loss": pa.float64(),
        "lr": pa.float64(),
        "validation_loss": pa.float64(),
    }
)
"""The finished curve: steps done, examples seen, the loss of the step, its learning rate, the loss on held-out examples
after it (null where it was not measured)."""


def loss_table(losses: Sequence[float], validation: Sequence[tuple[int, float]], config: TrainingConfig) -> pa.Table:
    """A row a step, as `LOSS_SCHEMA` says: the same whether the training was interrupted or not."""
    steps = range(1, len(losses) + 1)
    measured = dict(validation)
    return pa.table(
        {
            "step": steps,
            "num_images": [step * config.batch_size for step in steps],
            "loss": losses,
            "lr": [config.lr * lr_factor(step - 1, config) for step in steps],
            "validation_loss": [measured.get(step) for step in steps],
        },
        LOSS_SCHEMA,
    )


def images_per_s(work: Path) -> float | None:
    """The median pace of a training, over the lines of its curve; None where there is none.

    It is a fact of the machine, not of the training: no part of a finished curve.
    """
    lines = read_curve(work)
    return float(np.median([line["images_per_s"] for line in lines])) if lines else None


class Curve:
    """One line a report in `curve.jsonl`, in the training's folder.

    A line holds step (steps done), num_images, loss (mean since the last line), lr, images_per_s, and validation_loss
    where it was measured; a number that is not finite is null. Lines of steps that a resumed training does again are
    dropped.
    """

    def __init__(self, work: Path, first_step: int, batch_size: int, tensorboard: Path | None) -> None:
        self._path = work / CURVE
        self._batch_size = batch_size
        self._last = (first_step, time.monotonic())
        self._writer = _tensorboard(tensorboard, first_step) if tensorboard is not None else None
        work.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_curve(work) if line["step"] <= first_step]
        with replacing(self._path) as aside:
            aside.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def add(self, step: int, loss: float, lr: float, validation_loss: float | None = None) -> None:
        """Add the line of a report after `step` steps."""
        last_step, last_time = self._last
        now = time.monotonic()
        rate = (step - last_step) * self._batch_size / max(now - last_time, 1e-9)
        self._last = (step, now)
        figures = {"loss": loss, "lr": lr, "images_per_s": round(rate, 2)}
        if validation_loss is not None:
            figures["validation_loss"] = validation_loss
        line: dict[str, float | None] = {"step": step, "num_images": step * self._batch_size}
        line |= {name: value if math.isfinite(value) else None for name, value in figures.items()}
        with self._path.open("a") as handle:
            handle.write(json.dumps(line) + "\n")
        if self._writer is not None:
            for name, value in figures.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()

    def show(self, step: int, picture: Pixels) -> None:
        """Hand a picture (h, w, 3) to TensorBoard."""
        if self._writer is not None:
            self._writer.add_image("samples", picture, step, dataformats="HWC")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()


def read_curve(work: Path) -> list[dict[str, Any]]:
    """The lines of the curve in a training's folder; a last one that is not whole is left out."""
    path = work / CURVE
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def check_tensorboard() -> None:
    """Refuse before any work where TensorBoard's writer is missing."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "event files need TensorBoard: pip install 'derm_pipeline[tensorboard]', or train without them"
        ) from error


def _tensorboard(folder: Path, first_step: int) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter

    # what a killed training told of later steps is told again: TensorBoard drops it from this step on
    return SummaryWriter(str(folder), purge_step=first_step + 1)
