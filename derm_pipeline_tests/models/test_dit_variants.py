"""What a DiT can be beyond the public one: told text, told in part, and with rotary positions."""

import pytest
import torch

from derm_pipeline.models.diffusion import guided
from derm_pipeline.models.dit import DiT, DiTConfig
from derm_pipeline.models.positions import rotate, rotation_table

PLAIN = DiTConfig(latent_size=8, width=32, depth=2, heads=2, conditions={"diagnosis": 7, "skin_type": 6})
POOLED = PLAIN.model_copy(update={"text_tokens": 5, "text_width": 12})
CROSS = POOLED.model_copy(update={"text_mode": "cross"})
ROTARY = PLAIN.model_copy(update={"positions": "rotary"})
ALL = CROSS.model_copy(update={"positions": "rotary", "qk_norm": True})

with_text = pytest.mark.parametrize("config", [POOLED, CROSS], ids=["pooled", "cross"])


def awake(config: DiTConfig) -> DiT:
    """A DiT whose gates and output are not 0, as after some training."""
    torch.manual_seed(0)
    model = DiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def batch(n: int, config: DiTConfig):
    torch.manual_seed(n)
    told = {name: torch.randint(num + 1, (n,)) for name, num in config.conditions.items()}
    if config.has_text:
        told["text"] = torch.randn(n, config.text_tokens, config.text_width)
        told["text_mask"] = torch.arange(config.text_tokens) < torch.randint(1, config.text_tokens, (n, 1))
    return torch.randn(n, config.channels, config.latent_size, config.latent_size), 1000 * torch.rand(n), told


def names(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in DiT(config).state_dict().items()}


def test_text_only_adds_its_own_parameters():
    added = names(POOLED).keys() - names(PLAIN).keys()
    assert {name.split(".")[0] for name in added} == {"text_embedder"}
    crossing = names(CROSS).keys() - names(POOLED).keys()
    assert {".".join((name.split(".")[0], name.split(".")[2])) for name in crossing} == {"blocks.cross"}
    assert names(CROSS).items() >= names(PLAIN).items()


@pytest.mark.parametrize("config", [POOLED, CROSS, ROTARY, ALL])
def test_a_fresh_variant_outputs_exactly_zero(config):
    output = DiT(config)(*batch(3, config))
    assert torch.equal(output, torch.zeros_like(output))


@with_text
def test_text_is_heard_but_not_what_stands_in_its_padding(config):
    model = awake(config)
    x, time, told = batch(3, config)
    plain = model(x, time, told)
    padding = ~told["text_mask"][..., None]
    for rubbish in (0.0, 1e6, torch.nan):
        text = torch.where(padding, rubbish, told["text"])
        torch.testing.assert_close(model(x, time, told | {"text": text}), plain)
    changed = model(x, time, told | {"text": torch.where(padding, told["text"], told["text"].flip(2))})
    assert ((changed - plain).abs().amax((1, 2, 3)) > 1e-3).all()


@with_text
def test_a_text_without_tokens_is_the_learned_null(config):
    model = awake(config)
    x, time, told = batch(2, config)
    nothing = torch.zeros(2, config.text_tokens, dtype=torch.bool)
    untold = model(x, time, told | {"text_mask": nothing})
    torch.testing.assert_close(model(x, time, told | model.null_conditions(2, ["text"])), untold)
    assert torch.isfinite(untold).all()
    untold.square().sum().backward()
    assert float(model.text_embedder.null.grad.norm()) > 0
    model.zero_grad()
    model(x, time, told).square().sum().backward()
    assert float(model.text_embedder.null.grad.norm()) == 0, "no part in a text that is told"


def test_crossing_hears_the_tokens_beside_the_pooled_text():
    for config, hears in ((POOLED, False), (CROSS, True)):
        model = awake(config)
        with torch.no_grad():
            model.text_embedder.out_norm.weight.zero_()
        x, time, told = batch(1, config)
        difference = model(x, time, told) - model(x, time, told | {"text": told["text"].flip(2)})
        assert (float(difference.detach().abs().max()) > 1e-3) == hears


@with_text
def test_a_row_with_text_does_not_depend_on_the_others(config):
    model = awake(config)
    x, time, told = batch(4, config)
    together = model(x, time, told)
    for row in range(4):
        part = slice(row, row + 1)
        alone = model(x[part], time[part], {name: value[part] for name, value in told.items()})
        torch.testing.assert_close(together[part], alone, atol=1e-5, rtol=1e-5)


def test_a_network_may_be_told_nothing_but_text():
    config = DiTConfig.model_validate(POOLED.model_dump() | {"conditions": {}})
    assert not any("y_embedder" in name for name in names(config))
    model = awake(config)
    x, time, told = batch(2, config)
    assert not torch.allclose(model(x, time, told), model(x, time, model.null_conditions(2)), atol=1e-3)


@with_text
def test_text_embeddings_may_be_cached_in_half_precision(config):
    model = awake(config)
    x, time, told = batch(2, config)
    half = told["text"].half()
    torch.testing.assert_close(
        model(x, time, told | {"text": half}), model(x, time, told | {"text": half.float()}), rtol=0, atol=0
    )
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(x, time, told | {"text": half})
    torch.testing.assert_close(rough.float(), model(x, time, told), atol=0.2, rtol=0.1)


def test_the_pooled_text_starts_as_strong_as_a_table_of_classes():
    torch.manual_seed(1)
    config = POOLED.model_copy(update={"width": 512, "condition_init_std": 0.7})
    _, _, told = batch(4, config)
    pooled, _, _ = DiT(config).text_embedder(told["text"], told["text_mask"])
    assert float(pooled.detach().std()) == pytest.approx(0.7, rel=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": torch.zeros(2, 4, 12)}, r"\(2, 4, 12\); .* \(n, 5, 12\)"),
        ({"text": torch.zeros(2, 5, 13)}, r"\(2, 5, 13\); .* \(n, 5, 12\)"),
        ({"text_mask": None}, "told.*'text'.*built for.*'text_mask'"),
    ],
)
def test_text_of_another_shape_or_without_its_mask_is_refused(change, message):
    x, time, told = batch(2, POOLED)
    told = {name: value for name, value in (told | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        DiT(POOLED)(x, time, told)


def test_nulls_can_be_asked_for_some_conditions_only():
    model = DiT(POOLED)
    assert list(model.null_conditions(2)) == ["diagnosis", "skin_type", "text", "text_mask"]
    some = model.null_conditions(3, ["skin_type"])
    assert {name: value.tolist() for name, value in some.items()} == {"skin_type": [6, 6, 6]}
    assert list(model.null_conditions(3, ["text"])) == ["text", "text_mask"]
    with pytest.raises(ValueError, match="'sex'.*diagnosis, skin_type, text"):
        model.null_conditions(1, ["sex"])


def test_guidance_of_a_network_with_text_mixes_told_and_untold():
    model = awake(CROSS)
    x, time, told = batch(3, CROSS)
    with torch.no_grad():
        mixed = guided(model, told, 2.5)(x, time)
        untold = model(x, time, model.null_conditions(3))
        expected = untold + 2.5 * (model(x, time, told) - untold)
    torch.testing.assert_close(mixed, expected, atol=1e-4, rtol=1e-4)


def test_recomputing_the_blocks_of_every_variant_gives_the_same_gradients():
    model = awake(ALL)
    gradients = []
    for model.is_checkpointing in (False, True):
        model.zero_grad()
        model(*batch(2, ALL)).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


def test_rotary_positions_leave_the_parameters_as_they_are():
    assert names(ROTARY) == names(PLAIN)
    torch.manual_seed(4)
    one = DiT(PLAIN).state_dict()
    torch.manual_seed(4)
    other = DiT(ROTARY).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_rotation_keeps_lengths_and_turns_columns_and_rows_apart():
    side, size = 5, 16
    x = torch.randn(2, 3, side * side, size)
    turned = rotate(x, rotation_table(size, side))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned[:, :, 0], x[:, :, 0])
    of_columns = [i for i in range(size) if i % (size // 2) < size // 4]
    of_rows = [i for i in range(size) if i not in of_columns]
    first_column = torch.arange(side) * side
    torch.testing.assert_close(turned[:, :, first_column][..., of_columns], x[:, :, first_column][..., of_columns])
    torch.testing.assert_close(turned[:, :, :side][..., of_rows], x[:, :, :side][..., of_rows])


def test_rotated_queries_and_keys_see_only_how_far_apart_they_are():
    side, size = 6, 32
    q, k = torch.randn(size).expand(1, 1, side**2, size), torch.randn(size).expand(1, 1, side**2, size)
    rotation = rotation_table(size, side)
    scores = (rotate(q, rotation) @ rotate(k, rotation).mT)[0, 0].view(side, side, side, side)
    for down, right in ((1, 0), (0, 1), (2, 3)):
        near, far = scores[: side - down, : side - right], scores[down:, right:]
        torch.testing.assert_close(
            near[:, :, : side - down, : side - right], far[:, :, down:, right:], atol=1e-4, rtol=1e-4
        )
    assert float((scores[0, 0] - scores[0, 0, 0, 0]).abs().max()) > 0.1, "and that they do see"


def test_a_rotary_network_does_not_see_where_its_grid_lies_but_a_table_shows_it():
    model = awake(ROTARY)
    x, time, told = batch(2, ROTARY)
    here = model(x, time, told)
    model.rotation = rotation_table(16, 4, first_column=9, first_row=-3)
    torch.testing.assert_close(model(x, time, told), here, atol=1e-4, rtol=1e-4)
    model.rotation = rotation_table(16, 4).flip(1)
    assert float((model(x, time, told) - here).detach().abs().max()) > 1e-3
    with torch.no_grad():
        model.pos_embed.zero_()
    model.rotation = rotation_table(16, 4)
    torch.testing.assert_close(model(x, time, told), here, rtol=0, atol=0, msg="the table has no part in it")


@pytest.mark.parametrize(
    ("config", "has_table", "tells"), [(ROTARY, False, True), (PLAIN, True, True), (PLAIN, False, False)]
)
def test_patches_are_told_apart_by_place(config, has_table, tells):
    """Without positions, patches that change places only take their outputs with them."""
    model = awake(config)
    if not has_table:
        model.pos_embed.data.zero_()
    x, time, told = batch(1, config)
    difference = model(x.roll(2, dims=3), time, told) - model(x, time, told).roll(2, dims=3)
    assert (float(difference.detach().abs().max()) > 1e-3) == tells


def test_a_variant_can_be_compiled_without_a_break():
    explained = torch._dynamo.explain(awake(ALL))(*batch(2, ALL))
    assert explained.graph_break_count == 0
