import math

import pytest
import torch

from derm_pipeline.models.diffusion import DDPM, RectifiedFlow, guided, noise_for, sample

TOLD = {"diagnosis": torch.tensor([0, 1, 2]), "skin_type": torch.tensor([0, 0, 5])}
LEVEL = torch.tensor([0.0, 1.0, 52.0])


class Recorder:
    """Answers with its conditions, in 2c channels, and remembers how many rows it was asked, and when."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.times: list[float] = []

    def __call__(self, x, time, conditions):
        self.asked.append(len(x))
        self.times.append(float(time[0]))
        assert len(x) == len(time) == len(conditions["diagnosis"])
        level = (conditions["diagnosis"] + 10 * conditions["skin_type"]).float()[:, None, None, None]
        return torch.cat([level.expand_as(x), 100 + level.expand_as(x)], dim=1)

    def null_conditions(self, num):
        return {"diagnosis": torch.full((num,), 7), "skin_type": torch.full((num,), 6)}


def batch(n: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(n, 4, 2, 2), torch.zeros(n)


def test_guidance_extrapolates_from_the_null_classes_in_one_batch():
    model = Recorder()
    output = guided(model, TOLD, 1.5)(*batch())
    assert model.asked == [6]
    torch.testing.assert_close(output[:, 0, 0, 0], 67 + 1.5 * (LEVEL - 67))
    torch.testing.assert_close(output[:, 4, 0, 0], 100 + LEVEL)  # the variance is not guided
    partly = guided(model, TOLD, 1.5, guided_channels=3)(*batch())
    torch.testing.assert_close(partly[:, 2, 0, 0], output[:, 2, 0, 0])
    torch.testing.assert_close(partly[:, 3, 0, 0], LEVEL)
    torch.testing.assert_close(guided(model, TOLD, 0.0)(*batch())[:, 0, 0, 0], torch.full((3,), 67.0))


def test_no_guidance_costs_one_evaluation_a_row():
    model = Recorder()
    torch.testing.assert_close(guided(model, TOLD, 1.0)(*batch())[:, 0, 0, 0], LEVEL)
    assert model.asked == [3]


def test_guidance_by_one_condition_leaves_the_other_told():
    output = guided(Recorder(), TOLD, 2.0, guided_by=["skin_type"])(*batch())[:, 0, 0, 0]
    untold = torch.tensor([60.0, 61.0, 62.0])
    torch.testing.assert_close(output, untold + 2 * (LEVEL - untold))


def test_guidance_by_text_nulls_its_mask_too():
    seen = {}

    class Reader:
        def __call__(self, x, time, conditions):
            seen.update(conditions)
            return x

        def null_conditions(self, num):
            return {"text": torch.zeros(num, 2, 3), "text_mask": torch.zeros(num, 2, dtype=torch.bool)}

    told = {"text": torch.ones(3, 2, 3), "text_mask": torch.ones(3, 2, dtype=torch.bool)}
    guided(Reader(), told, 2.0, guided_by=["text"])(*batch())
    assert seen["text"][:3].all()
    assert not seen["text"][3:].any()
    assert seen["text_mask"][:3].all()
    assert not seen["text_mask"][3:].any()


@pytest.mark.parametrize("interval", [(0.3, 2.0), (0.0, 0.5), (1.0, math.inf)])
@pytest.mark.parametrize("solver", ["dpm2m", "unipc", "euler", "heun", "ddim", "ddpm"])
@pytest.mark.parametrize("law", [RectifiedFlow(), DDPM()], ids=["flow", "ddpm"])
def test_the_null_is_asked_for_inside_the_interval_only(law, solver, interval):
    if solver == "ddpm" and law.kind == "flow":
        return
    model = Recorder()
    denoise = guided(model, TOLD, 1.5, interval=interval)
    sample(denoise, law, noise_for(range(3), (4, 2, 2)), 20, solver, seeds=range(3))
    grid = law.spaced("20") if solver == "ddpm" else law.grid(20)
    levels = dict(zip(grid.times.float().tolist(), (grid.sigmas / grid.alphas).tolist(), strict=False))
    expected = [6 if interval[0] <= levels[time] <= interval[1] else 3 for time in model.times]
    assert model.asked == expected
    assert {3, 6} == set(expected)


def test_an_interval_of_all_levels_changes_nothing():
    torch.manual_seed(0)
    weight = torch.randn(8, 4)

    class Network:
        def __call__(self, x, time, conditions):
            return weight[conditions["diagnosis"]].mean(1)[:, None, None, None] * torch.tanh(x)

        def null_conditions(self, num):
            return {"diagnosis": torch.full((num,), 7)}

    told, noise = {"diagnosis": torch.arange(3)}, noise_for(range(3), (4, 2, 2))
    ways = [guided(Network(), told, 3.0), guided(Network(), told, 3.0, interval=(0.0, math.inf))]
    assert torch.equal(*(sample(way, RectifiedFlow(), noise, 8) for way in ways))


def test_an_interval_is_not_guessed_from_the_time():
    with pytest.raises(ValueError, match="call at"):
        guided(Recorder(), TOLD, 1.5, interval=(0.1, 1.0))(*batch())


def test_guidance_that_makes_no_sense_is_refused():
    wrong = [
        ("no noise level", TOLD, {"interval": (1.0, 1.0)}),
        ("no noise level", TOLD, {"interval": (-1.0, 1.0)}),
        ("0 channels", TOLD, {"guided_channels": 0}),
        (r"guide by \[\]", {}, {}),
        ("'sex'.*told.*'skin_type'", TOLD, {"guided_by": ["sex"]}),
    ]
    for message, told, options in wrong:
        with pytest.raises(ValueError, match=message):
            guided(Recorder(), told, 1.5, **options)
