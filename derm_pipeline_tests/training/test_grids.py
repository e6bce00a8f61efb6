"""Samples on the way: what they are told, and that they are the same for the same network."""

import numpy as np
import pytest
import torch

from derm_pipeline.latents import to_pixels
from derm_pipeline.models.diffusion import guided, noise_for, sample
from derm_pipeline.models.generator import load_autoencoder, load_network
from derm_pipeline.models.laws import DDPM, RectifiedFlow
from derm_pipeline.models.runtime import autocast
from derm_pipeline.training.grids import GridConfig, draw_grid, told_in_grid
from derm_pipeline_tests.generation.networks import generator_at

CPU = torch.device("cpu")


def test_a_grid_is_told_what_rows_of_each_diagnosis_are_from_light_to_dark_skin():
    diagnosis = torch.tensor([6, 2, 2, 6, 2, 2, 0])
    skin_type = torch.tensor([1, 5, 0, 6, 3, 2, 4])
    site = torch.arange(7)
    told = told_in_grid({"diagnosis": diagnosis, "skin_type": skin_type, "site": site}, ("diagnosis", "site"), 2)
    assert told["diagnosis"].tolist() == [0, 0, 2, 2, 6, 6]
    # of the four rows of 2, ordered by skin: 2 (type 0), 5, 4, 1; the middles of their halves
    assert told["site"].tolist() == [6, 6, 5, 1, 0, 3]
    assert set(told) == {"diagnosis", "site"}


def test_every_diagnosis_of_many_rows_has_its_row_and_no_cell_is_told_what_no_image_is():
    stream = torch.Generator()
    stream.seed()
    labels = {
        name: torch.randint(most, (300,), generator=stream) for name, most in (("diagnosis", 9), ("skin_type", 7))
    }
    labels["diagnosis"][:9] = torch.arange(9)
    told = told_in_grid(labels, ("diagnosis", "skin_type"), 5)
    assert told["diagnosis"].tolist() == [diagnosis for diagnosis in range(9) for _ in range(5)]
    pairs = set(zip(*(values.tolist() for values in labels.values()), strict=True))
    assert set(zip(*(values.tolist() for values in told.values()), strict=True)) <= pairs


@pytest.mark.parametrize("law", [RectifiedFlow(), DDPM(learned_variance=True)], ids=["flow", "learned"])
def test_a_grid_is_a_row_a_diagnosis_of_samples_by_their_own_seeds(tmp_path, law):
    shape = {"learn_sigma": True} if law.kind == "ddpm" else {}
    folders = generator_at(tmp_path, law=law, **shape)
    spec, network = load_network(folders["generator"], CPU)
    decode = load_autoencoder(folders["autoencoder"], CPU).decode
    told = {"diagnosis": torch.arange(3).repeat_interleave(2), "skin_type": torch.tensor([0, 5] * 3)}
    config = GridConfig(num_each=2, num_steps=3, guidance=2.0)
    picture = draw_grid(network, spec, decode, told, config, "fp32")
    assert picture.shape == (3 * 34 + 2, 2 * 34 + 2, 3)
    assert (picture == draw_grid(network, spec, decode, told, config, "fp32")).all()
    with torch.no_grad(), autocast(CPU, "fp32"):
        latents = sample(guided(network, told, 2.0), law, noise_for(range(6), (4, 8, 8)), 3)
        images = to_pixels(torch.cat([decode(part) for part in spec.unwhiten(latents).split(4)]))
    for place, image in enumerate(images):
        row, column = divmod(place, 2)
        cell = picture[2 + 34 * row : 34 + 34 * row, 2 + 34 * column : 34 + 34 * column]
        assert np.abs(cell.astype(int) - image).max() <= 1
