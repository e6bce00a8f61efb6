"""The three forms that other programs read LoRA in, written: peft's, diffusers' and kohya's.

`lora_files` reads them again. What a form has no place for is refused, with what has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from derm_pipeline.models.lora import Lora
from derm_pipeline.models.lora_names import Network, Part, kohya_name, with_text_model
from derm_pipeline.store import replacing, write_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Form = Literal["peft", "diffusers", "kohya"]
"""Raw names and a configuration (one network a file) · a prefix for each network · flattened names and alphas."""

CONFIG = "lora_adapter_metadata"
"""Where diffusers keeps the configuration in a file."""
NETWORK = "derm_network"
"""Where we keep what a network is, so that a file can be exported without its base."""
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
PEFT_PREFIX = "base_model.model."


def save_raw(path: Path, lora: Lora, network: Network) -> None:
    """Write one network's adapter with its own names, its configuration and what the network is as metadata."""
    _write(path, _peft_tensors(lora), {CONFIG: _as_json(_config(lora)), NETWORK: network.model_dump_json()})


def save_diffusers(path: Path, loras: Mapping[Part, Lora], networks: Mapping[Part, Network], **options: Any) -> None:
    """Write adapters as `load_lora_weights` of a diffusers pipeline reads them, alphas included.

    peft's own names under a prefix, since diffusers' converted ones lose layers when they are read again; of CLIP
    the long names, which every version reads.

    Args:
        path: The file.
        loras: The adapters by network.
        networks: What these networks are.
        options: `dtype`, in which weights are written; as they are by default.
    """
    tensors: dict[str, Tensor] = {}
    configs: dict[str, Any] = {}
    for part, lora in loras.items():
        prefix = part if part != "denoiser" else "unet" if networks[part].is_unet else "transformer"
        is_clip = networks[part].kind.startswith("CLIPTextModel")
        named = replace(lora, layers={with_text_model(name): one for name, one in lora.layers.items()})
        own = _peft_tensors(named if is_clip else lora)
        if is_clip:  # diffusers takes "lora_A" of attention only, and transformers the magnitudes as weights
            own = {_long_name(key): value for key, value in own.items()}
        tensors |= {f"{prefix}.{key}": value for key, value in own.items()}
        config = _config(lora, is_anchored=not is_clip)
        configs |= {f"{prefix}.{key}": value for key, value in config.items()}
    _write(path, tensors, {CONFIG: _as_json(configs)}, **options)


def save_kohya(
    path: Path,
    loras: Mapping[Part, Lora],
    networks: Mapping[Part, Network],
    *,
    is_sdxl: bool | None = None,
    **options: Any,
) -> None:
    """Write adapters as kohya's scripts do: `lora_unet_...`, `lora_te_...` or `lora_te1_...`, an alpha each.

    rsLoRA's scale is written as the alpha that gives it. DoRA's magnitudes are written as LyCORIS names them,
    `dora_scale`, one an output (its `wd_on_output`): diffusers' pipelines leave them out with a warning, kohya's own
    scripts do not know them, and other readers may divide by the base's norms, which draws something else. Of a
    text encoder's attention, diffusers reads this form only if `out_proj` is adapted, too.

    Args:
        path: The file.
        loras: The adapters by network.
        networks: What these networks are.
        is_sdxl: Whether the base is SDXL, whose names are others; None: as the networks tell.
        options: `dtype`, in which weights are written; as they are by default.

    Raises:
        ValueError: a network that the form has no names for, or two layers of the same name.
    """
    import torch

    if is_sdxl is None:
        is_sdxl = "text_encoder_2" in loras or ("denoiser" in networks and networks["denoiser"].is_sdxl)
    tensors: dict[str, Tensor] = {}
    alphas: dict[str, Tensor] = {}
    for part, lora in loras.items():
        for name, layer in lora.layers.items():
            key = kohya_name(part, name, networks[part], is_sdxl=is_sdxl)
            if f"{key}.alpha" in alphas:
                raise ValueError(f"{name} has the kohya name {key}, as another layer has: take peft or diffusers")
            tensors[f"{key}.lora_down.weight"] = layer.down
            tensors[f"{key}.lora_up.weight"] = layer.up
            alphas[f"{key}.alpha"] = torch.tensor(lora.scale(name) * layer.rank, dtype=torch.float32)
            if layer.magnitude is not None:
                tensors[f"{key}.dora_scale"] = layer.magnitude.reshape(-1, *(1 for _ in layer.down.shape[1:]))
    _write(path, tensors, _kohya_metadata(loras, networks, is_sdxl=is_sdxl), keep=alphas, **options)


def save_peft(folder: Path, lora: Lora, *, base: str = "", **options: Any) -> None:
    """Write one network's adapter as a folder that `peft.PeftModel.from_pretrained(network, folder)` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{PEFT_PREFIX}{key}": value for key, value in _peft_tensors(lora).items()}
    _write(folder / PEFT_WEIGHTS, tensors, {}, **options)
    write_json(folder / PEFT_CONFIG, _config(lora) | {"peft_type": "LORA", "base_model_name_or_path": base or None})


def _peft_tensors(lora: Lora) -> dict[str, Tensor]:
    """As `peft.get_peft_model_state_dict` calls them."""
    tensors = {}
    for name, layer in lora.layers.items():
        tensors[f"{name}.lora_A.weight"] = layer.down
        tensors[f"{name}.lora_B.weight"] = layer.up
        if layer.magnitude is not None:
            is_conv = layer.down.ndim == 4
            tensors[f"{name}.lora_magnitude_vector"] = (
                layer.magnitude.reshape(1, -1, 1, 1) if is_conv else layer.magnitude
            )
    return tensors


def _long_name(key: str) -> str:
    """Peft's name of a tensor as diffusers has it for text encoders."""
    for own, told in ((".lora_A.", ".lora_linear_layer.down."), (".lora_B.", ".lora_linear_layer.up.")):
        key = key.replace(own, told)
    return f"{key}.weight" if key.endswith(".lora_magnitude_vector") else key


def _config(lora: Lora, *, is_anchored: bool = True) -> dict[str, Any]:
    """Of peft's configuration what the weights do not tell; no more: other versions refuse what they do not know."""
    first = next(iter(lora.layers.values()))
    start = "^" if is_anchored else ""
    named = {f"{start}{re.escape(name)}": layer for name, layer in lora.layers.items()}
    return {
        "r": first.rank,
        "lora_alpha": first.alpha,
        "rank_pattern": {name: layer.rank for name, layer in named.items() if layer.rank != first.rank},
        "alpha_pattern": {name: layer.alpha for name, layer in named.items() if layer.alpha != first.alpha},
        "target_modules": list(lora.targets or lora.layers),
        "use_dora": lora.dora,
        "use_rslora": lora.rslora,
    }


def _as_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def _kohya_metadata(loras: Mapping[Part, Lora], networks: Mapping[Part, Network], *, is_sdxl: bool) -> dict[str, str]:
    """What kohya's scripts say of a whole file, where it holds for all of it."""
    ranks = {layer.rank for lora in loras.values() for layer in lora.layers.values()}
    alphas = {lora.scale(name) * layer.rank for lora in loras.values() for name, layer in lora.layers.items()}
    width = networks["denoiser"].text_width if "denoiser" in networks else None
    versions = {768: "sd_v1", 1024: "sd_v2"}
    version = "sdxl_base_v1-0" if is_sdxl else versions.get(width or 0)
    metadata = {"ss_network_module": "networks.lora"}
    metadata |= {"ss_network_dim": str(*ranks)} if len(ranks) == 1 else {}
    metadata |= {"ss_network_alpha": str(*alphas)} if len(alphas) == 1 else {}
    return metadata | ({"ss_base_model_version": version} if version else {})


def _write(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    dtype: torch.dtype | None = None,
    keep: Mapping[str, Tensor] | None = None,
) -> None:
    from safetensors.torch import save_file

    cast = {key: value.to(dtype or value.dtype).contiguous() for key, value in tensors.items()} | dict(keep or {})
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        save_file(cast, aside, metadata={"format": "pt", **metadata})
