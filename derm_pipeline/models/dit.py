"""The diffusion transformer: DiT with adaLN-Zero (Peebles and Xie 2023, arXiv 2212.09748).

Parameters carry the names and shapes of the public DiT checkpoints, so those files load; further conditions and the
normalisation of queries and keys only add parameters. The network holds no randomness and knows nothing of noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

TIME_CODE_SIZE = 256


class DiTConfig(BaseModel):
    """Shape of a DiT."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    latent_size: int = Field(ge=1)
    """Side of the square latent, in cells; a multiple of `patch`."""
    channels: int = Field(default=4, ge=1)
    """Latent channels."""
    patch: int = Field(default=2, ge=1)
    """Side of a patch, in cells: one patch is one token."""
    width: int = Field(ge=4)
    """Features per token; a multiple of 4 and of `heads`."""
    depth: int = Field(ge=1)
    """Number of blocks."""
    heads: int = Field(ge=1)
    """Attention heads."""
    mlp_ratio: float = Field(default=4.0, gt=0)
    """Hidden features of a block's MLP, as a multiple of `width`."""
    conditions: dict[str, int] = Field(min_length=1)
    """Name of each condition and its number of classes, in order; the null class is one more, at the end."""
    learn_sigma: bool = False
    """Whether the output has twice the channels, the second half telling the variance (Nichol and Dhariwal 2021)."""
    qk_norm: bool = False
    """Whether queries and keys are RMS-normalised per head, which keeps low-precision training stable."""
    condition_init_std: float = Field(default=0.02, gt=0)
    """Deviation of the condition tables at the start: 0.02 in the public DiT; 1 learns classes in far fewer steps."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> DiTConfig:
        if self.latent_size % self.patch:
            raise ValueError(f"latent_size {self.latent_size} is not a multiple of patch {self.patch}")
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width {self.width} is not a multiple of 4 and of heads {self.heads}")
        for name, num_classes in self.conditions.items():
            if not name.isidentifier() or num_classes < 1:
                raise ValueError(
                    f"condition {name!r} with {num_classes} classes: a plain name and at least 1 class are needed"
                )
        return self


DIT_SIZES = {"XL": (28, 1152, 16), "L": (24, 1024, 16), "B": (12, 768, 12), "S": (12, 384, 6)}
"""Depth, width and heads of the public sizes; each comes with patch 2, 4 and 8 (Peebles and Xie 2023, table 1)."""

DIT_PRESETS = {
    f"{size}/{patch}": {"depth": depth, "width": width, "heads": heads, "patch": patch}
    for size, (depth, width, heads) in DIT_SIZES.items()
    for patch in (2, 4, 8)
}
"""The twelve public configurations by name, "XL/2" to "S/8"."""


def preset(
    name: str, *, latent_size: int, conditions: dict[str, int], channels: int = 4, learn_sigma: bool = True
) -> DiTConfig:
    """The public configuration `name` ("XL/2" ... "S/8") for a latent size and conditions of one's own.

    Raises:
        ValueError: no such configuration.
    """
    if name not in DIT_PRESETS:
        raise ValueError(f"no DiT preset {name!r}; there are {', '.join(DIT_PRESETS)}")
    return DiTConfig.model_validate(
        {"latent_size": latent_size, "channels": channels, "conditions": conditions, "learn_sigma": learn_sigma}
        | DIT_PRESETS[name]
    )


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


def _linear(num_in: int, num_out: int, *, std: float | None = None) -> nn.Linear:
    """A linear layer as the public DiT starts it: bias 0, weights Xavier-uniform, or normal with deviation `std`."""
    linear = nn.Linear(num_in, num_out)
    nn.init.zeros_(linear.bias)
    if std is None:
        nn.init.xavier_uniform_(linear.weight)
    else:
        nn.init.normal_(linear.weight, std=std)
    return linear


def _zero_linear(num_in: int, num_out: int) -> nn.Linear:
    """A linear layer that starts at 0, for gates and output: every block starts as the identity and the DiT as 0."""
    linear = nn.Linear(num_in, num_out)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class PatchEmbedder(nn.Module):
    """Latents (n, c, h, w) to tokens (n, t, d), row by row."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.channels, config.width, config.patch, config.patch)
        nn.init.xavier_uniform_(self.proj.weight.view(config.width, -1))
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]  # torch types a convolution's bias as optional

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimeEmbedder(nn.Module):
    """The code of a time (n, 256) to features (n, d)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, second = _linear(TIME_CODE_SIZE, width, std=0.02), _linear(width, width, std=0.02)
        self.mlp = nn.Sequential(first, nn.SiLU(), second)

    def forward(self, code: Tensor) -> Tensor:
        return self.mlp(code)


class ConditionEmbedder(nn.Module):
    """Class indices (n,) to features (n, d); the last row of the table is the null class."""

    def __init__(self, num_classes: int, width: int, init_std: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.embedding_table.weight, std=init_std)

    def forward(self, classes: Tensor) -> Tensor:
        return self.embedding_table(classes)


class Attention(nn.Module):
    """Self-attention over tokens (n, t, d)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        head_size = config.width // config.heads
        self.qkv = _linear(config.width, 3 * config.width)
        self.q_norm = nn.RMSNorm(head_size, eps=1e-6) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_size, eps=1e-6) if config.qk_norm else nn.Identity()
        self.proj = _linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (n, heads, t, d / heads)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two layers with a tanh-GELU between, token by token."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        hidden = int(config.width * config.mlp_ratio)
        self.fc1 = _linear(config.width, hidden)
        self.fc2 = _linear(hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Block(nn.Module):
    """Attention and MLP, each normalised, shifted, scaled and gated by the condition (adaLN-Zero)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.attn = Attention(config)
        self.mlp = MLP(config)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), _zero_linear(config.width, 6 * config.width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(condition)[
            :, None
        ].chunk(6, dim=2)  # each (n, 1, d)
        x = x + gate_attn * self.attn(_modulate(x, shift_attn, scale_attn))
        return x + gate_mlp * self.mlp(_modulate(x, shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Tokens (n, t, d) to patches (n, t, patch * patch * output channels)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        num_outputs = config.channels * (2 if config.learn_sigma else 1)
        self.linear = _zero_linear(config.width, config.patch**2 * num_outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), _zero_linear(config.width, 2 * config.width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=2)
        return self.linear(_modulate(x, shift, scale))


class DiT(nn.Module):
    """A transformer over the patches of a latent, told the time and the conditions."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.is_checkpointing = False
        """Whether training recomputes each block in the backward pass instead of storing it: less memory, more time."""
        (_, num_classes), *further = config.conditions.items()
        self.x_embedder = PatchEmbedder(config)
        self.t_embedder = TimeEmbedder(config.width)
        width, init_std = config.width, config.condition_init_std
        self.y_embedder = ConditionEmbedder(num_classes, width, init_std)
        self.extra_embedders = nn.ModuleDict({name: ConditionEmbedder(num, width, init_std) for name, num in further})
        table = position_table(config.width, config.latent_size // config.patch)
        self.pos_embed = nn.Parameter(table[None], requires_grad=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)

    def forward(self, x: Tensor, time: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """Latents (n, c, h, w) at times (n,) to a prediction (n, c, h, w), or (n, 2c, h, w) with `learn_sigma`.

        Args:
            x: Noised latents; h = w = `latent_size`.
            time: In [0, 1000]; 0 is clean, 1000 is noise.
            conditions: Class indices (n,), int64, of every condition; the null class is its number of classes.

        Raises:
            ValueError: the conditions given are not those of the configuration.
        """
        tokens = self.x_embedder(x) + self.pos_embed  # (n, t, d)
        code = time_code(time).to(self.pos_embed.dtype)
        condition = self.t_embedder(code) + self._embed(conditions)  # (n, d)
        for block in self.blocks:
            if self.is_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, condition, use_reentrant=False)
            else:
                tokens = block(tokens, condition)
        return self._to_latent(self.final_layer(tokens, condition))

    def null_conditions(self, num: int) -> dict[str, Tensor]:
        """The null class of every condition for `num` rows: what an unconditional prediction is told."""
        device = self.pos_embed.device
        return {name: torch.full((num,), count, device=device) for name, count in self.config.conditions.items()}

    def _embed(self, conditions: Mapping[str, Tensor]) -> Tensor:
        if conditions.keys() != self.config.conditions.keys():
            raise ValueError(
                f"the network is told {sorted(conditions)} but was built for {sorted(self.config.conditions)}; "
                "an unknown value is the null class, not a missing condition"
            )
        first, *further = self.config.conditions
        embedded = self.y_embedder(conditions[first])
        for name in further:
            embedded = embedded + self.extra_embedders[name](conditions[name])
        return embedded

    def _to_latent(self, patches: Tensor) -> Tensor:
        side, patch = self.config.latent_size // self.config.patch, self.config.patch
        cells = patches.unflatten(2, (patch, patch, -1)).unflatten(1, (side, side))  # (n, row, column, p, q, c)
        return cells.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
