"""Whether a training fits into memory, estimated before any work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from derm_pipeline.models.runtime import free_bytes
from derm_pipeline.training.config import largest_divisor

TRIED = 4
_COMPILED_PART = 0.5
"""A compiled network keeps less for its backward pass than an eager one; no less than about half."""


class Need(NamedTuple):
    """Bytes that a training takes beside its network."""

    states: int
    """Gradients (on a CPU those of the step before, too), AdamW's two moments and the averages."""
    fixed: int
    """Kept for the backward pass whatever the batch: weights in lower precision."""
    per_example: int
    """Kept for the backward pass of each example."""


def estimate(module: nn.Module, num_averages: int, batch: Mapping[str, Tensor], *, num_moments: float = 2.0) -> Need:
    """What training a module on such examples takes, as found by its forward passes on a few and on twice as many.

    Args:
        module: maps a batch to its losses.
        num_averages: moving averages of the weights.
        batch: `TRIED` examples, or fewer where there are no more; on the module's device.
        num_moments: float32 numbers that the optimiser keeps of each weight.
    """
    weights = [parameter for parameter in module.parameters() if parameter.requires_grad]
    num_gradients = 2 if weights[0].device.type == "cpu" else 1
    states = int(sum(weight.nbytes for weight in weights) * (num_gradients + num_moments + num_averages))
    most = min(len(tensor) for tensor in batch.values())
    few = max(1, most // 2)
    kept = [_kept_bytes(module, {name: tensor[:num] for name, tensor in batch.items()}) for num in {few, most}]
    if most == few:
        return Need(states, 0, kept[0])
    per_example = (max(kept) - min(kept)) // (most - few)
    return Need(states, max(0, min(kept) - few * per_example), per_example)


def check_memory(need: Need, micro_batch: int, share: int, device: torch.device, *, is_compiled: bool = False) -> None:
    """Refuse a training that clearly does not fit into what is free on the device.

    Args:
        need: what it takes.
        micro_batch: examples held at once.
        share: examples of a step that this process has: micro batches must divide it.
        device: where it runs.
        is_compiled: whether the network will be compiled.

    Raises:
        ValueError: with the figures and what to change.
    """
    part = _COMPILED_PART if is_compiled else 1.0
    free = free_bytes(device)
    activations = part * (need.fixed + micro_batch * need.per_example)
    if need.states + activations <= free:
        return
    room = free - need.states - part * need.fixed
    fitting = int(room // max(1.0, part * need.per_example))
    if fitting >= 1:
        advice = f"set micro_batch_size to {largest_divisor(share, fitting)}, which changes no result"
    else:
        advice = "take a smaller network, fewer averages (ema_decays) or a device with more memory"
    raise ValueError(
        f"training does not fit: about {_gb(need.states)} for gradients, AdamW and averages and {_gb(activations)} for "
        f"{micro_batch} examples at once, and {_gb(free)} are free on {device}; {advice}"
    )


def _kept_bytes(module: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """Bytes of what one forward pass keeps for the backward pass; buffers are as before afterwards."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        losses = module(dict(batch))
    del losses
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    return sum(kept.values())


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.3g} GB"
