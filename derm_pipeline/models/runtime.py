"""Where and in what arithmetic a network runs, and its weights on disk (safetensors only)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from derm_pipeline.store import replacing

Precision = Literal["auto", "bf16", "fp32"]


def pick_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def computes_bf16(device: torch.device) -> bool:
    """Whether the device has bfloat16 arithmetic that is faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def autocast(device: torch.device, precision: Precision = "auto") -> torch.autocast:
    """The arithmetic of a forward pass on this device; auto is bf16 where the device computes in it."""
    wanted = precision == "bf16" or (precision == "auto" and computes_bf16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)


def save_weights(path: Path, state: dict[str, Tensor]) -> None:
    """Write weights as safetensors, all of them or nothing."""
    with replacing(path) as aside:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, aside)


def load_weights(path: Path, device: torch.device | None = None) -> dict[str, Tensor]:
    """Read weights written by `save_weights`."""
    return load_file(path, device=str(device or "cpu"))
