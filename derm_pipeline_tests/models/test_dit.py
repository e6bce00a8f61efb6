import math
import re

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from derm_pipeline.models.dit import DIT_PRESETS, DiT, DiTConfig, position_table, preset, time_code
from derm_pipeline.models.dit import num_parameters as num_parameters_of

TINY = DiTConfig(latent_size=8, width=32, depth=2, heads=2, conditions={"diagnosis": 7, "skin_type": 6})


def awake(config: DiTConfig = TINY) -> DiT:
    """A DiT whose gates and output are not 0, as after some training."""
    torch.manual_seed(0)
    model = DiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def batch(n: int, config: DiTConfig = TINY):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, config.channels, config.latent_size, config.latent_size, generator=generator)
    told = {name: torch.randint(num + 1, (n,), generator=generator) for name, num in config.conditions.items()}
    return x, 1000 * torch.rand(n, generator=generator), told


@pytest.mark.parametrize(
    ("name", "num_classes", "latent_size", "num_parameters"),
    [
        ("XL/2", 1000, 32, 675_129_632),
        ("XL/4", 1000, 32, 675_074_432),
        ("XL/8", 1000, 32, 675_683_072),
        ("L/2", 1000, 32, 458_102_816),
        ("L/4", 1000, 32, 458_053_760),
        ("L/8", 1000, 32, 458_594_816),
        ("B/2", 1000, 32, 130_512_416),
        ("B/4", 1000, 32, 130_475_648),
        ("B/8", 1000, 32, 130_881_536),
        ("S/2", 1000, 32, 32_963_360),
        ("S/4", 1000, 32, 32_945_024),
        ("S/8", 1000, 32, 33_148_160),
        ("XL/2", 7, 32, 673_985_696),
        ("B/2", 7, 32, 129_749_792),
        ("S/2", 7, 32, 32_582_048),
        ("XL/2", 1000, 64, 676_014_368),
    ],
)
def test_public_sizes_have_the_published_number_of_parameters(name, num_classes, latent_size, num_parameters):
    assert num_parameters_of(preset(name, latent_size=latent_size, conditions={"label": num_classes})) == num_parameters


@pytest.mark.parametrize(("name", "num_parameters"), [("DiT", 16_593_040), ("DiT-B", 64_472_464)])
def test_the_two_sizes_of_000_have_their_number_of_parameters(name, num_parameters):
    config = preset(name, latent_size=28, conditions={"diagnosis": 7})
    assert not config.learn_sigma
    assert num_parameters_of(config) == num_parameters


def test_there_are_twelve_public_presets_and_two_of_000_and_an_unknown_one_names_them():
    assert len(DIT_PRESETS) == 12 + 2
    with pytest.raises(ValueError, match="'M/2'.*XL/2.*DiT-B"):
        preset("M/2", latent_size=32, conditions={"diagnosis": 7})


def test_a_preset_takes_further_fields_and_refuses_those_it_does_not_know():
    config = preset("S/8", latent_size=32, conditions={"diagnosis": 7}, learn_sigma=False, qk_norm=True)
    assert (config.width, config.patch, config.learn_sigma, config.qk_norm) == (384, 8, False, True)
    with pytest.raises(ValidationError, match="dropout"):
        preset("S/8", latent_size=32, conditions={"diagnosis": 7}, dropout=0.1)


def test_parameters_are_named_as_in_the_public_checkpoints():
    config = DiTConfig(latent_size=4, width=32, depth=1, heads=2, conditions={"diagnosis": 7}, learn_sigma=True)
    layers = {
        "x_embedder.proj": (32, 4, 2, 2),
        "t_embedder.mlp.0": (32, 256),
        "t_embedder.mlp.2": (32, 32),
        "blocks.0.attn.qkv": (96, 32),
        "blocks.0.attn.proj": (32, 32),
        "blocks.0.mlp.fc1": (128, 32),
        "blocks.0.mlp.fc2": (32, 128),
        "blocks.0.adaLN_modulation.1": (192, 32),
        "final_layer.linear": (32, 32),
        "final_layer.adaLN_modulation.1": (64, 32),
    }
    expected = {f"{name}.weight": shape for name, shape in layers.items()}
    expected |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    expected |= {"pos_embed": (1, 4, 32), "y_embedder.embedding_table.weight": (8, 32)}
    assert {name: tuple(value.shape) for name, value in DiT(config).state_dict().items()} == expected


def test_further_conditions_only_add_their_tables():
    one = DiT(TINY.model_copy(update={"conditions": {"diagnosis": 7}})).state_dict().keys()
    two = DiT(TINY).state_dict()
    assert set(two) - set(one) == {"extra_embedders.skin_type.embedding_table.weight"}
    assert two["extra_embedders.skin_type.embedding_table.weight"].shape == (7, 32)


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_a_fresh_dit_outputs_exactly_zero(learn_sigma):
    model = DiT(TINY.model_copy(update={"learn_sigma": learn_sigma}))
    output = model(*batch(3))
    assert output.shape == (3, 8 if learn_sigma else 4, 8, 8)
    assert torch.equal(output, torch.zeros_like(output))


def test_the_position_table_is_the_public_one():
    table = position_table(1152, 16)
    assert table.shape == (256, 1152)
    assert float(table.double().sum()) == pytest.approx(134598.9478, abs=1e-3)
    column, row = 3, 5  # the first half of the features is the column's
    cell, frequency = table[row * 16 + column], 10000 ** (-7 / 288)
    np.testing.assert_allclose(
        cell[[7, 288 + 7, 576 + 7, 864 + 7]].numpy(),
        [f(place * frequency) for place in (column, row) for f in (math.sin, math.cos)],
        atol=1e-6,
    )


def test_the_position_table_is_fixed():
    model = DiT(TINY)
    assert not model.pos_embed.requires_grad
    assert "pos_embed" in model.state_dict()


def test_the_time_code_is_the_public_one():
    code = time_code(torch.tensor([1.0]))[0]
    assert code.shape == (256,)
    np.testing.assert_allclose(code[[0, 1, 128]].numpy(), [0.54030, 0.59738, 0.84147], atol=5e-6)


def test_the_null_class_is_the_number_of_classes():
    model = DiT(TINY)
    null = model.null_conditions(2)
    assert {name: classes.tolist() for name, classes in null.items()} == {"diagnosis": [7, 7], "skin_type": [6, 6]}
    model(*batch(2)[:2], null)
    with pytest.raises(IndexError):
        model(*batch(2)[:2], null | {"diagnosis": torch.tensor([8, 8])})


def test_every_condition_and_the_time_are_heard():
    model = awake()
    x, time, told = batch(1)
    told = {name: torch.zeros_like(classes) for name, classes in told.items()}
    plain = model(x, time, told)
    for name in told:
        assert not torch.allclose(plain, model(x, time, told | {name: torch.ones(1, dtype=torch.long)}), atol=1e-4)
    assert not torch.allclose(plain, model(x, time / 2, told), atol=1e-4)


def test_a_row_does_not_depend_on_the_others():
    model = awake()
    x, time, told = batch(8)
    together = model(x, time, told)
    for row in range(8):
        alone = model(
            x[row : row + 1], time[row : row + 1], {name: value[row : row + 1] for name, value in told.items()}
        )
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)


def test_patches_go_out_where_they_came_in():
    """With the network's body silenced, the output of a cell depends on the patch that holds it, and on no other."""
    model = awake()
    with torch.no_grad():
        for block in model.blocks:
            block.adaLN_modulation[1].weight.zero_()
            block.adaLN_modulation[1].bias.zero_()
    x, time, told = batch(1)
    changed = x.clone()
    changed[:, :, 2:4, 6:8] += 1
    difference = (model(changed, time, told) - model(x, time, told)).abs().sum((0, 1)) > 1e-6
    assert difference[2:4, 6:8].all()
    assert difference.sum() == 4


def test_recomputing_the_blocks_gives_the_same_gradients():
    model = awake()
    gradients = []
    for model.is_checkpointing in (False, True):
        model.zero_grad()
        model(*batch(2)).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_normalised_queries_and_keys_bound_the_attention():
    model = awake(TINY.model_copy(update={"qk_norm": True}))
    x, time, told = batch(2)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[:64] *= 1e4  # queries and keys, but not values
        model.blocks[0].attn.qkv.bias[:64] *= 1e4
    scaled = model(x, time, told)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[:64] *= 10
        model.blocks[0].attn.qkv.bias[:64] *= 10
    torch.testing.assert_close(model(x, time, told), scaled, atol=1e-3, rtol=1e-3)


def test_the_condition_tables_start_with_the_deviation_asked_for():
    torch.manual_seed(1)
    model = DiT(TINY.model_copy(update={"width": 512, "heads": 8, "condition_init_std": 0.7}))
    for embedder in (model.y_embedder, model.extra_embedders["skin_type"]):
        assert float(embedder.embedding_table.weight.detach().std()) == pytest.approx(0.7, rel=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_size": 9}, "latent_size 9 .* take latent_size 8 or 10, or patch 1 or 3 or 9"),
        ({"patch": 3}, "patch 3: take latent_size 6 or 9, or patch 1 or 2 or 4 or 8"),
        ({"heads": 3}, "heads 3: take width 24 or 36, or heads .*16 or 32"),
        ({"width": 30}, "width 30 is not a multiple of 4 .* take width 28 or 32$"),
        ({"positions": "rotary", "heads": 16}, "width 32 / heads 16 = 2: take heads 1 or 2 or 4 or 8"),
        ({"mlp_ratio": 0.001}, "mlp_ratio"),
        ({"conditions": {}}, "conditions are empty"),
        ({"conditions": {"skin.type": 6}}, "skin.type"),
        ({"conditions": {"sex": 0}}, "'sex' with 0 classes"),
        ({"conditions": {"text": 6}}, "'text'.*rename"),
        ({"conditions": {"diagnosis": 7, "items": 6}}, "'items'.*rename"),
        ({"text_tokens": 7}, "text_tokens 7 with text_width 0"),
        ({"text_mode": "cross"}, "set text_tokens and text_width"),
        ({"depht": 3}, "depht"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused_with_what_would(change, message):
    with pytest.raises(ValidationError) as caught:
        DiTConfig.model_validate(TINY.model_dump() | change)
    assert any(re.search(message, f"{error['loc']} {error['msg']}") for error in caught.value.errors())


def test_what_is_advised_instead_fits():
    for change in ({"latent_size": 10}, {"patch": 8}, {"width": 36, "heads": 3}, {"positions": "rotary", "heads": 8}):
        DiT(DiTConfig.model_validate(TINY.model_dump() | change))


def test_missing_conditions_are_refused_by_name():
    x, time, told = batch(1)
    with pytest.raises(ValueError, match="'diagnosis'.*skin_type"):
        DiT(TINY)(x, time, {"diagnosis": told["diagnosis"]})


def test_the_configuration_keeps_the_order_of_its_conditions_through_json():
    config = TINY.model_copy(update={"conditions": {"zone": 3, "age": 2}})
    assert list(DiTConfig.model_validate_json(config.model_dump_json()).conditions) == ["zone", "age"]
