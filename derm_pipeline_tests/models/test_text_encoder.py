"""Text encoders by reference: real classes of transformers, tiny and random, written to disk and read again."""

import json
import re
import shutil
import types

import pytest
import torch
from click.testing import CliRunner
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizer, CLIPTextModel, T5Config, T5EncoderModel

from derm_pipeline.cli import main
from derm_pipeline.models.text_encoder import (
    TextEncoderConfig,
    load_text_encoder,
    load_text_reference,
    text_width,
)
from derm_pipeline.models.tiny import write_tiny_clip_text

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TEXTS = (
    "A dermoscopic image of melanoma on the back.",
    "",
    "a nevus",
    "An image of a naevus, é 漢, on the trunk of a 75-year-old female " * 4,
)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_tiny_clip_text(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def folder(clip, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(clip, tmp_path / "clip")


def bert_at(folder):
    folder.mkdir(parents=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "an", "image", "of", "nevus", "melanoma", "."]
    tokenizer = BertTokenizer(vocab={word: place for place, word in enumerate(words)}, model_max_length=32)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=32, **shape)).save_pretrained(folder)
    return folder


def t5_at(folder, clip):
    """With the tokenizer of another: what matters is the network's kind."""
    AutoTokenizer.from_pretrained(clip).save_pretrained(folder)
    torch.manual_seed(2)
    config = T5Config(vocab_size=700, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder)
    return folder


def load(model, **settings):
    return load_text_encoder(TextEncoderConfig(model=str(model), **{"dtype": "float32", "max_tokens": 20} | settings))


def test_embeddings_are_the_states_of_transformers_own_class_and_zero_beyond_the_text(clip):
    found = load(clip, max_tokens=30).embed(TEXTS)
    assert found["text"].shape == (4, 30, 32)
    assert found["text"].dtype == torch.float32
    assert found["text_mask"].dtype == torch.bool
    network, tokenizer = CLIPTextModel.from_pretrained(clip).eval(), AutoTokenizer.from_pretrained(clip)
    inputs = tokenizer(list(TEXTS), padding="max_length", truncation=True, max_length=30, return_tensors="pt")
    with torch.no_grad():
        expected = network(**inputs).last_hidden_state
    mask = inputs["attention_mask"].bool()
    assert torch.equal(found["text_mask"], mask)
    assert mask.sum(1).tolist() == [mask.sum(1)[0], 2, mask.sum(1)[2], 30]
    assert (found["text"] - expected)[mask].abs().max() < 1e-5
    assert found["text"][~mask].eq(0).all()


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_encoders_of_other_families_are_read_by_their_own_class(family, clip, tmp_path):
    folder = bert_at(tmp_path / "bert") if family == "bert" else t5_at(tmp_path / "t5", clip)
    encoder = load(folder)
    found = encoder.embed(["an image of a nevus", "melanoma"])
    network = (BertModel if family == "bert" else T5EncoderModel).from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder)("an image of a nevus", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = network(input_ids=ids).last_hidden_state[0]
    assert (found["text"][0, : len(expected)] - expected).abs().max() < 1e-5
    assert int(found["text_mask"][0].sum()) == len(expected)
    assert text_width(encoder.config.settings) == encoder.config.width == 16


def test_a_texts_embedding_does_not_depend_on_the_other_texts(clip):
    encoder = load(clip)
    whole = encoder.embed(TEXTS)
    for place, text in enumerate(TEXTS):
        alone = encoder.embed([text, text])
        for name, tensor in whole.items():
            assert torch.equal(alone[name][0], tensor[place])
            assert torch.equal(alone[name][1], tensor[place])


def test_padded_batches_give_the_same_embeddings_as_single_texts(clip):
    """What a GPU is asked for: batches of one size, filled up."""
    encoder = load(clip)
    single = encoder.embed(TEXTS)
    encoder._batch_size = 3
    batched = encoder.embed(TEXTS)
    assert torch.equal(single["text_mask"], batched["text_mask"])
    assert (single["text"] - batched["text"]).abs().max() < 1e-5


def test_equal_texts_are_encoded_once(clip, monkeypatch):
    encoder, calls = load(clip), []
    forward = encoder._network.forward

    def counted(*arguments, **named):
        calls.append(1)
        return forward(*arguments, **named)

    monkeypatch.setattr(encoder._network, "forward", counted)
    found = encoder.embed([TEXTS[0], TEXTS[2], TEXTS[0]])
    assert len(calls) == 2
    assert torch.equal(found["text"][0], found["text"][2])


def test_tokens_are_counted_before_they_are_cut(clip):
    encoder = load(clip)
    counts = encoder.num_tokens(TEXTS)
    assert counts[1] == 2
    assert counts[3] > 100
    assert encoder.embed(TEXTS)["text_mask"].sum(1).tolist() == [min(20, count) for count in counts]


def test_settings_count_by_what_a_folder_holds_not_by_where_it_lies(folder, clip):
    def identity(where, **settings):
        return TextEncoderConfig(model=str(where), **settings).identity()

    assert identity(folder) == identity(clip) == identity(clip, offline=True)
    assert identity(clip, max_tokens=9) != identity(clip)
    (folder / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text() + "\n")
    assert identity(folder) != identity(clip)
    assert TextEncoderConfig(model="a/b").identity()["model"] == "a/b"


def test_a_reference_finds_the_very_same_encoder_again_and_no_other(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    encoder = load("clip")  # a relative path is kept in full
    assert encoder.config.settings.model == str(folder)
    monkeypatch.chdir("/")
    again = load_text_reference(encoder.config)
    assert again.config == encoder.config
    assert torch.equal(again.embed(TEXTS)["text"], encoder.embed(TEXTS)["text"])
    state = load_file(folder / "model.safetensors")
    name = next(name for name in state if name.endswith("position_embedding.weight"))
    save_file(state | {name: state[name] + 1}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"text encoder .* used before \(model.safetensors differ.*`latents`"):
        load_text_reference(encoder.config)
    assert load(folder).config.identity() != encoder.config.identity()


def test_a_whole_pipelines_encoder_is_found_with_the_tokenizer_beside_it(clip, tmp_path):
    for number in ("", "_2"):
        inside = tmp_path / f"text_encoder{number}"
        inside.mkdir()
        (tmp_path / f"tokenizer{number}").mkdir()
        for path in clip.iterdir():
            target = f"tokenizer{number}" if "token" in path.name else inside.name
            shutil.copy(path, tmp_path / target)
        found = load(tmp_path, subfolder=f"./text_encoder{number}/")
        assert torch.equal(found.embed(TEXTS)["text"], load(clip).embed(TEXTS)["text"])
        assert f"tokenizer{number}/tokenizer.json" in found.config.files


def test_weights_in_shards_are_read_and_incomplete_ones_are_not(clip, tmp_path):
    network = CLIPTextModel.from_pretrained(clip)
    network.save_pretrained(tmp_path, max_shard_size="60KB")
    AutoTokenizer.from_pretrained(clip).save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    found = load(tmp_path)
    assert torch.equal(found.embed(TEXTS)["text"], load(clip).embed(TEXTS)["text"])
    assert {shard.name for shard in shards} < found.config.files.keys()
    shards[-1].unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model.safetensors"):
        load(tmp_path)


def test_what_is_no_such_encoder_is_refused_by_name(folder):
    config, weights = folder / "config.json", folder / "model.safetensors"
    good, state = json.loads(config.read_text()), load_file(weights)

    def refused(error, message):
        with pytest.raises(error, match=message):
            load(folder)

    config.write_text("{")
    refused(ValueError, "config.json is no JSON")
    config.write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    refused(ValueError, "names no model_type")
    config.write_text(json.dumps({"model_type": "wonder", "auto_map": {"AutoConfig": "code.Wonder"}}))
    refused(ValueError, "a wonder, which transformers does not know; code that comes with a model is not run")
    config.write_text(json.dumps({"model_type": "vit", "hidden_size": 8}))
    refused(ValueError, "of kind vit, which encodes no text")
    config.write_text(json.dumps(good))
    missing = next(name for name in state if name.endswith("fc1.weight"))
    save_file({name: tensor for name, tensor in state.items() if name != missing}, weights, metadata={"format": "pt"})
    refused(ValueError, "not complete: missing are .*fc1.weight")
    save_file(state | {missing: torch.full_like(state[missing], torch.inf)}, weights, metadata={"format": "pt"})
    refused(ValueError, "not finite, in .*fc1.weight")
    weights.write_bytes(weights.read_bytes()[:500])
    refused(ValueError, "broken")
    weights.rename(folder / "pytorch_model.bin")
    refused(FileNotFoundError, r"has no model.safetensors \(only safetensors are read\).*holds config.json")
    (folder / "tokenizer.json").unlink()
    refused(FileNotFoundError, "no model.safetensors and no tokenizer.json")


def test_more_tokens_than_the_model_takes_are_refused(clip):
    with pytest.raises(ValueError, match="takes 77 tokens at most, and max_tokens is 78"):
        load(clip, max_tokens=78)
    with pytest.raises(ValueError, match="takes 77 tokens"):
        text_width(TextEncoderConfig(model=str(clip), max_tokens=300))


@pytest.mark.parametrize("subfolder", ["../other", "/etc", "text/../..", ""])
def test_a_subfolder_stays_inside_the_model(subfolder):
    with pytest.raises(ValidationError, match="no folder inside"):
        TextEncoderConfig(subfolder=subfolder)


def unplugged(*_, **__):
    raise ConnectionError("the plug was pulled")


def test_a_missing_model_says_where_it_was_looked_for_and_a_cached_one_serves(clip, monkeypatch, tmp_path):
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unplugged)
    where = re.escape(str(cache))
    with pytest.raises(FileNotFoundError, match=rf"text encoder some/clip .*{where}, and offline is set.*hf download"):
        load("some/clip", offline=True)
    with pytest.raises(FileNotFoundError, match=rf"{where}, and cannot be downloaded \(the plug was pulled\)"):
        load("some/clip")
    with pytest.raises(FileNotFoundError, match=re.escape(f"in the folder {tmp_path / 'none'}, which is not there")):
        load(tmp_path / "none")
    repository = cache / "models--some--clip"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(clip, repository / "snapshots" / COMMIT)
    for offline in (False, True):
        encoder = load("some/clip", offline=offline)
        assert (encoder.config.settings.model, encoder.config.settings.revision) == ("some/clip", COMMIT)
    assert torch.equal(encoder.embed(TEXTS)["text"], load(clip).embed(TEXTS)["text"])


def test_the_hub_is_asked_for_what_is_needed_at_one_commit(clip, monkeypatch):
    asked = []
    there = [*(path.name for path in clip.iterdir()), "pytorch_model.bin", "tf_model.h5", "README.md"]

    def download(_, name, revision, cache_dir):
        asked.append((name, revision))
        return str(clip / name)

    siblings = [types.SimpleNamespace(rfilename=name) for name in there]
    answer = types.SimpleNamespace(sha=COMMIT, siblings=siblings)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: answer)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    load("some/clip")
    assert sorted(asked) == sorted((path.name, COMMIT) for path in clip.iterdir())
    siblings[:] = siblings[-3:]
    with pytest.raises(FileNotFoundError, match="on the hub has no config.json and no model.safetensors and no tok"):
        load("some/clip")


def test_the_tiny_encoder_is_the_same_for_the_same_seed_and_spells_any_text(clip, tmp_path):
    again, other = write_tiny_clip_text(tmp_path / "a"), write_tiny_clip_text(tmp_path / "b", seed=1)
    for path in clip.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()
    assert (clip / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(clip)
    ids = tokenizer("an extraordinary naevus é 漢 37 mm²")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids[1:-1]  # which stands for what is not known, too


def test_the_command_line_writes_the_tiny_encoder(clip, tmp_path):
    done = CliRunner().invoke(main, ["models", "tiny", "clip_text", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert done.output.strip().endswith(f"clip_text: {tmp_path / 'out'}")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {
        path.name: path.read_bytes() for path in clip.iterdir()
    }
