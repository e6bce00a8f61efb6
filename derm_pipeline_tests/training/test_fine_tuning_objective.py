"""What a step of a fine-tuning draws and computes; held against the same with nothing cached."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from derm_pipeline.latents import open_embeddings, write_embeddings
from derm_pipeline.latents.text_cache import Embeddings
from derm_pipeline.models.generator import GeneratorSpec
from derm_pipeline.models.pretrained.base import load_base
from derm_pipeline.models.pretrained_vae import PretrainedVae
from derm_pipeline.training.fine_tuned import Captioned
from derm_pipeline.training.fine_tuning import fine_tune
from derm_pipeline.training.fine_tuning_objective import Examples, FineTuningObjective, Prior
from derm_pipeline.training.hldf import Hldf, HldfConfig, frozen_decoder
from derm_pipeline.training.told_texts import CachedTexts, EncodedTexts
from derm_pipeline.training.trainee import prepare
from derm_pipeline_tests.training.bases import CAPTIONS, CLASSES, images, inversion, lora, settings

CPU = torch.device("cpu")


def objective(folder, texts=None, base=None, examples=None, prior=None, size=32, **changes):
    """Of a base's denoiser, untrained, and its texts."""
    config = settings(folder, **changes)
    base = base or load_base(config.base)
    texts = texts or EncodedTexts(base, CAPTIONS, CPU)
    trainee = prepare(lora(), base, base.network_config(8))
    trainee.network.set_null(base.null())
    mean, std = base.latent_scaling
    spec = GeneratorSpec(
        network=trainee.network.config, law=config.law(base.law), classes=CLASSES, latent_mean=mean, latent_std=std
    )
    few = images()
    examples = examples or Examples(few.moments, few.diagnoses, texts.rows(few.captions)[:, None])
    return FineTuningObjective(
        trainee.network, spec, examples, texts, config, size, CPU, caption_dropout=config.caption_dropout, prior=prior
    )


def drawn(made, num=60):
    """Draws of so many steps, joined."""
    batches = [made.draw(step, torch.Generator().manual_seed(step)) for step in range(num)]
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def share(flags):
    return float(flags.double().mean())


def test_flips_dropout_diagnoses_and_templates_are_drawn_as_often_as_they_should(tiny_base):
    few = images()
    choices = torch.arange(11).expand(6, -1)
    config = {"caption_dropout": 0.2, "balance": 1.0, "noise_offset": 0.5}
    texts = EncodedTexts(load_base(settings(tiny_base("sd")).base), [f"a photo {n}" for n in range(11)], CPU)
    batch = drawn(objective(tiny_base("sd"), texts, examples=Examples(few.moments, few.diagnoses, choices), **config))
    num = len(batch["rows"])  # 1,920: five deviations are 0.057 of a half, 0.046 of a fifth
    assert num == 1920
    assert share(batch["orientations"] == 1) == pytest.approx(0.5, abs=0.057)
    assert share(batch["hidden"]) == pytest.approx(0.2, abs=0.046)
    assert share(few.diagnoses[batch["rows"]] == 1) == pytest.approx(0.5, abs=0.057)  # a third of the images
    counts = batch["texts"].bincount(minlength=11)
    assert (counts / num - 1 / 11).abs().max() < 0.033
    offsets = batch["noise"].mean((2, 3))  # of 64 cells: 0.25 + 1 / 64
    assert float(offsets.var()) == pytest.approx(0.2656, rel=0.15)
    assert "hidden" not in drawn(objective(tiny_base("sd"), size=2), 1)


@pytest.mark.parametrize("family", ["sd", "sd2", "sdxl", "pixart"])
@torch.no_grad()
def test_a_cached_loss_is_the_loss_with_nothing_cached(family, tiny_base, tmp_path):
    """By the baseline: each step encodes image and caption, and calls diffusers' own scheduler and network."""
    base = load_base(settings(tiny_base(family)).base)
    pixels = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1
    turned = torch.stack([pixels, pixels.flip(3)], 1)
    moments = torch.cat(base.vae.encode(turned.flatten(0, 1)), 1).unflatten(0, (6, 2))
    few = images()
    write_embeddings(tmp_path, CAPTIONS, base.embed, encoder=base.text_identity)
    halved = open_embeddings(tmp_path)
    single = Embeddings([base.embed(["", *CAPTIONS])], halved._shard, halved._row, list(halved._place), halved.encoder)
    scheduler = DDPMScheduler.from_config(base.pipeline().scheduler.config)
    for embeddings, held, tolerance in ((single, moments, 1e-5), (halved, moments.half(), 2e-3)):
        texts = CachedTexts(embeddings, base.null(), CPU)
        examples = Examples(held, few.diagnoses, texts.rows(few.captions)[:, None])
        made = objective(
            tiny_base(family),
            texts,
            base=load_base(base.reference.settings),
            examples=examples,
            size=8,
            caption_dropout=0.5,
        )
        batch = made.draw(0, torch.Generator().manual_seed(7))
        mean, logvar = base.vae.encode(turned[batch["rows"], batch["orientations"]])
        latents = (mean + (0.5 * logvar).exp() * batch["latent_noise"]) * base.pipeline().vae.config.scaling_factor
        times = batch["times"].round().long()
        noised = scheduler.add_noise(latents, batch["noise"], times)
        captions = [few.captions[row] for row in batch["rows"].tolist()]
        told = base.embed(captions)
        null = base.null()
        for name, value in told.items():
            value[batch["hidden"]] = null[name].expand_as(value)[batch["hidden"]]
        output = made._network(noised, times.float(), told)
        is_v = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(latents, batch["noise"], times) if is_v else batch["noise"]
        expected = F.mse_loss(output, target, reduction="none").mean((1, 2, 3))
        assert (made.loss(batch) - expected).abs().max() < tolerance
    assert batch["hidden"].any()


def test_with_a_cache_neither_text_encoder_nor_autoencoder_is_called(tiny_base, tmp_path, monkeypatch):
    base = load_base(settings(tiny_base("sd")).base)
    few = images()
    write_embeddings(tmp_path / "texts", few.captions, base.embed, encoder=base.text_identity)
    calls = []
    for kind, name in ((type(base.text_encoders[0]), "forward"), (PretrainedVae, "encode"), (PretrainedVae, "decode")):
        monkeypatch.setattr(kind, name, lambda *args, name=name, **named: calls.append(name))
    arguments = {"text": open_embeddings(tmp_path / "texts"), "held_out": few}
    config = settings(tiny_base("sd"), lora(num_steps=2), caption_dropout=0.5)
    done = fine_tune(few, CLASSES, config, work=tmp_path / "work", **arguments)
    assert calls == []
    assert done.stages[0].num_captions_cut is None
    write_embeddings(tmp_path / "others", few.captions, lambda own: {"text": torch.ones(len(own), 77, 32)}, encoder={})
    with pytest.raises(ValueError, match="not of this base"):
        fine_tune(few, CLASSES, config, work=tmp_path / "b", text=open_embeddings(tmp_path / "others"))


def test_a_text_encoder_is_called_once_for_each_text_and_not_in_steps(tiny_base, tmp_path, monkeypatch):
    config = settings(tiny_base("sd"), lora(num_steps=3))
    kind = type(load_base(config.base).text_encoders[0])
    rows, forward = [], kind.forward

    def counted(self, ids, **named):
        rows.append(len(ids))
        return forward(self, ids, **named)

    monkeypatch.setattr(kind, "forward", counted)
    fine_tune(images(), CLASSES, config, work=tmp_path)
    assert rows == [1 + len(CAPTIONS)]


def test_a_prior_counts_as_much_as_its_weight(tiny_base):
    base = load_base(settings(tiny_base("sd")).base)
    texts = EncodedTexts(base, [*CAPTIONS, "skin"], CPU)
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    prior = Prior(latents, texts.rows(["skin"] * 3), weight=0.25)
    made = objective(tiny_base("sd"), texts, prior=prior, size=6)
    batch = made.draw(0, torch.Generator().manual_seed(1))
    own, others = torch.arange(0, 6, 2), torch.arange(1, 6, 2)
    assert torch.equal(made.latents(batch)[others], latents[batch["prior"][others]])
    skin = base.embed(["skin"])["text"]
    torch.testing.assert_close(made.told(batch)["text"][others], skin.expand(3, -1, -1))
    plain = objective(tiny_base("sd"), texts, size=6)
    with torch.no_grad():
        losses = made.loss(batch)
        without = plain.loss({name: tensor[own] for name, tensor in batch.items()})
        unweighted = objective(tiny_base("sd"), texts, prior=Prior(latents, prior.texts, 1.0), size=6).loss(batch)
    torch.testing.assert_close(losses[own], 2 * without)
    torch.testing.assert_close(losses[others], 0.25 * unweighted[others])


def test_min_snr_is_the_law_of_the_base_with_a_ceiling(tiny_base):
    config = settings(tiny_base("sd2"), min_snr_gamma=5.0)
    own = load_base(config.base).law
    assert config.law(own) == own.model_copy(update={"min_snr_gamma": 5.0})
    assert config.law(own).prediction == "v"


def test_an_inversion_tells_templates_of_the_images_own_token(tiny_base, tmp_path, monkeypatch):
    from derm_pipeline.training import fine_tuning

    asked = []

    class Spy(EncodedTexts):
        def draw(self, rows):
            asked.extend(rows.tolist())
            return super().draw(rows)

        def rows(self, texts):
            self.known = getattr(self, "known", {}) | dict(zip(super().rows(texts).tolist(), texts, strict=True))
            asked_texts.update(self.known)
            return super().rows(texts)

    asked_texts = {}
    monkeypatch.setattr(fine_tuning, "EncodedTexts", Spy)
    stage = inversion({"batch_size": 8}, templates=("a photo of a {}", "the {}"))
    few = images()
    mel = [row for row in range(6) if few.diagnoses[row] == 0]
    one = Captioned(few.moments[mel], few.diagnoses[mel], [""] * len(mel))
    fine_tune(one, CLASSES, settings(tiny_base("sd"), stage, caption_dropout=0.9), work=tmp_path)
    told = {asked_texts[row] for row in asked}
    assert told == {"a photo of a mel-class", "the mel-class"}
    assert set(itertools.chain(asked_texts.values())) == told | {"a photo of a mela-class", "the mela-class"}


def test_drawn_images_teach_all_adapters_and_never_the_autoencoder(tiny_base):
    base = load_base(settings(tiny_base("pixart")).base)
    stage = lora(text=True, targets=("q", "v")).model_copy(update={"denoiser": lora().denoiser})
    trainee = prepare(stage, base, base.network_config(8), activation_checkpointing=True)
    texts = EncodedTexts(base, CAPTIONS, CPU)
    trainee.network.set_null(base.null())
    mean, std = base.latent_scaling
    term = Hldf(HldfConfig(num_steps=2), base.law, trainee.network, frozen_decoder(base.vae, mean, std))
    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    trainee.module.train()
    told = texts.told(texts.draw(texts.rows(CAPTIONS[:2])))
    term.losses(told, noise, latents=latents, null=texts.null(2)).sum().backward()
    ups = {name: weight.grad for name, weight in trainee.module.named_parameters() if "lora_B" in name}
    assert {name.split(".")[0] for name in ups} == {"network", "text"}
    assert all(grad is not None and grad.any() for grad in ups.values())
    assert all(weight.grad is None for weight in base.vae.parameters())
