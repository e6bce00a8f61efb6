import math

import pytest
import torch
from diffusers import PixArtTransformer2DModel, UNet2DConditionModel
from peft.utils import get_peft_model_state_dict
from pydantic import ValidationError
from torch import nn
from transformers import T5Config, T5EncoderModel

from derm_pipeline.models.lora import (
    MAX_RANK,
    Lora,
    LoraConfig,
    LoraLayer,
    add_lora,
    count_lora,
    fit_lora,
    put_lora,
    take_lora,
)
from derm_pipeline_tests.models.lora_cases import filled

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")

# The published configurations: CompVis/stable-diffusion-v1-4, stabilityai/stable-diffusion-2-1-base,
# stabilityai/stable-diffusion-xl-base-1.0 (unet), PixArt-alpha/PixArt-XL-2-512x512 (transformer, text_encoder).
SD_1 = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
SD_2 = SD_1 | {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True}
SDXL = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
PIXART = {
    "sample_size": 64,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
}
T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
MED_ART = (*ATTENTION, "proj_out", "ff.net.0.proj", "ff.net.2", "proj", "linear", "linear_1", "linear_2")
KOHYA = (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")


@pytest.mark.parametrize(
    ("make", "rank", "targets", "num_weights", "num_modules"),
    [
        (lambda: UNet2DConditionModel(**SD_1), 64, ATTENTION, 12_754_944, 128),
        (lambda: UNet2DConditionModel(**SD_2), 8, ATTENTION, 1_659_904, 128),
        (lambda: UNet2DConditionModel(**SDXL), 128, KOHYA, 340_459_520, 722),
        (lambda: PixArtTransformer2DModel(**PIXART), 8, MED_ART, 6_882_688, 287),
        (lambda: T5EncoderModel(T5Config(**T5_XXL)), 8, ("q", "k", "v", "o", "wo"), 9_043_968, 120),
    ],
    ids=["lesiongen", "skin_diff", "melanoma_sdxl", "med_art", "med_art_text"],
)
def test_the_predecessors_adapters_have_their_published_sizes(make, rank, targets, num_weights, num_modules):
    with torch.device("meta"):
        network = make()
    names = add_lora(network, LoraConfig(rank=rank, targets=targets))
    assert len(names) == num_modules
    assert count_lora(network) == num_weights
    assert sum(weight.numel() for weight in network.parameters() if weight.requires_grad) == num_weights
    assert all(weight.is_meta for weight in network.parameters())


@pytest.mark.parametrize(("absent", "nearest"), [("wi", "wi_0"), ("q_proj", "q")])
def test_a_target_that_is_not_there_is_refused_with_those_nearest(absent, nearest):
    network = text_encoder()
    with pytest.raises(ValueError, match=f"'{absent}': no linear or convolution layer of T5EncoderModel.*{nearest}"):
        add_lora(network, LoraConfig(rank=4, targets=("k", absent)))
    assert not hasattr(network, "peft_config")


def test_a_target_that_cannot_be_adapted_is_refused_with_what_it_is():
    with pytest.raises(ValueError, match="only a T5Attention is, which cannot be adapted"):
        add_lora(text_encoder(), LoraConfig(rank=4, targets=("SelfAttention",)))


@pytest.mark.parametrize(
    "settings", [{"rank": 0}, {"rank": MAX_RANK + 1}, {"alpha": 0}, {"alpha": math.inf}, {"targets": ()}, {"rnak": 4}]
)
def test_settings_that_make_no_adapter_are_refused_by_name(settings):
    with pytest.raises(ValidationError, match=next(iter(settings))):
        LoraConfig(**{"rank": 4, "targets": ("q",)} | settings)


def test_names_that_are_taken_or_cannot_be_are_refused():
    network, config = text_encoder(), LoraConfig(rank=2, targets=("q",))
    add_lora(network, config, "tone")
    for name, said in (("tone", "has an adapter 'tone' already"), ("a.b", "no name for an adapter")):
        with pytest.raises(ValueError, match=said):
            add_lora(network, config, name)
    with pytest.raises(ValueError, match="no LoRA called 'default'; its adapters: tone"):
        take_lora(network)


@pytest.mark.parametrize("settings", [{}, {"init": "gaussian"}, {"dora": True}, {"rslora": True, "alpha": 3.0}])
def test_a_fresh_adapter_changes_nothing_and_is_all_that_is_trained(settings):
    network, ids = text_encoder().eval(), torch.arange(6)[None]
    before = network(ids).last_hidden_state
    names = add_lora(network, LoraConfig(rank=4, targets=("q", "wo"), **settings))
    assert names == tuple(name for name, _ in text_encoder().named_modules() if name.split(".")[-1] in ("q", "wo"))
    assert type(network) is T5EncoderModel
    torch.testing.assert_close(network(ids).last_hidden_state, before)
    trained = {name for name, weight in network.named_parameters() if weight.requires_grad}
    assert {name.split(".lora_")[0] for name in trained} == set(names)
    network(ids).last_hidden_state.square().sum().backward()
    assert all(weight.grad is not None for weight in network.parameters() if weight.requires_grad)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("alpha", [None, 7.0])
def test_the_change_is_alpha_over_rank_times_up_times_down(alpha, rslora):
    network = Two()
    x, picture = torch.randn(5, 6), torch.randn(2, 3, 8, 8)
    plain, convolved = network.proj(x), network.inner.conv(picture)
    add_lora(network, LoraConfig(rank=4, alpha=alpha, rslora=rslora, targets=("proj", "conv")))
    lora = take_lora(filled(network))
    scale = (4 if alpha is None else alpha) / (2 if rslora else 4)
    own, conv = lora.layers["proj"], lora.layers["inner.conv"]
    assert lora.scale("proj") == pytest.approx(scale)
    torch.testing.assert_close(network.proj(x), plain + scale * x @ own.down.T @ own.up.T)
    kernel = torch.einsum("or,rihw->oihw", conv.up[..., 0, 0], conv.down)
    expected = convolved + scale * nn.functional.conv2d(picture, kernel, padding=1)
    torch.testing.assert_close(network.inner.conv(picture), expected)


def test_dora_gives_each_output_its_magnitude():
    network, x = Two(), torch.randn(5, 6)
    weight, bias = network.proj.weight.detach().clone(), network.proj.bias.detach().clone()
    add_lora(network, LoraConfig(rank=2, alpha=1, dora=True, targets=("inner.proj", "proj")))
    own = take_lora(filled(network)).layers["proj"]
    moved = weight + 0.5 * own.up @ own.down
    directed = own.magnitude[:, None] * moved / moved.norm(dim=1, keepdim=True)
    torch.testing.assert_close(network.proj(x), x @ directed.T + bias)


def test_the_adapter_of_a_network_in_half_precision_is_float32():
    network = Two().to(torch.bfloat16)
    add_lora(network, LoraConfig(rank=2, targets=("proj",)))
    assert {weight.dtype for weight in network.parameters() if weight.requires_grad} == {torch.float32}
    assert network.proj(torch.randn(1, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_taken_out_and_put_into_another_copy_is_the_same(dora):
    network = Two()
    copy = Two()
    copy.load_state_dict(network.state_dict())
    add_lora(network, LoraConfig(rank=3, alpha=2, dora=dora, rslora=True, targets=("proj", "conv")))
    lora = take_lora(filled(network))
    put_lora(copy, lora, "other")
    assert copy.peft_config["other"].target_modules == {"proj", "conv"}
    assert count_lora(copy, "other") == count_lora(network)
    mine, theirs = get_peft_model_state_dict(network), get_peft_model_state_dict(copy, adapter_name="other")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert torch.equal(network.inner.proj(torch.ones(6)), copy.inner.proj(torch.ones(6)))


def test_each_layer_keeps_its_own_rank_and_alpha_even_where_its_name_ends_anothers():
    network = Two()
    layers = {
        "proj": LoraLayer(torch.randn(2, 6), torch.randn(4, 2), 3.0),
        "inner.conv": LoraLayer(torch.randn(5, 3, 3, 3), torch.randn(2, 5, 1, 1), 1.0),
    }
    put_lora(network, Lora(layers))
    taken = take_lora(network)
    assert taken.layers.keys() == layers.keys()  # not inner.proj, which peft's rule by endings would take
    for name, layer in layers.items():
        assert (taken.layers[name].rank, taken.layers[name].alpha) == (layer.rank, layer.alpha)
        assert torch.equal(taken.layers[name].down, layer.down)
    assert network.proj.scaling["default"] == 1.5
    assert network.inner.conv.scaling["default"] == 0.2


def test_of_two_adapters_the_last_is_in_force_and_both_are_kept():
    network, x = Two(), torch.ones(6)
    before = network.proj(x)
    add_lora(network, LoraConfig(rank=2, targets=("proj",)), "first")
    filled(network, "first")
    first = take_lora(network, "first")
    assert not torch.equal(network.proj(x), before)
    add_lora(network, LoraConfig(rank=3, targets=("inner.proj",)), "second")
    assert torch.equal(network.proj(x), before)
    assert take_lora(network, "first").layers["proj"].rank == 2
    assert list(take_lora(network, "second").layers) == ["inner.proj"]
    assert torch.equal(take_lora(network, "first").layers["proj"].up, first.layers["proj"].up)


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ({}, "adapts no layer"),
        ({"pro": ((2, 6), (4, 2))}, r"has no layer pro to adapt \(most like the first is proj\)"),
        ({"norm": ((2, 6), (4, 2))}, "has no layer norm to adapt"),
        ({"proj": ((2, 7), (4, 2))}, r"proj \(down\) is \(2, 7\) in the file and \(2, 6\) in the network"),
        ({"proj": ((2, 6), (4, 3))}, r"proj \(up\) is \(4, 3\) in the file and \(4, 2\)"),
        ({"inner.conv": ((2, 3), (2, 2))}, r"inner.conv \(down\) is \(2, 3\) in the file and \(2, 3, 3, 3\)"),
        ({"proj": ((MAX_RANK + 1, 6), (4, MAX_RANK + 1))}, f"has rank {MAX_RANK + 1}; 1 to {MAX_RANK}"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_and_the_network_stays(layers, said):
    network = Two()
    lora = Lora({name: LoraLayer(torch.zeros(down), torch.zeros(up), 1.0) for name, (down, up) in layers.items()})
    with pytest.raises(ValueError, match=said):
        put_lora(network, lora)
    assert not hasattr(network, "peft_config")
    assert type(network.proj) is nn.Linear


def test_values_that_are_no_numbers_are_refused():
    broken = Lora({"proj": LoraLayer(torch.full((2, 6), math.nan), torch.zeros(4, 2), 1.0)})
    with pytest.raises(ValueError, match=r"x: proj \(down\) holds values that are no finite numbers"):
        fit_lora(Two(), broken, where="x")


def text_encoder() -> T5EncoderModel:
    torch.manual_seed(0)
    return T5EncoderModel(
        T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    )


class Two(nn.Module):
    """Names that end in each other."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 4)
        self.norm = nn.LayerNorm(4)
        self.inner = nn.ModuleDict({"proj": nn.Linear(6, 4), "conv": nn.Conv2d(3, 2, 3, padding=1)})
