"""A base that was trained from its random start learns by a LoRA what it never saw.

Of latents that are one of three patterns and some noise: `benchmarks/fine_tuning.py` does it with pictures, in minutes.
"""

import pytest
import torch

from derm_pipeline.models.diffusion import guided, noise_for, sample
from derm_pipeline.models.generator import load_embedder, load_network
from derm_pipeline.models.lora import LoraConfig
from derm_pipeline.models.pretrained.adapted import put_denoiser
from derm_pipeline.models.pretrained.base import load_base
from derm_pipeline.training.fine_tuned import Captioned
from derm_pipeline.training.fine_tuning import fine_tune
from derm_pipeline.training.fine_tuning_settings import LoraStage
from derm_pipeline_tests.training.bases import full, settings, training

CAPTIONS = ("a dermoscopic image of melanoma", "a dermoscopic image of a nevus", "an image of a vascular lesion")
NEW = 2
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")


def patterns() -> torch.Tensor:
    """What the three diagnoses look like, (3, 4, 8, 8), of deviation 1."""
    coarse = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(11))
    smooth = torch.nn.functional.interpolate(coarse, size=8, mode="bilinear")
    return smooth / smooth.std((1, 2, 3), keepdim=True)


def latents(diagnoses: torch.Tensor, seed: int) -> torch.Tensor:
    noise = torch.randn(len(diagnoses), 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    return patterns()[diagnoses] + 0.3 * noise


def captioned(diagnoses: list[int], std: tuple[float, ...], of: int) -> Captioned:
    """Moments that the base's scaling brings to these latents; `diagnoses` become the classes 0, 1, .."""
    every = torch.tensor(diagnoses).repeat_interleave(of)
    mean = latents(every, seed=1)[:, None] * torch.tensor(std)[:, None, None]
    moments = torch.cat([mean, torch.full_like(mean, -12.0)], 2)
    return Captioned(moments, every - min(diagnoses), [CAPTIONS[diagnosis] for diagnosis in every])


@torch.no_grad()
def held_out_loss(folder) -> float:
    """Of fresh examples of the new diagnosis, at the same times and noise whoever is asked."""
    spec, network = load_network(folder, torch.device("cpu"))
    fresh = latents(torch.full((64,), NEW), seed=2)
    told = load_embedder(folder)([CAPTIONS[NEW]] * 64)
    draw = spec.law.draw(tuple(fresh.shape), torch.Generator().manual_seed(3))
    return float(spec.law.loss(lambda x, time: network(x, time, told), fresh, draw).mean())


@torch.no_grad()
def agreement(folder, diagnosis: int, num: int = 24) -> float:
    """How often a sample is nearest to the pattern of the diagnosis that its prompt names."""
    spec, network = load_network(folder, torch.device("cpu"))
    told = load_embedder(folder)([CAPTIONS[diagnosis]] * num)
    drawn = sample(guided(network, told, 1.5), spec.law, noise_for(range(num), (4, 8, 8)), 12, "dpm2m")
    distances = (drawn[:, None] - patterns()).square().mean((2, 3, 4))
    return float((distances.argmin(1) == diagnosis).float().mean())


@pytest.mark.slow
def test_a_lora_teaches_a_base_what_it_never_saw(tiny_base, tmp_path):
    start = settings(tiny_base("sd"), full(num_steps=400, batch_size=16, lr=2e-3, ema_decay=0.99))
    base = load_base(start.base)
    _, std = base.latent_scaling
    known = fine_tune(captioned([0, 1], std, 64), {"diagnosis": ("mel", "nv")}, start, work=tmp_path / "known")
    put_denoiser(known.folder, base.denoiser)
    base.pipeline().save_pretrained(tmp_path / "base", safe_serialization=True)
    stage = LoraStage(
        denoiser=LoraConfig(rank=8, targets=TARGETS), training=training(num_steps=200, batch_size=16, lr=3e-3)
    )
    tuned = fine_tune(
        captioned([NEW], std, 64),
        {"diagnosis": ("vasc",)},
        settings(tmp_path / "base", stage),
        work=tmp_path / "tuned",
    )
    assert held_out_loss(tuned.folder) < 0.8 * held_out_loss(known.folder)
    assert agreement(known.folder, NEW) < 0.2
    assert agreement(tuned.folder, NEW) > 0.8
