"""Drawing what prompts ask for: bit by bit the same in any company, from noise or from images, parts of them kept."""

import dataclasses
import hashlib
import random
from functools import partial

import cv2
import numpy as np
import pytest
import torch

from derm_pipeline.generation import (
    Img2ImgSampling,
    LesionGenSampling,
    Origin,
    OriginImages,
    Prompting,
    PromptListSampling,
    SampleRequest,
    TrainingImage,
    draw_batches,
    draw_samples,
    in_order,
    plan_requests,
)
from derm_pipeline.generation.drawing import Drawer
from derm_pipeline.images import encode_png, to_square
from derm_pipeline.latents import ImageFile, read_squares, to_model_range, to_pixels
from derm_pipeline.models.generator import GeneratorSpec, load_autoencoder, save_autoencoder
from derm_pipeline.models.laws import DDPM
from derm_pipeline.models.pretrained.base import load_base
from derm_pipeline.models.pretrained.config import PretrainedConfig
from derm_pipeline.models.pretrained.network import PretrainedNetwork
from derm_pipeline.models.pretrained.tiny import write_tiny
from derm_pipeline.records import SkinType
from derm_pipeline_tests.generation.networks import SEVEN, generator_at

TOKENS, WIDTH = 5, 8


def embed(texts):
    """Embeddings that follow from the words, for any text; one batch is as good as another."""
    rows = [np.frombuffer(hashlib.sha512(text.encode()).digest() * 5, np.uint8)[: TOKENS * WIDTH] for text in texts]
    values = torch.from_numpy(np.stack(rows)).float().view(-1, TOKENS, WIDTH) / 64 - 2
    mask = torch.arange(TOKENS) < torch.tensor([[1 + len(text) % TOKENS] for text in texts])
    return {"text": values, "text_mask": mask}


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A tiny DiT that is told text, and no class."""
    folder = tmp_path_factory.mktemp("networks")
    shape = {"text_tokens": TOKENS, "text_width": WIDTH, "text_mode": "cross"}
    return generator_at(folder, conditions=(), law=DDPM(prediction="epsilon"), **shape)


def draw(requests, config, networks, work, **told):
    work.mkdir(exist_ok=True, parents=True)
    return draw_samples(requests, config, **networks, work=work, **{"embed_text": embed} | told)


def lesiongen(**changes):
    return LesionGenSampling(**{"num_samples": 21, "guidances": (1, 4), "steps": (2, 3), "batch_size": 8} | changes)


def test_samples_of_mixed_settings_are_the_same_in_any_batch_and_order_and_alone(networks, tmp_path):
    config = lesiongen(seed=random.randrange(2**31), negative_prompt="a drawing")
    requests = plan_requests(config, SEVEN, {})
    assert len({(one.prompting.guidance, one.prompting.num_steps) for one in requests}) > 1
    images = draw(requests, config, networks, tmp_path / "whole")
    assert len({image.tobytes() for image in images}) == 21
    for batch_size in (1, 5, 64):
        order = random.sample(range(21), 21 if batch_size > 1 else 3)
        again = draw(
            [requests[place] for place in order],
            config.model_copy(update={"batch_size": batch_size}),
            networks,
            tmp_path / f"batch {batch_size}",
        )
        assert np.array_equal(again, images[order])


def test_files_of_batches_are_read_in_the_order_of_the_requests(networks, tmp_path):
    config = lesiongen(batch_size=4)
    requests = plan_requests(config, SEVEN, {})
    images = draw(requests, config, networks, tmp_path)
    batches = draw_batches(requests, config, **networks, work=tmp_path, embed_text=embed)
    assert sorted(place for one in batches for place in one.places) == list(range(21))
    for one in batches:
        how = {(requests[place].prompting.guidance, requests[place].prompting.num_steps) for place in one.places}
        assert len(how) == 1
    assert np.array_equal(np.concatenate(list(in_order(batches))), images)


def test_a_sample_depends_on_all_that_its_prompt_says(networks, tmp_path):
    config = PromptListSampling(prompts=["a nevus --n a drawing --s 3 --l 3 --d 5"], diagnosis="nv")
    request = plan_requests(config, SEVEN, {})[0]
    how = request.prompting
    changed = [
        request,
        dataclasses.replace(request, text="a melanoma"),
        dataclasses.replace(request, seed=6),
        dataclasses.replace(request, prompting=dataclasses.replace(how, negative_prompt="a photograph")),
        dataclasses.replace(request, prompting=dataclasses.replace(how, negative_prompt=None)),
        dataclasses.replace(request, prompting=dataclasses.replace(how, guidance=6.0)),
        dataclasses.replace(request, prompting=dataclasses.replace(how, num_steps=4)),
    ]
    images = draw(changed, config, networks, tmp_path)
    assert len({image.tobytes() for image in images}) == len(changed)
    labelled = dataclasses.replace(request, number=4, skin_type=SkinType.VI)  # a label, which is not told
    assert np.array_equal(draw([labelled], config, networks, tmp_path / "labelled")[0], images[0])


def test_kept_batches_of_another_text_encoder_are_never_taken(networks, tmp_path):
    requests = plan_requests(lesiongen(), SEVEN, {})
    first = draw(requests, lesiongen(), networks, tmp_path)
    calls = []

    def counted(texts):
        calls.append(len(texts))
        return embed(texts)

    assert np.array_equal(draw(requests, lesiongen(), networks, tmp_path, embed_text=counted), first)
    assert set(calls) == {1}  # alone, so that no other text changes its last bits
    other = draw(
        requests, lesiongen(), networks, tmp_path, embed_text=lambda texts: embed([one + "!" for one in texts])
    )
    assert not np.array_equal(other, first)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Four image files of 48 x 40 px, with masks of their lesions."""
    folder, files, masks = tmp_path_factory.mktemp("photographs"), {}, {}
    rng = np.random.default_rng()
    for number in range(4):
        skin = np.full((40, 48, 3), (224, 172, 140), np.uint8) + rng.integers(0, 12, (40, 48, 1), np.uint8)
        lesion = np.zeros((40, 48), np.uint8)
        cv2.circle(lesion, (14 + 5 * number, 20), 9, 255, -1)
        skin[lesion > 0] = rng.integers(30, 110, 3)
        content = encode_png(skin)
        sha256 = hashlib.sha256(content).hexdigest()
        (folder / f"{number}.png").write_bytes(content)
        (folder / f"{number}_mask.png").write_bytes(encode_png(np.repeat(lesion[..., None], 3, 2)))
        files[sha256] = ImageFile(folder / f"{number}.png", sha256)
        masks[sha256] = folder / f"{number}_mask.png"
    return files, masks


def img2img(photographs, **changes):
    """Config and requests of two samples of each photograph."""
    config = Img2ImgSampling(**{"num_steps": 6, "samples_each": 2, "batch_size": 8} | changes)
    images = [TrainingImage(sha256, SEVEN[0], SkinType.II, "") for sha256 in photographs[0]]
    return config, plan_requests(config, SEVEN, {}, images)


def reader(photographs, size_px=32, geometry="squash", **changes):
    """Reads the photographs as a recipe does."""
    read = partial(read_squares, size_px=size_px, geometry=geometry)
    return OriginImages(photographs[0], read, geometry=geometry, **{"masks": photographs[1]} | changes)


def rebuilt(photographs, networks):
    """The photographs as they come back from the autoencoder, two of each; pixels may be one off."""
    autoencoder = load_autoencoder(networks["autoencoder"], torch.device("cpu"))
    found = []
    for sha256 in photographs[0]:
        with torch.no_grad():
            image = to_model_range(torch.from_numpy(reader(photographs)(sha256).pixels)[None])
            found += [to_pixels(autoencoder.decode(autoencoder.encode(image)[0]))[0]] * 2
    return np.stack(found)


def at_strength(requests, strength, *, keeps_lesion=False):
    def changed(one):
        origin = Origin(one.origin.sha256, strength, keeps_lesion)
        return dataclasses.replace(one, prompting=dataclasses.replace(one.prompting, origin=origin))

    return [changed(one) for one in requests]


def test_full_strength_is_drawing_from_noise_and_hardly_any_gives_the_image_back(networks, photographs, tmp_path):
    config, requests = img2img(photographs, precision="fp32")
    read = reader(photographs)
    from_noise = [
        dataclasses.replace(one, prompting=dataclasses.replace(one.prompting, origin=None)) for one in requests
    ]
    plain = draw(from_noise, config, networks, tmp_path / "plain")
    full = draw(at_strength(requests, 1.0), config, networks, tmp_path / "full", read_origin=read)
    assert np.array_equal(full, plain)
    back = draw(at_strength(requests, 0.1), config, networks, tmp_path / "back", read_origin=read)
    assert np.abs(back.astype(int) - rebuilt(photographs, networks)).max() <= 1
    half = draw(requests, config, networks, tmp_path / "half", read_origin=read)
    assert len({image.tobytes() for image in (*half, *full, *back)}) == 8 + 8 + 4
    assert not any(np.array_equal(a, b) for a, b in zip(half[::2], half[1::2], strict=True))


def test_a_sample_of_an_image_is_the_same_in_any_batch_and_order_and_alone(networks, photographs, tmp_path):
    config, requests = img2img(photographs, lesion="kept")
    read = reader(photographs, lesion="kept")
    images = draw(requests, config, networks, tmp_path / "whole", read_origin=read)
    for batch_size in (1, 3, 64):
        order = random.sample(range(8), 8 if batch_size > 1 else 2)
        again = draw(
            [requests[place] for place in order],
            config.model_copy(update={"batch_size": batch_size}),
            networks,
            tmp_path / f"batch {batch_size}",
            read_origin=read,
        )
        assert np.array_equal(again, images[order])


def latents_drawn(monkeypatch):
    """Where the latents of every evaluation go, before they are decoded."""
    seen = []

    def told(self, latents):
        seen.append(latents)
        return latents

    monkeypatch.setattr(GeneratorSpec, "unwhiten", told)
    return seen


def test_the_latents_of_a_kept_lesion_are_those_of_its_image(networks, photographs, tmp_path, monkeypatch):
    config, requests = img2img(photographs, lesion="kept", samples_each=1, precision="fp32", batch_size=1)
    read, seen = reader(photographs, lesion="kept"), latents_drawn(monkeypatch)
    drawer = Drawer(networks["generator"], networks["autoencoder"], config, embed, read)
    spec = GeneratorSpec.load(networks["generator"])
    autoencoder = load_autoencoder(networks["autoencoder"], torch.device("cpu"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for request in requests:
            begun = read(request.origin.sha256)
            assert 0.05 < begun.lesion.mean() < 0.5
            drawer.draw([request])
            with torch.no_grad():
                mean, _ = autoencoder.encode(to_model_range(torch.from_numpy(begun.pixels)[None]))
            latents, found = spec.whiten(mean)[0], seen[-1][0]
            cells = torch.from_numpy(begun.lesion.reshape(8, 4, 8, 4).mean((1, 3)) >= 0.5).expand(4, 8, 8)
            assert torch.equal(found[cells], latents[cells])
            assert (found[~cells] != latents[~cells]).all()
    finally:
        torch.set_num_threads(before)


def test_an_image_and_its_mask_are_made_square_alike(photographs):
    for geometry in ("squash", "crop", "pad"):
        read = reader(photographs, geometry=geometry, lesion="kept")
        for sha256, file in photographs[0].items():
            begun = read(sha256)
            whole = cv2.cvtColor(cv2.imread(str(file.path)), cv2.COLOR_BGR2RGB)
            assert np.array_equal(begun.pixels, to_square(whole, 32, geometry))
            inside = cv2.erode(begun.lesion.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
            outside = cv2.dilate(begun.lesion.astype(np.uint8), np.ones((3, 3), np.uint8)) == 0
            assert inside.any()
            assert begun.pixels[inside].max() < 140
            assert (begun.pixels[outside].max(axis=1) > 200).mean() > (0.5 if geometry == "pad" else 0.99)


def test_a_lesion_that_is_found_is_kept_and_one_that_is_not_known_is_refused(photographs):
    found = reader(photographs, 64, lesion="kept_as_found")
    outlined = reader(photographs, 64, lesion="kept")
    for sha256 in photographs[0]:
        a, b = found(sha256).lesion, outlined(sha256).lesion
        assert (a & b).sum() / (a | b).sum() > 0.6
    with pytest.raises(ValueError, match=r"0\.png: its source has no mask .* kept_as_found"):
        reader(photographs, lesion="kept", masks={})(next(iter(photographs[0])))
    with pytest.raises(ValueError, match="no training image has the sha256 abc"):
        found("abc")


def test_what_cannot_be_drawn_is_refused_before_any_work(networks, photographs, tmp_path):
    prompt = SampleRequest(0, 1, SEVEN[0], None, text="a nevus", prompting=Prompting())
    sized = dataclasses.replace(prompt, prompting=Prompting(size_px=(32, 32)))
    config, requests = img2img(photographs)
    for asked, words in (
        (requests, "nothing reads them: pass read_origin"),
        ([sized], r"images of one size only: leave out the size \(32, 32\)"),
        ([prompt, sized], "samples of several sizes"),
    ):
        with pytest.raises(ValueError, match=words):
            draw(asked, config, networks, tmp_path)
    with pytest.raises(ValueError, match="pass embed_text"):
        draw([prompt], config, networks, tmp_path, embed_text=None)
    wide = {"embed_text": lambda texts: {"text": torch.zeros(len(texts), TOKENS, WIDTH + 1)}}
    with pytest.raises(ValueError, match=r"embedding 'text' of a text is \[\(5, 9\)\]; the network is told \(5, 8\)"):
        draw([prompt], config, networks, tmp_path, **wide)
    classes = generator_at(tmp_path / "classes")
    with pytest.raises(
        ValueError, match=r"asked for \['text'\], but the generator is told \['diagnosis', 'skin_type'\]"
    ):
        draw([prompt], config, classes, tmp_path)


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def pretrained(request, tmp_path_factory):
    """A tiny pipeline of the real classes as a generator, and its text encoders."""
    folder = tmp_path_factory.mktemp(request.param)
    base = load_base(PretrainedConfig(model=str(write_tiny(request.param, folder / "base")), dtype="float32"))
    network = PretrainedNetwork(base.network_config(8), base.denoiser)
    network.set_null(base.null())
    scale = {"latent_mean": (0.0,) * 4, "latent_std": base.vae.config.latent_std}
    for name in ("generator", "autoencoder"):
        (folder / name).mkdir()
    GeneratorSpec(network=network.config, law=base.law, classes={}, **scale).save(folder / "generator")
    network.save_null(folder / "generator")
    save_autoencoder(base.vae, folder / "autoencoder")
    return {name: folder / name for name in ("generator", "autoencoder")}, base


def test_a_pretrained_pipeline_draws_prompts_of_any_size_the_same_in_any_batch(pretrained, tmp_path):
    networks, base = pretrained
    lines = [f"photo of {words} --w 96 --h 64 --s {2 + words.count('a')} --n cartoon" for words in ("a mole", "skin")]
    config = PromptListSampling(prompts=[*lines, "a naevus --w 96 --h 64"], samples_each=2, diagnosis="nv", num_steps=2)
    requests = plan_requests(config, SEVEN, {})
    images = draw(requests, config, networks, tmp_path / "a", embed_text=base.embed)
    assert images.shape == (6, 64, 96, 3)
    assert len({image.tobytes() for image in images}) == 6
    again = draw(
        requests[4:0:-1], config.model_copy(update={"batch_size": 1}), networks, tmp_path / "b", embed_text=base.embed
    )
    assert np.array_equal(again, images[4:0:-1])
    odd = dataclasses.replace(requests[0], prompting=Prompting(size_px=(60, 64)))
    with pytest.raises(ValueError, match="does not divide into latent cells of 8 px"):
        draw([odd], config, networks, tmp_path, embed_text=base.embed)


def test_a_pretrained_pipeline_draws_images_anew(pretrained, photographs, tmp_path):
    networks, base = pretrained
    config, requests = img2img(photographs, num_steps=4, lesion="kept_as_found")
    read = reader(photographs, 64, lesion="kept_as_found")
    images = draw(requests, config, networks, tmp_path / "a", embed_text=base.embed, read_origin=read)
    assert images.shape == (8, 64, 64, 3)
    again = draw(requests[3:5], config, networks, tmp_path / "b", embed_text=base.embed, read_origin=read)
    assert np.array_equal(again, images[3:5])
