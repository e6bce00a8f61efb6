"""What samples are told in words: captions of training images like them, or prompts; each by its own seed."""

import dataclasses

import numpy as np
import pytest
import torch

from derm_pipeline.generation import (
    Prompting,
    SampleRequest,
    SamplingConfig,
    caption_requests,
    check_requests,
    draw_samples,
    provenance_rows,
    requests_of_cells,
    text_of_requests,
)
from derm_pipeline.latents import open_embeddings, write_embeddings
from derm_pipeline.models.generator import GeneratorSpec
from derm_pipeline.records import Diagnosis, SkinType
from derm_pipeline_tests.generation.networks import generator_at

MEL, NV, DF = Diagnosis.MEL, Diagnosis.NV, Diagnosis.DF
KNOWN = {
    "diagnosis": ["mel", "mel", "mel", "nv", "nv", "df"],
    "skin_type": [1, 1, 2, 1, None, 5],
    "sex": ["female", "male", "female", None, "male", "male"],
}
CAPTIONS = ["mel 1 f", "mel 1 m", "mel 2 f", "nv 1", "nv m", "df 5 m"]
TOKENS, WIDTH = 4, 8


def captioned(requests):
    return caption_requests(requests, CAPTIONS, KNOWN, "rich", {"modality": "clinical"})


def embed(texts):
    drawn = [torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(len(text))) for text in texts]
    mask = torch.arange(TOKENS) < torch.tensor([1 + len(text) % TOKENS for text in texts])[:, None]
    return {"text": torch.stack(drawn), "text_mask": mask}


@pytest.fixture
def embeddings(tmp_path):
    write_embeddings(tmp_path / "text", CAPTIONS, embed, encoder=None)
    return open_embeddings(tmp_path / "text")


def test_a_caption_is_one_of_the_images_that_are_what_is_asked_for():
    for asked, expected in (
        (requests_of_cells([MEL], [None], 60, 3), {"mel 1 f", "mel 1 m", "mel 2 f"}),
        (requests_of_cells([MEL], [SkinType.I], 60, 3), {"mel 1 f", "mel 1 m"}),
        (requests_of_cells([MEL], [None], 60, 3, further={"sex": "female"}), {"mel 1 f", "mel 2 f"}),
        (requests_of_cells([NV], [SkinType.I], 5, 3, further={}), {"nv 1"}),
    ):
        assert {request.text for request in captioned(asked)} == expected


def test_where_no_image_is_what_is_asked_for_the_caption_says_so_in_the_recipes_style():
    (request,) = captioned(requests_of_cells([DF], [SkinType.II], 1, 0))
    assert request.text not in CAPTIONS
    assert "dermatofibroma" in request.text.lower()
    assert "clinical" in request.text.lower()
    label = caption_requests(requests_of_cells([DF], [SkinType.II], 1, 0), CAPTIONS, KNOWN, "label")
    assert "dermatofibroma" in label[0].text.lower()


def test_a_caption_depends_on_the_samples_own_seed_and_conditions():
    asked = requests_of_cells([MEL, NV], [None, SkinType.I], 20, 11)
    whole = captioned(asked)
    assert captioned(asked[::-1]) == whole[::-1]
    for request, told in zip(asked, whole, strict=True):
        assert captioned([request]) == [told]
        assert captioned([dataclasses.replace(request, number=request.number + 999)])[0].text == told.text
    assert len({request.text for request in whole[:20]}) > 1


def test_a_prompt_stays_and_is_said_of_the_sample():
    (asked,) = requests_of_cells([None], [None], 1, 0, text="a blue one")
    assert captioned([asked]) == [asked]
    assert asked.prompt == "text=a blue one"
    (both,) = requests_of_cells([MEL], [SkinType.V], 1, 0, text="a blue one")
    assert both.prompt == "diagnosis=mel, skin_type=5, text=a blue one"
    digests = {"generator_digest": "a", "autoencoder_digest": "b", "pixels": ["c", "d"]}
    rows = provenance_rows([asked, both], SamplingConfig(), recipe="tiny", **digests)
    assert [row["text"] for row in rows] == ["a blue one"] * 2
    assert [row["diagnosis"] for row in rows] == [None, "mel"]
    assert [row["prompt"] for row in rows] == [asked.prompt, both.prompt]


def test_known_texts_are_looked_up_and_new_ones_embedded_once(embeddings):
    asked = []

    def counted(texts):
        asked.append(list(texts))
        return embed(texts)

    words = ["new", "mel 1 f", None, "new", ""]
    requests = [SampleRequest(i, i, MEL, None, text=text) for i, text in enumerate(words)]
    how = Prompting(negative_prompt="not so")
    requests[1] = dataclasses.replace(requests[1], prompting=how)
    embed_text = text_of_requests(requests, embeddings, counted)
    told = [text for text in words if text is not None] + ["not so"]
    found = embed_text(told)
    assert asked == [["new", "not so"]]
    for row, text in enumerate(told):
        expected = embed([text])
        assert torch.equal(found["text"][row], expected["text"][0].half())
        assert torch.equal(found["text_mask"][row], expected["text_mask"][0])
        assert torch.equal(embed_text([text])["text"][0], found["text"][row])
    text_of_requests([dataclasses.replace(requests[1], prompting=None)], embeddings, None)  # nobody is asked


def test_samples_follow_their_text_and_are_the_same_in_any_batch(tmp_path, embeddings):
    networks = generator_at(tmp_path, text_tokens=TOKENS, text_width=WIDTH, text_mode="cross")
    requests = captioned(requests_of_cells([MEL, NV], [None], 5, 1))
    requests += requests_of_cells([MEL], [None], 1, 1, text="something new")
    embed_text = text_of_requests(requests, embeddings, embed)

    def draw(asked, name, **changes):
        config = SamplingConfig(**{"num_steps": 3, "guidance": 2.0, "batch_size": 4, "precision": "fp32"} | changes)
        (tmp_path / name).mkdir(exist_ok=True)
        return draw_samples(asked, config, **networks, work=tmp_path / name, embed_text=embed_text)

    whole = draw(requests, "a")
    assert np.array_equal(draw(requests[::-1], "b", batch_size=3), whole[::-1])
    assert np.array_equal(draw(requests[3:4], "c"), whole[3:4])
    other = [dataclasses.replace(requests[0], text="nv m"), dataclasses.replace(requests[0], text=None)]
    for image in draw(other, "d"):
        assert not np.array_equal(image, whole[0])
    unguided = draw(requests, "e", guidance=1.0)
    assert not np.array_equal(unguided, whole)


def test_finished_samples_are_of_their_own_text(tmp_path, embeddings):
    networks = generator_at(tmp_path, text_tokens=TOKENS, text_width=WIDTH)
    config = SamplingConfig(num_steps=2, batch_size=4)
    (tmp_path / "work").mkdir()
    requests = requests_of_cells([MEL], [None], 2, 1, text="new")
    for scale in (1, 2):  # the same words, and another encoder's embeddings of them

        def scaled(texts, scale=scale):
            return {name: tensor * (scale if name == "text" else 1) for name, tensor in embed(texts).items()}

        embed_text = text_of_requests(requests, embeddings, scaled)
        draw_samples(requests, config, **networks, work=tmp_path / "work", embed_text=embed_text)
    assert len(list((tmp_path / "work").glob("*.npy"))) == 2


def test_text_is_refused_by_generators_that_hear_none_and_demanded_by_those_that_do(tmp_path):
    deaf = GeneratorSpec.load(generator_at(tmp_path / "a")["generator"])
    prompts = requests_of_cells([MEL], [None], 1, 0, text="a blue one")
    with pytest.raises(ValueError, match=r"asked for \['diagnosis', 'text'\], but the generator is told"):
        check_requests(prompts, deaf, has_text=True)
    hears = GeneratorSpec.load(generator_at(tmp_path / "b", text_tokens=TOKENS, text_width=WIDTH)["generator"])
    check_requests(prompts, hears, has_text=True)
    with pytest.raises(ValueError, match="pass embed_text"):
        check_requests(prompts, hears)
