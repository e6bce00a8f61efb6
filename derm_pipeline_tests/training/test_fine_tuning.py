"""The stages of a pretrained base: what moves, what does not, and that a kill at any time changes nothing."""

import json
import multiprocessing

import pytest
import torch
from safetensors.torch import load_file

from derm_pipeline.latents import open_embeddings
from derm_pipeline.models.generator import load_embedder, load_network
from derm_pipeline.models.pretrained.base import load_base
from derm_pipeline.training.fine_tuning import fine_tune
from derm_pipeline.training.fine_tuning_settings import PriorConfig
from derm_pipeline.training.hldf import Hldf, HldfConfig
from derm_pipeline.training.loop import Interrupted
from derm_pipeline_tests.training.bases import (
    ATTENTION,
    CAPTIONS,
    CLASSES,
    every_stage,
    fine_tune_as_one_of,
    full,
    images,
    inversion,
    lora,
    settings,
    training,
)
from derm_pipeline_tests.training.test_processes import free_port

CPU = torch.device("cpu")


def tensors(folder):
    """All that a generator's folder holds, by file and name."""
    files = sorted(folder.rglob("*.safetensors"))
    return {(str(path.relative_to(folder)), name): value for path in files for name, value in load_file(path).items()}


def check_same(folder, other):
    found, expected = tensors(folder), tensors(other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def after(looks):
    """Says stop at the so-manieth look."""
    asked = iter(range(1, 1_000))
    return lambda: next(asked) == looks


def prediction(network, told):
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return network(x, torch.tensor([400.0]), told)


def test_a_lora_lowers_the_loss_of_what_it_is_trained_on(tiny_base, tmp_path):
    one = images(1)
    stage = lora(num_steps=40, lr=1e-2, batch_size=8, validation_batches=2, validate_every_steps=40)
    short = lora(num_steps=1, lr=1e-9, batch_size=8, validation_batches=2)
    before = fine_tune(one, CLASSES, settings(tiny_base("sd"), short), work=tmp_path / "a", held_out=one)
    done = fine_tune(one, CLASSES, settings(tiny_base("sd"), stage), work=tmp_path / "b", held_out=one)
    (_, first), (_, last) = before.validation[-1], done.validation[-1]  # the same examples, times and noise
    assert last < 0.95 * first
    weights = sum(value.numel() for (file, _), value in tensors(done.folder).items() if file.startswith("lora"))
    assert done.stages[0].num_weights == weights


@pytest.mark.parametrize("family", ["sd", "sdxl", "pixart"])
def test_what_is_saved_is_what_was_trained(family, tiny_base, tmp_path):
    seen = {}

    def on_samples(step, network, spec, embed):
        seen[step] = prediction(network, embed(CAPTIONS[:1]))

    targets = ("q", "v") if family == "pixart" else None
    stages = [lora(text=True, targets=targets, num_steps=2), lora(num_steps=2)]
    stage = stages[0].model_copy(update={"denoiser": stages[1].denoiser})
    config = settings(tiny_base(family), stage, caption_dropout=0.5, activation_checkpointing=True)
    done = fine_tune(images(), CLASSES, config, work=tmp_path / "work", on_samples=on_samples)
    done.save(tmp_path / "generator")
    spec, network = load_network(tmp_path / "generator", CPU)
    told = load_embedder(tmp_path / "generator")(CAPTIONS[:1])
    torch.testing.assert_close(prediction(network, told), seen[2], rtol=0, atol=1e-6)
    assert spec.network.base.family == family
    assert spec.num_images({"diagnosis": "nv"}) == 2
    base = load_base(config.base)
    null, own = network.null_conditions(1), base.null()
    if family == "sdxl":
        assert not null["text"].any()
    else:  # what is told of nothing was trained, too
        assert 0 < (null["text"] - own["text"]).abs().max() < 1
    assert not torch.equal(told["text"], base.embed(CAPTIONS[:1])["text"])


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_adapters_of_text_encoders_get_gradients(family, tiny_base, tmp_path):
    done = fine_tune(images(), CLASSES, settings(tiny_base(family), lora(text=True)), work=tmp_path)
    moved = {name for name, value in tensors(done.folder).items() if name[1].endswith("lora_B.weight") and value.any()}
    still = {name for name in tensors(done.folder) if name[1].endswith("lora_B.weight")} - moved
    assert len(moved) >= 4
    # SDXL is not told the last layer of its first text encoder
    assert all(file == "lora/text_encoder.safetensors" and "layers.1." in name for file, name in still)
    assert len(still) == (2 if family == "sdxl" else 0)
    assert not any(file == "lora/denoiser.safetensors" for file, _ in tensors(done.folder))


def test_an_inversion_moves_new_rows_only_and_each_image_that_of_its_diagnosis(tiny_base, tmp_path):
    config = settings(tiny_base("sd"), inversion({"lr": 1e-2}, num_vectors=2))
    few = images()
    own = [row for row in range(6) if few.diagnoses[row] == 1]
    one = type(few)(few.moments[own], few.diagnoses[own], [few.captions[row] for row in own])
    done = fine_tune(one, CLASSES, config, work=tmp_path)
    assert [path.name for path in sorted(done.folder.iterdir())] == [
        "generator.json",
        "learned_embeds.safetensors",
        "null.safetensors",
    ]
    base = load_base(config.base)
    table, word = base.text_encoders[0].get_input_embeddings().weight, base.tokenizers[0].encode("skin")[1]
    learned = load_file(done.folder / "learned_embeds.safetensors")
    assert learned.keys() == {"mel-class", "mela-class"}
    assert learned["mela-class"].shape == (2, 32)
    assert not torch.equal(learned["mela-class"], table[word].expand(2, -1))
    assert torch.equal(learned["mel-class"], table[word].expand(2, -1))  # no image of it was seen
    texts = ["a photo of skin", "an image of a nevus"]
    assert torch.equal(load_embedder(done.folder)(texts)["text"], base.embed(texts)["text"])
    assert done.stages[0].num_weights == 2 * 2 * 32


def test_the_rows_that_are_there_stay_as_they_are_to_the_bit(tiny_base, tmp_path, monkeypatch):
    from derm_pipeline.training import fine_tuning

    kept = []
    prepare = fine_tuning.prepare
    monkeypatch.setattr(fine_tuning, "prepare", lambda *args, **named: kept.append(prepare(*args, **named)) or kept[-1])
    config = settings(tiny_base("sdxl"), inversion({"lr": 1e-2, "weight_decay": 1e-2}))
    fine_tune(images(), CLASSES, config, work=tmp_path)
    published = load_base(config.base)
    trained = kept[0].base
    for encoder, own, rows in zip(trained.text_encoders, published.text_encoders, kept[0].rows, strict=True):
        table = own.get_input_embeddings().weight
        assert torch.equal(rows.table.weight[: len(table)], table)
        assert rows.rows.shape == (2, table.shape[1])
        for name, weight in own.state_dict().items():
            if "token_embedding" not in name:
                assert torch.equal(weight, encoder.state_dict()[name])
    for name, weight in published.denoiser.state_dict().items():
        assert torch.equal(weight, trained.denoiser.state_dict()[name])


def test_the_average_of_a_full_training_is_the_one_computed_by_hand(tiny_base, tmp_path):
    base = load_base(settings(tiny_base("sd")).base)
    average = {name: weight.clone() for name, weight in base.denoiser.state_dict().items()}
    for num_steps in (1, 2, 3):
        stage = full(num_steps=num_steps, ema_decay=0.15, schedule="constant")
        done = fine_tune(images(), CLASSES, settings(tiny_base("sd"), stage), work=tmp_path / str(num_steps))
        weights = load_file(done.folder / "weights.safetensors")
        decay = min(0.15, num_steps / (9 + num_steps))
        average = {name: decay * value + (1 - decay) * weights[name] for name, value in average.items()}
    found = load_file(done.folder / "ema.safetensors")
    for name, value in average.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
    assert any(not torch.equal(found[name], weights[name]) for name in found)
    for averaged, state in ((True, found), (False, weights)):
        loaded = load_network(done.folder, CPU, averaged=averaged)[1].denoiser.state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_an_averaged_adapter_is_what_is_saved(tiny_base, tmp_path):
    plain = fine_tune(images(), CLASSES, settings(tiny_base("sd"), lora()), work=tmp_path / "a")
    averaged = fine_tune(images(), CLASSES, settings(tiny_base("sd"), lora(ema_decay=0.9)), work=tmp_path / "b")
    found, weights = tensors(averaged.folder), tensors(plain.folder)
    assert plain.losses == averaged.losses
    assert found.keys() == weights.keys()
    ups = [name for name in found if name[1].endswith("lora_B.weight")]
    assert all(found[name].abs().sum() < weights[name].abs().sum() for name in ups)


def two_stages(folder):
    return settings(folder, inversion({"lr": 1e-2, "num_steps": 3}), lora(num_steps=3), caption_dropout=0.3)


@pytest.fixture(scope="module")
def straight(tiny_base, tmp_path_factory):
    """Two stages that nobody stopped."""
    work = tmp_path_factory.mktemp("straight")
    return fine_tune(images(), CLASSES, two_stages(tiny_base("sd")), work=work, held_out=images(3))


@pytest.mark.parametrize(("looks", "resumed"), [(2, [2, 0]), (4, [3, 2])])  # no look at the end of a stage
def test_a_training_that_is_stopped_in_any_stage_goes_on_there_to_the_same_bits(
    looks, resumed, straight, tiny_base, tmp_path
):
    config, arguments, steps = two_stages(tiny_base("sd")), {"work": tmp_path, "held_out": images(3)}, []
    with pytest.raises(Interrupted):
        fine_tune(images(), CLASSES, config, **arguments, stop_when=after(looks))
    done = fine_tune(images(), CLASSES, config, **arguments, on_progress=lambda step, num, _: steps.append((step, num)))
    assert steps[-1] == (6, 6)
    assert [stage.resumed_from_step for stage in done.stages] == resumed
    assert done.losses == straight.losses
    assert done.validation == straight.validation
    check_same(done.folder, straight.folder)
    again = fine_tune(images(), CLASSES, config, **arguments)  # all is there
    assert again.losses == straight.losses
    assert [stage.resumed_from_step for stage in again.stages] == [3, 3]


def test_work_of_another_training_is_not_taken_for_this_one(tiny_base, tmp_path):
    fine_tune(images(), CLASSES, settings(tiny_base("sd"), lora(num_steps=1)), work=tmp_path)
    with pytest.raises(ValueError, match="another training: remove"):
        fine_tune(images(), CLASSES, settings(tiny_base("sd"), lora(num_steps=1), noise_offset=0.1), work=tmp_path)


def test_stages_follow_one_another_and_captions_tell_what_the_first_has_learnt(tiny_base, tmp_path):
    stages = (inversion({"lr": 0.5}), full(ema_decay=0.9), lora())
    done = fine_tune(images(), CLASSES, settings(tiny_base("sd"), *stages), work=tmp_path)
    assert [stage.kind for stage in done.stages] == ["inversion", "full", "lora"]
    assert {path.name for path in done.folder.rglob("*.safetensors")} == {
        "learned_embeds.safetensors",
        "weights.safetensors",
        "ema.safetensors",
        "denoiser.safetensors",
        "null.safetensors",
    }
    assert len(done.trained.losses) == 12
    with torch.no_grad():
        known = load_base(settings(tiny_base("sd")).base).embed(CAPTIONS)["text"]
    cached = open_embeddings(tmp_path / "stage-2-full" / "texts")
    found = cached.gather(cached.rows_of(CAPTIONS))["text"].float()
    assert (found - known).abs().amax((1, 2)).min() > 0.1  # each of them has a learned token


def test_images_are_drawn_at_the_steps_that_are_due_and_no_others(tiny_base, tmp_path, monkeypatch):
    fired, taken = [], []
    losses = Hldf.losses
    monkeypatch.setattr(Hldf, "losses", lambda *args, **named: fired.append(len(taken)) or losses(*args, **named))
    config = settings(
        tiny_base("sd"), lora(num_steps=5, report_every_steps=1), hldf=HldfConfig(every_steps=3, num_steps=2)
    )
    fine_tune(images(), CLASSES, config, work=tmp_path, on_progress=lambda step, *_: taken.append(step))
    tries = 2  # of the memory that it takes, before any step
    assert fired[tries:] == [0, 3]
    assert fired[:tries] == [0, 0]


def test_prior_preservation_draws_once_and_every_second_example_is_the_bases_own(tiny_base, tmp_path):
    prior = PriorConfig(num_samples=3, num_steps=2, batch_size=2, prompts=("a photo of skin", "skin"))
    config = settings(tiny_base("sd"), lora(num_steps=2), prior=prior)
    done = fine_tune(images(), CLASSES, config, work=tmp_path)
    (path,) = tmp_path.glob("prior-*.safetensors")
    drawn = load_file(path)["latents"]
    assert drawn.shape == (3, 4, 8, 8)
    again = fine_tune(
        images(), CLASSES, settings(tiny_base("sd"), lora(num_steps=2), prior=prior), work=tmp_path / "again"
    )
    assert torch.equal(load_file(tmp_path / "again" / path.name)["latents"], drawn)
    assert again.losses == done.losses
    assert done.losses[0] > 1.5  # two means


def test_captions_that_are_too_long_are_counted(tiny_base, tmp_path):
    few = images()
    captions = [*few.captions[:4], "mel " * 80, "nv, " * 90]
    long = type(few)(few.moments, few.diagnoses, captions)
    for name, stage in (("cached", lora(num_steps=1)), ("trained", lora(text=True, num_steps=1))):
        done = fine_tune(long, CLASSES, settings(tiny_base("sd"), stage), work=tmp_path / name)
        assert done.stages[0].num_captions_cut == 2


def test_what_cannot_work_is_refused_before_a_step(tiny_base, tmp_path):
    def refused(message, *stages, given=None, family="sd", **changes):
        with pytest.raises(ValueError, match=message):
            fine_tune(given or images(), CLASSES, settings(tiny_base(family), *stages, **changes), work=tmp_path)
        assert not list(tmp_path.rglob("checkpoint*"))

    wrong = lora().model_copy(update={"denoiser": lora().denoiser.model_copy(update={"targets": ("to_quack",)})})
    refused("no linear or convolution layer .* is called so", wrong)
    refused("no linear or convolution layer .* is called so", inversion(), wrong)  # before the inversion
    refused("has melanoma already", inversion(tokens={"mel": "melanoma", "nv": "x-class"}))
    refused("has none for nv", inversion(tokens={"mel": "x-class"}))
    refused("a token of its own", inversion(tokens={"mel": "x-class", "nv": "x-class"}))
    refused("not found in pixart texts", inversion(tokens={"mel": "X-class", "nv": "y-class"}), family="pixart")
    refused("no single token of the base", inversion(initialiser="dermatofibrosarcoma protuberans"))
    refused("no caption has the learned token 'x-class'", inversion(tokens={"mel": "x-class", "nv": "y-class"}), lora())
    few = images()
    refused("captions of 5 images", lora(), given=type(few)(few.moments, few.diagnoses, few.captions[:5]))
    refused("not known", lora(), given=type(few)(few.moments, few.diagnoses + 1, few.captions))
    refused("of another autoencoder", lora(), given=type(few)(few.moments[:, :, :6], few.diagnoses, few.captions))
    other = settings(tiny_base("sd")).base.model_copy(update={"family": "sdxl"})
    refused("family sd, not sdxl", lora(), base=other)


def test_settings_that_contradict_themselves_are_refused(tiny_base):
    base = tiny_base("sd")
    for message, settle in (
        ("greater than or equal to 1", lambda: type(lora().denoiser)(rank=0, targets=ATTENTION)),
        ("neither is named", lambda: type(lora())(training=training())),
        ("in the order inversion, full, lora", lambda: settings(base, lora(), inversion())),
        ("in the order inversion, full, lora", lambda: settings(base, lora(), lora())),
        ("must be even", lambda: settings(base, lora(batch_size=3), prior=PriorConfig())),
        ("where the token goes", lambda: inversion(templates=("a photo",))),
    ):
        with pytest.raises(ValueError, match=message):
            settle()


def test_a_config_is_read_back_from_json(tiny_base):
    config = settings(tiny_base("sd"), inversion(), lora(), prior=PriorConfig(), hldf=HldfConfig())
    assert type(config).model_validate(json.loads(config.model_dump_json())) == config
    assert config.num_steps == 8
    assert config.further_texts == ("a photo of skin",)


@pytest.mark.slow
def test_two_processes_train_what_one_does(tiny_base, tmp_path):
    folder = tiny_base("sdxl")
    alone = fine_tune(images(), CLASSES, every_stage(folder), work=tmp_path / "one", held_out=images(3))
    work, port = tmp_path / "two", free_port()
    work.mkdir()
    context = multiprocessing.get_context("spawn")
    arguments = [(index, 2, port, work, folder) for index in range(2)]
    processes = [context.Process(target=fine_tune_as_one_of, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    first, second = (json.loads((work / f"losses-{index}.json").read_text()) for index in range(2))
    assert first == second
    assert first == pytest.approx(alone.losses, abs=1e-4)
    found = tensors(work / "stage-3-lora" / "generator")
    for name, value in tensors(alone.folder).items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-3)  # AdamW's first steps are signs
