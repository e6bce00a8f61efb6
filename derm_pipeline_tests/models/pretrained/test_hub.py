import re
import shutil
import types

import pytest
from safetensors.torch import load_file, save_file

from derm_pipeline.models.pretrained.base import load_base, load_base_of
from derm_pipeline.models.pretrained.files import find_base
from derm_pipeline_tests.models.pretrained.conftest import settings

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def unplugged(*_, **__):
    raise OSError("Network is unreachable")


def put_in_cache(cache, folder, name):
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


def test_a_base_that_is_nowhere_says_where_it_was_looked_for(cache, monkeypatch):
    where = re.escape(str(cache))
    with pytest.raises(
        FileNotFoundError, match=f"the base some/sd .* not in the Hugging Face cache {where}, and offline"
    ):
        load_base(settings("some/sd", offline=True))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unplugged)
    with pytest.raises(FileNotFoundError, match="cannot be downloaded .*unreachable"):
        load_base(settings("some/sd"))


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart"])
def test_a_cached_base_serves_without_a_network_and_is_pinned(name, cache, tiny_folders, monkeypatch):
    put_in_cache(cache, tiny_folders[name], f"some/{name}")
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unplugged)
    base = load_base(settings(f"some/{name}"))
    assert base.reference.settings.revision == COMMIT
    assert base.reference.settings.model == f"some/{name}"
    assert base.reference.files == find_base(settings(tiny_folders[name])).digests()
    assert base.vae.config.settings.revision == COMMIT
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", None)  # a pinned one that is cached is not asked for
    load_base_of(base.reference, parts=("text",))


def test_the_hub_is_asked_for_what_is_read_and_for_nothing_else(cache, tiny_folders, monkeypatch):
    folder = tiny_folders["sdxl"]
    needed = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    others = {"sd_xl_base.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors", "README.md"}
    others |= {"unet/diffusion_pytorch_model.bin", "vae_1_0/diffusion_pytorch_model.safetensors", "vae/model.onnx"}
    asked = []

    def model_info(self, name, revision, timeout):
        siblings = [types.SimpleNamespace(rfilename=name) for name in sorted(needed | others)]
        return types.SimpleNamespace(sha=COMMIT, siblings=siblings)

    def hf_hub_download(name, file_name, revision, cache_dir):
        asked.append(file_name)
        return str(folder / file_name)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    assert find_base(settings("some/sdxl")).commit == COMMIT
    assert len(asked) == len(needed)
    assert set(asked) == needed


def test_a_repository_without_safetensors_is_refused_before_any_download(cache, tiny_folders, monkeypatch):
    folder = tiny_folders["sd"]
    there = [path.relative_to(folder).as_posix().replace(".safetensors", ".bin") for path in folder.rglob("*")]

    def model_info(self, name, revision, timeout):
        return types.SimpleNamespace(sha=COMMIT, siblings=[types.SimpleNamespace(rfilename=name) for name in there])

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)
    with pytest.raises(FileNotFoundError, match=r"on the hub has no unet/\*\.safetensors"):
        load_base(settings("some/sd"))


def test_weights_in_several_files_are_read_by_their_index(tiny_folders, tmp_path):
    folder = shutil.copytree(tiny_folders["pixart"], tmp_path / "pixart")
    whole = load_base(settings(folder), parts=("text",))
    whole.text_encoders[0].save_pretrained(folder / "text_encoder", max_shard_size="40KB")
    (folder / "text_encoder" / "model.safetensors").unlink()
    shards = sorted((folder / "text_encoder").glob("*.safetensors"))
    assert len(shards) > 1
    again = load_base(settings(folder), parts=("text",))
    state = again.text_encoders[0].state_dict()
    assert all((state[name] == tensor).all() for name, tensor in whole.text_encoders[0].state_dict().items())
    assert sum(name.startswith("text_encoder/model-") for name in again.reference.files) == len(shards)
    index = folder / "text_encoder" / "model.safetensors.index.json"
    said = index.read_text()
    index.write_text(said.replace(shards[0].name, "../../secret.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"names \.\./\.\./secret.safetensors"):
        load_base(settings(folder), parts=("text",))
    index.write_text(said)
    shards[0].unlink()
    with pytest.raises(FileNotFoundError, match="names model-00001-of-.* not there beside it"):
        load_base(settings(folder), parts=("text",))


def test_weights_that_are_not_finite_or_of_other_sizes_are_refused(tiny_folders, tmp_path):
    folder = shutil.copytree(tiny_folders["sd"], tmp_path / "sd")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    save_file(state | {"conv_in.bias": state["conv_in.bias"] * float("nan")}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="not finite, in conv_in.bias"):
        load_base(settings(folder), parts=("denoiser",))
    save_file(state | {"conv_in.bias": state["conv_in.bias"][:3].clone()}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="do not fit .*/unet/config.json"):
        load_base(settings(folder), parts=("denoiser",))
    path.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="broken or do not fit"):
        load_base(settings(folder), parts=("denoiser",))
