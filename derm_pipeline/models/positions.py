"""Codes of time and place: sinusoids for the time, a fixed table or rotations for the cells of a square grid."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TIME_CODE_SIZE = 256


def time_code(time: Tensor, size: int = TIME_CODE_SIZE) -> Tensor:
    """Sinusoidal code (n, size) of times (n,): `size / 2` cosines, then as many sines, of falling frequency."""
    half = size // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=time.device) / half)
    angles = time.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def position_table(width: int, side: int) -> Tensor:
    """Fixed sin-cos code (side * side, width), float32, of the cells of a square grid in row-major order.

    The first half of the features codes the column and the second the row, as in the public DiT ("here w goes first").
    """
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    code = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    columns = code[None, :, :].expand(side, side, -1)
    rows = code[:, None, :].expand(side, side, -1)
    return torch.cat([columns, rows], dim=2).reshape(side * side, width).float()


def rotation_table(head_size: int, side: int, *, first_column: int = 0, first_row: int = 0) -> Tensor:
    """Cosines and sines (2, side * side, head_size / 2), float32, that `rotate` turns the features of each cell by.

    Axial rotary positions (RoFormer, arXiv 2104.09864; on two axes as in arXiv 2403.13298): half of the features are
    pairs turned by the column and half pairs turned by the row, at frequencies 10000^(-4 i / head_size).

    Args:
        head_size: Features of a head, a multiple of 4.
        side: Cells along an axis.
        first_column: Place of the first column; what is rotated depends on differences of places only.
        first_row: Place of the first row.
    """
    frequencies = 10000.0 ** -(torch.arange(head_size // 4, dtype=torch.float64) / (head_size / 4))
    places = torch.arange(side, dtype=torch.float64)[:, None]
    columns = ((places + first_column) * frequencies)[None, :, :].expand(side, side, -1)
    rows = ((places + first_row) * frequencies)[:, None, :].expand(side, side, -1)
    angles = torch.cat([columns, rows], dim=2).flatten(0, 1)  # (t, head_size / 2)
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Features (n, heads, t, e) with the pairs (i, i + e / 2) turned by `rotation_table`; lengths stay."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
