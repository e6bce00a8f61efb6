"""What a fine-tuning surely needs, and whether it can begin: by its base's configs, before any weight is read."""

from __future__ import annotations

from torch import nn

from derm_pipeline.models.lora import add_lora
from derm_pipeline.models.pretrained.files import BaseFiles, find_base
from derm_pipeline.models.pretrained.parts import networks_without_weights
from derm_pipeline.models.runtime import computes_bf16, free_bytes, pick_device
from derm_pipeline.training.fine_tuning_settings import FineTuning, FullStage, LoraStage, Stage
from derm_pipeline.training.trainee import trains_text

_FLOAT_BYTES = 4


def rehearse_fine_tuning(config: FineTuning, latent_size: int) -> None:
    """See that the base is there, that its adapters fit it, and that what is trained fits into memory.

    By weights, gradients, AdamW's moments and averages alone: what a batch needs is found when the training begins.

    Raises:
        FileNotFoundError: the base is not there; the message says where it was looked for.
        ValueError: it is another family than asked for; LoRA targets that no layer is called by; latents of a size that
            it does not take; too little memory.
    """
    files = find_base(config.base)
    patch = int(files.config("transformer")["patch_size"]) if files.family == "pixart" else 1
    if latent_size % patch:
        raise ValueError(
            f"the base takes latents of a multiple of {patch} cells, and latents.size_px gives {latent_size}"
        )
    there = free_bytes(pick_device())
    for stage in config.stages:
        need = _bytes_of(stage, files, config)
        if need > there:
            raise ValueError(
                f"stages.{stage.kind}: at least {need / 1e9:,.1f} GB are needed for weights, gradients and the "
                f"optimiser, and {there / 1e9:,.1f} GB are free; take a smaller base, a lower rank, fewer averages "
                "(ema_decays), optimizer: adamw8bit or a device with more memory"
            )


def _bytes_of(stage: Stage, files: BaseFiles, config: FineTuning) -> float:
    fixed = _FLOAT_BYTES if config.base.dtype == "float32" or not _halves(config) else _FLOAT_BYTES // 2
    networks = networks_without_weights(files, "denoiser")
    texts = networks_without_weights(files, "text") if trains_text(stage) else []
    num_fixed = sum(parameter.numel() for network in [*networks, *texts] for parameter in network.parameters())
    num_trained = _num_trained(stage, networks[0], texts)
    moments = 0.5 if stage.training.optimizer == "adamw8bit" else 2.0
    states = num_trained * _FLOAT_BYTES * (2 + moments + len(stage.training.decays))
    return states + (0 if isinstance(stage, FullStage) else fixed * num_fixed)


def _halves(config: FineTuning) -> bool:
    return config.base.dtype != "auto" or computes_bf16(pick_device())


def _num_trained(stage: Stage, denoiser: nn.Module, texts: list[nn.Module]) -> int:
    if isinstance(stage, FullStage):
        return sum(parameter.numel() for parameter in denoiser.parameters())
    if not isinstance(stage, LoraStage):
        return 0  # a few rows
    for network in (denoiser, *texts):
        network.requires_grad_(requires_grad=False)
    if stage.denoiser is not None:
        add_lora(denoiser, stage.denoiser)
    for text in texts:
        if stage.text is not None:
            add_lora(text, stage.text)
    networks = (denoiser, *texts)
    return sum(one.numel() for network in networks for one in network.parameters() if one.requires_grad)
