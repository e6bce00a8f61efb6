"""What other programs call the layers of Stable Diffusion's networks in their LoRA files.

kohya's scripts flatten names to underscores; of SDXL's U-Net they flatten the original names (input_blocks.4.1), of
Stable Diffusion 1 and 2 diffusers' (down_blocks.0.attentions.0). Both are known for all U-Nets here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Part = Literal["denoiser", "text_encoder", "text_encoder_2"]
"""Which network of a base."""
PARTS: tuple[Part, ...] = ("denoiser", "text_encoder", "text_encoder_2")

KOHYA_PREFIXES: dict[str, Part] = {
    "lora_unet_": "denoiser",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
DIFFUSERS_PREFIXES: dict[str, Part] = {
    "unet": "denoiser",
    "transformer": "denoiser",
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder_2",
}

_TEXT = "text_model."
"""Begins the names of a CLIP text model's layers everywhere but in transformers 5."""
_CLIP_LAYER = re.compile(r"(embeddings|encoder\.layers|final_layer_norm)\.")
_SD_UNET = "UNet2DConditionModel"

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_IN_BLOCK = re.compile(r"(down|up|mid)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


class Network(BaseModel):
    """As much of a network's configuration as decides how other programs call its layers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    """Its class in diffusers or transformers."""
    layers_per_block: int | None = None
    """Of a U-Net; None where its blocks differ."""
    up_attends: tuple[bool, ...] = ()
    """Of a U-Net: whether each block of the way up attends, from the coarsest."""
    is_sdxl: bool = False
    """Of a U-Net: whether it is told the image's size and a pooled text, as SDXL's is."""
    text_width: int | None = None
    """Of a U-Net: features of a text token; 768 in Stable Diffusion 1, 1024 in 2."""

    @property
    def is_unet(self) -> bool:
        return self.kind == _SD_UNET


def network_of(module: Any) -> Network:
    """The facts of a network of diffusers or transformers."""
    kind = type(module).__name__
    if kind != _SD_UNET:
        return Network(kind=kind)
    config = module.config
    layers, width = config.layers_per_block, config.cross_attention_dim
    return Network(
        kind=kind,
        layers_per_block=layers if isinstance(layers, int) else None,
        up_attends=tuple("Attn" in block for block in config.up_block_types),
        is_sdxl=config.addition_embed_type == "text_time",
        text_width=width if isinstance(width, int) else None,
    )


def original_name(name: str, network: Network) -> str | None:
    """A layer of a U-Net by its original name, as kohya's scripts know SDXL's; None where it has none.

    Source: sd-scripts, networks/lora_diffusers.py, make_unet_conversion_map; here for any number of blocks.
    """
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    found, per_block = _IN_BLOCK.fullmatch(name), network.layers_per_block
    if found is None or per_block is None:
        return None
    way, level, kind, index, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    if kind == "resnets":
        rest = _RESNET.get(rest, rest)
    if way == "mid":
        return f"middle_block.{2 * index if kind == 'resnets' else 2 * index + 1}.{rest}"
    if way == "down":
        first = 1 + level * (per_block + 1)
        if kind == "downsamplers":
            return f"input_blocks.{first + per_block}.0.op"
        return f"input_blocks.{first + index}.{int(kind == 'attentions')}.{rest}"
    first = level * (per_block + 1)
    if kind == "upsamplers":
        return f"output_blocks.{first + per_block}.{2 if network.up_attends[level] else 1}.{rest}"
    return f"output_blocks.{first + index}.{int(kind == 'attentions')}.{rest}"


def kohya_name(part: Part, name: str, network: Network, *, is_sdxl: bool) -> str:
    """What kohya's scripts call a layer.

    Raises:
        ValueError: a network of another kind.
    """
    if part == "denoiser":
        if not network.is_unet:
            raise ValueError(
                f"the kohya form is written for the U-Nets of Stable Diffusion only, and this is a {network.kind}: "
                "take peft or diffusers"
            )
        original = original_name(name, network) if is_sdxl else name
        if original is None:
            raise ValueError(f"the kohya form of SDXL has no name for {name}: take peft or diffusers")
        return "lora_unet_" + original.replace(".", "_")
    if not network.kind.startswith("CLIPTextModel"):
        raise ValueError(
            f"the kohya form is written for CLIP only, and this is a {network.kind}: take peft or diffusers"
        )
    prefix = "lora_te2_" if part == "text_encoder_2" else "lora_te1_" if is_sdxl else "lora_te_"
    return prefix + with_text_model(name).replace(".", "_")


def with_text_model(name: str) -> str:
    """The name of a CLIP layer as everybody but transformers 5 has it; others as they are."""
    return _TEXT + name if _CLIP_LAYER.match(name) else name


def aliases(names: Iterable[str], network: Network) -> dict[str, str]:
    """The layers of a network by every name that a file may call them; none that two of them would have."""
    own = list(names)
    told: dict[str, set[str]] = {}
    for name in own:
        words = {name.removeprefix(_TEXT), with_text_model(name)}
        if network.is_unet and (original := original_name(name, network)):
            words.add(original)
        for word in words | {word.replace(".", "_") for word in words | {name}}:
            told.setdefault(word, set()).add(name)
    return {word: next(iter(meant)) for word, meant in told.items() if len(meant) == 1} | {name: name for name in own}
