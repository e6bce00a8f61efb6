"""A training on disk: all that its next step depends on, as one safetensors file, whole or not at all.

The file holds the trained weights and buffers, AdamW's moments, the averages, fp16's loss scale and the losses so far;
its metadata hold the settings that decide the weights. Random streams are functions of (seed, step), so the number of
steps done is their state, and that of the data order too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from derm_pipeline.store import replacing
from derm_pipeline.training.averages import Averages
from derm_pipeline.training.optimizers import kept_of, start_state
from derm_pipeline.training.scaling import LossScale

CHECKPOINT = "checkpoint.safetensors"
_FORMAT = "2"


class CheckpointError(ValueError):
    """A checkpoint that cannot be resumed: damaged, or of another training."""


@dataclass
class State:
    """What a training is at the end of a step."""

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    """Those that are trained, by name."""
    optimizer: torch.optim.Optimizer
    averages: Averages
    scale: LossScale | None
    """Of fp16 only."""
    losses: list[float] = field(default_factory=list)
    """The loss of every step that was done."""
    validation: list[tuple[int, float]] = field(default_factory=list)
    """Steps done and the loss on held-out examples then."""

    def tensors(self) -> dict[str, Tensor]:
        """All of it that lives on the device, by the name that it has in a checkpoint."""
        found: dict[str, Tensor] = {f"model.{name}": parameter for name, parameter in self.parameters.items()}
        found |= {f"model.{name}": buffer for name, buffer in _buffers(self.model).items()}
        for number, (name, parameter) in enumerate(self.parameters.items()):
            for kind, value in kept_of(self.optimizer, parameter).items():
                found[f"optimizer.{kind}.{name}"] = value
            for decay, average in self.averages.values.items():
                found[f"ema.{decay}.{name}"] = average[number]
        if self.scale is not None:
            found |= {"scale.scale": self.scale.scale, "scale.num_sound": self.scale.num_sound}
        return found


def network_facts(model: nn.Module) -> dict[str, object]:
    """Name and shape of all that is trained or kept in a network: what its checkpoint must fit."""
    found = {name: list(parameter.shape) for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {**found, **{name: list(buffer.shape) for name, buffer in _buffers(model).items()}}


def save(path: Path, state: State, settings: Mapping[str, object]) -> None:
    """Write a checkpoint in place of the last.

    Args:
        path: the file.
        state: after the last step done; `losses` has one entry a step.
        settings: JSON values that decide the weights; compared when the training is resumed.
    """
    tensors = {name: tensor.detach().contiguous() for name, tensor in state.tensors().items()}
    tensors["losses"] = torch.tensor(state.losses, dtype=torch.float64)
    tensors["validation.steps"] = torch.tensor([step for step, _ in state.validation], dtype=torch.int64)
    tensors["validation.losses"] = torch.tensor([loss for _, loss in state.validation], dtype=torch.float64)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        save_file(tensors, aside, metadata={"format": _FORMAT, "settings": json.dumps(settings, sort_keys=True)})


def resume(path: Path, state: State, settings: Mapping[str, object]) -> int:
    """Put the checkpoint at `path` into `state` and return how many steps were done; 0 where there is none.

    Tensors are copied one at a time: no second copy of the training is ever in memory.

    Raises:
        CheckpointError: the file is damaged, or of a training with other settings, which are named.
    """
    if not path.is_file():
        return 0
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            _check_settings(path, file.metadata() or {}, settings)
            for name, parameter in state.parameters.items():
                if f"optimizer.step.{name}" in file.keys():  # noqa: SIM118  # no mapping
                    start_state(state.optimizer, parameter, int(file.get_tensor(f"optimizer.step.{name}")))
            with torch.no_grad():
                for name, tensor in state.tensors().items():
                    tensor.copy_(file.get_tensor(name))
            state.losses[:] = file.get_tensor("losses").tolist()
            steps, losses = (file.get_tensor(f"validation.{kind}").tolist() for kind in ("steps", "losses"))
            state.validation[:] = list(zip(steps, losses, strict=True))
    except SafetensorError as error:
        raise CheckpointError(
            f"the checkpoint {path} is damaged ({error}): remove it to train from the start again"
        ) from error
    return len(state.losses)


def _check_settings(path: Path, metadata: Mapping[str, str], settings: Mapping[str, object]) -> None:
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(f"the checkpoint {path} is of another version of derm_pipeline: remove it")
    there, here = json.loads(metadata["settings"]), json.loads(json.dumps(settings))
    changed = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    if changed:
        differences = "; ".join(_difference(name, there.get(name), here.get(name)) for name in changed)
        raise CheckpointError(
            f"the checkpoint {path} is of another training: {differences}. Restore these settings to resume it, or "
            "remove the file to train from the start"
        )


def _difference(name: str, there: object, here: object) -> str:
    if isinstance(there, dict) and isinstance(here, dict):
        inner = next(key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key))
        return _difference(f"{name}.{inner}", there.get(inner), here.get(inner))
    return f"{name} was {_short(there)}, is {_short(here)}"


def _short(value: object) -> str:
    text = "absent" if value is None else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that a state of the model holds: of a batch norm, not of a table that is computed."""
    held = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in held}
