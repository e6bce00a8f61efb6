"""img2img: sampling that begins from latents, as diffusers does it; and what is kept of them."""

import pytest
import torch

from derm_pipeline.models.diffusion import DDPM, RectifiedFlow, Start, guided, noise_for, sample

SOLVERS = ["dpm2m", "unipc", "euler", "ddim", "heun", "ddpm"]
LAWS = {"flow": RectifiedFlow(), "v": DDPM(), "epsilon": DDPM(prediction="epsilon")}
CASES = [(law, solver) for law in LAWS for solver in SOLVERS if (law, solver) != ("flow", "ddpm")]
SHAPE = (3, 2, 6, 6)


def network(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    return torch.tanh(2 * x) * torch.cos(time.double() / 300)[:, None, None, None].to(x.dtype)


def drawn():
    """Latents, noise and their seeds: fresh ones each time."""
    seeds = torch.randint(2**31, (3,)).tolist()
    return 3 * torch.randn(SHAPE), noise_for(seeds, SHAPE[1:]), seeds


@pytest.mark.parametrize(("law", "solver"), CASES)
def test_full_strength_is_sampling_from_noise_and_none_gives_the_latents_back(law, solver):
    latents, noise, seeds = drawn()
    plain = sample(network, LAWS[law], noise, 7, solver, seeds=seeds)
    full = sample(network, LAWS[law], noise, 7, solver, seeds=seeds, start=Start(latents, 1.0))
    assert torch.equal(full, plain)
    for nearly_none in (0.0, 0.14):  # int(7 * 0.14) is 0
        back = sample(network, LAWS[law], noise, 7, solver, seeds=seeds, start=Start(latents, nearly_none))
        assert torch.equal(back, latents)


@pytest.mark.parametrize(("law", "solver"), CASES)
def test_cells_that_are_kept_come_out_as_they_went_in_and_the_others_change(law, solver):
    latents, noise, seeds = drawn()
    keep = torch.rand(3, 1, 6, 6) < 0.4
    for strength in (0.3, 0.5, 1.0):
        found = sample(network, LAWS[law], noise, 7, solver, seeds=seeds, start=Start(latents, strength, keep))
        kept = keep.expand(SHAPE)
        assert torch.equal(found[kept], latents[kept])
        assert (found[~kept] != latents[~kept]).all()


@pytest.mark.parametrize(("law", "solver"), CASES)
def test_keeping_nothing_or_everything(law, solver):
    latents, noise, seeds = drawn()
    nothing, everything = torch.zeros(3, 1, 6, 6, dtype=torch.bool), torch.ones(3, 1, 6, 6, dtype=torch.bool)
    plain = sample(network, LAWS[law], noise, 7, solver, seeds=seeds, start=Start(latents, 0.6))
    assert torch.equal(
        sample(network, LAWS[law], noise, 7, solver, seeds=seeds, start=Start(latents, 0.6, nothing)), plain
    )
    kept = sample(network, LAWS[law], noise, 7, solver, seeds=seeds, start=Start(latents, 0.6, everything))
    assert torch.equal(kept, latents)


@pytest.mark.parametrize(("law", "solver"), CASES)
def test_a_row_depends_on_itself_alone(law, solver):
    latents, noise, seeds = drawn()
    keep = torch.rand(3, 1, 6, 6) < 0.5
    whole = sample(network, LAWS[law], noise, 5, solver, seeds=seeds, start=Start(latents, 0.5, keep))
    alone = sample(
        network, LAWS[law], noise[1:2], 5, solver, seeds=seeds[1:2], start=Start(latents[1:2], 0.5, keep[1:2])
    )
    assert torch.equal(alone, whole[1:2])


@pytest.mark.parametrize("strength", [0.2, 0.5, 0.57, 0.99])
@pytest.mark.parametrize("solver", ["ddim", "dpm2m"])
def test_the_tail_of_the_steps_is_that_of_diffusers(solver, strength):
    """The loop of StableDiffusionImg2ImgPipeline (get_timesteps, add_noise, step), its scheduler ending where clean."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    shared = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    times = list(range(950, -1, -50))
    if solver == "ddim":
        scheduler = DDIMScheduler(**shared, clip_sample=False, timestep_spacing="leading", set_alpha_to_one=True)
        scheduler.set_timesteps(20)
        assert scheduler.timesteps.tolist() == times
    else:
        scheduler = DPMSolverMultistepScheduler(**shared, final_sigmas_type="zero")
        scheduler.set_timesteps(timesteps=times)
        scheduler.set_begin_index(20 - int(20 * strength))
    latents, noise, _ = drawn()
    latents, noise = latents.double(), noise.double()
    left = scheduler.timesteps[20 - int(20 * strength) :]
    x = scheduler.add_noise(latents, noise, left[:1].repeat(3))
    for time in left:
        x = scheduler.step(network(x, time.expand(3)), time, x).prev_sample
    law = DDPM(prediction="epsilon")
    found = sample(network, law, noise, 20, solver, spacing="ddim20", start=Start(latents, strength))
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused():
    latents, noise, _ = drawn()
    law = RectifiedFlow()
    for strength in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="is no part of the steps"):
            sample(network, law, noise, 4, start=Start(latents, strength))
    with pytest.raises(ValueError, match=r"latents \(2, 2, 6, 6\) does not fit noise \(3, 2, 6, 6\)"):
        sample(network, law, noise, 4, start=Start(latents[:2], 0.5))
    with pytest.raises(ValueError, match=r"cells to keep \(3, 6, 6\)"):
        sample(network, law, noise, 4, start=Start(latents, 0.5, torch.ones(3, 6, 6, dtype=torch.bool)))


class Told:
    """Says what it is told."""

    def __call__(self, x, time, conditions, /):
        return conditions["text"][:, None, None, None] + conditions["site"][:, None, None, None] + 0 * x

    def null_conditions(self, num, /):
        return {"text": torch.zeros(num), "site": torch.full((num,), 7.0)}


def test_a_negative_prompt_stands_in_for_the_null_and_other_conditions_keep_theirs():
    told = {"text": torch.tensor([1.0, 2.0]), "site": torch.tensor([10.0, 20.0])}
    x, time = torch.zeros(2, 1, 1, 1), torch.zeros(2)
    found = guided(Told(), told, 3.0, null={"text": torch.tensor([-1.0, -4.0])})(x, time).flatten()
    expected = [(-1 + 7) + 3 * ((1 + 10) - (-1 + 7)), (-4 + 7) + 3 * ((2 + 20) - (-4 + 7))]
    assert found.tolist() == expected
    by_site = guided(Told(), told, 3.0, guided_by=["site"], null={"text": torch.tensor([-1.0, -4.0])})(x, time)
    assert by_site.flatten().tolist() == [(1 + 7) + 3 * (11 - 8), (2 + 7) + 3 * (22 - 9)]
