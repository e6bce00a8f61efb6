"""Adapters with something in them, for tests."""

from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def filled(module: M, name: str = "default") -> M:
    """The network, its adapter moved away from its start."""
    for key, weight in module.named_parameters():
        if f".{name}." in key and ".lora_magnitude" in key:
            weight *= 1 + 0.2 * torch.rand_like(weight)
        elif f".{name}." in key:
            weight.copy_(0.3 * torch.randn_like(weight))
    return module
