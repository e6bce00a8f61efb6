"""What a fine-tuning is given, and what it leaves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from derm_pipeline.latents import Moments
from derm_pipeline.models.generator import GeneratorSpec
from derm_pipeline.store import digest_of_json, write_json
from derm_pipeline.training.loop import Trained


@dataclass(frozen=True)
class Captioned:
    """Images and what is known of them."""

    moments: Tensor | Moments
    """(n, orientations, 2 c, h, w), mean and log-variance, by the base's own autoencoder."""
    diagnoses: Tensor
    """Class index (n,)."""
    captions: Sequence[str]
    """n of them."""


@dataclass(frozen=True)
class StageTrained:
    """What a stage leaves, beside its files."""

    kind: str
    losses: list[float]
    """The loss of every step."""
    validation: list[tuple[int, float]]
    """Steps done in the stage, and the loss on held-out examples then."""
    num_weights: int
    """How many were trained."""
    num_captions_cut: int | None
    """Captions of training images that are longer than the base takes; None where a cache was given."""
    resumed_from_step: int
    """0 when it ran from the start; all of them when it was done before."""


@dataclass(frozen=True)
class FineTuned:
    """A generator that was trained from a base."""

    folder: Path
    """What `models.generator.load_network` and `load_embedder` read; lies in `work`."""
    spec: GeneratorSpec
    stages: tuple[StageTrained, ...]

    @property
    def losses(self) -> list[float]:
        """Of every step of all stages."""
        return [loss for stage in self.stages for loss in stage.losses]

    @property
    def validation(self) -> list[tuple[int, float]]:
        """Steps done in all stages, and the loss on held-out examples then."""
        found, before = [], 0
        for stage in self.stages:
            found += [(before + step, loss) for step, loss in stage.validation]
            before += len(stage.losses)
        return found

    @property
    def trained(self) -> Trained:
        """All stages as if they were one training; the averages lie in the folder."""
        return Trained(self.losses, None, sum(stage.resumed_from_step for stage in self.stages), {}, self.validation)

    def save(self, folder: Path) -> None:
        """Write the generator to a folder."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)


def write_done(path: Path, identity: Mapping[str, Any], done: StageTrained) -> None:
    """Note what a stage left, and of which training it is."""
    said = {
        "losses": done.losses,
        "validation": [list(pair) for pair in done.validation],
        "num_weights": done.num_weights,
        "num_captions_cut": done.num_captions_cut,
    }
    write_json(path, {"identity": digest_of_json(identity), "kind": done.kind, **said})


def read_done(path: Path, identity: Mapping[str, Any]) -> StageTrained:
    """What `write_done` wrote, of the same training.

    Raises:
        ValueError: it is of another.
    """
    said = json.loads(path.read_text())
    if said.pop("identity") != digest_of_json(identity):
        raise ValueError(f"{path.parent} holds a stage of another training: remove {path.parent.parent}")
    validation = [(int(step), float(loss)) for step, loss in said.pop("validation")]
    return StageTrained(**said, validation=validation, resumed_from_step=len(said["losses"]))
