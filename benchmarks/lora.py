"""A LoRA step on a pretrained base: ours, beside a baseline loop written from what is known of diffusers' script.

Baseline (train_text_to_image_lora.py, and its SDXL sibling): in every step images are normalised, flipped and encoded
by the VAE and captions by the text encoders; `.item()` twice a step; AdamW as torch makes it; frozen weights in
the precision of `--mixed_precision`, autocast around the U-Net. "stock" has no gradient checkpointing and the batch at
once; "LesionGen" is that repository's command: checkpointing, one image at a time, gradients accumulated over a batch.
Reading, decoding and tokenising are left out of the baseline (its loader's), so it is faster than the original.
Ours: what `fine_tune` makes of a `LoraStage` (its base, trainee and objective) and the steps of `loop.train`: moments
in both orientations and embeddings computed once before, no checkpointing, captions dropped at 0.1.

Networks are of the published shapes with random weights, LoRA of rank 64 on the U-Net's attention. `--shrink 4` divides
widths, heads, tokens and pixels by 4, so that linear layers, convolutions and attention all cost a 64th, and the
proportions of the parts stay: what each costs is counted at true size on the meta device and given beside. Of that, the
baseline does 1.64 times ours at SD1.5-512 and 1.98 times with checkpointing (1.8 if attention cost nothing).

On a CPU: CPU seconds of the process (all its threads; OMP_NUM_THREADS=1 is best, since a thread that waits spins, and
counts). On a GPU: wall seconds between synchronisations. Blocks of steps of all arms in the order A-B-C-C-B-A, after a
warm-up of each; medians over blocks. Then, of eager steps: calls of VAE and text encoders, floating-point operations,
operations dispatched, and how often the host would wait. The losses of one batch are computed from images and captions,
too, for the same noise; flips and dropped captions are counted over draws.

    OMP_NUM_THREADS=1 python benchmarks/lora.py --out benchmarks/results/lora.json
    OMP_NUM_THREADS=1 python benchmarks/lora.py --shrink 1 --batch 1 --precisions bf16 --images 2 --warm-up 0 --rounds 1
    python benchmarks/lora.py --model sdxl --size 1024 --batch 4 --compile
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from measuring import DEVICE, IS_GPU, Dispatched, ceiling, cpu_attention, cuda_waits, machine, rounded, timed
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from derm_pipeline.latents.text_cache import EMPTY, open_embeddings, write_embeddings
from derm_pipeline.models.generator import GeneratorSpec
from derm_pipeline.models.laws import Draw
from derm_pipeline.models.lora import LoraConfig, add_lora
from derm_pipeline.models.pretrained.base import load_base
from derm_pipeline.models.pretrained.config import Family, PretrainedConfig
from derm_pipeline.models.pretrained.network import PretrainedNetwork
from derm_pipeline.models.pretrained.text import Tokens, embed_tokens
from derm_pipeline.models.pretrained.tiny import write_tiny
from derm_pipeline.models.runtime import Precision, autocast, computes_bf16
from derm_pipeline.training.config import TrainingConfig, step_seed
from derm_pipeline.training.fine_tuning_objective import Examples, FineTuningObjective
from derm_pipeline.training.fine_tuning_settings import FineTuning, LoraStage
from derm_pipeline.training.processes import Processes
from derm_pipeline.training.steps import Steps
from derm_pipeline.training.told_texts import CachedTexts
from derm_pipeline.training.trainee import prepare

RANK, LR, BETAS, DECAY = 64, 1e-4, (0.9, 0.999), 1e-2
TARGETS = ("to_k", "to_q", "to_v", "to_out.0")
DROPOUT = 0.1
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
ENDLESS = 1_000_000
"""Steps that no run reaches."""
DRAWN = 256
"""Examples over which flips and dropped captions are counted."""
TARGET = {("sd15", 512): 1.7}


@dataclass(frozen=True)
class Shape:
    """A published base, its linear sizes divided by `shrink`."""

    model: str
    size: int
    shrink: int

    @property
    def family(self) -> Family:
        return "sd" if self.model == "sd15" else "sdxl"

    @property
    def side(self) -> int:
        """Of the images; their pixels, not their sides, are divided by `shrink`."""
        return round(self.size / self.shrink**0.5)

    @property
    def tokens(self) -> int:
        return 77 // self.shrink

    @property
    def lora(self) -> LoraConfig:
        return LoraConfig(rank=RANK // self.shrink, targets=TARGETS, init="gaussian")

    def networks(self) -> dict[str, Any]:
        """By folder, on torch's default device."""
        found = {"unet": UNet2DConditionModel(**self._unet()), "vae": AutoencoderKL(**self._vae())}
        found["text_encoder"] = CLIPTextModel(self._text(768, 12, 12))
        if self.family == "sdxl":
            found["text_encoder_2"] = CLIPTextModelWithProjection(self._text(1280, 32, 20))
        for network in found.values():
            network.eval().requires_grad_(requires_grad=False)
        return found

    def _divided(self, *sizes: int) -> tuple[int, ...]:
        return tuple(max(1, size // self.shrink) for size in sizes)

    def _unet(self) -> dict[str, Any]:
        (groups,) = self._divided(32)
        common = {"sample_size": self.side // 8, "norm_num_groups": groups}
        if self.family == "sd":
            (cross,) = self._divided(768)
            widths, (heads,) = self._divided(320, 640, 1280, 1280), self._divided(8)
            return common | {"block_out_channels": widths, "attention_head_dim": heads, "cross_attention_dim": cross}
        (cross, times, added) = self._divided(2048, 256, 2816)
        return common | {
            "block_out_channels": self._divided(320, 640, 1280),
            "attention_head_dim": self._divided(5, 10, 20),
            "cross_attention_dim": cross,
            "transformer_layers_per_block": (1, 2, 10),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": times,
            "projection_class_embeddings_input_dim": added,
        }

    def _vae(self) -> dict[str, Any]:
        (groups,) = self._divided(32)
        return {
            "block_out_channels": self._divided(128, 256, 512, 512),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "layers_per_block": 2,
            "norm_num_groups": groups,
            "sample_size": self.side,
            "scaling_factor": 0.18215 if self.family == "sd" else 0.13025,
        }

    def _text(self, width: int, layers: int, heads: int) -> CLIPTextConfig:
        own, inner, own_heads = self._divided(width, 4 * width, heads)
        return CLIPTextConfig(
            hidden_size=own,
            intermediate_size=inner,
            projection_dim=own,
            num_hidden_layers=layers,
            num_attention_heads=own_heads,
            max_position_embeddings=self.tokens,
        )


@dataclass(frozen=True)
class Data:
    """What is trained on: noise, and captions that say nothing."""

    pixels: Tensor
    """(n, 3, side, side) uint8, on the device."""
    captions: Sequence[str]
    ids: tuple[Tensor, ...]
    """Tokens (n, s) for each text encoder, on the device."""


class Arm(ABC):
    """A loop whose steps are measured."""

    name: str
    precision: Precision
    optimizer: torch.optim.Optimizer

    @abstractmethod
    def step(self) -> None:
        """One step, its data included."""


class _Script:
    """The baseline's networks and optimiser, shared by the arms of a precision."""

    def __init__(self, shape: Shape, folder: Path, data: Data, precision: Precision) -> None:
        dtype = getattr(torch, DTYPES[precision])
        kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
        kinds |= {"text_encoder_2": CLIPTextModelWithProjection} if shape.family == "sdxl" else {}
        types = dict.fromkeys(kinds, dtype)
        if shape.family == "sdxl":
            types["vae"] = torch.float32  # its own overflows in fp16
        networks = {
            name: kind.from_pretrained(folder / name, torch_dtype=types[name]).to(DEVICE).requires_grad_(False)
            for name, kind in kinds.items()
        }
        self.family, self.data, self.precision, self.dtype = shape.family, data, precision, dtype
        self.unet, self.vae = networks["unet"].train(), networks["vae"]
        self.encoders = [network for name, network in networks.items() if name.startswith("text")]
        torch.manual_seed(0)
        add_lora(self.unet, shape.lora)
        self.weights = [weight for weight in self.unet.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=LR, betas=BETAS, weight_decay=DECAY)
        self.scaler = torch.amp.GradScaler(DEVICE.type, enabled=precision == "fp16")
        self.scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        self.shown = 0.0

    def encoded(self, rows: Tensor) -> Tensor:
        pixels = self.data.pixels[rows].float() / 127.5 - 1
        is_flipped = torch.rand(len(rows), 1, 1, 1, device=DEVICE) < 0.5
        images = torch.where(is_flipped, pixels.flip(3), pixels).to(self.vae.dtype)
        with torch.no_grad():
            latents = self.vae.encode(images).latent_dist.sample() * self.vae.config.scaling_factor
        return latents.to(self.dtype)

    @torch.no_grad()
    def told(self, rows: Tensor) -> dict[str, Tensor]:
        ids = tuple(table[rows] for table in self.data.ids)
        return embed_tokens(self.family, self.encoders, Tokens(ids, ids, (0,) * len(rows)))

    def loss(self, rows: Tensor) -> Tensor:
        latents, told = self.encoded(rows), self.told(rows)
        noise = torch.randn_like(latents)
        times = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(rows),), device=DEVICE)
        noised = self.scheduler.add_noise(latents, noise, times)
        added = None
        if self.family == "sdxl":
            side = self.data.pixels.shape[-1]
            sizes = torch.tensor([side, side, 0, 0, side, side], device=DEVICE).expand(len(rows), 6)
            added = {"text_embeds": told["pooled"].to(self.dtype), "time_ids": sizes}
        with autocast(DEVICE, self.precision):
            text = told["text"].to(self.dtype)
            predicted = self.unet(noised, times, text, added_cond_kwargs=added, return_dict=False)[0]
        return F.mse_loss(predicted.float(), noise.float())


class Baseline(Arm):
    """The loop as the script has it."""

    kinds: ClassVar[dict[str, bool]] = {"stock": False, "LesionGen": True}
    """Whether it checkpoints, and takes one image at a time."""

    def __init__(self, script: _Script, kind: str, batch: int) -> None:
        self.name, self.precision, self._script = f"{kind} {script.precision}", script.precision, script
        self._is_frugal, self._batch, self.optimizer = self.kinds[kind], batch, script.optimizer

    def step(self) -> None:
        script, num = self._script, self._batch if self._is_frugal else 1
        if self._is_frugal:
            script.unet.enable_gradient_checkpointing()
        else:
            script.unet.disable_gradient_checkpointing()
        rows = torch.randint(len(script.data.pixels), (self._batch,), device=DEVICE)
        for own in rows.chunk(num):
            loss = script.loss(own)
            script.shown += loss.repeat(len(own)).mean().item() / num  # what it logs
            script.scaler.scale(loss / num).backward()
            last = loss.detach().item()  # what its bar shows
        script.scaler.unscale_(script.optimizer)
        torch.nn.utils.clip_grad_norm_(script.weights, 1.0)
        script.scaler.step(script.optimizer)
        script.scaler.update()
        script.optimizer.zero_grad()
        script.shown = last


class Ours(Arm):
    """The steps of `loop.train` on what `fine_tune` makes of a LoRA stage, and its looks at the losses."""

    def __init__(
        self, stack: ExitStack, options: argparse.Namespace, folder: Path, data: Data, precision: Precision
    ) -> None:
        self.name, self.precision = f"ours {precision}", precision
        shape = _shape(options)
        training = TrainingConfig(
            num_steps=ENDLESS, batch_size=options.batch, micro_batch_size=options.micro_batch, lr=LR, betas=BETAS,
            weight_decay=DECAY, warmup_steps=0, schedule="constant", precision=precision, compile=options.compile,
        )  # fmt: skip
        stage = LoraStage(denoiser=shape.lora, training=training)
        settings = PretrainedConfig(model=str(folder), dtype=DTYPES[precision], max_tokens=shape.tokens)
        config = FineTuning(base=settings, stages=(stage,), caption_dropout=DROPOUT)
        cache = _Cache(config, folder / f"texts-{precision}", data)
        base = load_base(config.base, DEVICE, parts=("denoiser",))
        trainee = prepare(stage, base, base.network_config(shape.side // 8, cache.embeddings.shapes))
        mean, std = base.latent_scaling
        spec = GeneratorSpec(
            network=trainee.network.config,
            law=config.law(base.law),
            classes={"diagnosis": ("nevus",)},
            latent_mean=mean,
            latent_std=std,
        )
        null = base.null_of(cache.embeddings.gather(cache.embeddings.rows_of([EMPTY])))
        texts = CachedTexts(cache.embeddings, null, DEVICE)
        diagnoses = torch.zeros(len(data.captions), dtype=torch.int64)
        objective = FineTuningObjective(
            trainee.network,
            spec,
            Examples(cache.moments, diagnoses, texts.rows(data.captions)[:, None]),
            texts,
            config,
            options.batch,
            DEVICE,
            caption_dropout=DROPOUT,
        )
        self.facts = {
            "lora_weights": trainee.num_weights,
            "cached_once_s_an_image": cache.seconds,
            "relative_difference_of_losses_uncached": cache.differences(trainee.network, objective, spec),
            "draws": _drawn(objective, options.batch),
        }
        processes = stack.enter_context(Processes(training))
        self._steps = Steps(trainee.module, objective, None, training, processes)
        stack.enter_context(self._steps.compiled())
        self.optimizer = self._steps.state.optimizer
        self._taken = self._steps.take(0)

    def step(self) -> None:
        done = next(self._taken)
        if self._steps.due(done, may_sample=False).report:
            self._steps.collect()


class _Cache:
    """What the `latents` asset makes of the data once, and the networks that it takes."""

    def __init__(self, config: FineTuning, folder: Path, data: Data) -> None:
        self._base, self._data = load_base(config.base, DEVICE, parts=("text", "vae")), data
        self._precision = config.training.precision
        made: list[Tensor] = []
        seconds = timed(self._embed_into(folder), 1) + timed(lambda: made.append(self._moments()), 1)
        self.seconds = rounded(seconds / len(data.captions))
        self.embeddings, self.moments = open_embeddings(folder), made[0]

    def _embed_into(self, folder: Path) -> Callable[[], object]:
        base = self._base
        return lambda: write_embeddings(folder, self._data.captions, base.embed, encoder=base.text_identity)

    def _images(self) -> Tensor:
        """Both orientations (n, 2, 3, side, side)."""
        images = self._data.pixels.float() / 127.5 - 1
        return torch.stack([images, images.flip(3)], 1)

    @torch.no_grad()
    def _moments(self) -> Tensor:
        assert self._base.vae is not None  # it was asked for
        made = [torch.cat(self._base.vae.encode(both), 1) for both in self._images()]
        return torch.stack(made).half()

    @torch.no_grad()
    def differences(
        self, network: PretrainedNetwork, objective: FineTuningObjective, spec: GeneratorSpec
    ) -> dict[str, float]:
        """Largest, relative, of a batch's losses to those by VAE and text encoders for the same noise.

        And, for what these figures are worth, to those of the images turned and of others' captions.
        """
        batch = objective.draw(0, torch.Generator().manual_seed(1))
        own = batch["rows"], batch["orientations"]
        others = (own[0] + 1) % len(self._data.captions), 1 - own[1]
        places = {"as drawn": own, "turned": (own[0], others[1]), "other captions": own}
        captions = {name: (others if name == "other captions" else own)[0].tolist() for name in places}
        hidden = batch["hidden"].to(DEVICE) & False  # all captions count
        batch = {name: tensor.to(DEVICE) for name, tensor in (batch | {"hidden": hidden}).items()}
        with autocast(DEVICE, self._precision):
            cached = objective.loss(batch)
            found = {}
            for name, (rows, orientations) in places.items():
                latents = self._latents(rows, orientations, batch["latent_noise"], spec)
                told = self._base.embed([self._data.captions[row] for row in captions[name]])
                draw = Draw(*(batch[part] for part in Draw._fields))
                losses = spec.law.loss(partial(_denoised, network, told), latents, draw)
                found[name] = rounded(float(((cached - losses).abs() / losses).max()))
        return found

    def _latents(self, rows: Tensor, orientations: Tensor, noise: Tensor, spec: GeneratorSpec) -> Tensor:
        assert self._base.vae is not None
        mean, logvar = self._base.vae.encode(self._images()[rows.to(DEVICE), orientations.to(DEVICE)])
        shift, scale = torch.tensor([spec.latent_mean, spec.latent_std], device=DEVICE).view(2, 1, -1, 1, 1)
        return (mean + (0.5 * logvar).exp() * noise - shift) / scale


def _denoised(network: PretrainedNetwork, told: dict[str, Tensor], x: Tensor, time: Tensor) -> Tensor:
    return network(x, time, told)


def _drawn(objective: FineTuningObjective, batch: int) -> dict[str, float]:
    """Parts of the examples that are flipped, and told nothing."""
    drawn = [objective.draw(step, torch.Generator().manual_seed(step_seed(1, step))) for step in range(DRAWN // batch)]
    parts = {"flipped": "orientations", "caption_hidden": "hidden"}
    return {name: rounded(float(torch.cat([one[key] for one in drawn]).float().mean())) for name, key in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument("--size", type=int, default=512, help="of the images in px, at true size")
    parser.add_argument("--shrink", type=int, choices=(1, 4), default=1 if IS_GPU else 4, help="divides linear sizes")
    parser.add_argument("--batch", type=int, default=16 if IS_GPU else 4, help="images a step")
    parser.add_argument("--micro-batch", type=int, help="images that ours holds at once; all without it")
    parser.add_argument("--compile", action="store_true", help="compile ours")
    parser.add_argument("--arms", nargs="+", default=list(Baseline.kinds), choices=list(Baseline.kinds))
    parser.add_argument("--precisions", nargs="+", choices=list(DTYPES), help="of the baselines, the first as it comes")
    parser.add_argument("--steps", type=int, default=50 if IS_GPU else 1, help="steps a block")
    parser.add_argument("--warm-up", type=int, default=20 if IS_GPU else 1, help="steps of each arm before")
    parser.add_argument("--rounds", type=int, default=2, help="times A-B-C-C-B-A")
    parser.add_argument("--images", type=int, default=8, help="in the training set")
    parser.add_argument("--out", type=Path, help="also put the figures into the JSON there, beside other runs")
    options = parser.parse_args()
    if IS_GPU:  # what is not under autocast gains by it in all arms alike
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    report = _report(options)
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        runs = json.loads(options.out.read_text()) if options.out.exists() else {}
        runs[_run_name(options)] = report
        options.out.write_text(json.dumps(runs, indent=1) + "\n")


def _run_name(options: argparse.Namespace) -> str:
    parts = [DEVICE.type, f"{options.model} {options.size}", f"shrink {options.shrink}", f"batch {options.batch}"]
    return ", ".join([*parts, "compiled" if options.compile else "eager"])


def _shape(options: argparse.Namespace) -> Shape:
    return Shape(options.model, options.size, options.shrink)


def _report(options: argparse.Namespace) -> dict[str, object]:
    bf16: tuple[Precision, ...] = ("bf16",) if computes_bf16(DEVICE) else ()
    baselines: tuple[Precision, ...] = tuple(options.precisions or ("fp16" if IS_GPU else "fp32", *bf16))
    ours: tuple[Precision, ...] = tuple(name for name in baselines if name != "fp16") or bf16
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        data = _prepare_base(folder, _shape(options), options.images)
        our_arms = [Ours(stack, options, folder, data, precision) for precision in ours]
        scripts = [_Script(_shape(options), folder, data, precision) for precision in baselines]
        arms: list[Arm] = [Baseline(script, kind, options.batch) for kind in options.arms for script in scripts]
        arms += our_arms
        gc.collect()
        measured = _measure(arms, options)
        counts = {arm.name: _counts(arm, options.batch) for arm in arms}
    for arm in arms:
        measured[arm.name] |= counts[arm.name]
    shapes = {"true size": Shape(options.model, options.size, 1), "as measured": _shape(options)}
    return {
        "machine": machine("diffusers", "transformers", "peft", "accelerate"),
        "clock": "wall, synchronised" if IS_GPU else "CPU time of the process",
        "settings": {name: value for name, value in vars(options).items() if name != "out"},
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(("MALLOC_", "OMP_NUM"))
        },
        "matrix_product_ceiling_tflops": {name: rounded(ceiling(name)) for name in dict.fromkeys((*baselines, *ours))},
        "work": {name: _work(shape) for name, shape in shapes.items()},
        "arms": measured,
        "ours": {arm.name: arm.facts for arm in our_arms},
        "comparisons": _comparisons(arms, measured, options),
    }


def _prepare_base(folder: Path, shape: Shape, num: int) -> Data:
    """Write a pipeline of this shape: a tiny one, but for its networks; and make what is trained on."""
    write_tiny("sd" if shape.family == "sd" else "sdxl", folder)
    torch.manual_seed(0)
    with DEVICE:
        networks = shape.networks()
    while networks:
        name, network = networks.popitem()
        network.to(torch.bfloat16).save_pretrained(folder / name)
    del network
    captions = [f"a photo of a nevus, number {number}" for number in range(num)]
    base = load_base(PretrainedConfig(model=str(folder), max_tokens=shape.tokens), parts=("text",))
    ids = tuple(own.to(DEVICE) for own in base.tokenise(captions).ids)
    pixels = torch.randint(256, (num, 3, shape.side, shape.side), dtype=torch.uint8, device=DEVICE)
    return Data(pixels, captions, ids)


# Work


def _work(shape: Shape) -> dict[str, float]:
    """GFLOP of one image by part, and how much more the baselines do; counted without computing."""
    with torch.device("meta"):
        networks = shape.networks()
        unet, side = networks["unet"], shape.side // 8
        add_lora(unet, shape.lora)
        ids = torch.zeros(1, shape.tokens, dtype=torch.int64)
        latents, times = torch.zeros(1, 4, side, side), torch.zeros(1)
        encoders = [network for name, network in networks.items() if name.startswith("text")]
        told = embed_tokens(shape.family, encoders, Tokens((ids, ids), (ids, ids), (0,)))
        added = None
        if shape.family == "sdxl":
            added = {"text_embeds": told["pooled"], "time_ids": torch.zeros(1, 6)}

        def trained() -> None:
            unet(latents, times, told["text"], added_cond_kwargs=added, return_dict=False)[0].sum().backward()

        parts: dict[str, Callable[[], object]] = {
            "vae_encoder": lambda: networks["vae"].encode(torch.zeros(1, 3, shape.side, shape.side)),
            "text_encoders": lambda: embed_tokens(shape.family, encoders, Tokens((ids, ids), (ids, ids), (0,))),
            "unet": unet.train() and trained,
        }
        gflop = {name: _gflop(part) for name, part in parts.items()}
        linear = {name: _gflop(part, leave_out=torch.ops.aten.bmm) for name, part in parts.items()}
        unet.enable_gradient_checkpointing()
        checkpointed = _gflop(trained)
    ours, encoded = gflop["unet"], gflop["vae_encoder"] + gflop["text_encoders"]
    return {f"gflop_{name}": rounded(value) for name, value in gflop.items()} | {
        "gflop_unet_checkpointed": rounded(checkpointed),
        "stock_by_ours": rounded((encoded + ours) / ours),
        "stock_by_ours_if_attention_cost_nothing": rounded(sum(linear.values()) / linear["unet"]),
        "LesionGen_by_ours": rounded((encoded + checkpointed) / ours),
    }


def _gflop(work: Callable[[], object], leave_out: object = None) -> float:
    with FlopCounterMode(display=False, custom_mapping=cpu_attention()) as counter:
        work()
    counts = counter.get_flop_counts().get("Global", {})
    return sum(number for operation, number in counts.items() if operation is not leave_out) / 1e9


# Time and counts


def _measure(arms: Sequence[Arm], options: argparse.Namespace) -> dict[str, dict[str, object]]:
    first = {arm.name: timed(arm.step, 1) for arm in arms}
    waits = {arm.name: cuda_waits(arm.step) for arm in arms}
    for arm in arms:
        timed(arm.step, options.warm_up)
    taken: dict[str, list[float]] = {arm.name: [] for arm in arms}
    peaks: dict[str, float] = {}
    for arm in [*arms, *reversed(arms)] * options.rounds:
        before = _start_peak()
        taken[arm.name].append(timed(arm.step, options.steps))
        peaks[arm.name] = max(peaks.get(arm.name, 0), _peak_gb(before))
    rows: dict[str, dict[str, object]] = {}
    for name, seconds in taken.items():
        median = statistics.median(seconds)
        rows[name] = {
            "s_a_step": rounded(median),
            "s_a_step_by_block": [rounded(value) for value in seconds],
            "first_step_s": rounded(first[name]),
            "img_a_s": rounded(options.batch / median),
        }
        if IS_GPU:
            rows[name] |= {"peak_gb_beyond_states": rounded(peaks[name]), "cuda_waits_a_step": waits[name]}
    return rows


def _start_peak() -> float:
    if not IS_GPU:
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak_gb(before: float) -> float:
    return (torch.cuda.max_memory_allocated() - before) / 1e9 if IS_GPU else 0.0


@contextmanager
def _calls() -> Iterator[dict[str, int]]:
    """Counts how often a VAE and text encoders are called, whosever they are."""
    found = {"vae_calls": 0, "text_encoder_calls": 0}

    def counting(name: str, method: Callable[..., object]) -> Callable[..., object]:
        def counted(*args: object, **named: object) -> object:
            found[name] += 1
            return method(*args, **named)

        return counted

    with ExitStack() as stack:
        for name, kind, method in (
            ("vae_calls", AutoencoderKL, "encode"),
            ("text_encoder_calls", CLIPTextModel, "forward"),
            ("text_encoder_calls", CLIPTextModelWithProjection, "forward"),
        ):
            stack.enter_context(mock.patch.object(kind, method, counting(name, getattr(kind, method))))
        yield found


def _counts(arm: Arm, batch: int) -> dict[str, object]:
    """Of one step."""
    with torch.compiler.set_stance("force_eager"), _calls() as calls, Dispatched(arm.optimizer) as seen:
        gflop = _gflop(arm.step)
    return {
        **{f"{name}_a_step": num for name, num in calls.items()},
        "gflop_an_image": rounded(gflop / batch),
        "host_waits_a_step": seen.num_waits,
        "operations_dispatched_a_step": seen.num,
    }


def _comparisons(
    arms: Sequence[Arm], measured: Mapping[str, Mapping[str, object]], options: argparse.Namespace
) -> dict[str, dict[str, object]]:
    """Like with like, and each as it comes: the baselines' first precision beside our last."""
    baselines = [arm for arm in arms if isinstance(arm, Baseline)]
    ours = [arm for arm in arms if isinstance(arm, Ours)]
    pairs = [(a, b) for a in baselines for b in ours if a.precision == b.precision]
    pairs += [(a, ours[-1]) for a in baselines if a.precision == baselines[0].precision != ours[-1].precision]
    found: dict[str, dict[str, object]] = {}
    for baseline, our in pairs:
        seconds = [float(str(measured[arm.name]["s_a_step"])) for arm in (baseline, our)]
        row: dict[str, object] = {"times_faster": rounded(seconds[0] / seconds[1])}
        saved = (seconds[0] - seconds[1]) / options.batch
        row["epochs_until_the_cache_is_paid"] = rounded(float(str(our.facts["cached_once_s_an_image"])) / saved)
        if (options.model, options.size) in TARGET:
            wanted = TARGET[options.model, options.size]
            row |= {"wanted": wanted, "is_met": seconds[0] / seconds[1] >= wanted}
        found[f"{baseline.name} by {our.name}"] = row
    return found


if __name__ == "__main__":
    main()
