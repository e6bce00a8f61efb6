"""What is told of the published models without their weights: their sizes and their noise laws."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from derm_pipeline.models.laws import DDPM
from derm_pipeline.models.pretrained.config import PretrainedConfig, PretrainedNetworkConfig, PretrainedReference
from derm_pipeline.models.pretrained.files import law_of
from derm_pipeline.models.pretrained.network import PretrainedNetwork
from derm_pipeline_tests.models.pretrained.published import PIXART_512, PIXART_1024, SD_1, SD_2, SDXL, pixart, unet


def num_weights(network) -> int:
    return sum(weight.numel() for weight in network.parameters())


@pytest.mark.parametrize(
    ("build", "config", "count"),
    [
        (unet, SD_1, 859_520_964),
        (unet, SD_2, 865_910_724),
        (unet, SDXL, 2_567_463_684),
        (pixart, PIXART_512, 610_856_096),
        (pixart, PIXART_1024, 611_349_152),
    ],
)
def test_networks_of_true_size_have_the_published_number_of_weights(build, config, count):
    assert num_weights(build(config)) == count


def test_pixart_for_1024_px_is_told_sizes():
    """Its shapes hold on the meta device, where nothing is computed."""
    reference = PretrainedReference(settings=PretrainedConfig(model="some/pixart"), family="pixart", files={})
    shape = PretrainedNetworkConfig(base=reference, latent_size=128, text_tokens=120, text_width=4096)
    network = PretrainedNetwork(shape, pixart(PIXART_1024 | {"num_layers": 1}))
    with torch.device("meta"):
        told = {"text": torch.ones(2, 120, 4096), "text_mask": torch.ones(2, 120, dtype=torch.bool)}
        x, time = torch.ones(2, 4, 128, 96), torch.ones(2)
        assert network(x, time, told).shape == x.shape
        assert network(x, time, told | {"size": torch.ones(2, 6)}).shape == x.shape


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
            DDPM(schedule="scaled_linear", prediction="epsilon", beta_start=0.00085, beta_end=0.012),
        ),
        (
            {
                "beta_schedule": "scaled_linear",
                "beta_start": 0.001,
                "beta_end": 0.015,
                "prediction_type": "v_prediction",
            },
            DDPM(schedule="scaled_linear", beta_start=0.001, beta_end=0.015),
        ),
        ({"beta_schedule": "linear"}, DDPM(prediction="epsilon")),
        ({"beta_schedule": "squaredcos_cap_v2"}, DDPM(prediction="epsilon", schedule="cosine")),
    ],
)
def test_a_law_has_the_table_of_its_scheduler(scheduler, expected):
    published = DDPMScheduler(**scheduler)
    law = law_of(dict(published.config), "here")
    assert law == expected
    np.testing.assert_allclose(law.alphas_cumprod().numpy(), published.alphas_cumprod.numpy(), rtol=2e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_noise_and_targets_are_those_of_the_scheduler(prediction):
    law = DDPM(schedule="scaled_linear", prediction=prediction, beta_start=0.00085, beta_end=0.012)
    kind = {"epsilon": "epsilon", "v": "v_prediction"}[prediction]
    published = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=kind)
    clean = torch.randn(6, 4, 8, 8)
    draw = law.draw(tuple(clean.shape), torch.Generator().manual_seed(2))
    steps = draw.times.long()
    noised = published.add_noise(clean, draw.noise, steps)
    target = draw.noise if prediction == "epsilon" else published.get_velocity(clean, draw.noise, steps)
    found = law.loss(lambda x, time: torch.sin(x) + time[:, None, None, None] / 1000, clean, draw)
    guess = torch.sin(noised) + steps[:, None, None, None] / 1000
    torch.testing.assert_close(found, (guess - target).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"prediction_type": "sample"}, "prediction_type 'sample'"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid'"),
        ({"num_train_timesteps": 400}, "num_train_timesteps 400"),
        ({"trained_betas": [0.1]}, "trained_betas"),
    ],
)
def test_a_scheduler_that_is_no_law_is_refused(said, problem):
    with pytest.raises(ValueError, match=f"the scheduler of here has {problem}"):
        law_of({"beta_start": 0.1, "beta_end": 0.2} | said, "here")
    with pytest.raises(ValueError, match="no betas"):
        law_of({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "here")
