"""Where the files of a pretrained autoencoder lie, and the network that they hold.

A folder or file here, or the hub through its cache. Nothing but JSON and safetensors is opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"

_CLASS = "AutoencoderKL"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_TIMEOUT_S = 10
_PREFIXES = ("", "first_stage_model.", "vae.")
"""Of an autoencoder's names: alone, or within a whole Stable Diffusion."""
_ORIGINAL_NAME = "encoder.down.0.block.0.conv2.weight"


class Wanted(Protocol):
    """What `find_files` reads of the settings (`PretrainedVaeConfig`)."""

    @property
    def model(self) -> str: ...
    @property
    def subfolder(self) -> str | None: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def offline(self) -> bool: ...


@dataclass(frozen=True)
class VaeFiles:
    """The files of one autoencoder."""

    where: str
    """Where they were found, for messages."""
    config: Path | None
    """config.json; a single file may have none."""
    weights: Path
    """The safetensors."""
    commit: str | None = None
    """On the hub."""


def find_files(wanted: Wanted) -> VaeFiles:
    """The files, downloaded where they must be.

    Raises:
        FileNotFoundError: they are not there; the message says where they were looked for.
        ValueError: a single file of another format.
    """
    here = Path(wanted.model)
    if here.is_file():
        return _single_file(here, wanted)
    if here.is_dir():
        return _in_folder(here / wanted.subfolder if wanted.subfolder else here)
    if not _HUB_ID.fullmatch(wanted.model):
        kind = "file" if here.suffix else "folder"
        raise FileNotFoundError(
            f"the autoencoder is looked for in the {kind} {here.absolute()}, which is not there, and it is no hub id"
        )
    return _on_hub(wanted)


def _single_file(path: Path, wanted: Wanted) -> VaeFiles:
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is no .safetensors file; other weights can run code when they are read")
    if wanted.subfolder:
        raise ValueError(f"subfolder {wanted.subfolder!r} of the single file {path}: leave it out")
    beside = path.with_name(CONFIG_FILE)
    return VaeFiles(str(path), beside if beside.is_file() and _class_of(beside) == _CLASS else None, path)


def _in_folder(folder: Path) -> VaeFiles:
    if not folder.is_dir():
        raise FileNotFoundError(f"the autoencoder is looked for in the folder {folder.absolute()}, which is not there")
    paths = {name: folder / name for name in (CONFIG_FILE, WEIGHTS_FILE)}
    missing = [name for name, path in paths.items() if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"the folder {folder.absolute()} has no {' and no '.join(missing)} (only safetensors are read); it holds "
            f"{_some(sorted(path.name for path in folder.iterdir()))}"
        )
    return VaeFiles(str(folder), paths[CONFIG_FILE], paths[WEIGHTS_FILE])


def _on_hub(wanted: Wanted) -> VaeFiles:
    """From the cache at once where nothing can have changed there, else as the hub has it, else from the cache."""
    revision = wanted.revision or "main"
    is_fixed = bool(_COMMIT.fullmatch(revision))
    problem: Exception | None = None
    if not wanted.offline and not (is_fixed and _in_cache(wanted, revision)):
        from huggingface_hub.errors import HfHubHTTPError

        unreachable: tuple[type[Any], ...] = (OSError, *HfHubHTTPError.__bases__)  # of the HTTP library that it uses
        try:
            return _download(wanted, revision)
        except _NoSafetensorsError as error:
            raise FileNotFoundError(str(error)) from error
        except unreachable as error:
            problem = error
    found = _in_cache(wanted, revision)
    if found is None:
        raise FileNotFoundError(_not_there(wanted, revision, problem)) from problem
    return found


class _NoSafetensorsError(LookupError):
    """The hub has the model, but not these files of it."""


def _names(wanted: Wanted) -> tuple[str, str]:
    prefix = f"{wanted.subfolder.rstrip('/')}/" if wanted.subfolder else ""
    return prefix + CONFIG_FILE, prefix + WEIGHTS_FILE


def _download(wanted: Wanted, revision: str) -> VaeFiles:
    import huggingface_hub

    info = huggingface_hub.HfApi().model_info(wanted.model, revision=revision, timeout=_HUB_TIMEOUT_S)
    there = {sibling.rfilename for sibling in info.siblings or ()}
    missing = [name for name in _names(wanted) if name not in there]
    if missing:
        raise _NoSafetensorsError(
            f"{wanted.model} (revision {revision}) on the hub has no {' and no '.join(missing)}; it holds "
            f"{_some(sorted(there))}"
        )
    cache = huggingface_hub.constants.HF_HUB_CACHE
    config, weights = (
        Path(huggingface_hub.hf_hub_download(wanted.model, name, revision=info.sha, cache_dir=cache))
        for name in _names(wanted)
    )
    return VaeFiles(f"{wanted.model}@{info.sha}", config, weights, info.sha)


def _in_cache(wanted: Wanted, revision: str) -> VaeFiles | None:
    from huggingface_hub import constants, try_to_load_from_cache

    paths = [
        try_to_load_from_cache(wanted.model, name, revision=revision, cache_dir=constants.HF_HUB_CACHE)
        for name in _names(wanted)
    ]
    config, weights = (Path(path) if isinstance(path, str) else None for path in paths)
    if config is None or weights is None:
        return None
    commit = next((part for part in reversed(config.parts) if _COMMIT.fullmatch(part)), None)
    return VaeFiles(f"{wanted.model}@{commit or revision}", config, weights, commit)


def _not_there(wanted: Wanted, revision: str, problem: Exception | None) -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    reason = next(iter(str(problem or "").strip().splitlines()), "")[:300].rstrip(".")
    tried = f"and cannot be downloaded ({reason})" if problem else "and offline is set"
    return (
        f"the autoencoder {wanted.model} (revision {revision}) is no folder here, its {' and '.join(_names(wanted))} "
        f"are not in the Hugging Face cache {HF_HUB_CACHE}, {tried}. Get it where there is a network "
        f"(`hf download {wanted.model}`), or give a folder that holds it."
    )


def read_network(files: VaeFiles) -> tuple[Any, bool]:
    """The `AutoencoderKL` in these files, float32 on the CPU, and whether they tell its scaling factor.

    Raises:
        ValueError: another class, other channels, weights that are missing, broken or not finite.
    """
    from safetensors import SafetensorError, safe_open

    if files.config is not None and _class_of(files.config) != _CLASS:
        raise ValueError(
            f"{files.config} describes {_class_of(files.config) or 'no model of diffusers'}; an {_CLASS} is needed"
        )
    try:
        with safe_open(files.weights, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"the weights {files.weights} are broken ({error}); get them again") from error
    is_named = files.weights.name == WEIGHTS_FILE and files.config is not None
    network, missing = _from_folder(files) if is_named else _from_single_file(files)
    if missing:
        raise ValueError(f"{files.weights} is not complete: missing are {_some(missing)}")
    _check(network, files)
    return network, files.config is not None


def _from_folder(files: VaeFiles) -> tuple[Any, list[str]]:
    """The network, and the names of its tensors that are not there."""
    from diffusers import AutoencoderKL

    network, info = AutoencoderKL.from_pretrained(
        str(files.weights.parent), use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    if info["unexpected_keys"]:
        raise ValueError(
            f"{files.config} is not that of {files.weights}, which also holds {_some(sorted(info['unexpected_keys']))}"
        )
    return network, sorted(info["missing_keys"])


def _from_single_file(files: VaeFiles) -> tuple[Any, list[str]]:
    """As `_from_folder`, of a file in diffusers' names or in the original ones, alone or within a whole model's."""
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
    from safetensors import safe_open

    with safe_open(files.weights, framework="pt") as handle:
        names = list(handle.keys())
        prefix = next((prefix for prefix in _PREFIXES if f"{prefix}encoder.conv_in.weight" in names), "")
        state = {name[len(prefix) :]: handle.get_tensor(name) for name in names if name.startswith(prefix)}
    shape = json.loads(files.config.read_text()) if files.config else _shape_of_original(state, files)
    if _ORIGINAL_NAME in state:
        state = convert_ldm_vae_checkpoint(state, shape)
    network: Any = AutoencoderKL.from_config(shape)
    try:
        missing, _ = network.load_state_dict(state, strict=False)
    except RuntimeError as error:  # sizes that differ
        raise ValueError(f"{files.weights} does not fit its configuration: {error}") from error
    return network.eval(), sorted(missing)


def _shape_of_original(state: Mapping[str, Tensor], files: VaeFiles) -> dict[str, Any]:
    """The shape of an autoencoder in the original (CompVis) names, from its tensors' sizes.

    Raises:
        ValueError: the names are others.
    """
    if _ORIGINAL_NAME not in state or "decoder.conv_in.weight" not in state:
        raise ValueError(
            f"{files.weights} has neither a config.json of an {_CLASS} beside it nor the original names of one; it "
            f"holds {_some(sorted(state))}"
        )

    def count(pattern: str) -> int:
        return sum(1 for name in state if re.fullmatch(pattern, name))

    num_levels = count(r"encoder\.down\.\d+\.block\.0\.conv2\.weight")
    return {
        "_class_name": _CLASS,
        "block_out_channels": [len(state[f"encoder.down.{i}.block.0.conv2.weight"]) for i in range(num_levels)],
        "down_block_types": ["DownEncoderBlock2D"] * num_levels,
        "up_block_types": ["UpDecoderBlock2D"] * num_levels,
        "layers_per_block": count(r"encoder\.down\.0\.block\.\d+\.conv2\.weight"),
        "latent_channels": state["decoder.conv_in.weight"].shape[1],
        "norm_num_groups": 32,  # of every published one; no tensor tells it
        "use_quant_conv": "quant_conv.weight" in state,
        "use_post_quant_conv": "post_quant_conv.weight" in state,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in state,
    }


def _check(network: Any, files: VaeFiles) -> None:
    if (network.config.in_channels, network.config.out_channels) != (3, 3):
        raise ValueError(
            f"{files.where} takes {network.config.in_channels} and gives {network.config.out_channels} channels; an "
            "autoencoder of RGB images is needed"
        )
    broken = [name for name, tensor in network.named_parameters() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{files.weights} holds values that are not finite, in {_some(broken)}; get it again")


def _class_of(config: Path) -> str | None:
    try:
        content = json.loads(config.read_text())
    except ValueError as error:
        raise ValueError(f"{config} is no JSON ({error})") from error
    return content.get("_class_name") if isinstance(content, dict) else None


def _some(names: list[str]) -> str:
    return (", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")) or "nothing"
