"""Published configurations of true size, and networks of them without weights (on the meta device)."""

from typing import Any

import torch

SD_1: dict[str, Any] = {  # CompVis/stable-diffusion-v1-4, unet/config.json
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD_2 = SD_1 | {  # stabilityai/stable-diffusion-2-1
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SDXL: dict[str, Any] = {  # stabilityai/stable-diffusion-xl-base-1.0
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
PIXART_512: dict[str, Any] = {  # PixArt-alpha/PixArt-XL-2-512x512, transformer/config.json
    "sample_size": 64,
    "patch_size": 2,
    "num_layers": 28,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "in_channels": 4,
    "out_channels": 8,
}
PIXART_1024 = PIXART_512 | {"sample_size": 128}  # -1024-MS, which is told sizes


def unet(config: dict[str, Any]) -> Any:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**config)


def pixart(config: dict[str, Any]) -> Any:
    from diffusers import PixArtTransformer2DModel

    with torch.device("meta"):
        return PixArtTransformer2DModel(**config)
