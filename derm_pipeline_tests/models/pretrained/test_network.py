import pytest
import torch

from derm_pipeline.models.conditions import POOLED, SIZE, TEXT, TEXT_MASK, hide
from derm_pipeline.models.diffusion import guided
from derm_pipeline.models.generator import GeneratorSpec, load_network
from derm_pipeline.models.pretrained.config import TINY_FAMILIES
from derm_pipeline.models.pretrained.network import PretrainedNetwork
from derm_pipeline.models.runtime import save_weights

TEXTS = ["a dermoscopic image of melanoma", "a benign nevus on light skin, hairy"]


def network_of(base) -> PretrainedNetwork:
    network = PretrainedNetwork(base.network_config(8), base.denoiser)
    network.set_null(base.null())
    return network


def latents(n: int = 2, height: int = 8, width: int = 8) -> torch.Tensor:
    return torch.randn(n, 4, height, width, generator=torch.Generator().manual_seed(height * width))


def direct(base, x, time, told, sizes=None) -> torch.Tensor:
    """The denoiser as its pipeline calls it."""
    if base.family == "pixart":
        return base.denoiser(
            x,
            encoder_hidden_states=told[TEXT],
            encoder_attention_mask=told[TEXT_MASK].long(),
            timestep=time.long(),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample.chunk(2, dim=1)[0]
    added = None
    if base.family == "sdxl":
        height, width = 8 * x.shape[2], 8 * x.shape[3]
        sizes = [[height, width, 0, 0, height, width]] * len(x) if sizes is None else sizes
        added = {"text_embeds": told[POOLED], "time_ids": torch.tensor(sizes)}
    return base.denoiser(x, time.long(), told[TEXT], added_cond_kwargs=added).sample


@pytest.mark.parametrize("name", TINY_FAMILIES)
@torch.no_grad()
def test_a_prediction_is_the_denoisers_own(name, bases):
    base = bases[name]
    told, time = base.embed(TEXTS), torch.tensor([17.0, 961.0])
    for x in (latents(), latents(height=8, width=16)):
        torch.testing.assert_close(network_of(base)(x, time, told), direct(base, x, time, told))


@torch.no_grad()
def test_sizes_are_told_where_they_are_known(bases):
    base = bases["sdxl"]
    told, x, time = base.embed(TEXTS), latents(), torch.tensor([17.0, 961.0])
    sizes = [[450, 600, 0, 75, 64, 64], [1024, 1024, 0, 0, 64, 64]]
    network = network_of(base)
    found = network(x, time, told | {SIZE: torch.tensor(sizes)})
    torch.testing.assert_close(found, direct(base, x, time, told, sizes))
    assert not torch.allclose(found, network(x, time, told))
    guided(network, told | {SIZE: torch.tensor(sizes)}, 3.0)(x, time)  # told on both sides


@pytest.mark.parametrize("name", TINY_FAMILIES)
@torch.no_grad()
def test_guidance_goes_away_from_the_empty_text(name, bases):
    base = bases[name]
    told, x, time = base.embed(TEXTS), latents(), torch.tensor([300.0, 300.0])
    untold = {key: value.expand_as(told[key]) for key, value in base.null().items()}
    expected = torch.lerp(direct(base, x, time, untold), direct(base, x, time, told), 7.5)
    torch.testing.assert_close(guided(network_of(base), told, 7.5)(x, time), expected, rtol=1e-4, atol=1e-4)


def test_a_hidden_text_is_hidden_with_all_its_parts(bases):
    for base in bases.values():
        network, told = network_of(base), base.embed(TEXTS)
        hidden = hide(told, network.null_conditions(2), {TEXT: torch.tensor([True, False])})
        for key, value in hidden.items():
            assert torch.equal(value[0], base.null()[key][0])
            assert torch.equal(value[1], told[key][1])


def test_what_it_was_not_built_for_is_refused(bases):
    network, told, time = network_of(bases["sdxl"]), bases["sdxl"].embed(TEXTS), torch.zeros(2)
    with pytest.raises(ValueError, match="built for .*pooled"):
        network(latents(), time, {key: told[key] for key in (TEXT, TEXT_MASK)})
    with pytest.raises(ValueError, match=r"built for \(n, s, 72\)"):
        network(latents(), time, told | {TEXT: told[TEXT][..., :32]})
    with pytest.raises(ValueError, match="no condition 'diagnosis'"):
        network.null_conditions(2, ["diagnosis"])
    with pytest.raises(ValueError, match="set_null"):
        PretrainedNetwork(network.config, network.denoiser).null_conditions(2)


@pytest.mark.parametrize("is_trained", [False, True])
@torch.no_grad()
def test_a_generator_folder_is_loaded_by_its_reference(is_trained, bases, tmp_path):
    base = bases["sdxl"]
    network = network_of(base)
    spec = GeneratorSpec(
        network=network.config, law=base.law, classes={}, latent_mean=(0.0,) * 4, latent_std=base.vae.config.latent_std
    )
    spec.save(tmp_path)
    network.save_null(tmp_path)
    state = {name: weight + 0.01 * is_trained for name, weight in base.denoiser.state_dict().items()}
    if is_trained:
        save_weights(tmp_path / "weights.safetensors", state)
    found, loaded = load_network(tmp_path, torch.device("cpu"))
    assert found == spec
    loaded_state = loaded.denoiser.state_dict()
    assert all(torch.equal(loaded_state[name], weight) for name, weight in state.items())
    assert all(torch.equal(loaded.null_conditions(1)[name], value) for name, value in base.null().items())
    if not is_trained:
        told = base.embed(TEXTS)
        arguments = latents(), torch.tensor([3.0, 990.0]), told
        torch.testing.assert_close(loaded(*arguments), network(*arguments))


def test_recomputing_blocks_changes_no_gradient(bases):
    network, told = network_of(bases["sd"]), bases["sd"].embed(TEXTS)
    gradients = []
    network.denoiser.train()
    for network.is_checkpointing in (False, True):
        x = latents().requires_grad_()
        network(x, torch.tensor([5.0, 500.0]), told).square().sum().backward()
        gradients.append(x.grad)
    network.is_checkpointing = False
    network.denoiser.eval()
    torch.testing.assert_close(*gradients)
