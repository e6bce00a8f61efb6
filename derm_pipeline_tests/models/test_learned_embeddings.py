import copy
import math

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from derm_pipeline.models.learned_embeddings import (
    add_embeddings,
    load_embeddings,
    save_each_embedding,
    save_embeddings,
    spellings,
    take_embeddings,
)

LEARNT = {"pso-class": (1, 32), "squ-class": (1, 32), "veil": (3, 32)}


@pytest.fixture(scope="module")
def made(tiny_pipelines):
    return DiffusionPipeline.from_pretrained(tiny_pipelines["sd"], local_files_only=True)


@pytest.fixture
def pipeline(made):
    fresh = type(made)(**copy.deepcopy(made.components))
    fresh.set_progress_bar_config(disable=True)
    return fresh


def learnt():
    return {token: torch.randn(shape) for token, shape in LEARNT.items()}


def embedded(pipeline, text):
    ids = pipeline.tokenizer(text, return_tensors="pt").input_ids
    return pipeline.text_encoder(ids).last_hidden_state


def test_one_merged_file_holds_several_tokens(tmp_path):
    embeddings = learnt()
    save_embeddings(tmp_path / "learned_embeds.safetensors", embeddings)
    for path in (tmp_path, tmp_path / "learned_embeds.safetensors"):
        again = load_embeddings(path)
        assert again.keys() == embeddings.keys()
        assert all(torch.equal(again[token], embeddings[token]) for token in again)


@pytest.mark.parametrize("token", ["pso-class", "veil"])
def test_load_textual_inversion_reads_ours_and_embeds_as_we_do(token, pipeline, made, tmp_path):
    embeddings = learnt()
    paths = save_each_embedding(tmp_path, embeddings)
    theirs = type(made)(**copy.deepcopy(made.components))
    theirs.load_textual_inversion(str(paths[token]))
    add_embeddings(pipeline.tokenizer, pipeline.text_encoder, load_embeddings(paths[token]))
    text = f"an image of {' '.join(spellings(token, LEARNT[token][0]))} on the skin"
    assert theirs.maybe_convert_prompt(f"an image of {token} on the skin", theirs.tokenizer) == text
    assert torch.equal(embedded(pipeline, text), embedded(theirs, text))
    assert not torch.equal(embedded(pipeline, text), embedded(made, text))


def test_only_the_new_rows_are_new(pipeline, made):
    state = torch.random.get_rng_state()
    embeddings = learnt()
    torch.random.set_rng_state(state)
    before = torch.rand(1)
    torch.random.set_rng_state(state)
    ids = add_embeddings(pipeline.tokenizer, pipeline.text_encoder, embeddings)
    assert torch.equal(torch.rand(1), before)  # no draw from the global generator
    old, table = (one.text_encoder.get_input_embeddings().weight for one in (made, pipeline))
    assert torch.equal(table[: len(old)], old)
    assert len(table) == len(old) + 5 == pipeline.text_encoder.config.vocab_size
    assert sorted(row for own in ids.values() for row in own) == list(range(len(old), len(table)))
    taken = take_embeddings(pipeline.text_encoder, ids)
    assert all(torch.equal(taken[token], embeddings[token]) for token in embeddings)
    assert torch.equal(embedded(pipeline, "melanoma on light skin"), embedded(made, "melanoma on light skin"))
    for token, own in ids.items():
        words = " ".join(spellings(token, len(own)))
        assert pipeline.tokenizer(words).input_ids[1:-1] == list(own)


def test_rows_to_spare_are_taken_before_the_table_grows(pipeline):
    """T5's table has more rows than its tokenizer has tokens."""
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer) + 50, mean_resizing=False)
    size = len(pipeline.text_encoder.get_input_embeddings().weight)
    ids = add_embeddings(pipeline.tokenizer, pipeline.text_encoder, learnt())
    assert len(pipeline.text_encoder.get_input_embeddings().weight) == size
    assert take_embeddings(pipeline.text_encoder, ids)["veil"].shape == (3, 32)


@pytest.mark.parametrize(
    ("embeddings", "said"),
    [
        ({"melanoma</w>": (1, 32)}, "tokenizer has melanoma</w> already"),
        ({"<|endoftext|>": (1, 32)}, "already"),
        ({"veil": (2, 32), "veil_1": (1, 32)}, "tokenizer has veil_1 already"),
        ({"veil": (1, 64)}, "veil has 64 features, and the text encoder's tokens 32"),
        ({"two words": (1, 32)}, "'two words' is no token"),
        ({"a" * 101: (1, 32)}, "is no token"),
        ({"veil": (32,)}, r"veil is \(32,\)"),
        ({"veil": (129, 32)}, "a token has 1 to 128 vectors"),
        ({}, "holds no token"),
    ],
)
def test_tokens_that_cannot_be_added_are_refused_and_nothing_changes(embeddings, said, pipeline, made):
    with pytest.raises(ValueError, match=said):
        add_embeddings(
            pipeline.tokenizer,
            pipeline.text_encoder,
            {token: torch.zeros(shape) for token, shape in embeddings.items()},
        )
    assert pipeline.tokenizer.get_vocab() == made.tokenizer.get_vocab()
    rows = pipeline.text_encoder.get_input_embeddings().weight
    assert torch.equal(rows, made.text_encoder.get_input_embeddings().weight)


def test_a_files_name_never_leaves_the_folder(tmp_path):
    tokens = ["../../etc/passwd", "a/b", "a.b", "a b".replace(" ", "?"), "...", "<pso>"]
    paths = save_each_embedding(tmp_path / "each", {token: torch.randn(1, 4) for token in tokens})
    assert {path.parent for path in paths.values()} == {tmp_path / "each"}
    assert len(set(paths.values())) == len(tokens) == len(list((tmp_path / "each").iterdir()))
    assert {next(iter(load_file(path))) for path in paths.values()} == set(tokens)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"string_to_param": torch.zeros(3, 3, 3)}, r"string_to_param is \(3, 3, 3\)"),
        ({"veil": torch.full((1, 4), math.nan)}, "veil holds values that are no finite numbers"),
        ({"veil": torch.zeros(1, 4, dtype=torch.int64)}, "veil holds values that are no finite numbers"),
        ({"a\nb": torch.zeros(1, 4)}, "is no token"),
    ],
)
def test_files_of_something_else_are_refused(tensors, said, tmp_path):
    save_file(tensors, tmp_path / "e.safetensors")
    with pytest.raises(ValueError, match=said):
        load_embeddings(tmp_path / "e.safetensors")


def test_files_that_are_not_there_or_could_run_code_are_refused(tmp_path):
    (tmp_path / "e.pt").write_bytes(b"")
    (tmp_path / "e.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match="can run code"):
        load_embeddings(tmp_path / "e.pt")
    with pytest.raises(ValueError, match="no safetensors file, or a broken one"):
        load_embeddings(tmp_path / "e.safetensors")
    with pytest.raises(FileNotFoundError, match=r"learned_embeds\.safetensors"):
        load_embeddings(tmp_path)
