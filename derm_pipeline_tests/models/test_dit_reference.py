"""The DiT against what the paper says it computes, in float64, and the work that it costs."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

from derm_pipeline.models.dit import DiT, DiTConfig, preset


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def silu(x):
    return x / (1 + torch.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def normalised(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)


def modulated(x, shift, scale):
    return normalised(x) * (1 + scale[:, None]) + shift[:, None]


def attention(state, name, x, heads):
    n, t, d = x.shape
    q, k, v = (part.reshape(n, t, heads, d // heads) for part in linear(state, f"{name}.qkv", x).split(d, dim=2))
    weights = torch.softmax(torch.einsum("nihe,njhe->nhij", q, k) / math.sqrt(d // heads), dim=3)
    return linear(state, f"{name}.proj", torch.einsum("nhij,njhe->nihe", weights, v).reshape(n, t, d))


def reference(state: dict[str, torch.Tensor], config: DiTConfig, x, time, classes):
    """Peebles and Xie 2023, sections 3.1 and 3.2: float64, from the weights by name and nothing else."""
    patch, side, n = config.patch, config.latent_size // config.patch, len(x)
    patches = x.reshape(n, -1, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5).reshape(n, side * side, -1)
    kernel = state["x_embedder.proj.weight"].flatten(1)
    tokens = patches @ kernel.T + state["x_embedder.proj.bias"] + state["pos_embed"]
    angles = time[:, None] * torch.tensor([10000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    code = torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)
    told = linear(state, "t_embedder.mlp.2", silu(linear(state, "t_embedder.mlp.0", code)))
    told = silu(told + state["y_embedder.embedding_table.weight"][classes])
    for i in range(config.depth):
        block = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(state, f"{block}.adaLN_modulation.1", told).chunk(6, 1)
        mixed = attention(state, f"{block}.attn", modulated(tokens, shift1, scale1), config.heads)
        tokens = tokens + gate1[:, None] * mixed
        hidden = gelu(linear(state, f"{block}.mlp.fc1", modulated(tokens, shift2, scale2)))
        tokens = tokens + gate2[:, None] * linear(state, f"{block}.mlp.fc2", hidden)
    shift, scale = linear(state, "final_layer.adaLN_modulation.1", told).chunk(2, 1)
    out = linear(state, "final_layer.linear", modulated(tokens, shift, scale))
    return torch.einsum("nhwpqc->nchpwq", out.reshape(n, side, side, patch, patch, -1)).reshape(
        n, -1, config.latent_size, config.latent_size
    )


def test_s2_and_its_gradients_equal_the_reference_in_float64():
    torch.manual_seed(3)
    config = preset("S/2", latent_size=32, conditions={"label": 1000})
    model = DiT(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                parameter.add_(0.03 * torch.randn_like(parameter))
    x, target = torch.randn(2, 4, 32, 32), torch.randn(2, 8, 32, 32)
    time, classes = torch.tensor([999.0, 137.5]), torch.tensor([1000, 207])
    state = {name: value.detach().double().requires_grad_() for name, value in model.state_dict().items()}

    expected = reference(state, config, x.double(), time.double(), classes)
    expected_loss = ((expected - target.double()) ** 2).mean()
    expected_loss.backward()
    found = model(x, time, {"label": classes})
    loss = (found - target).square().mean()
    loss.backward()

    assert float(expected.detach().std()) > 0.1, "the network is awake"
    assert float((found.detach() - expected.detach()).norm() / expected.detach().norm()) < 1e-5
    assert float(loss.detach()) == pytest.approx(float(expected_loss.detach()), rel=1e-6)
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            wanted = state[name].grad
            assert float(wanted.norm()) > 0, name
            assert float((parameter.grad - wanted).norm() / wanted.norm()) < 1e-4, name


def gflop(config: DiTConfig, *, is_training: bool, is_checkpointing: bool = False) -> float:
    """Floating-point operations for one image with fused attention, counted as it would run, on tensors without data.

    The counter does not know the CPU's fused attention by itself; it is given the law of the GPU's.
    """
    aten = torch.ops.aten
    fused = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad, q, k, v, *_, **__: sdpa_backward_flop(grad, q, k, v)
        ),
    }
    with FakeTensorMode():
        model = DiT(config)
        model.is_checkpointing = is_checkpointing
        size = config.latent_size
        x, time = torch.randn(1, config.channels, size, size), torch.rand(1)
        told = {name: torch.zeros(1, dtype=torch.long) for name in config.conditions}
        with FlopCounterMode(display=False, custom_mapping=fused) as counter:
            if is_training:
                model(x, time, told).sum().backward()
            else:
                with torch.no_grad():
                    model(x, time, told)
        return counter.get_total_flops() / 1e9


def test_xl2_at_256_px_costs_what_it_must():
    config = preset("XL/2", latent_size=32, conditions={"label": 1000})
    assert gflop(config, is_training=False) == pytest.approx(237.2, abs=0.1)
    assert gflop(config, is_training=True) == pytest.approx(716.0, abs=0.1)
    assert gflop(config, is_training=True, is_checkpointing=True) == pytest.approx(953.2, abs=0.1)


@pytest.mark.parametrize("size", ["B/2", "S/2"])
def test_leaving_checkpointing_out_saves_a_quarter_of_a_step(size):
    config = preset(size, latent_size=32, conditions={"label": 1000})
    forward = gflop(config, is_training=False)
    plain, recomputing = (gflop(config, is_training=True, is_checkpointing=which) for which in (False, True))
    assert recomputing == pytest.approx(plain + forward, rel=1e-3)
    assert plain / recomputing == pytest.approx(716 / 953, abs=3e-3)
