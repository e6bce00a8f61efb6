"""Where the files of a base lie, what they say of it, and which of them are read. Opens nothing but JSON."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from derm_pipeline.models.laws import DDPM
from derm_pipeline.models.pretrained.config import Family, Part, PretrainedConfig
from derm_pipeline.store import digest_of_file

INDEX = "model_index.json"
TEXT_FOLDERS: dict[Family, tuple[tuple[str, str], ...]] = {
    "sd": (("text_encoder", "tokenizer"),),
    "sdxl": (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")),
    "pixart": (("text_encoder", "tokenizer"),),
}
"""Folders of each text encoder and its tokenizer, in the order in which their embeddings are joined."""
DENOISER_FOLDERS: dict[Family, str] = {"sd": "unet", "sdxl": "unet", "pixart": "transformer"}
"""Folder of the denoiser."""

_WEIGHTS = ("diffusion_pytorch_model", "model")
_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}
_UNUSUAL = ("trained_betas", "rescale_betas_zero_snr", "use_flow_sigmas")


@dataclass(frozen=True)
class BaseFiles:
    """The files of one base."""

    where: str
    """Where they were found, for messages."""
    root: Path
    """Folder with the configs, and of all else but for a single file."""
    family: Family
    """As the denoiser's config says."""
    names: dict[str, tuple[str, ...]]
    """Paths within the folder that are read, by folder ("" is model_index.json)."""
    commit: str | None = None
    """On the hub."""
    single: Path | None = None
    """All weights in one file."""

    def folders(self, part: Part) -> tuple[str, ...]:
        """The folders of a part."""
        if part == "text":
            return tuple(folder for both in TEXT_FOLDERS[self.family] for folder in both)
        return ("vae",) if part == "vae" else (DENOISER_FOLDERS[self.family],)

    def config(self, folder: str) -> dict[str, Any]:
        """The JSON that describes this folder's part ("scheduler" among them)."""
        return read_json(self.root / folder / _config_name(folder))

    def digests(self, parts: Collection[Part] | None = None) -> dict[str, str]:
        """sha256 by path of all files, or of these parts' and of what describes the whole."""
        folders = None if parts is None else {"", "scheduler", *(one for part in parts for one in self.folders(part))}
        names = [name for folder, names in self.names.items() if folders is None or folder in folders for name in names]
        digests = {name: digest_of_file(self.root / name) for name in names}
        return digests | ({"weights.safetensors": digest_of_file(self.single)} if self.single else {})


def find_base(config: PretrainedConfig) -> BaseFiles:
    """The files, downloaded where they must be.

    Raises:
        FileNotFoundError: they are not there; the message says where they were looked for.
        ValueError: another format, another family than asked for, or one that cannot be used.
    """
    root, commit = _locate(config)
    if not (root / INDEX).is_file():
        raise FileNotFoundError(
            f"the folder {root.absolute()} has no {INDEX}: it is no pipeline in diffusers format; it holds "
            f"{some(sorted(path.name for path in root.iterdir()))}"
        )
    where = f"{config.model}@{commit}" if commit else str(root)
    family = _family_of(root, where)
    if config.family not in (None, family):
        raise ValueError(f"{where} is a base of the family {family}, not {config.family} as its settings say")
    named = {"": (INDEX,)} | {folder: _files_in(root, folder, where) for folder in _needed(family)}
    return BaseFiles(where, root, family, named, commit)


def _needed(family: Family) -> tuple[str, ...]:
    texts = (folder for both in TEXT_FOLDERS[family] for folder in both)
    return (DENOISER_FOLDERS[family], *texts, "vae", "scheduler")


def _locate(config: PretrainedConfig) -> tuple[Path, str | None]:
    here = Path(config.model)
    if here.is_dir():
        return here.resolve(), None
    raise FileNotFoundError(
        f"the base is looked for in the folder {here.absolute()}, which is not there, and it is no hub id"
    )


def _family_of(root: Path, where: str) -> Family:
    """The family, by the denoiser's own config."""
    unet, transformer = root / "unet" / "config.json", root / "transformer" / "config.json"
    found = unet if unet.is_file() else transformer
    said = read_json(found) if found.is_file() else {}
    name = said.get("_class_name")
    if name == "UNet2DConditionModel":
        return "sdxl" if said.get("addition_embed_type") == "text_time" else "sd"
    if name == "PixArtTransformer2DModel":
        return "pixart"
    pipeline = read_json(root / INDEX).get("_class_name")
    if not found.is_file():
        raise FileNotFoundError(f"{where} ({pipeline}) has no unet/config.json and no transformer/config.json")
    raise ValueError(f"{where} ({pipeline}, {name}) is of no family that can be a base: {', '.join(get_args(Family))}")


def _config_name(folder: str) -> str:
    if folder == "":
        return INDEX
    if folder.startswith("tokenizer"):
        return "tokenizer_config.json"
    return "scheduler_config.json" if folder == "scheduler" else "config.json"


def _files_in(root: Path, folder: str, where: str) -> tuple[str, ...]:
    """Paths of the files of one folder that are read.

    Raises:
        FileNotFoundError: something is missing, in safetensors.
    """
    there = sorted(path.name for path in (root / folder).iterdir()) if (root / folder).is_dir() else []
    if _config_name(folder) not in there:
        raise FileNotFoundError(f"{where} has no {folder}/{_config_name(folder)}: the base is not complete")
    if folder == "scheduler":
        return (f"{folder}/{_config_name(folder)}",)
    if folder.startswith("tokenizer"):
        return tuple(f"{folder}/{name}" for name in there if Path(name).suffix in (".json", ".txt", ".model"))
    weights = _weights_in(root / folder, there)
    if not weights:
        raise FileNotFoundError(
            f"{where} has no {folder}/*.safetensors (only safetensors are read: others can run code); it holds "
            f"{some(there)}"
        )
    return tuple(f"{folder}/{name}" for name in ("config.json", *weights))


def _weights_in(folder: Path, there: Collection[str]) -> list[str]:
    """Names of the weights: one file, or an index and its parts."""
    for stem in _WEIGHTS:
        if f"{stem}.safetensors" in there:
            return [f"{stem}.safetensors"]
        index = f"{stem}.safetensors.index.json"
        if index in there:
            shards = sorted(set(read_json(folder / index).get("weight_map", {}).values()))
            strange = [name for name in shards if name not in there or not name.endswith(".safetensors")]
            if strange:
                raise FileNotFoundError(f"{folder / index} names {some(strange)}, which are not there beside it")
            return [index, *shards]
    return []


def law_of(scheduler: Mapping[str, Any], where: str) -> DDPM:
    """The noise law that a scheduler_config.json tells.

    Raises:
        ValueError: it is one that the project has no law for; the message says what of it.
    """
    schedule, prediction = scheduler.get("beta_schedule", "linear"), scheduler.get("prediction_type", "epsilon")
    problems = [f"{name} {scheduler[name]!r}" for name in _UNUSUAL if scheduler.get(name)]
    problems += [f"beta_schedule {schedule!r}"] if schedule not in _SCHEDULES else []
    problems += [f"prediction_type {prediction!r}"] if prediction not in _PREDICTIONS else []
    if scheduler.get("num_train_timesteps", 1000) != 1000:
        problems.append(f"num_train_timesteps {scheduler['num_train_timesteps']}")
    if problems or "beta_start" not in scheduler:
        said = ", ".join(problems) or f"no betas ({scheduler.get('_class_name')})"
        raise ValueError(f"the scheduler of {where} has {said}, for which there is no law here")
    return DDPM.model_validate(
        {
            "prediction": _PREDICTIONS[prediction],
            "schedule": _SCHEDULES[schedule],
            "beta_start": scheduler["beta_start"],
            "beta_end": scheduler["beta_end"],
        }
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file.

    Raises:
        ValueError: it is none.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def some(names: Collection[str]) -> str:
    """The first few of these names, in words."""
    first = [str(name) for name in names][:5]
    return (", ".join(first) + (f" and {len(names) - 5} more" if len(names) > 5 else "")) or "nothing"
