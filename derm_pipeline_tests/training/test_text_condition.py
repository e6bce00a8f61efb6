"""Captions as a condition of a generator: gathered with their rows, hidden like any other, learnt."""

import numpy as np
import pytest
import torch

from derm_pipeline.latents import open_embeddings, write_embeddings
from derm_pipeline.models.dit import DiT
from derm_pipeline.models.generator import build_network
from derm_pipeline.models.laws import RectifiedFlow
from derm_pipeline.training.loop import CheckpointError, Interrupted, TrainingConfig, train
from derm_pipeline.training.objectives import GeneratorObjective, train_generator
from derm_pipeline.training.settings import DiTTraining, TextConditioning, UNetTraining
from derm_pipeline_tests.training.small import NoWaiting

CLASSES = {"diagnosis": ("mel", "nv"), "skin_type": tuple("123456")}
CAPTIONS = ("a dark image", "a bright image", "an image of neither")
TOKENS, WIDTH = 5, 12


def embed(texts):
    """Two to five tokens a text, each of random features that are its own; nonsense where there is no token."""
    drawn = [torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(len(text))) for text in texts]
    mask = torch.arange(TOKENS) < torch.tensor([2 + len(text) % 4 for text in texts])[:, None]
    return {"text": torch.stack(drawn), "text_mask": mask}


@pytest.fixture
def embeddings(tmp_path):
    write_embeddings(tmp_path / "text", CAPTIONS, embed, encoder={"of": "this test"})
    return open_embeddings(tmp_path / "text")


def rows_told_by_caption(embeddings, num=64):
    """Moments (num, 2, 8, 4, 4) of latents that are -1 or +1 throughout, which only their captions tell."""
    is_bright = torch.arange(num) % 2
    mean = (2.0 * is_bright - 1).view(-1, 1, 1, 1, 1).expand(-1, 2, 4, 4, 4)
    rows = torch.from_numpy(embeddings.rows_of(CAPTIONS[kind] for kind in is_bright.tolist()))
    labels = {"diagnosis": torch.zeros(num, dtype=torch.int64), "skin_type": torch.full((num,), 6), "text": rows}
    return torch.cat([mean, torch.full_like(mean, -12.0)], dim=2).half(), labels


def generator(num_steps, text="cross", **changes):
    told = None if text is None else TextConditioning(encoder={"model": "none", "max_tokens": TOKENS}, mode=text)
    budget = {"batch_size": 16, "lr": 3e-3, "warmup_steps": 5, "ema_decay": 0.9, "checkpoint_every_steps": 10}
    return DiTTraining(
        **{"width": 32, "depth": 1, "heads": 2, "law": RectifiedFlow(), "text": told} | changes,
        training=TrainingConfig(num_steps=num_steps, **budget),
    )


@pytest.mark.parametrize("mode", ["cross", "pooled"])
def test_what_only_the_captions_tell_is_learnt(tmp_path, embeddings, mode):
    moments, labels = rows_told_by_caption(embeddings)
    spec, model, trained = train_generator(
        moments, labels, CLASSES, generator(120, mode), work=tmp_path / "work", text=embeddings
    )
    assert (spec.network.text_tokens, spec.network.text_width, spec.network.text_mode) == (TOKENS, WIDTH, mode)
    assert spec.load(_saved(spec, tmp_path)) == spec
    assert np.mean(trained.losses[-20:]) < 0.7 * np.mean(trained.losses[:10])
    noise, time = torch.randn(64, 4, 4, 4, generator=torch.Generator().manual_seed(2)), torch.full((64,), 900.0)
    told = {"diagnosis": torch.zeros(64, dtype=torch.int64), "skin_type": torch.full((64,), 6)}
    with torch.no_grad():
        dark, bright = (
            model.eval()(noise, time, told | embeddings.gather(np.repeat(embeddings.rows_of([caption]), 64)))
            for caption in CAPTIONS[:2]
        )
    # velocity is noise - data: lower for what is brighter
    assert float((dark - bright).mean()) > 0.5


def _saved(spec, folder):
    spec.save(folder)
    return folder


def test_every_row_is_told_its_own_caption_and_the_hidden_ones_none(embeddings):
    moments, labels = rows_told_by_caption(embeddings)
    config = generator(1, condition_dropout=0.2, condition_dropout_each=0.3)
    spec = _spec_of(config)
    told = []

    class Recording(DiT):
        def forward(self, x, time, conditions):
            told.append(conditions)
            return super().forward(x, time, conditions)

    objective = GeneratorObjective(Recording(spec.network), spec, moments, labels, config, embeddings)
    names = ("diagnosis", "skin_type", "text")
    seen = []
    for step in range(12):
        batch = objective.draw(step, torch.Generator().manual_seed(step))
        assert objective.loss(batch).shape == (16,)
        expected = embeddings.gather(labels["text"][batch["rows"]])
        hidden = batch["hidden.text"]
        assert torch.equal(told[-1]["text"][~hidden], expected["text"][~hidden])
        assert torch.equal(told[-1]["text_mask"], expected["text_mask"] & ~hidden[:, None])
        assert told[-1]["diagnosis"].eq(len(CLASSES["diagnosis"])).tolist() == batch["hidden.diagnosis"].tolist()
        seen += torch.stack([batch[f"hidden.{name}"] for name in names], 1).tolist()
    assert [False, False, True] in seen  # by itself
    assert [True, True, True] in seen  # with the others
    assert [True, False, False] in seen  # and the others without it


def _spec_of(config):
    from derm_pipeline.models.generator import GeneratorSpec

    network = config.network(4, 4, {name: len(values) for name, values in CLASSES.items()}, text_width=WIDTH)
    return GeneratorSpec(
        network=network, law=config.law, classes=CLASSES, latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4
    )


def test_a_resident_text_gives_the_losses_of_a_gathered_one(embeddings, monkeypatch):
    moments, labels = rows_told_by_caption(embeddings)
    config = generator(1)
    spec = _spec_of(config)
    torch.manual_seed(3)
    model = build_network(spec.network)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    gathered = GeneratorObjective(model, spec, moments, labels, config, embeddings)
    whole = embeddings.gather(range(len(embeddings)))
    monkeypatch.setattr(type(embeddings), "resident", lambda *_: whole)
    resident = GeneratorObjective(model, spec, moments, labels, config, embeddings)
    one, two = (objective.draw(5, torch.Generator().manual_seed(8)) for objective in (gathered, resident))
    assert "text" in one
    assert "text" not in two
    assert torch.equal(gathered.loss(one), resident.loss(two))


def test_without_text_every_draw_is_what_it_was(embeddings):
    """The text comes last among what is hidden, and nothing is drawn for it where it cannot be hidden by itself."""
    moments, labels = rows_told_by_caption(embeddings)
    draws = []
    for text in (None, "cross"):
        config = generator(1, text)
        spec = _spec_of(config)
        objective = GeneratorObjective(
            build_network(spec.network), spec, moments, labels, config, embeddings if text else None
        )
        draws.append(objective.draw(2, torch.Generator().manual_seed(4)))
    assert draws[1].keys() - draws[0].keys() == {"text", "text_mask", "hidden.text"}
    assert all(torch.equal(tensor, draws[1][name]) for name, tensor in draws[0].items())


def test_no_step_waits_for_the_device(tmp_path, embeddings):
    moments, labels = rows_told_by_caption(embeddings)
    config = generator(6)
    spec = _spec_of(config)
    model = build_network(spec.network)
    objective = GeneratorObjective(model, spec, moments, labels, config, embeddings)
    with NoWaiting() as seen:
        train(model, objective, config.training, work=tmp_path / "work")
    assert seen.num_seen > 300


def test_what_does_not_fit_together_is_refused_before_any_step(tmp_path, embeddings):
    moments, labels = rows_told_by_caption(embeddings)
    options = {"work": tmp_path / "work", "text": embeddings}
    with pytest.raises(ValueError, match="text is told of 9 rows"):
        train_generator(moments, labels | {"text": labels["text"][:9]}, CLASSES, generator(2), **options)
    with pytest.raises(ValueError, match="0 to 4 of 4 embeddings"):
        train_generator(moments, labels | {"text": torch.arange(64) % 5}, CLASSES, generator(2), **options)
    for text, given in ((None, embeddings), ("cross", None)):
        with pytest.raises(ValueError, match="where the settings name text"):
            train_generator(moments, labels, CLASSES, generator(2, text), work=tmp_path / "work", text=given)
    with pytest.raises(ValueError, match="a U-Net is told no text"):
        UNetTraining(text={}, training=generator(1).training)
    assert not (tmp_path / "work").exists()


def test_text_is_part_of_what_a_checkpoint_is_of(tmp_path, embeddings):
    moments, labels = rows_told_by_caption(embeddings)
    options = {"work": tmp_path / "work", "text": embeddings}
    looks = iter(range(99))
    with pytest.raises(Interrupted):
        train_generator(moments, labels, CLASSES, generator(8), **options, stop_when=lambda: next(looks) == 3)
    with pytest.raises(CheckpointError, match="text"):
        train_generator(moments, labels, CLASSES, generator(8, "pooled"), **options)
    assert train_generator(moments, labels, CLASSES, generator(8), **options)[2].resumed_from_step == 4


def test_settings_without_text_are_written_as_they_always_were():
    assert "text" not in generator(1, None).model_dump(mode="json")
    written = generator(1).model_dump(mode="json")
    assert written["text"]["mode"] == "cross"
    assert DiTTraining.model_validate(written) == generator(1)
