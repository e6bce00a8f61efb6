"""Complete pipelines of tiny size with random weights: what the real loaders read, for tests and dry runs.

They have all that the real ones have (denoiser, text encoders, tokenizers, VAE of 8 px a cell, scheduler, safetensors)
and know nothing. Those who train one from its random start find latents of about deviation 1: the VAE's scaling factor
is measured, not published.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from derm_pipeline.models.pretrained.config import TinyFamily

_LATENT = 8
"""Side of the latents that the denoisers are made for: images of 64 px."""
_WIDTH, _WIDTH_2, _HEADS = 32, 40, 4
"""Of the text encoders; SDXL's second one is wider."""
_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
_END = "</w>"
"""Ends the last letter of a word in CLIP's tokens."""
_TEXT = (
    "a dermoscopic image of melanoma with an irregular border, a benign nevus on light skin, very dark skin",
    "basal cell carcinoma with arborizing vessels, seborrheic keratosis with milia-like cysts, blue-grey veil",
    "actinic keratosis, dermatofibroma, vascular lesion, squamous cell carcinoma, psoriasis, an individual",
    "photo of a male and a female skin on torso, lower extremity, upper extremity, head and neck, at age, hairy",
    "fitzpatrick skin type, ruler marks, gel bubbles, vignette, pigment network, globules, streaks, high quality",
    "0 1 2 3 4 5 6 7 8 9 % mm",
)


def write_tiny(family: TinyFamily, folder: Path, seed: int = 0) -> Path:
    """Write a pipeline to a folder: under 2 MB, the same files for the same seed.

    Args:
        family: Which pipeline.
        folder: Where to; made if it is not there, its files replaced.
        seed: Decides the weights.

    Returns:
        The folder, to be given as `PretrainedConfig.model`.
    """
    pipelines = {"sd": _sd, "sd2": _sd2, "sdxl": _sdxl, "pixart": _pixart}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipelines[family]().save_pretrained(folder, safe_serialization=True)
    return folder


def _sd(**scheduler: Any) -> Any:
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    tokenizer = _clip_tokenizer()
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_clip(tokenizer),
        tokenizer=tokenizer,
        unet=_unet(cross_attention_dim=_WIDTH),
        scheduler=PNDMScheduler(**_BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1, **scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sd2() -> Any:
    return _sd(prediction_type="v_prediction")


def _sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    tokenizer, tokenizer_2 = _clip_tokenizer(), _clip_tokenizer(pad_token="!")
    size_width = 8
    unet = _unet(
        cross_attention_dim=_WIDTH + _WIDTH_2,
        addition_embed_type="text_time",
        addition_time_embed_dim=size_width,
        projection_class_embeddings_input_dim=6 * size_width + _WIDTH_2,
        use_linear_projection=True,
    )
    return StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=_clip(tokenizer),
        text_encoder_2=_clip(tokenizer_2, _WIDTH_2, projected=True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**_BETAS, timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )


def _pixart() -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    tokenizer = _t5_tokenizer()
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=_WIDTH,
            d_kv=_WIDTH // _HEADS,
            d_ff=2 * _WIDTH,
            num_layers=2,
            num_heads=_HEADS,
            feed_forward_proj="gated-gelu",
        )
    ).eval()
    transformer = PixArtTransformer2DModel(
        sample_size=_LATENT,
        patch_size=2,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=16,
        cross_attention_dim=64,
        caption_channels=_WIDTH,
        in_channels=4,
        out_channels=8,
        use_additional_conditions=False,
    )
    return PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=_vae(),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
    )


def _unet(**further: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=_LATENT,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(24, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=_HEADS,
        norm_num_groups=8,
        **further,
    )


def _vae() -> Any:
    """An autoencoder of 8 px a cell whose scaling factor brings smooth pictures' latents to about deviation 1."""
    from diffusers import AutoencoderKL

    kind: Any = AutoencoderKL
    vae = kind(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=8 * _LATENT,
    ).eval()
    pictures = torch.nn.functional.interpolate(torch.rand(8, 3, 4, 4), size=8 * _LATENT, mode="bicubic") * 2 - 1
    with torch.no_grad():
        deviation = float(vae.encode(pictures).latent_dist.mean.std())
    vae.register_to_config(scaling_factor=round(1 / deviation, 4))
    return vae


def _clip(tokenizer: Any, width: int = _WIDTH, *, projected: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=_HEADS,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def _clip_tokenizer(pad_token: str = "<|endoftext|>") -> Any:
    """CLIP's byte-level BPE over our own words; any text has tokens."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    alphabet = sorted(ByteLevel.alphabet())
    merges: Any = _merges(_words())
    names = [*alphabet, *(f"{letter}{_END}" for letter in alphabet), *("".join(pair) for pair in merges)]
    names += ["<|startoftext|>", "<|endoftext|>"]  # last, as CLIP's
    vocabulary = {name: place for place, name in enumerate(dict.fromkeys(names))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad_token, model_max_length=77)


def _words() -> list[str]:
    return re.findall(r"\w+", " ".join(_TEXT))


def _merges(words: Sequence[str], num: int = 300) -> list[tuple[str, str]]:
    """BPE's merges: the most frequent pair each time. The library's own trainer breaks ties by chance."""
    spelled = [[*word[:-1], word[-1] + _END] for word in words]
    merges: list[tuple[str, str]] = []
    while len(merges) < num:
        pairs = Counter(pair for letters in spelled for pair in pairwise(letters))
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = [_merged(letters, best) for letters in spelled]
    return merges


def _merged(letters: list[str], pair: tuple[str, str]) -> list[str]:
    result: list[str] = []
    for letter in letters:
        if result and (result[-1], letter) == pair:
            result[-1] += letter
        else:
            result.append(letter)
    return result


def _t5_tokenizer() -> Any:
    """T5's unigram pieces: our own words whole, all else by letters."""
    from transformers import T5Tokenizer

    counts = Counter(_words())
    pieces = [(f"▁{word}", math.log(count / counts.total())) for word, count in sorted(counts.items())]
    letters = ["▁", *(chr(code) for code in range(ord("!"), ord("~") + 1))]
    pieces += [(letter, -12.0) for letter in letters]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=special + pieces, extra_ids=0, model_max_length=512)
