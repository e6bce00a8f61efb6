"""LLaVA-NeXT through transformers, on a model of tiny size that the real loader reads."""

from __future__ import annotations

import importlib.util
import json
import re

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from derm_pipeline.captions.claims import Facts
from derm_pipeline.captions.gate import Gate
from derm_pipeline.captions.llava_next import LlavaNextCaptioner, LlavaNextConfig, RowSampler
from derm_pipeline.captions.prompted import PromptedConfig, seed_of, within_bounds
from derm_pipeline.captions.prompts import Question, make_prompt
from derm_pipeline.captions.tiny import write_tiny_llava_next
from derm_pipeline.records import Modality

SIZES = [(150, 200), (450, 600), (30, 300), (1, 50), (1, 1), (900, 400), (64, 64)]
PROMPTS = [make_prompt(modality, label) for modality in Modality for label in ("nevus", None)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_llava_next(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def captioner(folder):
    return LlavaNextCaptioner(LlavaNextConfig(model=str(folder), max_new_tokens=24, batch_size=4))


def questions(count=7):
    rng = np.random.default_rng()
    return [
        Question(
            rng.integers(0, 256, (*SIZES[n % len(SIZES)], 3), dtype=np.uint8),
            PROMPTS[n % len(PROMPTS)],
            int(rng.integers(2**31)),
        )
        for n in range(count)
    ]


def test_the_tiny_model_is_small_and_the_same_each_time(folder, tmp_path):
    again = write_tiny_llava_next(tmp_path / "again")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert files == {path.name: path.read_bytes() for path in again.iterdir()}
    assert sum(map(len, files.values())) < 2_000_000
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(files)
    other = write_tiny_llava_next(tmp_path / "other", seed=1)
    assert (other / "model.safetensors").read_bytes() != files["model.safetensors"]


def test_an_answer_does_not_depend_on_the_batch(captioner):
    asked = questions(9)
    together = captioner.answer(asked)
    assert together == [captioner.answer([question])[0] for question in asked]
    assert together[::-1] == captioner.answer(asked[::-1])
    assert len({answer.text for answer in together}) == len(asked)
    assert captioner.answer([]) == []


def test_an_answer_depends_on_seed_image_and_prompt(folder):
    captioner = LlavaNextCaptioner(LlavaNextConfig(model=str(folder), max_new_tokens=24))
    with torch.no_grad():  # the weights are so small that an image hardly shows; make it show
        for weight in captioner._network.parameters():
            weight.mul_(8)
    first, *others = questions(7)
    same, *answers = captioner.answer(
        [
            first,
            first,
            *(Question(first.image, first.prompt, other.seed) for other in others),
            *(Question(other.image, first.prompt, first.seed) for other in others),
            *(Question(first.image, other.prompt, first.seed) for other in others if other.prompt != first.prompt),
        ]
    )
    assert answers.pop(0) == same
    # A random network may happen to say the same twice.
    for changed in (answers[:6], answers[6:12], answers[12:]):
        assert any(answer != same for answer in changed)


def test_without_temperature_the_seed_does_not_matter(folder):
    captioner = LlavaNextCaptioner(LlavaNextConfig(model=str(folder), max_new_tokens=12, temperature=0))
    [question] = questions(1)
    other = Question(question.image, question.prompt, question.seed ^ 1)
    assert len(set(captioner.answer([question, other]))) == 1
    assert captioner.config.num_attempts == 1


def test_an_answer_holds_the_new_words_only_and_knows_whether_it_ended(captioner):
    eos = captioner._processor.tokenizer.eos_token_id
    words = captioner._processor.tokenizer(" a regular border", add_special_tokens=False)["input_ids"]
    ended = captioner._read([*words, eos, *words])
    assert (ended.text, ended.is_complete) == ("a regular border", True)
    cut = captioner._read(words)
    assert (cut.text, cut.is_complete) == ("a regular border", False)
    [answer] = captioner.answer(questions(1))
    assert "Please describe" not in answer.text
    assert "[INST]" not in answer.text


def test_real_output_of_a_model_that_knows_nothing_is_refused(captioner):
    gate = Gate()
    verdicts = [gate.judge(answer, Facts(), PROMPTS[0]) for answer in captioner.answer(questions(8))]
    assert not any(verdict.accepted for verdict in verdicts)


def test_rows_sample_from_the_distribution_that_transformers_would_sample_from():
    rows, tokens = 4000, 12
    logits = torch.randn(1, tokens) * 2
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopKLogitsWarper(8), TopPLogitsWarper(0.9)])
    expected = warpers(None, logits).softmax(-1)[0]
    seeds = torch.randint(2**31, (rows,)).tolist()
    drawn = RowSampler(seeds, 0.7, 8, 0.9)(None, logits.expand(rows, -1)).argmax(-1)
    found = torch.bincount(drawn, minlength=tokens) / rows
    assert found[expected == 0].sum() == 0
    assert torch.allclose(found, expected, atol=5 * 0.5 / rows**0.5)


def test_each_row_draws_by_its_own_seed_whatever_its_neighbours():
    logits = torch.randn(5, 40)
    seeds = torch.randint(2**31, (5,)).tolist()
    together = RowSampler(seeds, 1.0, 50, 1.0)
    alone = [RowSampler([seed], 1.0, 50, 1.0) for seed in seeds]
    for _ in range(4):
        expected = torch.cat([sampler(None, row[None]) for sampler, row in zip(alone, logits, strict=True)])
        assert torch.equal(together(None, logits), expected)


@pytest.mark.parametrize("shape", [(3000, 4000), (1, 1), (5, 4000), (4000, 5), (1224, 1225), (100, 300)])
def test_an_image_within_bounds_keeps_its_proportions_and_is_not_thin(shape):
    image = np.full((*shape, 3), 7, np.uint8)
    bounded = within_bounds(image, 1_500_000)
    height, width = bounded.shape[:2]
    assert (bounded == 7).all()
    assert min(height, width) >= 8
    assert max(height, width) <= 16 * min(height, width)
    if shape[0] * shape[1] > 1_500_000:
        assert 1_490_000 < height * width <= 1_500_000
        assert height / width == pytest.approx(shape[0] / shape[1], rel=1e-2)
    elif min(shape) >= 8:
        assert bounded.shape[:2] == shape


def test_seeds_differ_by_image_attempt_and_setting_and_fit_everywhere():
    seeds = {seed_of(s, image, attempt) for s in (0, 1) for image in ("a", "b") for attempt in range(50)}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert seed_of(3, "ab", 1) == seed_of(3, "ab", 1)


def test_how_it_runs_is_no_part_of_what_it_is(folder):
    one = LlavaNextConfig(model="a/b", batch_size=1, device="cpu", offline=True)
    assert one.identity() == LlavaNextConfig(model="a/b", batch_size=64, device_map="auto").identity()
    assert one.identity() != LlavaNextConfig(model="a/b", top_k=2).identity()
    assert "batch_size" not in PromptedConfig().identity()


def test_a_folder_counts_by_what_it_holds_not_by_where_it_lies(folder, tmp_path):
    moved = write_tiny_llava_next(tmp_path / "moved")
    identity = LlavaNextConfig(model=str(folder)).identity()
    assert LlavaNextConfig(model=str(moved)).identity() == identity
    weights = bytearray((moved / "model.safetensors").read_bytes())
    weights[int(np.random.default_rng().integers(len(weights)))] ^= 1
    (moved / "model.safetensors").write_bytes(weights)
    assert LlavaNextConfig(model=str(moved)).identity() != identity


def test_large_files_are_sampled_all_over(tmp_path):
    large = tmp_path / "model.safetensors"
    with large.open("wb") as handle:
        handle.truncate(2**28)
    before = LlavaNextConfig(model=str(tmp_path)).identity()
    with large.open("r+b") as handle:
        handle.seek(2**27 + 100)
        handle.write(b"x")
    assert LlavaNextConfig(model=str(tmp_path)).identity() != before


def test_a_missing_model_says_where_it_was_looked_for_and_how_to_get_it(tmp_path, monkeypatch):
    asked = []

    def unreachable(*_, timeout, **__):
        asked.append(timeout)
        raise ConnectionError("the plug was pulled")

    with pytest.raises(FileNotFoundError, match=re.escape(f"in the folder {tmp_path / 'none'}, which is not there")):
        LlavaNextCaptioner(LlavaNextConfig(model=str(tmp_path / "none")))
    with pytest.raises(FileNotFoundError, match=r"no/such-model .*Hugging Face cache .*hf download no/such-model"):
        LlavaNextCaptioner(LlavaNextConfig(model="no/such-model", offline=True))
    with monkeypatch.context() as patched:
        patched.setattr("huggingface_hub.HfApi.model_info", unreachable)
        with pytest.raises(FileNotFoundError, match=r"cannot be downloaded \(the plug was pulled\)\. Get it where"):
            LlavaNextCaptioner(LlavaNextConfig(model="no/such-model"))
        assert asked == [10]
    with pytest.raises(FileNotFoundError, match="holds no complete LLaVA-NeXT"):
        LlavaNextCaptioner(LlavaNextConfig(model=str(tmp_path)))


def test_pickled_weights_other_models_and_missing_templates_are_refused(tmp_path):
    pickled = write_tiny_llava_next(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="safetensors"):
        LlavaNextCaptioner(LlavaNextConfig(model=str(pickled)))
    other = write_tiny_llava_next(tmp_path / "other")
    (other / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(ValueError, match="type 'clip'; a llava_next is needed"):
        LlavaNextCaptioner(LlavaNextConfig(model=str(other)))
    broken = write_tiny_llava_next(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"the weights of .* are broken"):
        LlavaNextCaptioner(LlavaNextConfig(model=str(broken)))
    silent = write_tiny_llava_next(tmp_path / "silent")
    (silent / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no chat template"):
        LlavaNextCaptioner(LlavaNextConfig(model=str(silent)))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_few_bits_without_bitsandbytes_say_what_to_install(folder):
    with pytest.raises(ValueError, match="bits: 4 needs the package bitsandbytes"):
        LlavaNextCaptioner(LlavaNextConfig(model=str(folder), bits=4))


@pytest.mark.parametrize("device", ["wrong", "cuda:99", ""])
def test_a_device_that_is_not_there_is_named(folder, device):
    with pytest.raises(ValueError, match=f"device: '{device}' cannot be used here"):
        LlavaNextCaptioner(LlavaNextConfig(model=str(folder), device=device))


def test_dtype_and_device_are_taken(folder):
    captioner = LlavaNextCaptioner(LlavaNextConfig(model=str(folder), dtype="bfloat16", device="cpu", max_new_tokens=4))
    assert captioner._network.dtype is torch.bfloat16
    assert len(captioner.answer(questions(3))) == 3
