"""A generator and an autoencoder with random weights, as folders."""

import shutil

import torch

from derm_pipeline.models.autoencoder import Autoencoder, AutoencoderConfig
from derm_pipeline.models.dit import DiT, DiTConfig
from derm_pipeline.models.generator import GeneratorSpec, save_autoencoder
from derm_pipeline.models.laws import RectifiedFlow
from derm_pipeline.models.runtime import save_weights
from derm_pipeline.records import Diagnosis, SkinType
from derm_pipeline.store import Request

SEVEN = tuple(Diagnosis)[:7]
CLASSES = {
    "diagnosis": tuple(diagnosis.value for diagnosis in SEVEN),
    "skin_type": tuple(str(skin_type.value) for skin_type in SkinType),
}


def generator_at(folder, conditions=("diagnosis", "skin_type"), seed=11, autoencoder=None, law=None, seen=(), **shape):
    """A random network, moved off its all-zero start, and a random autoencoder (of 32 px)."""
    torch.manual_seed(seed)
    told = {name: CLASSES[name] for name in conditions}
    network = DiTConfig.model_validate(
        {"latent_size": 8, "width": 32, "depth": 2, "heads": 2, "conditions": {n: len(c) for n, c in told.items()}}
        | shape
    )
    model = DiT(network)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    spec = GeneratorSpec(
        network=network,
        law=law or RectifiedFlow(),
        classes=told,
        seen=seen,
        latent_mean=(0.1,) * network.channels,
        latent_std=(1.0, 2.0, 0.5, 1.0, 1.5, 0.7)[: network.channels],
    )
    for name in ("generator", "autoencoder"):
        (folder / name).mkdir(parents=True)
    spec.save(folder / "generator")
    save_weights(folder / "generator" / "weights.safetensors", model.state_dict())
    config = AutoencoderConfig.model_validate(
        {"width": 8, "num_blocks": 1, "latent_channels": network.channels} | (autoencoder or {})
    )
    save_autoencoder(Autoencoder(config), folder / "autoencoder")
    return {name: folder / name for name in ("generator", "autoencoder")}


def with_networks(project, networks):
    """Put these networks into the project's store as those of the recipe tiny, with latents between them."""
    inputs = {}
    for asset in ("autoencoder", "latents", "generator"):
        request = Request(asset, "tiny", inputs, {"made": str(networks["generator"])}, "1")

        def make(build, asset=asset):
            if asset in networks:
                shutil.copytree(networks[asset], build.directory, dirs_exist_ok=True)

        inputs = {asset: project.workspace.store.obtain(request, make).reference}
    return project
