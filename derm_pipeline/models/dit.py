"""The diffusion transformer: DiT with adaLN-Zero (Peebles and Xie 2023, arXiv 2212.09748).

Parameters carry the names and shapes of the public DiT checkpoints, so those files load (see `checkpoints`); further
conditions, text and the normalisation of queries and keys only add parameters, and rotary positions none. The network
holds no randomness and knows nothing of noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from derm_pipeline.models.conditions import TEXT, TEXT_MASK, ConditionEmbedder, TextEmbedder
from derm_pipeline.models.dit_config import DIT_PRESETS, DiTConfig, preset
from derm_pipeline.models.positions import TIME_CODE_SIZE, position_table, rotate, rotation_table, time_code

__all__ = ["DIT_PRESETS", "DiT", "DiTConfig", "num_parameters", "position_table", "preset", "time_code"]


def num_parameters(config: DiTConfig) -> int:
    """How many parameters a DiT has, the fixed position table among them; takes no memory for them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in DiT(config).parameters())


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

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (n, heads, t, d / heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        mixed = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """What tokens (n, t, d) take from text tokens (n, s, d); 0 at the start, so that every block is the identity."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        head_size = config.width // config.heads
        self.q = _linear(config.width, config.width)
        self.kv = _linear(config.width, 2 * config.width)
        self.q_norm = nn.RMSNorm(head_size, eps=1e-6) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_size, eps=1e-6) if config.qk_norm else nn.Identity()
        self.proj = _zero_linear(config.width, config.width)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        q = self.q(F.layer_norm(x, x.shape[-1:], eps=1e-6)).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(text).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
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


class Told(NamedTuple):
    """What every block is told."""

    condition: Tensor
    """Time and conditions (n, d)."""
    rotation: Tensor | None
    """Of rotary positions: `rotation_table`."""
    text: Tensor | None
    """Text tokens (n, s, d), where blocks attend to them."""
    text_mask: Tensor | None
    """Which text tokens there are (n, s)."""


class Block(nn.Module):
    """Attention and MLP, each normalised, shifted, scaled and gated by the condition (adaLN-Zero)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.attn = Attention(config)
        self.mlp = MLP(config)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), _zero_linear(config.width, 6 * config.width))
        self.cross = CrossAttention(config) if config.text_mode == "cross" else None

    def forward(self, x: Tensor, told: Told) -> Tensor:
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(told.condition)[
            :, None
        ].chunk(6, dim=2)  # each (n, 1, d)
        x = x + gate_attn * self.attn(_modulate(x, shift_attn, scale_attn), told.rotation)
        if self.cross is not None:
            x = x + self.cross(x, told.text, told.text_mask)
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
        self.x_embedder = PatchEmbedder(config)
        self.t_embedder = TimeEmbedder(config.width)
        width, init_std = config.width, config.condition_init_std
        first, *further = config.conditions or (None,)
        self.y_embedder = ConditionEmbedder(config.conditions[first], width, init_std) if first else None
        self.extra_embedders = nn.ModuleDict(
            {name: ConditionEmbedder(config.conditions[name], width, init_std) for name in further if name}
        )
        self.text_embedder = TextEmbedder(config.text_width, width, config.heads, init_std) if config.has_text else None
        self.pos_embed = nn.Parameter(position_table(width, config.side)[None], requires_grad=False)
        rotation = rotation_table(width // config.heads, config.side) if config.positions == "rotary" else None
        self.register_buffer("rotation", rotation, persistent=False)
        self.rotation: Tensor | None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)

    def forward(self, x: Tensor, time: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """Latents (n, c, h, w) at times (n,) to a prediction (n, c, h, w), or (n, 2c, h, w) with `learn_sigma`.

        Args:
            x: Noised latents; h = w = `latent_size`.
            time: In [0, 1000]; 0 is clean, 1000 is noise.
            conditions: Class indices (n,), int64, of every condition; the null class is its number of classes. With
                text also "text", its embeddings (n, text_tokens, text_width), and "text_mask", bool (n, text_tokens),
                True where there is a token; a text without any is the null. See `conditions.check_classes`.

        Raises:
            ValueError: the conditions given are not those of the configuration.
        """
        self._check_names(conditions)
        tokens = self.x_embedder(x)  # (n, t, d)
        if self.rotation is None:
            tokens = tokens + self.pos_embed
        code = time_code(time).to(self.pos_embed.dtype)
        text, mask = None, None
        embedded = self._embed_classes(conditions)
        if self.text_embedder is not None:
            pooled, text, mask = self.text_embedder(conditions[TEXT], conditions[TEXT_MASK])
            embedded = [*embedded, pooled]
        told = Told(self.t_embedder(code) + sum(embedded[1:], embedded[0]), self.rotation, text, mask)
        for block in self.blocks:
            if self.is_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, told, use_reentrant=False)
            else:
                tokens = block(tokens, told)
        return self._to_latent(self.final_layer(tokens, told.condition))

    def null_conditions(self, num: int, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """The nulls of conditions for `num` rows: what an unconditional prediction is told.

        Args:
            num: Rows.
            names: Only these conditions ("text" among them), for guidance by some of them: what the others are told
                stays. None for all.

        Raises:
            ValueError: a name that is no condition of this network.
        """
        config, device = self.config, self.pos_embed.device
        known = [*config.conditions, *([TEXT] if config.has_text else [])]
        wanted = known if names is None else list(names)
        unknown = [name for name in wanted if name not in known]
        if unknown:
            raise ValueError(f"no condition {unknown[0]!r} to be nulled; the network is told {', '.join(known)}")
        null = {name: torch.full((num,), config.conditions[name], device=device) for name in wanted if name != TEXT}
        if TEXT in wanted:
            null[TEXT] = torch.zeros(num, config.text_tokens, config.text_width, device=device)
            null[TEXT_MASK] = torch.zeros(num, config.text_tokens, dtype=torch.bool, device=device)
        return null

    def _check_names(self, conditions: Mapping[str, Tensor]) -> None:
        config = self.config
        expected = config.conditions.keys() | ({TEXT, TEXT_MASK} if config.has_text else set())
        if conditions.keys() != expected:
            raise ValueError(
                f"the network is told {sorted(conditions)} but was built for {sorted(expected)}; "
                "an unknown value is the null class, not a missing condition"
            )
        if config.has_text and conditions[TEXT].shape[1:] != (config.text_tokens, config.text_width):
            raise ValueError(
                f"text is {tuple(conditions[TEXT].shape)}; the network was built for (n, {config.text_tokens}, "
                f"{config.text_width})"
            )

    def _embed_classes(self, conditions: Mapping[str, Tensor]) -> list[Tensor]:
        """Features (n, d) of every condition that has classes, in order."""
        if self.y_embedder is None:
            return []
        first, *further = self.config.conditions
        return [self.y_embedder(conditions[first])] + [self.extra_embedders[name](conditions[name]) for name in further]

    def _to_latent(self, patches: Tensor) -> Tensor:
        side, patch = self.config.side, self.config.patch
        cells = patches.unflatten(2, (patch, patch, -1)).unflatten(1, (side, side))  # (n, row, column, p, q, c)
        return cells.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
