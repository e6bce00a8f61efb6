"""Where the files of a base lie, what they say of it, and which of them are read. Opens nothing but JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, get_args

from derm_pipeline.models.hub_files import Choice, find_model, some
from derm_pipeline.models.laws import DDPM
from derm_pipeline.models.pretrained.config import Family, Part, PretrainedConfig
from derm_pipeline.store import digest_of_file

INDEX = "model_index.json"
SINGLE = "single.safetensors"
"""Name under which the digest of a single file is kept."""
TEXT_FOLDERS: dict[Family, tuple[tuple[str, str], ...]] = {
    "sd": (("text_encoder", "tokenizer"),),
    "sdxl": (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")),
    "pixart": (("text_encoder", "tokenizer"),),
}
"""Folders of each text encoder and its tokenizer, in the order in which their embeddings are joined."""
DENOISER_FOLDERS: dict[Family, str] = {"sd": "unet", "sdxl": "unet", "pixart": "transformer"}
"""Folder of the denoiser."""

_IN_SINGLE_FILES: tuple[Family, ...] = ("sd", "sdxl")
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
        """sha256 by path of all files, or of these parts' and of what describes the whole; a single file has all."""
        folders = None if parts is None else {"", "scheduler", *(one for part in parts for one in self.folders(part))}
        names = [name for folder, names in self.names.items() if folders is None or folder in folders for name in names]
        digests = {name: _digest(self.root / name) for name in names}
        return digests | ({SINGLE: _digest(self.single)} if self.single else {})


def find_base(config: PretrainedConfig) -> BaseFiles:
    """The files, downloaded where they must be.

    Raises:
        FileNotFoundError: they are not there; the message says where they were looked for.
        ValueError: another format, another family than asked for, or one that cannot be used.
    """
    here = Path(config.model)
    single = here.resolve() if here.is_file() else None
    if single is None and config.layout is not None:
        raise ValueError(f"layout {config.layout!r} goes with a single file, which {config.model} is not: leave it out")
    root, commit = _locate(config) if single is None else _layout_of(single, config)
    if not (root / INDEX).is_file():
        raise FileNotFoundError(
            f"the folder {root.absolute()} has no {INDEX}: it is no pipeline in diffusers format; it holds "
            f"{some(sorted(path.name for path in root.iterdir()))}"
        )
    where = str(single or (f"{config.model}@{commit}" if commit else root))
    family = _family_of(root, where)
    if config.family not in (None, family):
        raise ValueError(f"{where} is a base of the family {family}, not {config.family} as its settings say")
    if single and family not in _IN_SINGLE_FILES:
        raise ValueError(f"{single}: a base of the family {family} cannot be read from a single file; give its folder")
    named: dict[str, tuple[str, ...]] = {"": (INDEX,)}
    for folder in needed_folders(family):
        named[folder] = _files_in(root, folder, where, has_weights=single is None)
    return BaseFiles(where, root, family, named, None if single else commit, single)


def needed_folders(family: Family) -> tuple[str, ...]:
    """Folders of a pipeline's files that are read."""
    texts = (folder for both in TEXT_FOLDERS[family] for folder in both)
    return (DENOISER_FOLDERS[family], *texts, "vae", "scheduler")


def _digest(path: Path) -> str:
    """sha256 of a file's bytes, read once a process: bases have gigabytes, and several stages ask for it."""
    found = path.stat()
    return _digest_of(path, found.st_ino, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=256)
def _digest_of(path: Path, inode: int, size: int, time_ns: int) -> str:
    return digest_of_file(path)


class _Wanted(NamedTuple):
    """A pipeline, as `find_model` asks for it: a folder that each has tells where its files lie in the cache."""

    model: str
    revision: str | None
    offline: bool
    subfolder: str = "vae"


def _locate(config: PretrainedConfig) -> tuple[Path, str | None]:
    """The folder of the files, and the commit on the hub."""
    here = Path(config.model)
    if here.is_dir():
        return here.resolve(), None
    found = find_model(_Wanted(config.model, config.revision, config.offline), _choose, "base")
    return found.paths[INDEX].parent, found.commit


def _layout_of(single: Path, config: PretrainedConfig) -> tuple[Path, str | None]:
    """The folder with the configs and tokenizers of a single file."""
    if single.suffix != ".safetensors":
        raise ValueError(f"{single} is no .safetensors file; other weights can run code when they are read")
    if config.layout is None:
        beside = single.with_suffix("")
        if beside.is_dir():
            return beside, None
        raise FileNotFoundError(
            f"{single} holds weights only, and no folder {beside.name} lies beside it with its configs and tokenizers: "
            "put there those of a pipeline in diffusers format, or name that pipeline as `layout` (a folder, or "
            'on the hub "stable-diffusion-v1-5/stable-diffusion-v1-5" for Stable Diffusion 1.x, '
            '"stabilityai/stable-diffusion-xl-base-1.0" for SDXL)'
        )
    folder = Path(config.layout)
    if folder.is_dir():
        return folder.resolve(), None
    wanted = _Wanted(config.layout, config.revision, config.offline)
    found = find_model(wanted, lambda names: _choose(names, has_weights=False), "layout")
    return found.paths[INDEX].parent, found.commit


def _choose(names: Collection[str], *, has_weights: bool = True) -> Choice:
    """Of the files of a pipeline on the hub, those that are read."""
    if INDEX not in names:
        return Choice([], [INDEX])
    family: Family = "sd"
    if "transformer/config.json" in names:
        family = "pixart"
    elif "text_encoder_2/config.json" in names:
        family = "sdxl"
    chosen, missing = [INDEX], []
    for folder in needed_folders(family):
        there = [name.removeprefix(f"{folder}/") for name in names if name.startswith(f"{folder}/")]
        found = _choose_in(folder, there, has_weights=has_weights)
        chosen += [f"{folder}/{name}" for name in found.chosen]
        missing += [f"{folder}/{name}" for name in found.missing]
    return Choice(chosen, missing)


def _choose_in(folder: str, there: Collection[str], *, has_weights: bool) -> Choice:
    """Of the files of one folder of a pipeline, those that are read."""
    said = _config_name(folder)
    missing = [said] if said not in there else []
    if folder.startswith("tokenizer"):
        return Choice([name for name in sorted(there) if Path(name).suffix in (".json", ".txt", ".model")], missing)
    if folder == "scheduler" or not has_weights:
        return Choice([said], missing)
    for stem in _WEIGHTS:
        if f"{stem}.safetensors" in there:
            return Choice([said, f"{stem}.safetensors"], missing)
        shards = sorted(name for name in there if re.fullmatch(rf"{stem}-\d+-of-\d+\.safetensors", name))
        if shards and f"{stem}.safetensors.index.json" in there:
            return Choice([said, f"{stem}.safetensors.index.json", *shards], missing)
    return Choice([said], [*missing, "*.safetensors"])


def _files_in(root: Path, folder: str, where: str, *, has_weights: bool) -> tuple[str, ...]:
    """Paths of the files of one folder that are read.

    Raises:
        FileNotFoundError: something is missing, in safetensors.
    """
    there = sorted(path.name for path in (root / folder).iterdir()) if (root / folder).is_dir() else []
    found = _choose_in(folder, there, has_weights=has_weights)
    if found.missing:
        why = " (only safetensors are read: others can run code)" if "*.safetensors" in found.missing else ""
        raise FileNotFoundError(
            f"{where} is not complete: it has no {folder}/{found.missing[0]}{why}; that folder holds {some(there)}"
        )
    _check_index(root / folder, found.chosen)
    return tuple(f"{folder}/{name}" for name in found.chosen)


def _check_index(folder: Path, chosen: Collection[str]) -> None:
    """See that an index of weights names files beside it, and no others."""
    for index in (name for name in chosen if name.endswith(".index.json")):
        strange = sorted(set(read_json(folder / index).get("weight_map", {}).values()) - set(chosen))
        if strange:
            raise FileNotFoundError(f"{folder / index} names {some(strange)}, which are not there beside it")


def _family_of(root: Path, where: str) -> Family:
    """The family, by the denoiser's own config."""
    unet, transformer = root / "unet" / "config.json", root / "transformer" / "config.json"
    found = unet if unet.is_file() else transformer
    pipeline = read_json(root / INDEX).get("_class_name")
    if not found.is_file():
        raise FileNotFoundError(f"{where} ({pipeline}) has no unet/config.json and no transformer/config.json")
    said = read_json(found)
    name = said.get("_class_name")
    if name == "UNet2DConditionModel":
        return "sdxl" if said.get("addition_embed_type") == "text_time" else "sd"
    if name == "PixArtTransformer2DModel":
        return "pixart"
    raise ValueError(f"{where} ({pipeline}, {name}) is of no family that can be a base: {', '.join(get_args(Family))}")


def _config_name(folder: str) -> str:
    if folder.startswith("tokenizer"):
        return "tokenizer_config.json"
    return "scheduler_config.json" if folder == "scheduler" else "config.json"


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
