"""A pretrained denoiser with the interface of `models.dit.DiT`: what is told it goes in as one mapping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from derm_pipeline.models.conditions import POOLED, SIZE, TEXT, TEXT_MASK, TEXT_PARTS
from derm_pipeline.models.pretrained.config import Part, PretrainedNetworkConfig
from derm_pipeline.models.runtime import load_weights, save_weights

NULL_FILE = "null.safetensors"
"""Beside a generator's weights: what its network is told of the empty text."""

_PARTS: tuple[Part, ...] = ("denoiser",)


def load_pretrained_network(config: PretrainedNetworkConfig, device: torch.device | None = None) -> PretrainedNetwork:
    """The network of this configuration, with its base's own weights; see `load_base` for what it raises."""
    from derm_pipeline.models.pretrained.base import load_base_of

    base = load_base_of(config.base, device, parts=_PARTS)
    return PretrainedNetwork(config, base.denoiser)


class PretrainedNetwork(nn.Module):
    """diffusers' own denoiser of a base, as a network of the project.

    `denoiser` is that very module: adapters are added to it. Gradients and checkpointing are as it has them.
    """

    def __init__(self, config: PretrainedNetworkConfig, denoiser: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.denoiser: Any = denoiser
        self._null: dict[str, Tensor] = {}

    @property
    def is_checkpointing(self) -> bool:
        """Whether training recomputes blocks in the backward pass instead of storing them."""
        return bool(self.denoiser.is_gradient_checkpointing)

    @is_checkpointing.setter
    def is_checkpointing(self, value: bool) -> None:
        if value:
            self.denoiser.enable_gradient_checkpointing()
        else:
            self.denoiser.disable_gradient_checkpointing()

    def forward(self, x: Tensor, time: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """Latents (n, c, h, w) at times (n,) to a prediction (n, c, h, w) in the dtype of the denoiser's arithmetic.

        Args:
            x: Noised latents, scaled as the base's publishers do; h and w may be any that the denoiser takes.
            time: In [0, 1000]; 0 is clean, 1000 is noise.
            conditions: "text" (n, s, e) and "text_mask" bool (n, s); "pooled" (n, p) for SDXL. Further "size" (n, 6),
                see `conditions.SIZE`, where the denoiser is told sizes: without it, those of x, not cropped.

        Raises:
            ValueError: the conditions given are not those of the configuration.
        """
        self._check(conditions)
        dtype = next(self.denoiser.parameters()).dtype
        call = self._pixart if self.config.base.family == "pixart" else self._unet
        output = call(x.to(dtype), time, conditions, conditions[TEXT].to(dtype))
        return output[:, : self.config.channels]  # PixArt's second half tells a variance, which its law leaves

    def _unet(self, x: Tensor, time: Tensor, conditions: Mapping[str, Tensor], text: Tensor) -> Tensor:
        added = None
        if self.config.pooled_width is not None:
            added = {"text_embeds": conditions[POOLED].to(x.dtype), "time_ids": self._size(x, conditions)}
        return self.denoiser(x, time, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False)[0]

    def _pixart(self, x: Tensor, time: Tensor, conditions: Mapping[str, Tensor], text: Tensor) -> Tensor:
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.denoiser.use_additional_conditions:
            size = self._size(x, conditions)
            added = {"resolution": size[:, :2], "aspect_ratio": size[:, 4:5] / size[:, 5:]}
        return self.denoiser(
            x,
            encoder_hidden_states=text,
            encoder_attention_mask=conditions[TEXT_MASK].to(x.dtype),
            timestep=time,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]

    def _size(self, x: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """Sizes (n, 6) as `conditions.SIZE`, float32: what is told, else those of x."""
        if SIZE in conditions:
            return conditions[SIZE].float()
        height, width = (self.config.downsampling * side for side in x.shape[2:])
        # Filled in on the device: a copy from the host would be waited for.
        columns = [torch.full((len(x),), float(value), device=x.device) for value in (height, width, 0, 0)]
        return torch.stack([*columns, *columns[:2]], dim=1)

    def set_null(self, told: Mapping[str, Tensor]) -> None:
        """Set what is told of the empty text, of one row or more (the first is taken): `Base.null`.

        Raises:
            ValueError: those are not the conditions of this network.
        """
        null = {name: told[name][:1].detach() for name in TEXT_PARTS if name in told}
        self._check(null)
        self._null = null

    def null_conditions(self, num: int, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """What is told of the empty text, for `num` rows; its parts are one condition, "text".

        Raises:
            ValueError: a name that is no condition; `set_null` was not called.
        """
        unknown = [name for name in names or () if name != TEXT]
        if unknown:
            raise ValueError(f"no condition {unknown[0]!r} to be nulled; the network is told {TEXT}")
        if not self._null:
            raise ValueError("nothing is known of the empty text yet: set_null(base.null()) first")
        device = next(self.denoiser.parameters()).device
        if next(iter(self._null.values())).device != device:
            self._null = {name: value.to(device) for name, value in self._null.items()}
        wanted = self._null if names is None or names else {}
        return {name: value.expand(num, *value.shape[1:]) for name, value in wanted.items()}

    def save_null(self, folder: Path) -> None:
        """Write what is told of the empty text, so that sampling needs no text encoder."""
        save_weights(folder / NULL_FILE, self.null_conditions(1))

    def load_null(self, folder: Path) -> None:
        """Read what `save_null` wrote."""
        self.set_null(load_weights(folder / NULL_FILE))

    def _check(self, conditions: Mapping[str, Tensor]) -> None:
        config = self.config
        expected = {TEXT, TEXT_MASK, *([POOLED] if config.pooled_width is not None else [])}
        if conditions.keys() - {SIZE} != expected:
            raise ValueError(f"the network is told {sorted(conditions)} but was built for {sorted(expected)}")
        if conditions[TEXT].ndim != 3 or conditions[TEXT].shape[2] != config.text_width:
            raise ValueError(
                f"text is {tuple(conditions[TEXT].shape)}; the network was built for (n, s, {config.text_width})"
            )
