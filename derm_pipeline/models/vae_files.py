"""Where the files of a pretrained autoencoder lie, and the network that they hold.

A folder or file here, or the hub through its cache. Nothing but JSON and safetensors is opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from derm_pipeline.models.hub_files import CONFIG_FILE, Choice, Wanted, find_model, some

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"

_CLASS = "AutoencoderKL"
_PREFIXES = ("", "first_stage_model.", "vae.")
"""Of an autoencoder's names: alone, or within a whole Stable Diffusion."""
_ORIGINAL_NAME = "encoder.down.0.block.0.conv2.weight"


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
    config, weights = _names(wanted)

    def choose(there: Collection[str]) -> Choice:
        return Choice([config, weights], [name for name in (config, weights) if name not in there])

    found = find_model(wanted, choose, "autoencoder")
    return VaeFiles(found.where, found.paths[config], found.paths[weights], found.commit)


def _single_file(path: Path, wanted: Wanted) -> VaeFiles:
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is no .safetensors file; other weights can run code when they are read")
    if wanted.subfolder:
        raise ValueError(f"subfolder {wanted.subfolder!r} of the single file {path}: leave it out")
    beside = path.with_name(CONFIG_FILE)
    return VaeFiles(str(path), beside if beside.is_file() and _class_of(beside) == _CLASS else None, path)


def _names(wanted: Wanted) -> tuple[str, str]:
    prefix = f"{wanted.subfolder}/" if wanted.subfolder else ""
    return prefix + CONFIG_FILE, prefix + WEIGHTS_FILE


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
        raise ValueError(f"{files.weights} is not complete: missing are {some(missing)}")
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
            f"{files.config} is not that of {files.weights}, which also holds {some(sorted(info['unexpected_keys']))}"
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
            f"holds {some(sorted(state))}"
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
        raise ValueError(f"{files.weights} holds values that are not finite, in {some(broken)}; get it again")


def _class_of(config: Path) -> str | None:
    try:
        content = json.loads(config.read_text())
    except ValueError as error:
        raise ValueError(f"{config} is no JSON ({error})") from error
    return content.get("_class_name") if isinstance(content, dict) else None
