import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from derm_pipeline.models.diffusion import guided, noise_for, sample
from derm_pipeline.models.pretrained.config import TINY_FAMILIES
from derm_pipeline_tests.models.pretrained.test_network import TEXTS, network_of

SIDE, NUM_STEPS = 64, 10


def by_the_pipeline(base, scheduler, noise, negative=None) -> torch.Tensor:
    pipeline = base.pipeline()
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **OPTIONS[scheduler])
    pipeline.set_progress_bar_config(disable=True)
    further = {"clean_caption": False, "use_resolution_binning": False} if base.family == "pixart" else {}
    if negative is not None:
        further["negative_prompt"] = [negative] * len(TEXTS)
    return pipeline(
        TEXTS,
        height=SIDE,
        width=SIDE,
        guidance_scale=4.0,
        num_inference_steps=NUM_STEPS,
        latents=noise,
        output_type="latent",
        **further,
    ).images


OPTIONS = {
    # The last step goes to clean latents, as ours; Stable Diffusion's published DDIM stops at the noise of step 0.
    DDIMScheduler: {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False},
    DPMSolverMultistepScheduler: {"timestep_spacing": "linspace"},
}


@pytest.mark.parametrize("name", TINY_FAMILIES)
@pytest.mark.parametrize(
    ("scheduler", "solver", "spacing"),
    [(DDIMScheduler, "ddim", "trailing10"), (DPMSolverMultistepScheduler, "dpm2m", "linspace10")],
)
def test_samples_are_those_of_the_published_pipeline_on_the_same_steps(name, scheduler, solver, spacing, bases):
    base = bases[name]
    noise = noise_for([1, 2], (4, SIDE // 8, SIDE // 8))
    denoise = guided(network_of(base), base.embed(TEXTS), 4.0)
    found = sample(denoise, base.law, noise, NUM_STEPS, solver, spacing=spacing)
    expected = by_the_pipeline(base, scheduler, noise)
    error = (found - expected).norm() / expected.norm()
    assert error < 1e-3, f"{float(error):.1e}"


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart"])
def test_a_negative_prompt_is_a_null_of_its_own(name, bases):
    base = bases[name]
    noise = noise_for([1, 2], (4, SIDE // 8, SIDE // 8))
    negative = base.embed(["hairy, blurred"] * 2)
    denoise = guided(network_of(base), base.embed(TEXTS), 4.0, null=negative)
    found = sample(denoise, base.law, noise, NUM_STEPS, "ddim", spacing="trailing10")
    expected = by_the_pipeline(base, DDIMScheduler, noise, "hairy, blurred")
    error = (found - expected).norm() / expected.norm()
    assert error < 1e-3, f"{float(error):.1e}"
