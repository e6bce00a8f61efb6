"""Pictures of what a generator draws while it learns: a row a diagnosis, the same noise and conditions each time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from derm_pipeline.images import Pixels, contact_sheet
from derm_pipeline.latents import to_pixels
from derm_pipeline.models.diffusion import guided, noise_for, sample
from derm_pipeline.models.generator import GeneratorSpec, Network
from derm_pipeline.models.runtime import Precision, autocast

_DECODED_AT_ONCE = 4


class GridConfig(BaseModel):
    """Samples that are drawn while a generator trains, for people to look at; they change no weight."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_each: int = Field(default=2, ge=1, le=16)
    """Samples of each diagnosis."""
    num_steps: int = Field(default=8, ge=1)
    """Steps of DPM-Solver++(2M): few, as these are glanced at."""
    guidance: float = Field(default=1.5, ge=0, allow_inf_nan=False)
    """Classifier-free guidance; 1 is none."""


def told_in_grid(labels: Mapping[str, Tensor], conditions: Iterable[str], num_each: int) -> dict[str, Tensor]:
    """What the samples of a grid are told: what `num_each` training rows of every diagnosis that occurs are.

    So no sample is asked for what no image showed. Within a diagnosis they go from light to dark skin, where that is
    told.

    Args:
        labels: of the diagnosis and every condition, the class index (n,) of every row.
        conditions: those that the generator is told.
        num_each: samples of a diagnosis; rows serve again where there are fewer.

    Returns:
        The class indices (num diagnoses * num_each,) of every condition, one diagnosis after the other.
    """
    diagnoses = labels["diagnosis"].cpu()
    order = torch.argsort(labels.get("skin_type", torch.zeros_like(diagnoses)).cpu(), stable=True)
    chosen = []
    for diagnosis in diagnoses.unique().tolist():
        own = order[diagnoses[order] == diagnosis]
        chosen.append(own[((torch.arange(num_each) + 0.5) / num_each * len(own)).long()])
    rows = torch.cat(chosen)
    return {name: labels[name].cpu()[rows] for name in conditions}


@torch.no_grad()
def draw_grid(
    model: Network,
    spec: GeneratorSpec,
    decode: Callable[[Tensor], Tensor],
    told: Mapping[str, Tensor],
    config: GridConfig,
    precision: Precision = "auto",
) -> Pixels:
    """One picture (h, w, 3) of samples, `config.num_each` a row; sample i has the seed i.

    Args:
        model: in eval mode.
        spec: of the generator.
        decode: latents (n, c, h, w) to images (n, 3, f h, f w) in [-1, +1], on the model's device.
        told: see `told_in_grid`.
        config: how.
        precision: arithmetic of the networks.
    """
    device = next(model.parameters()).device
    count = len(next(iter(told.values())))
    conditions = model.null_conditions(count) | {name: values.to(device) for name, values in told.items()}
    denoise = guided(model, conditions, config.guidance)
    shape = (spec.network.channels, spec.network.latent_size, spec.network.latent_size)
    noise = noise_for(range(count), shape).to(device)
    with autocast(device, precision):
        latents = spec.unwhiten(sample(denoise, spec.law, noise, config.num_steps).float())
        images = torch.cat([decode(part).float() for part in latents.split(_DECODED_AT_ONCE)])
    return contact_sheet(to_pixels(images), columns=config.num_each)
