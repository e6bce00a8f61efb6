"""The files of a pretrained text encoder, and the tokenizer and network that they hold."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Protocol

from derm_pipeline.models.hub_files import CONFIG_FILE, Choice, ModelFiles, Wanted, find_model, some

if TYPE_CHECKING:
    import torch

WEIGHTS_FILE = "model.safetensors"

_INDEX_FILE = "model.safetensors.index.json"
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",), ("spiece.model",))
"""Files that hold a tokenizer's vocabulary; one of these sets is needed."""
_TOKENIZER_FILES = {
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    *(name for names in _VOCABULARIES for name in names),
}


class WantedText(Wanted, Protocol):
    """What is read of the settings (`TextEncoderConfig`)."""

    @property
    def max_tokens(self) -> int: ...


def find_text_files(wanted: Wanted) -> ModelFiles:
    """The files, downloaded where they must be.

    Raises:
        FileNotFoundError: they are not there; the message says where they were looked for.
    """
    prefix = _prefix(wanted)

    def choose(there: Collection[str]) -> Choice:
        known = set(there)
        weights = _weights(known, prefix)
        tokenizer = _tokenizer_names(known, prefix)
        chosen = [prefix + CONFIG_FILE, *weights, *tokenizer]
        missing = [prefix + CONFIG_FILE] if prefix + CONFIG_FILE not in known else []
        missing += [prefix + WEIGHTS_FILE] if not weights else []
        missing += [prefix + "tokenizer.json"] if not tokenizer else []
        return Choice(chosen, missing)

    return find_model(wanted, choose, "text encoder")


def _prefix(wanted: Wanted) -> str:
    return f"{wanted.subfolder}/" if wanted.subfolder else ""


def _weights(known: set[str], prefix: str) -> list[str]:
    """One file, or all shards with their index; nothing where neither is whole."""
    if prefix + WEIGHTS_FILE in known:
        return [prefix + WEIGHTS_FILE]
    found = {name: _SHARD.fullmatch(name.removeprefix(prefix)) for name in known if name.startswith(prefix)}
    shards = sorted(name for name, match in found.items() if match)
    num_told = {int(match[2]) for match in found.values() if match}
    is_whole = num_told == {len(shards)} and prefix + _INDEX_FILE in known
    return [prefix + _INDEX_FILE, *shards] if is_whole else []


def _tokenizer_names(known: set[str], prefix: str) -> list[str]:
    """The tokenizer's files: beside the weights, or in the folder that diffusers has for them ("tokenizer_2")."""
    for folder in dict.fromkeys((prefix, prefix.replace("text_encoder", "tokenizer"))):
        there = {name for name in _TOKENIZER_FILES if folder + name in known}
        if any(there.issuperset(names) for names in _VOCABULARIES):
            return sorted(folder + name for name in there)
    return []


def read_shape(wanted: WantedText, files: ModelFiles) -> int:
    """Features of a token's embedding, from config.json.

    Raises:
        ValueError: it is no text encoder, or takes fewer tokens than are wanted.
    """
    config = _config(files.paths[_prefix(wanted) + CONFIG_FILE].parent, files)
    most = getattr(config, "max_position_embeddings", None)  # T5, whose positions are relative, has none
    if most is not None and wanted.max_tokens > most:
        raise ValueError(
            f"the text encoder {files.where} takes {most} tokens at most, and max_tokens is {wanted.max_tokens}"
        )
    width: int = config.hidden_size
    return width


def read_text_encoder(wanted: WantedText, files: ModelFiles, dtype: torch.dtype) -> tuple[Any, Any, int]:
    """The tokenizer, the network (on the CPU, its weights fixed) and the features of a token's embedding.

    Raises:
        ValueError: it is no text encoder, its weights are missing, broken or not finite, or it takes fewer tokens than
            are wanted.
    """
    width = read_shape(wanted, files)
    tokenizer = _tokenizer(wanted, files)
    if wanted.max_tokens > tokenizer.model_max_length:
        raise ValueError(
            f"the tokenizer of {files.where} takes {tokenizer.model_max_length} tokens at most, and max_tokens is "
            f"{wanted.max_tokens}"
        )
    return tokenizer, _network(wanted, files, dtype), width


def _config(folder: Any, files: ModelFiles) -> Any:
    """The configuration of the part that encodes text."""
    from transformers import CONFIG_MAPPING, AutoConfig

    content = _json(folder / CONFIG_FILE)
    if not isinstance(content, dict) or "model_type" not in content:
        raise ValueError(f"{folder / CONFIG_FILE} is no configuration of a text encoder: it names no model_type")
    if content["model_type"] not in CONFIG_MAPPING:
        raise ValueError(
            f"{folder / CONFIG_FILE} describes a {content['model_type']}, which transformers does not know; code that "
            "comes with a model is not run"
        )
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        raise ValueError(f"the text encoder {files.where}: {str(error).splitlines()[0]}") from error
    return config.text_config if config.model_type == "clip" else config


def _network(wanted: Wanted, files: ModelFiles, dtype: torch.dtype) -> Any:
    import torch
    from safetensors import SafetensorError

    folder = files.paths[_prefix(wanted) + CONFIG_FILE].parent
    config = _config(folder, files)
    try:
        network, info = _class_of(config, files).from_pretrained(
            str(folder),
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"the weights of {files.where} are broken, or of another shape ({str(error).splitlines()[0]}); get them "
            "again"
        ) from error
    missing = sorted(name for name in info["missing_keys"] if "pooler" not in name)  # what is pooled is not used
    if missing:
        raise ValueError(f"the weights of {files.where} are not complete: missing are {some(missing)}")
    broken = [name for name, tensor in network.named_parameters() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"the weights of {files.where} hold values that are not finite, in {some(broken)}")
    return network.to(dtype).eval().requires_grad_(False)


def _class_of(config: Any, files: ModelFiles) -> Any:
    """Transformers' class that encodes text of this configuration."""
    from transformers import AutoModel, AutoModelForTextEncoding, CLIPTextModel
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES

    if config.model_type == "clip_text_model":
        return CLIPTextModel
    if config.model_type in MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES:
        return AutoModelForTextEncoding
    if getattr(config, "is_encoder_decoder", False) or not hasattr(config, "vocab_size"):
        raise ValueError(f"{files.where} is a model of kind {config.model_type}, which encodes no text by itself")
    return AutoModel


def _tokenizer(wanted: Wanted, files: ModelFiles) -> Any:
    from transformers import AutoTokenizer

    names = _tokenizer_names(set(files.paths), _prefix(wanted))
    folder = files.paths[names[0]].parent
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, ImportError, KeyError) as error:
        raise ValueError(f"the tokenizer in {folder} cannot be read: {str(error).strip().splitlines()[0]}") from error
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _json(path: Any) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error})") from error
