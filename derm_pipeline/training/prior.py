"""Samples of a base, drawn once before it is trained, that hold it to what it knew (prior preservation)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from derm_pipeline.models.diffusion import guided, noise_for, sample
from derm_pipeline.models.generator import GeneratorSpec
from derm_pipeline.models.pretrained.network import PretrainedNetwork
from derm_pipeline.models.runtime import Precision, autocast, join_processes, load_weights, save_weights
from derm_pipeline.training.fine_tuning_objective import Prior
from derm_pipeline.training.fine_tuning_settings import PriorConfig
from derm_pipeline.training.told_texts import ToldTexts

_LATENTS = "latents"


def obtain_prior(
    path: Path,
    config: PriorConfig,
    network: PretrainedNetwork,
    spec: GeneratorSpec,
    texts: ToldTexts,
    precision: Precision,
) -> Prior:
    """The base's samples in the file at `path`; drawn by the first process where it is not there.

    Args:
        path: safetensors.
        config: How many, of what, and how.
        network: Of the base, as it was published; its null is set.
        spec: Of the generator.
        texts: Know the prompts.
        precision: Arithmetic of the network.
    """
    processes = join_processes()
    if processes.is_main_process and not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_weights(path, {_LATENTS: _draw(config, network, spec, texts, precision)})
    processes.wait_for_everyone()
    latents = load_weights(path)[_LATENTS].to(next(network.parameters()).device)
    return Prior(latents, texts.rows(_prompts(config)), config.weight)


def _prompts(config: PriorConfig) -> list[str]:
    return [config.prompts[number % len(config.prompts)] for number in range(config.num_samples)]


@torch.no_grad()
def _draw(
    config: PriorConfig, network: PretrainedNetwork, spec: GeneratorSpec, texts: ToldTexts, precision: Precision
) -> Tensor:
    device = next(network.parameters()).device
    shape = (spec.network.channels, spec.network.latent_size, spec.network.latent_size)
    prompts, drawn = _prompts(config), []
    network.eval()
    for start in range(0, len(prompts), config.batch_size):
        own = prompts[start : start + config.batch_size]
        told = texts.embed(own)
        denoise = guided(network, told, config.guidance)
        noise = noise_for(range(config.seed + start, config.seed + start + len(own)), shape).to(device)
        with autocast(device, precision):
            drawn.append(sample(denoise, spec.law, noise, config.num_steps).float().cpu())
    return torch.cat(drawn)
