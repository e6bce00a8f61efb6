import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError

from derm_pipeline.models.unet import UNET_PRESETS, UNet, UNetConfig, unet_preset

TINY = UNetConfig(
    latent_size=8,
    widths=(16, 32),
    layers=1,
    attention_levels=(1,),
    head_size=8,
    norm_groups=4,
    conditions={"diagnosis": 7, "skin_type": 6},
)


def awake(config: UNetConfig = TINY) -> UNet:
    """A U-Net whose output is not 0, as after some training."""
    torch.manual_seed(0)
    model = UNet(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def batch(n: int, config: UNetConfig = TINY):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, config.channels, config.latent_size, config.latent_size, generator=generator)
    told = {name: torch.randint(num + 1, (n,), generator=generator) for name, num in config.conditions.items()}
    return x, 1000 * torch.rand(n, generator=generator), told


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("attention_levels", [(), (1,), (0, 1)])
def test_a_fresh_unet_outputs_exactly_zero(learn_sigma, attention_levels):
    model = UNet(TINY.model_copy(update={"learn_sigma": learn_sigma, "attention_levels": attention_levels}))
    output = model(*batch(3))
    assert output.shape == (3, 8 if learn_sigma else 4, 8, 8)
    assert torch.equal(output, torch.zeros_like(output))


def test_every_condition_and_the_time_are_heard():
    model = awake()
    x, time, told = batch(1)
    told = {name: torch.zeros_like(classes) for name, classes in told.items()}
    plain = model(x, time, told)
    for name in told:
        assert not torch.allclose(plain, model(x, time, told | {name: torch.ones(1, dtype=torch.long)}), atol=1e-4)
    assert not torch.allclose(plain, model(x, time / 2, told), atol=1e-4)
    assert not torch.allclose(plain, model(x, time + 0.5, told), atol=1e-7)  # times are not rounded


def test_the_conditions_are_summed_so_their_order_is_the_names_not_the_mappings():
    model = awake()
    x, time, told = batch(4)
    assert torch.equal(model(x, time, dict(reversed(told.items()))), model(x, time, told))
    features = [model.condition_embedders[name](classes) for name, classes in told.items()]
    given = model.body(x, time, class_labels=features[0] + features[1]).sample
    torch.testing.assert_close(model(x, time, told), given)


def test_a_row_does_not_depend_on_the_others():
    model = awake()
    x, time, told = batch(6)
    together = model(x, time, told)
    for row in range(6):
        rows = slice(row, row + 1)
        alone = model(x[rows], time[rows], {name: value[rows] for name, value in told.items()})
        torch.testing.assert_close(together[rows], alone, atol=1e-5, rtol=1e-5)


def test_the_null_class_is_the_number_of_classes():
    model = UNet(TINY)
    null = model.null_conditions(2)
    assert {name: classes.tolist() for name, classes in null.items()} == {"diagnosis": [7, 7], "skin_type": [6, 6]}
    model(*batch(2)[:2], null)
    with pytest.raises(IndexError):
        model(*batch(2)[:2], null | {"diagnosis": torch.tensor([8, 8])})


def test_recomputing_the_blocks_gives_the_same_gradients():
    model = awake().train()
    gradients = []
    for model.is_checkpointing in (False, True):
        model.zero_grad()
        model(*batch(2)).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert model.is_checkpointing
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_the_condition_tables_start_with_the_deviation_asked_for():
    torch.manual_seed(1)
    model = UNet(TINY.model_copy(update={"widths": (128, 128), "condition_init_std": 0.7}))
    for embedder in model.condition_embedders.values():
        assert float(embedder.embedding_table.weight.detach().std()) == pytest.approx(0.7, rel=0.1)


def test_some_steps_lower_the_error():
    torch.manual_seed(0)
    model, (x, time, told) = UNet(TINY), batch(8)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    errors = []
    for _ in range(40):
        error = (model(x, time, told) - x).square().mean()
        optimiser.zero_grad()
        error.backward()
        optimiser.step()
        errors.append(float(error.detach()))
    assert errors[-1] < 0.3 * errors[0]


@pytest.mark.parametrize(("name", "millions"), [("000-ldm", 2.4), ("S", 27.2), ("B", 108.5)])
def test_presets_have_the_sizes_that_are_said(name, millions):
    with torch.device("meta"):
        model = UNet(unet_preset(name, latent_size=28, conditions={"diagnosis": 7}))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_an_unknown_preset_names_the_known_ones():
    assert len(UNET_PRESETS) == 3
    with pytest.raises(ValueError, match="'M'.*000-ldm, S, B"):
        unet_preset("M", latent_size=32, conditions={"diagnosis": 7})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_size": 9}, "latent_size 9 is not a multiple of 2"),
        ({"latent_size": 14, "widths": (16, 32, 32)}, "latent_size 14 is not a multiple of 4.*fewer levels"),
        ({"widths": (16, 30)}, "width 30 is not a multiple of norm_groups 4"),
        ({"widths": ()}, "widths"),
        ({"attention_levels": (2,)}, r"attention_levels \[2\].*0 to 1"),
        ({"head_size": 12}, "width 32 of level 1 is not a multiple of head_size 12"),
        ({"head_size": 32, "attention_levels": (0,)}, "width 16 of level 0 .* head_size 32"),
        ({"conditions": {}}, "conditions"),
        ({"conditions": {"skin.type": 6}}, "skin.type"),
        ({"conditions": {"keys": 6}}, "keys"),
        ({"layerz": 3}, "layerz"),
        ({"kind": "dit"}, "kind"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused_by_name(change, message):
    with pytest.raises(ValidationError, match=message):
        UNetConfig.model_validate(TINY.model_dump() | change)


def test_missing_conditions_are_refused_by_name():
    x, time, told = batch(1)
    with pytest.raises(ValueError, match="'diagnosis'.*skin_type"):
        UNet(TINY)(x, time, {"diagnosis": told["diagnosis"]})


def test_diffusers_is_imported_when_a_unet_is_made_and_not_before():
    code = "import sys, derm_pipeline.models.generator; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
