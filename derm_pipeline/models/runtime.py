"""Where and in what arithmetic a network runs, and its weights on disk (safetensors only)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from derm_pipeline.store import replacing

if TYPE_CHECKING:
    from accelerate import Accelerator

Precision = Literal["auto", "bf16", "fp16", "fp32"]
"""Arithmetic of a forward pass. auto: bf16 where the device computes in it, else fp32."""


def pick_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def join_processes(num_accumulated: int = 1) -> Accelerator:
    """This process' place among those that `accelerate launch` (or torchrun) started; alone without them.

    Its `device` is this process' own: the GPU of its local number, or the CPU. Precision is not accelerate's here (see
    `autocast`): it keeps one for the whole process, and an autoencoder may be trained in another than its generator.

    Args:
        num_accumulated: backward passes whose gradients are averaged before they are exchanged.
    """
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin

    return Accelerator(
        cpu=not torch.cuda.is_available(),
        device_placement=False,
        mixed_precision="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=num_accumulated, sync_with_dataloader=False),
    )


def computes_bf16(device: torch.device) -> bool:
    """Whether the device has bfloat16 arithmetic that is faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def autocast(device: torch.device, precision: Precision = "auto") -> torch.autocast:
    """The arithmetic of a forward pass on this device; auto is bf16 where the device computes in it.

    Weights and losses stay float32. fp16 needs its loss scaled in training (`training.scaling`).
    """
    is_bf16 = precision == "bf16" or (precision == "auto" and computes_bf16(device))
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=is_bf16 or precision == "fp16")


def free_bytes(device: torch.device) -> int:
    """Memory that a training may still take on this device; of the CPU's, what Linux calls available, else all."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    facts = Path("/proc/meminfo")
    if facts.is_file():
        return next(int(line.split()[1]) * 1024 for line in facts.open() if line.startswith("MemAvailable:"))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def save_weights(path: Path, state: dict[str, Tensor]) -> None:
    """Write weights as safetensors, all of them or nothing."""
    with replacing(path) as aside:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, aside)


def load_weights(path: Path, device: torch.device | None = None) -> dict[str, Tensor]:
    """Read weights written by `save_weights`."""
    return load_file(path, device=str(device or "cpu"))
