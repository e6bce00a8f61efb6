"""Med-Art's hybrid-level loss (HLDF): now and then, images are drawn from noise and compared with the real ones.

Every N-th step each example's caption is drawn from fresh noise in M guided steps, gradients flow back through decoder
and sampler to all that is trained, and what the colours of the drawn image are off is added to the step's loss. As
Med-Art's published training code has it (project clguo/medart), from which we depart where it is marked below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from derm_pipeline.models.diffusion import DDPM, Conditional, Denoise, Law, guided
from derm_pipeline.models.generator import AnyAutoencoder
from derm_pipeline.models.laws import Grid
from derm_pipeline.models.samplers import Stage, dpm2m
from derm_pipeline.training.draws import Batch, Objective

ImageLoss = Literal["colour_moments", "colour_quantiles", "low_frequency", "pixels"]
"""How a drawn image is compared with the real one; see `image_losses`."""

Decode = Callable[[Tensor], Tensor]
"""Latents as the network has them, (n, c, h, w), to images (n, 3, f h, f w) in about [-1, 1], with gradients."""

_BY_PLACE: tuple[ImageLoss, ...] = ("low_frequency", "pixels")
_COARSE_SIDE = 8
_NOISE, _IMAGES = "hldf.noise", "hldf.images"


class HldfConfig(BaseModel):
    """When images are drawn during a training, how, and what is asked of them; the defaults are Med-Art's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    every_steps: int = Field(default=500, ge=1)
    """Optimiser steps between two drawings, of which step 0 has the first (Med-Art's N)."""
    num_steps: int = Field(default=20, ge=1)
    """Steps of a whole drawing, from noise to image (Med-Art's M)."""
    guidance: float = Field(default=4.5, ge=1)
    """Classifier-free guidance of the drawing; 1 is none and halves its cost."""
    weight: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """What the loss of the images counts beside that of the noise; null is 1 / `num_steps`."""
    loss: ImageLoss = "colour_moments"
    """How a drawn image is compared with the real one: colour_moments (Med-Art's), colour_quantiles, low_frequency or
    pixels. The first two compare colours wherever they lie, the last two place by place."""
    strength: float | None = Field(default=None, gt=0, le=1)
    """Part of the steps that is taken, as for img2img: 1 starts from noise alone, less from the example's own latents
    under as much noise. null: 1 for losses of colours; 0.5 for those by place, which have nothing to compare in an
    image that shares no place with the real one."""
    spacing: Literal["linspace", "trailing"] | None = "linspace"
    """Which steps of a DDPM law are visited, as diffusers' DPM-Solver++ names it; null is the law's own grid, the only
    one of a flow."""
    num_gradient_steps: int | None = Field(default=None, ge=1)
    """Last steps of the drawing through which gradients flow back; null is all of them, as Med-Art's."""
    activation_checkpointing: bool = True
    """Whether each step of the drawing is computed again when its gradients are due, rather than kept: the same
    gradients in the memory of one step (3.1 GB in place of 65 for PixArt-XL-2 at 512 px, by
    benchmarks/hldf_memory.py), for one more evaluation of each."""

    @property
    def image_weight(self) -> float:
        """The weight of the images' loss."""
        return 1 / self.num_steps if self.weight is None else self.weight

    @property
    def num_taken(self) -> int:
        """Steps that a drawing takes of the `num_steps`."""
        strength = self.strength or (0.5 if self.loss in _BY_PLACE else 1.0)
        return max(1, int(self.num_steps * strength))

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if self.num_gradient_steps is not None and self.num_gradient_steps > self.num_taken:
            raise ValueError(
                f"num_gradient_steps {self.num_gradient_steps} is more than the {self.num_taken} steps that a drawing "
                "takes; null is all of them"
            )
        return self

    def fires_at(self, step: int) -> bool:
        """Whether images are drawn in this step, the first being 0."""
        return step % self.every_steps == 0


def image_losses(name: ImageLoss, drawn: Tensor, real: Tensor) -> Tensor:
    """The loss (n,) of each drawn image, both (n, 3, h, w) in [-1, 1].

    "colour_moments": the squared difference of the means and that of the deviations (unbiased) of each channel,
    averaged over the channels (as Med-Art's code; its project page has the sum, three times as much).
    "colour_quantiles": the squared 2-Wasserstein distance of the values of each channel, averaged over the channels:
    all of the distribution, where the moments are two numbers of it. "low_frequency": the mean square error of the
    images averaged over an 8 x 8 grid. "pixels": that of the images themselves.

    Raises:
        ValueError: the images are not of one shape.
    """
    if drawn.shape != real.shape:
        raise ValueError(f"images drawn {tuple(drawn.shape)} do not compare with real ones {tuple(real.shape)}")
    if name == "colour_moments":
        both = [torch.stack([images.mean((2, 3)), images.std((2, 3))]) for images in (drawn, real)]
        return (both[0] - both[1]).square().sum(0).mean(1)
    if name == "colour_quantiles":
        drawn, real = (images.flatten(2).sort(dim=2).values for images in (drawn, real))
    elif name == "low_frequency":
        drawn, real = _coarse(drawn), _coarse(real)
    return (drawn - real).square().flatten(1).mean(1)


def _coarse(images: Tensor) -> Tensor:
    # not adaptive_avg_pool2d, whose gradients differ from run to run on a GPU
    cell = [max(1, -(-side // _COARSE_SIDE)) for side in images.shape[2:]]
    return F.avg_pool2d(images, cell, ceil_mode=True, count_include_pad=False)


def frozen_decoder(autoencoder: AnyAutoencoder, mean: Sequence[float], std: Sequence[float]) -> Decode:
    """The decoder of latents that were whitened by `mean` and `std` (one a channel), its weights frozen."""
    weights: nn.Module = autoencoder.requires_grad_(requires_grad=False).eval()
    device = next(weights.parameters()).device
    shift, scale = (torch.tensor(values, dtype=torch.float32, device=device)[:, None, None] for values in (mean, std))
    return lambda latents: autoencoder.decode(scale * latents + shift)


class Hldf:
    """The term of the loss: draws the images of captions and compares them, row by row."""

    def __init__(self, config: HldfConfig, law: Law, network: Conditional, decode: Decode) -> None:
        """A network and a decoder whose gradients reach what is trained.

        Args:
            config: When and how.
            law: What the network predicts.
            network: The network that is trained.
            decode: See `frozen_decoder`.

        Raises:
            ValueError: a spacing of steps for a law that has none, or more steps than it has.
        """
        self.config = config
        self._law, self._network, self._decode = law, network, decode
        whole = _grid(config, law)
        first = config.num_steps - config.num_taken
        self._grid = Grid(whole.times[first:], whole.alphas[first:], whole.sigmas[first:])

    @property
    def times(self) -> list[float]:
        """The times in [0, 1000] that a drawing visits, from noise to clean."""
        return [float(time) for time in self._grid.times]

    @property
    def needs_latents(self) -> bool:
        """Whether a drawing starts from the examples' own latents."""
        return self.config.num_taken < self.config.num_steps

    def losses(
        self,
        told: Mapping[str, Tensor],
        noise: Tensor,
        *,
        images: Tensor | None = None,
        latents: Tensor | None = None,
        null: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The loss (n,) of each row, not yet weighted; row i depends on row i alone.

        Med-Art draws n images for each of n captions and compares the first n of them, whosever they are; here each
        row has one image, compared with its own.

        Args:
            told: Conditions of the rows, as the network is told them.
            noise: Standard normal noise (n, c, h, w) to draw from.
            images: The real images (n, 3, f h, f w) in [-1, 1]; None takes what the decoder makes of `latents`.
            latents: The examples' own latents (n, c, h, w); needed without images, and where `needs_latents`.
            null: What the guidance goes away from, where it is not the network's own nulls; see `guided`. Where a text
                encoder is trained, it is the empty caption, embedded with gradients.

        Raises:
            ValueError: neither images nor latents, where they are needed.
        """
        if images is None:
            if latents is None:
                raise ValueError("there is nothing to compare drawn images with: give the real images or their latents")
            with torch.no_grad():
                images = self._decode(latents)
        drawn = self._decode(self.draw(told, noise, latents=latents, null=null))
        dtype = torch.promote_types(drawn.dtype, torch.float32)
        return image_losses(self.config.loss, drawn.to(dtype), images.to(drawn.device, dtype))

    def draw(
        self,
        told: Mapping[str, Tensor],
        noise: Tensor,
        *,
        latents: Tensor | None = None,
        null: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Latents (n, c, h, w) drawn by DPM-Solver++(2M), with gradients; see `losses` for what is given."""
        denoise = guided(self._network, told, self.config.guidance, null=null)
        stage = _GradientStage(denoise, self._law, self._grid, noise, self.config)
        if not self.needs_latents:
            return dpm2m(stage, noise)
        if latents is None:
            raise ValueError(f"a drawing of the last {len(stage)} steps starts from the examples' own latents")
        return dpm2m(stage, float(self._grid.alphas[0]) * latents + float(self._grid.sigmas[0]) * noise)


class _GradientStage(Stage):
    """Gradients flow through the last steps only, and what they need is kept or computed again."""

    def __init__(self, denoise: Denoise, law: Law, grid: Grid, like: Tensor, config: HldfConfig) -> None:
        super().__init__(denoise, law, grid, like)
        self._is_checkpointed = config.activation_checkpointing
        self._first = len(self) - (config.num_gradient_steps or len(self))

    def output(self, x: Tensor, step: int) -> Tensor:
        if step < self._first:
            with torch.no_grad():
                output = super().output(x, step)
            if step + 1 == self._first:
                torch.clear_autocast_cache()  # torch 2.10 goes on with weights that were cast here, without gradients
            return output
        if not self._is_checkpointed:
            return super().output(x, step)
        return checkpoint(super().output, x, step, use_reentrant=False)


def _grid(config: HldfConfig, law: Law) -> Grid:
    if config.spacing is None:
        return law.grid(config.num_steps)
    if not isinstance(law, DDPM):
        raise ValueError(f"a flow has no steps to be spaced {config.spacing!r}: set the spacing of hldf to null")
    return law.spaced(f"{config.spacing}{config.num_steps}")


class LatentObjective(Objective, Protocol):
    """What a generator is trained by, and what its batches hold; as `GeneratorObjective`.

    Its draws hold the law's `noise`, of the shape of the latents.
    """

    def latents(self, batch: Batch) -> Tensor:
        """The clean latents (n, c, h, w) of these rows, as the network has them."""
        ...

    def told(self, batch: Batch) -> dict[str, Tensor]:
        """The conditions of these rows, none hidden; with gradients where a text encoder is trained."""
        ...


class HldfObjective:
    """An objective with the hybrid-level loss added in every N-th step; the steps between are as they were.

    Of each row, so that neither accumulation nor the number of processes changes the sum. Captions are told whole: none
    is hidden for the images. A validation takes the objective without it: its batches are no steps.
    """

    def __init__(
        self,
        inner: LatentObjective,
        term: Hldf,
        *,
        images: Callable[[Batch], Tensor] | None = None,
        null: Callable[[int], Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Around the objective that is there.

        Args:
            inner: Whose loss it is added to.
            term: What is added.
            images: The real images (n, 3, f h, f w) in [-1, 1], on the CPU, of a drawn batch, cropped and turned as
                the batch says. None compares with what the decoder makes of the rows' latents: no file is read, and the
                decoder's own errors do not count.
            null: What the guidance goes away from, for so many rows; see `Hldf.losses`.
        """
        self._inner, self._term, self._images, self._null = inner, term, images, null

    def draw(self, step: int, stream: torch.Generator) -> Batch:
        batch = self._inner.draw(step, stream)
        if not self._term.config.fires_at(step):
            return batch
        added = {_NOISE: torch.randn(batch["noise"].shape, generator=stream)}
        if self._images is not None:
            added[_IMAGES] = self._images(batch)
        return batch | added

    def loss(self, batch: Batch) -> Tensor:
        losses = self._inner.loss(batch)
        if _NOISE not in batch:
            return losses
        images = batch.get(_IMAGES)
        latents = self._inner.latents(batch) if images is None or self._term.needs_latents else None
        null = None if self._null is None else self._null(len(losses))
        told, noise = self._inner.told(batch), batch[_NOISE]
        added = self._term.losses(told, noise, images=images, latents=latents, null=null)
        return losses + self._term.config.image_weight * added
