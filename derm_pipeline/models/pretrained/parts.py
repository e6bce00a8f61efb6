"""The networks and tokenizers of a base's files, by diffusers and transformers, on the CPU; safetensors only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from derm_pipeline.models.hub_files import some
from derm_pipeline.models.pretrained.files import DENOISER_FOLDERS, INDEX, TEXT_FOLDERS, BaseFiles, read_json

_TEXT_NAMES = ("cond_stage_model.", "conditioner.")
_DENOISER_NAMES = ("model.diffusion_model.",)
"""How the names of text encoders and of the denoiser begin in a single file."""


def load_denoiser(files: BaseFiles, dtype: torch.dtype) -> nn.Module:
    """Diffusers' network.

    Raises:
        ValueError: it is incomplete or broken, or does not take the latents of its VAE.
    """
    network = _load(_denoiser_class(files), files, DENOISER_FOLDERS[files.family], dtype)
    channels = files.config("vae").get("latent_channels", 4)
    if network.config.in_channels != channels:
        raise ValueError(
            f"the denoiser of {files.where} takes {network.config.in_channels} channels and its latents have "
            f"{channels}: it is a model for another task (inpainting, upscaling), no base"
        )
    return network


def load_text(files: BaseFiles, dtype: torch.dtype) -> tuple[list[Any], list[Any]]:
    """The text encoders and their tokenizers.

    Raises:
        ValueError: one is incomplete or broken, or does not belong to the other.
    """
    import transformers

    tokenizer_class: Any = transformers.T5Tokenizer if files.family == "pixart" else transformers.CLIPTokenizer
    encoders, tokenizers = [], []
    for kind, (folder, tokenizer_folder) in zip(_text_classes(files), TEXT_FOLDERS[files.family], strict=True):
        encoder = _load(kind, files, folder, dtype)
        tokenizer = tokenizer_class.from_pretrained(str(files.root / tokenizer_folder), local_files_only=True)
        if len(tokenizer) > encoder.config.vocab_size:
            raise ValueError(
                f"{tokenizer_folder} of {files.where} has {len(tokenizer)} tokens and {folder} knows "
                f"{encoder.config.vocab_size}: they do not belong together"
            )
        encoders.append(encoder)
        tokenizers.append(tokenizer)
    return encoders, tokenizers


def networks_without_weights(files: BaseFiles, part: Literal["denoiser", "text"]) -> list[nn.Module]:
    """The networks of a part on the meta device, by their configs alone: they take no memory and cannot compute."""
    with torch.device("meta"):
        if part == "denoiser":
            return [_denoiser_class(files).from_config(files.config(DENOISER_FOLDERS[files.family]))]
        folders = [files.root / folder for folder, _ in TEXT_FOLDERS[files.family]]
        kinds = zip(_text_classes(files), folders, strict=True)
        return [kind(kind.config_class.from_pretrained(str(folder), local_files_only=True)) for kind, folder in kinds]


def _denoiser_class(files: BaseFiles) -> Any:
    import diffusers

    return diffusers.PixArtTransformer2DModel if files.family == "pixart" else diffusers.UNet2DConditionModel


def _text_classes(files: BaseFiles) -> tuple[Any, ...]:
    import transformers

    if files.family == "pixart":
        return (transformers.T5EncoderModel,)
    second = (transformers.CLIPTextModelWithProjection,) if files.family == "sdxl" else ()
    return (transformers.CLIPTextModel, *second)


def _load(kind: Any, files: BaseFiles, folder: str, dtype: torch.dtype) -> Any:
    """A network of a folder, whole and finite."""
    from safetensors import SafetensorError

    where = files.root / folder
    config = files.config(folder)
    names = [config.get("_class_name"), *config.get("architectures", [])]
    if kind.__name__ not in names:
        raise ValueError(f"{where} holds a {next(filter(None, names), 'nothing known')}; a {kind.__name__} is needed")
    weights = files.single or where
    try:
        network, missing = (_from_single if files.single else _from_folder)(kind, files, folder, dtype)
    except (SafetensorError, RuntimeError, OSError, ValueError, KeyError) as error:  # broken; of other sizes or names
        raise ValueError(f"the weights in {weights} are broken or do not fit {where}/config.json ({error})") from error
    if missing:
        raise ValueError(f"the weights in {weights} are not complete: missing are {some(missing)}")
    broken = [name for name, tensor in network.named_parameters() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"the weights in {weights} are not finite, in {some(broken)}; get them again")
    return network


def _from_folder(kind: Any, files: BaseFiles, folder: str, dtype: torch.dtype) -> tuple[Any, list[str]]:
    """A network, and the names of its tensors that are not there."""
    with _without_bars():
        network, info = kind.from_pretrained(
            str(files.root / folder),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            torch_dtype=dtype,
        )
    return network, sorted(info["missing_keys"])


@contextmanager
def _without_bars() -> Iterator[None]:
    """Transformers draws a bar for every network that it reads; a library should not."""
    from transformers.utils import logging

    had = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if had:
            logging.enable_progress_bar()


def _from_single(kind: Any, files: BaseFiles, folder: str, dtype: torch.dtype) -> tuple[Any, list[str]]:
    """As `_from_folder`, of a file with a whole model in its original names."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, create_diffusers_clip_model_from_ldm

    if folder == DENOISER_FOLDERS[files.family]:
        network = kind.from_config(files.config(folder))
        state = convert_ldm_unet_checkpoint(_state_of(files, _DENOISER_NAMES), network.config)
        missing, _ = network.load_state_dict(state, strict=False)
        for part in network.children():  # diffusers warns of a cast of the whole
            part.to(dtype)
        return network.eval(), sorted(missing)
    where = {"config": str(files.root), "subfolder": folder, "local_files_only": True, "torch_dtype": dtype}
    network = create_diffusers_clip_model_from_ldm(kind, _state_of(files, _TEXT_NAMES), **where)
    return network.eval(), sorted(name for name, tensor in network.named_parameters() if tensor.is_meta)


def _state_of(files: BaseFiles, beginnings: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The tensors of the single file whose names begin so."""
    from safetensors import safe_open

    with safe_open(files.single, framework="pt") as handle:
        names = list(handle.keys())
        return {name: handle.get_tensor(name) for name in names if name.startswith(beginnings)}


def pipeline_of(files: BaseFiles, denoiser: Any, encoders: list[Any], tokenizers: list[Any], vae: Any) -> Any:
    """Diffusers' own pipeline of these very modules."""
    import diffusers

    said = files.config("scheduler")
    scheduler_class = getattr(diffusers, str(said.get("_class_name")), None)
    if not (isinstance(scheduler_class, type) and issubclass(scheduler_class, diffusers.SchedulerMixin)):
        raise ValueError(f"{files.where} has a scheduler {said.get('_class_name')!r}, which diffusers does not know")
    common = {"vae": vae, "scheduler": scheduler_class.from_config(said)}
    common |= {"text_encoder": encoders[0], "tokenizer": tokenizers[0]}
    if files.family == "pixart":
        sigma = read_json(files.root / INDEX).get("_class_name") == "PixArtSigmaPipeline"
        kind = diffusers.PixArtSigmaPipeline if sigma else diffusers.PixArtAlphaPipeline
        return kind(transformer=denoiser, **common)
    if files.family == "sdxl":
        zeros = read_json(files.root / INDEX).get("force_zeros_for_empty_prompt", True)
        further = {"text_encoder_2": encoders[1], "tokenizer_2": tokenizers[1], "force_zeros_for_empty_prompt": zeros}
        return diffusers.StableDiffusionXLPipeline(unet=denoiser, add_watermarker=False, **common, **further)
    checker = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return diffusers.StableDiffusionPipeline(unet=denoiser, **common, **checker)
