"""Med-Art's hybrid-level loss: when it fires, what it compares, and what its gradients reach."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from derm_pipeline.models.autoencoder import Autoencoder, AutoencoderConfig
from derm_pipeline.models.generator import GeneratorSpec, build_network
from derm_pipeline.models.laws import DDPM, RectifiedFlow
from derm_pipeline.training.config import TrainingConfig
from derm_pipeline.training.hldf import Hldf, HldfConfig, HldfObjective, frozen_decoder, image_losses
from derm_pipeline.training.loop import Interrupted, train
from derm_pipeline.training.objectives import GeneratorObjective
from derm_pipeline.training.settings import DiTTraining

EPSILON = DDPM(prediction="epsilon")
BOUNDED = DDPM(prediction="v")
"""Of a network that has learned nothing: its noise, taken for noise, would be divided by an alpha near 0."""


class Toy(nn.Module):
    """A few numbers that predict noise from latents, time and one told vector; float64."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(0.3 * torch.randn(4, 2, dtype=torch.float64))
        self.empty = nn.Parameter(torch.randn(2, dtype=torch.float64))
        self.num_calls, self.times = 0, []

    def forward(self, x, time, told):
        self.num_calls += 1
        self.times += [float(time[0])]
        scale = (told["text"] @ self.weights.T + torch.cos(time.double() / 300)[:, None])[:, :, None, None]
        return torch.tanh(x * scale) + 0.1 * x.roll(1, 1)

    def null_conditions(self, num):
        return {"text": self.empty.expand(num, -1)}


class Decoder(nn.Module):
    """Latents (n, 4, h, w) to images (n, 3, 2 h, 2 w), each of its own place."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(3, 4, dtype=torch.float64) / 2, requires_grad=False)
        self.num_calls = 0

    def forward(self, latents):
        self.num_calls += 1
        mixed = torch.einsum("oc,nchw->nohw", self.weights, latents)
        return torch.tanh(mixed).repeat_interleave(2, 2).repeat_interleave(2, 3)


def toys(num=2, side=3):
    """What the term's losses are told: conditions that take gradients, noise, real images, latents."""
    text = torch.randn(num, 2, dtype=torch.float64, requires_grad=True)
    noise, latents = torch.randn(2, num, 4, side, side, dtype=torch.float64)
    images = torch.rand(num, 3, 2 * side, 2 * side, dtype=torch.float64) * 2 - 1
    return {"text": text}, noise, images, latents


def hldf(toy=None, law=BOUNDED, decoder=None, **changes):
    return Hldf(HldfConfig(**changes), law, toy or Toy(), decoder or Decoder())


def constants(*values):
    return torch.tensor(values)[:, None, None, None].expand(-1, 3, 6, 5).clone()


@pytest.mark.parametrize("name", ["colour_moments", "colour_quantiles", "low_frequency", "pixels"])
def test_a_constant_image_of_a_half_against_nothing_costs_a_quarter(name):
    drawn = constants(0.5, -1.0).requires_grad_()
    losses = image_losses(name, drawn, constants(0.0, 0.0))
    assert losses.tolist() == pytest.approx([0.25, 1.0])
    losses.sum().backward()
    assert drawn.grad.isfinite().all()  # the deviation of a constant has no slope, and must not make one of NaN


def test_colour_moments_are_means_and_unbiased_deviations_of_each_channel():
    drawn, real = torch.randn(2, 4, 3, 5, 7, dtype=torch.float64)
    for loss, a, b in zip(image_losses("colour_moments", drawn, real), drawn.numpy(), real.numpy(), strict=True):
        expected = [(a[c].mean() - b[c].mean()) ** 2 + (a[c].std(ddof=1) - b[c].std(ddof=1)) ** 2 for c in range(3)]
        assert float(loss) == pytest.approx(sum(expected) / 3)


def test_losses_of_colours_do_not_ask_where_a_colour_lies_and_those_by_place_do():
    real = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    turned = real.transpose(2, 3).flip(2)
    assert image_losses("colour_moments", turned, real).max() < 1e-20
    assert image_losses("colour_quantiles", turned, real).max() == 0
    assert image_losses("pixels", turned, real).min() > 0.1
    assert image_losses("low_frequency", turned, real).min() > 0.01


def test_quantiles_tell_apart_what_has_the_same_moments():
    two_peaks = torch.tensor([-1.0, 1.0] * 32).view(1, 1, 8, 8).expand(1, 3, 8, 8)
    normal = torch.randn(1, 3, 8, 8)
    normal = (normal - normal.mean((2, 3), keepdim=True)) / normal.std((2, 3), keepdim=True)
    normal = normal * two_peaks.std((2, 3), keepdim=True)
    assert float(image_losses("colour_moments", normal, two_peaks)) < 1e-10
    assert float(image_losses("colour_quantiles", normal, two_peaks)) > 0.02


def test_low_frequencies_do_not_see_detail():
    detail = torch.ones(1, 3, 32, 32)
    detail[..., ::2] = -1
    assert float(image_losses("low_frequency", detail, torch.zeros_like(detail))) < 1e-10
    sizes = torch.randn(1, 3, 21, 5)  # not made of whole cells, and smaller than the grid
    assert image_losses("low_frequency", sizes, sizes).tolist() == [0]


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 3, 4, 4\).*\(1, 3, 1, 1\)"):
        image_losses("pixels", torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 1, 1))


def test_the_defaults_are_med_arts():
    config = HldfConfig()
    assert [step for step in range(1501) if config.fires_at(step)] == [0, 500, 1000, 1500]
    assert (config.num_steps, config.guidance, config.image_weight) == (20, 4.5, 1 / 20)
    assert HldfConfig(num_steps=8, loss="pixels").image_weight == 1 / 8
    assert HldfConfig(weight=3).image_weight == 3
    visited = [999, 949, 899, 849, 799, 749, 699, 649, 599, 549, 500, 450, 400, 350, 300, 250, 200, 150, 100, 50]
    toy = Toy()
    term = hldf(toy)
    assert term.times == visited
    told, noise, _, _ = toys()
    term.draw(told, noise)
    assert toy.times == visited


def test_it_draws_what_the_scheduler_of_diffusers_draws():
    from diffusers import DPMSolverMultistepScheduler

    toy = Toy()
    told, noise, _, _ = toys(num=3)
    scheduler = DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02)
    scheduler.set_timesteps(20)
    theirs, both = noise, {"text": torch.cat([told["text"], toy.null_conditions(3)["text"]])}
    for time in scheduler.timesteps:
        output, untold = toy(theirs.repeat(2, 1, 1, 1), time.expand(6), both).chunk(2)
        theirs = scheduler.step(untold + 4.5 * (output - untold), time, theirs).prev_sample
    torch.testing.assert_close(hldf(toy, EPSILON).draw(told, noise), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": "colour_quantiles"},
        {"loss": "pixels", "strength": 1},
        {"loss": "low_frequency", "strength": 0.5, "num_steps": 4, "activation_checkpointing": False},
        {"guidance": 1.0, "law": RectifiedFlow(), "spacing": None},
    ],
)
def test_the_gradient_is_that_of_finite_differences(changes):
    toy = Toy()
    term = hldf(toy, **{"num_steps": 2} | changes)
    told, noise, images, latents = toys(side=2)
    if "guidance" in changes:
        toy.empty.requires_grad_(requires_grad=False)  # nothing is told it
    inputs = [weights for weights in (*toy.parameters(), told["text"]) if weights.requires_grad]

    def losses(*_):
        return term.losses(told, noise, images=images, latents=latents)

    assert torch.autograd.gradcheck(losses, inputs)
    assert all(slope.abs().max() > 1e-4 for slope in torch.autograd.grad(losses().sum(), inputs))


def gradients(term, rows=slice(None), given=None):
    told, noise, images, latents = given
    term._network.zero_grad()
    losses = term.losses({"text": told["text"][rows]}, noise[rows], images=images[rows], latents=latents[rows])
    return losses.detach(), torch.autograd.grad(losses.sum(), (*term._network.parameters(), told["text"]))


def test_a_batch_of_four_is_four_batches_of_one():
    term, given = hldf(num_steps=5), toys(num=4)
    losses, whole = gradients(term, given=given)
    single = [gradients(term, slice(row, row + 1), given) for row in range(4)]
    torch.testing.assert_close(losses, torch.cat([loss for loss, _ in single]))
    for number, gradient in enumerate(whole):
        torch.testing.assert_close(gradient, sum(parts[number] for _, parts in single))


def test_computing_again_gives_the_very_gradients_and_keeps_less():
    toy, given = Toy(), toys()
    decoder, kept, found = Decoder(), [], []
    for is_checkpointed in (False, True):
        term = hldf(toy, decoder=decoder, activation_checkpointing=is_checkpointed)
        with counted_bytes() as num_bytes:
            found.append(gradients(term, given=given))
        kept.append(num_bytes[0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
    assert kept[1] < 0.6 * kept[0]


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """Bytes kept for a backward pass, outside of what is computed again."""
    num_bytes = [0]

    def note(tensor):
        num_bytes[0] += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield num_bytes


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("num_last", [1, 3, 6])
def test_truncated_gradients_are_those_of_a_drawing_whose_first_steps_are_fixed(num_last, is_checkpointed):
    toy, given = Toy(), toys()
    told, noise, images, _ = given
    term = hldf(toy, num_steps=6, num_gradient_steps=num_last, activation_checkpointing=is_checkpointed)
    losses, found = gradients(term, given=given)

    class Fixed:
        """The same network, whose first answers are taken as numbers."""

        num_left = 6 - num_last
        null_conditions = toy.null_conditions

        def __call__(self, x, time, conditions):
            self.num_left -= 1
            output = toy(x, time, conditions)
            return output.detach() if self.num_left >= 0 else output

    fixed = hldf(Fixed(), decoder=term._decode, num_steps=6, activation_checkpointing=False)
    expected = fixed.losses(told, noise, images=images)
    torch.testing.assert_close(losses, expected)
    slopes = torch.autograd.grad(expected.sum(), (*toy.parameters(), told["text"]))
    for one, other in zip(found, slopes, strict=True):
        torch.testing.assert_close(one, other)


def test_truncated_gradients_survive_autocast():
    network = nn.Conv2d(4, 4, 1)

    class Conditional:
        null_conditions = staticmethod(lambda num: {"nothing": torch.zeros(num)})

        def __call__(self, x, time, told):
            return network(x)

    told, noise, images = {"nothing": torch.zeros(2)}, torch.randn(2, 4, 3, 3), torch.zeros(2, 3, 6, 6)
    decoder = Decoder().float()
    term = hldf(Conditional(), decoder=decoder, num_steps=4, num_gradient_steps=2)
    with torch.autocast("cpu", torch.bfloat16):
        losses = term.losses(told, noise, images=images)
    losses.sum().backward()
    assert network.weight.grad.abs().max() > 0


def adapted(module, targets):
    """With LoRA weights that are not zero, so that both halves of each have a slope; only they are trained."""
    from peft import LoraConfig, inject_adapter_in_model

    module.requires_grad_(requires_grad=False)
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    return inject_adapter_in_model(config, module)


def test_gradients_reach_the_lora_of_denoiser_and_text_encoder_and_nothing_of_the_vae():
    from diffusers import AutoencoderKL, PixArtTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    sizes = {"vocab_size": 20, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    text = adapted(T5EncoderModel(T5Config(**sizes)), ["q", "v", "o", "wo"])
    shape = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "sample_size": 4}
    shape |= {"cross_attention_dim": 8, "caption_channels": 16, "in_channels": 4, "out_channels": 8}
    denoiser = PixArtTransformer2DModel(**shape, use_additional_conditions=False)
    denoiser = adapted(denoiser, ["to_k", "to_q", "to_v", "to_out.0", "linear_1", "linear_2"])
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4)

    class Network:
        """The prediction without its variance; its own nulls are of no use here."""

        def __call__(self, x, time, told):
            return denoiser(
                x, encoder_hidden_states=told["text"], timestep=time, added_cond_kwargs={}, return_dict=False
            )[0][:, :4]

        def null_conditions(self, num):
            return {"text": torch.full((num, 5, 16), torch.nan)}

    def embed(tokens):
        return {"text": text(tokens).last_hidden_state}

    vae.decoder.requires_grad_(requires_grad=True)
    decode = frozen_decoder(Decoding(vae), [0.1] * 4, [2.0] * 4)
    term = Hldf(HldfConfig(num_steps=3), EPSILON, Network(), decode)
    told, null = embed(torch.randint(2, 20, (2, 5))), embed(torch.ones(2, 5, dtype=torch.long))
    losses = term.losses(told, torch.randn(2, 4, 4, 4), images=torch.rand(2, 3, 4, 4), null=null)
    losses.sum().backward()
    for module in (text, denoiser):
        trained = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        assert trained
        assert all("lora" in name for name in trained)
        assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in trained.values())
    assert all(weight.grad is None and not weight.requires_grad for weight in vae.parameters())


class Decoding(nn.Module):
    """A diffusers VAE as our own are called."""

    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def decode(self, latents):
        return self.vae.decode(latents).sample


def test_the_decoder_gets_latents_as_its_encoder_made_them():
    model = Autoencoder(AutoencoderConfig(width=8, num_blocks=1, latent_channels=4))
    whitened = torch.randn(2, 4, 3, 3)
    mean, std = torch.randn(4), torch.rand(4) + 0.5
    images = frozen_decoder(model, mean.tolist(), std.tolist())(whitened)
    expected = model.decode(whitened * std[:, None, None] + mean[:, None, None])
    torch.testing.assert_close(images, expected)
    assert not model.training


def test_guidance_goes_away_from_what_is_given_as_nothing_with_its_gradients():
    toy = Toy()
    told, noise, images, _ = toys()
    term = hldf(toy, num_steps=2)
    given = toy.empty.detach().clone().requires_grad_()
    losses = term.losses(told, noise, images=images, null={"text": given.expand(2, -1)})
    torch.testing.assert_close(losses, term.losses(told, noise, images=images))
    losses.sum().backward()
    assert toy.empty.grad is None
    assert given.grad.abs().max() > 0


def test_a_drawing_that_starts_part_way_starts_from_the_examples_own_latents():
    toy = Toy()
    term = hldf(toy, loss="pixels", num_steps=20)
    told, noise, images, latents = toys()
    term.losses(told, noise, images=images, latents=latents)
    assert toy.times == [500, 450, 400, 350, 300, 250, 200, 150, 100, 50]
    with pytest.raises(ValueError, match="last 10 steps starts from the examples' own latents"):
        term.losses(told, noise, images=images)

    class Oracle:
        """Knows the noise."""

        null_conditions = toy.null_conditions

        def __call__(self, x, time, conditions):
            return torch.cat([noise, noise])

    oracle = hldf(Oracle(), EPSILON, decoder=lambda latents: latents[:, :3], loss="pixels")
    torch.testing.assert_close(oracle.draw(told, noise, latents=latents), latents)
    assert oracle.losses(told, noise, latents=latents).max() < 1e-20


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="num_gradient_steps 11 is more than the 10"):
        HldfConfig(loss="pixels", num_gradient_steps=11)
    with pytest.raises(ValueError, match=r"flow has no steps.*null"):
        hldf(law=RectifiedFlow())
    with pytest.raises(ValueError, match="1000 steps"):
        hldf(num_steps=1000)
    told, noise, _, _ = toys()
    with pytest.raises(ValueError, match="nothing to compare"):
        hldf().losses(told, noise)


# In the loop

CLASSES = {"diagnosis": ("nevus", "melanoma")}


class Counted(nn.Module):
    """An autoencoder that counts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.inside = Autoencoder(AutoencoderConfig(width=8, num_blocks=1, latent_channels=4))
        self.num_decoded = 0

    def decode(self, latents):
        self.num_decoded += len(latents)
        return self.inside.decode(latents)


def budget(**changes):
    defaults = {"num_steps": 5, "batch_size": 4, "lr": 1e-3, "warmup_steps": 1, "precision": "fp32"}
    return TrainingConfig(**defaults | changes)


def generator(training, images=None, **changes):
    """A tiny generator, its own objective, and that with the loss of images added."""
    torch.manual_seed(0)
    shape = {"patch": 2, "width": 8, "depth": 1, "heads": 2, "law": EPSILON, "conditions": ("diagnosis",)}
    config = DiTTraining(training=training, **shape)
    spec = GeneratorSpec(
        network=config.network(4, 4, {"diagnosis": 2}),
        law=EPSILON,
        classes=CLASSES,
        latent_mean=(0.1,) * 4,
        latent_std=(2.0,) * 4,
    )
    model, autoencoder = build_network(spec.network), Counted()
    moments = torch.randn(6, 2, 8, 4, 4, generator=torch.Generator().manual_seed(2))
    inner = GeneratorObjective(model, spec, moments, {"diagnosis": torch.arange(6) % 2}, config)
    decode = frozen_decoder(autoencoder, spec.latent_mean, spec.latent_std)
    term = Hldf(HldfConfig(**{"every_steps": 3, "num_steps": 2} | changes), EPSILON, model, decode)
    return model, inner, HldfObjective(inner, term, images=images), autoencoder


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def test_it_changes_no_draw_and_costs_nothing_between_firings():
    model, inner, objective, autoencoder = generator(budget())
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    for step in range(7):
        batch, plain = objective.draw(step, stream(step)), inner.draw(step, stream(step))
        assert all(torch.equal(batch[name], value) for name, value in plain.items())
        calls.clear()
        autoencoder.num_decoded = 0
        with counted_bytes() as num_bytes:
            losses = objective.loss(batch)
        num_calls = len(calls)
        with counted_bytes() as num_plain:
            expected = inner.loss(plain)
        if step % 3:
            assert batch.keys() == plain.keys()
            assert torch.equal(losses, expected)
            assert (num_calls, autoencoder.num_decoded, num_bytes) == (1, 0, num_plain)
        else:
            assert (losses > expected).all()
            assert (num_calls, autoencoder.num_decoded) == (1 + 2, 2 * 4)


def test_the_loss_of_images_counts_by_its_weight_and_may_compare_with_images_of_files():
    real = torch.rand(6, 3, 16, 16) * 2 - 1
    for images in (None, lambda batch: real[batch["rows"]]):
        model, inner, objective, _ = generator(budget(), images=images)
        nn.init.normal_(model.final_layer.linear.weight)
        batch = objective.draw(0, stream())
        assert ("hldf.images" in batch) == (images is not None)
        term = objective._term
        told, noise, latents = inner.told(batch), batch["hldf.noise"], inner.latents(batch)
        expected = term.losses(told, noise, images=images and images(batch), latents=latents)
        torch.testing.assert_close(objective.loss(batch), inner.loss(batch) + expected / 2)


def test_neither_accumulation_nor_an_interruption_changes_the_training(tmp_path):
    def trained(name, stop_when=None, **changes):
        config = budget(**changes)
        model, _, objective, _ = generator(config)
        try:
            done = train(model, objective, config, work=tmp_path / name, stop_when=stop_when)
        except Interrupted:
            return trained(name, **changes)
        return done.losses, torch.cat([weight.detach().flatten() for weight in model.parameters()])

    whole = trained("whole")
    parts = trained("parts", micro_batch_size=2)
    resumed = trained("resumed", stop_when=iter([False, True]).__next__)
    assert whole[0] == pytest.approx(parts[0], abs=1e-5)
    torch.testing.assert_close(whole[1], parts[1], atol=1e-5, rtol=1e-4)
    assert whole[0] == resumed[0]
    assert torch.equal(whole[1], resumed[1])


def test_every_loss_falls_as_it_is_trained():
    torch.manual_seed(3)
    for name in ("colour_moments", "colour_quantiles", "low_frequency"):
        toy, (told, noise, images, latents) = Toy(), toys(num=4)
        term = hldf(toy, loss=name, num_steps=4, guidance=1.5)
        optimizer = torch.optim.Adam(toy.parameters(), lr=0.02)
        losses = []
        for _ in range(60):
            loss = term.losses(told, noise, images=images, latents=latents).mean()
            optimizer.zero_grad()
            loss.backward(inputs=list(toy.parameters()))
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.8 * losses[0], name
