"""Tiny bases and what they are trained on, for the tests of fine-tuning."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from derm_pipeline.models.lora import LoraConfig
from derm_pipeline.models.pretrained.config import PretrainedConfig
from derm_pipeline.training.config import TrainingConfig
from derm_pipeline.training.fine_tuned import Captioned
from derm_pipeline.training.fine_tuning import fine_tune
from derm_pipeline.training.fine_tuning_settings import FineTuning, FullStage, InversionStage, LoraStage, PriorConfig
from derm_pipeline.training.hldf import HldfConfig

CLASSES = {"diagnosis": ("mel", "nv")}
CAPTIONS = ("An image of mel-class on dark skin", "An image of mela-class on light skin", "a photo of mel-class")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def images(num: int = 6, side: int = 8) -> Captioned:
    """Moments in two orientations that are told apart by their sign, of two diagnoses, told three captions."""
    stream = torch.Generator().manual_seed(4)
    mean = torch.randn(num, 1, 4, side, side, generator=stream)
    moments = torch.cat([torch.cat([mean, -mean], 1), torch.full((num, 2, 4, side, side), -6.0)], 2).half()
    captions = [CAPTIONS[row % 3] for row in range(num)]
    return Captioned(moments, torch.tensor([row % 3 == 1 for row in range(num)]).long(), captions)


def training(**changes) -> TrainingConfig:
    return TrainingConfig(
        **{"num_steps": 4, "batch_size": 4, "lr": 1e-3, "warmup_steps": 0, "precision": "fp32"} | changes
    )


def lora(text: bool = False, targets: tuple[str, ...] | None = None, **changes) -> LoraStage:
    """On the denoiser's attention, or on the text encoders' instead."""
    config = LoraConfig(rank=4, targets=targets or (("q_proj", "v_proj") if text else ATTENTION))
    return LoraStage(**{"text" if text else "denoiser": config}, training=training(**changes))


def full(**changes) -> FullStage:
    return FullStage(training=training(**changes))


def inversion(training_changes=None, **changes) -> InversionStage:
    return InversionStage(training=training(**(training_changes or {})), **changes)


def settings(folder, *stages, **changes) -> FineTuning:
    base = PretrainedConfig(model=str(folder), dtype="float32")
    return FineTuning(**{"base": base, "stages": stages or (lora(),), "grid": None} | changes)


def fine_tune_as_one_of(index: int, num: int, port: int, work: Path, folder: Path) -> None:
    """In a process of its own, as `accelerate launch` starts it; leaves its losses as `losses-<index>.json`."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(index),
        "LOCAL_RANK": str(index),
        "WORLD_SIZE": str(num),
        "LOCAL_WORLD_SIZE": str(num),
        "ACCELERATE_USE_CPU": "true",
    }
    done = fine_tune(images(), CLASSES, every_stage(folder), work=work, held_out=images(3))
    (work / f"losses-{index}.json").write_text(json.dumps(done.losses))


def every_stage(folder: Path) -> FineTuning:
    """New tokens, the whole denoiser, adapters of all networks; with all that a loss may have."""
    adapters = lora(text=True, num_steps=2, micro_batch_size=1)
    adapters = adapters.model_copy(update={"denoiser": lora().denoiser})
    stages = inversion({"num_steps": 2}), full(num_steps=2, ema_decay=0.9), adapters
    prior = PriorConfig(num_samples=2, num_steps=2)
    hldf = HldfConfig(every_steps=2, num_steps=2)
    return settings(folder, *stages, prior=prior, hldf=hldf, caption_dropout=0.3, noise_offset=0.1)
