"""Does fine-tuning learn: a tiny Stable Diffusion, trained from its random start, is taught a diagnosis it never saw.

Phantoms of 64 px, no download. A random Stable Diffusion (`derm models tiny sd`, its text encoder as it is) gets an
autoencoder that is trained here on phantoms of all diagnoses, as published ones have seen everything, and a denoiser
that fits its latents; all of the denoiser is trained on six diagnoses by their captions (a full stage), and what comes
out is the base of a LoRA that is shown the seventh alone. Measured before and after, by the files that were left:
the loss on held-out phantoms (other patients; the same times and noise for both), and how often a classifier finds in
a sample what its prompt asked for (the same prompts and seeds for both). The judge "sharp" was trained on real
phantoms; "both" on these and on what the autoencoder gives back of them, since "sharp" stumbles over its blur alone.

    OMP_NUM_THREADS=1 python benchmarks/fine_tuning.py --out benchmarks/results/fine_tuning.json [--grid samples.png]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from derm_pipeline.captions.metadata import metadata_caption
from derm_pipeline.evaluation.classifiers import (
    ClassifierConfig,
    LabelledImages,
    SmallResNet,
    agreement,
    predict,
    train_classifier,
)
from derm_pipeline.generation import Prompting, SampleRequest, Sampling, draw_samples, write_grid
from derm_pipeline.images import Pixels
from derm_pipeline.latents import orient, to_model_range, to_pixels
from derm_pipeline.models.generator import load_embedder, load_network, save_autoencoder
from derm_pipeline.models.lora import LoraConfig
from derm_pipeline.models.pretrained.adapted import put_denoiser
from derm_pipeline.models.pretrained.base import load_base, vae_config
from derm_pipeline.models.pretrained.config import PretrainedConfig
from derm_pipeline.models.pretrained.network import PretrainedNetwork
from derm_pipeline.models.pretrained.tiny import write_tiny
from derm_pipeline.models.pretrained_vae import PretrainedVae, load_pretrained_vae
from derm_pipeline.models.reconstruction import measure_reconstruction
from derm_pipeline.records import Diagnosis, SkinType
from derm_pipeline.sources.phantom.drawing import DRAWN, PhantomConfig, draw, plan
from derm_pipeline.training.draws import Batch
from derm_pipeline.training.fine_tuned import Captioned, FineTuned
from derm_pipeline.training.fine_tuning import fine_tune
from derm_pipeline.training.fine_tuning_settings import FineTuning, FullStage, LoraStage, Stage
from derm_pipeline.training.loop import TrainingConfig, train

NEW = Diagnosis.VASC
KNOWN = tuple(diagnosis for diagnosis in DRAWN if diagnosis != NEW)
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
_VAE_BATCH = 4
_PLAIN = {f"p_{name}": 0.0 for name in ("subtle", "hair", "ruler", "ink", "bubbles", "vignette")}


@dataclass(frozen=True)
class Budget:
    """How much is drawn and trained."""

    size_px: int = 64
    num_train: int = 1400
    num_held_out: int = 350
    vae_steps: int = 2200
    vae_widths: tuple[int, ...] = (16, 32, 32)
    base_steps: int = 1500
    widths: tuple[int, ...] = (32, 64)
    lora_steps: int = 400
    lora_rank: int = 8
    classifier_steps: int = 300
    num_samples: int = 48
    """Of the new diagnosis; of each known one an eighth."""
    sampling_steps: int = 20
    guidance: float = 2.0
    loss_repeats: int = 8
    """Times and noises for each held-out image."""

    @property
    def downsampling(self) -> int:
        """Pixels of a latent cell."""
        return 2 ** (len(self.vae_widths) - 1)


@dataclass(frozen=True)
class Phantoms:
    """Drawn images (n, h, w, 3), their diagnoses as places in `DRAWN`, and their captions."""

    images: Pixels
    diagnoses: npt.NDArray[np.int64]
    captions: tuple[str, ...]

    def of(self, diagnoses: tuple[Diagnosis, ...]) -> npt.NDArray[np.int64]:
        """The rows of these diagnoses."""
        return np.flatnonzero(np.isin(self.diagnoses, [DRAWN.index(diagnosis) for diagnosis in diagnoses]))


def draw_phantoms(num: int, seed: int, size_px: int) -> Phantoms:
    """Typical lesions without artefacts, every diagnosis equally often; other seeds are other patients."""
    equal = dict.fromkeys((diagnosis.value for diagnosis in DRAWN), 1.0)
    cases = plan(PhantomConfig.model_validate({"num_images": num, "seed": seed} | equal | _PLAIN))
    return Phantoms(
        np.stack([draw(case, size_px, size_px).image for case in cases]),
        np.array([DRAWN.index(case.diagnosis) for case in cases]),
        tuple(caption_of(case.diagnosis, case.skin_type) for case in cases),
    )


def caption_of(diagnosis: Diagnosis, skin_type: SkinType) -> str:
    """As the stage `metadata_captions` writes it of what is told here."""
    return metadata_caption({"modality": "dermoscopic", "diagnosis": diagnosis.value, "skin_type": skin_type.value})


class VaeObjective:
    """Images given back through their latents: absolute and squared error, and a slight pull to a unit normal.

    At first middle squares of half the side, then whole images: a step on a quarter of the cells costs a quarter.
    """

    def __init__(self, vae: Any, images: Pixels, budget: Budget) -> None:
        self._vae, self._images, self._budget = vae, torch.from_numpy(images), budget

    def draw(self, step: int, stream: torch.Generator) -> Batch:
        rows = torch.randint(len(self._images), (_VAE_BATCH,), generator=stream)
        turn = int(torch.randint(8, (1,), generator=stream))
        side = self._budget.size_px // 2
        y, x = torch.randint(side // 4, 3 * side // 4 + 1, (2,), generator=stream).tolist()
        images = self._images[rows]
        if step < 0.7 * self._budget.vae_steps:
            images = images[:, y : y + side, x : x + side]
        cells = images.shape[1] // self._budget.downsampling
        noise = torch.randn((_VAE_BATCH, 4, cells, cells), generator=stream)
        return {"images": orient(to_model_range(images), turn), "noise": noise}

    def loss(self, batch: Batch) -> Tensor:
        images = batch["images"]
        found = self._vae.encode(images).latent_dist
        error = self._vae.decode(found.mean + found.std * batch["noise"]).sample - images
        pull = 0.5 * (found.mean.square() + found.var - 1 - found.logvar).mean((1, 2, 3))
        return (error.abs() + error.square()).mean((1, 2, 3)) + 1e-5 * pull


def training(num_steps: int, batch_size: int, lr: float, **further: Any) -> TrainingConfig:
    settings = {"num_steps": num_steps, "batch_size": batch_size, "lr": lr, "precision": "fp32"}
    return TrainingConfig.model_validate(settings | {"checkpoint_every_steps": 500} | further)


def write_start(folder: Path, phantoms: Phantoms, budget: Budget, work: Path) -> PretrainedConfig:
    """A whole pipeline that has seen phantoms in its autoencoder only."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

    write_tiny("sd", folder)
    num_levels = len(budget.vae_widths)
    torch.manual_seed(1)
    kind: Any = AutoencoderKL
    vae = kind(
        down_block_types=("DownEncoderBlock2D",) * num_levels,
        up_block_types=("UpDecoderBlock2D",) * num_levels,
        block_out_channels=budget.vae_widths,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=budget.size_px,
    )
    with torch.no_grad():  # latents start with hardly any noise, else hundreds of steps go by before it is small
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = -6
    train(vae, VaeObjective(vae, phantoms.images, budget), training(budget.vae_steps, _VAE_BATCH, 4e-3), work=work)
    standardise(vae, phantoms.images[:128])
    pipeline: Any = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    torch.manual_seed(2)
    unet: Any = UNet2DConditionModel
    pipeline.unet = unet(
        sample_size=budget.size_px // budget.downsampling,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=budget.widths,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=8,
        cross_attention_dim=pipeline.text_encoder.config.hidden_size,
    )
    pipeline.vae = vae.eval()
    pipeline.save_pretrained(folder, safe_serialization=True)
    return PretrainedConfig(model=str(folder), dtype="float32")


@torch.no_grad()
def standardise(vae: Any, images: Pixels) -> None:
    """Latents of mean 0 and deviation 1 in every channel, the images the same: the 1 x 1 convolutions around them."""
    parts = to_model_range(torch.from_numpy(images)).split(16)
    means = torch.cat([vae.encode(part).latent_dist.mean for part in parts])
    mean, std = means.mean((0, 2, 3)), means.std((0, 2, 3))
    into, back = vae.quant_conv, vae.post_quant_conv
    into.weight[:4] /= std[:, None, None, None]
    into.bias[:4] = (into.bias[:4] - mean) / std
    into.bias[4:] -= 2 * std.log()
    back.bias += (back.weight[:, :, 0, 0] * mean).sum(1)
    back.weight *= std[None, :, None, None]
    vae.register_to_config(scaling_factor=1.0)


@torch.no_grad()
def moments_of(vae: PretrainedVae, images: Pixels) -> Tensor:
    """(n, 2, 8, h, w): of the images and of their mirror images."""
    pixels = to_model_range(torch.from_numpy(images))
    both = [torch.cat([torch.cat(vae.encode(part), 1) for part in orient(pixels, k).split(32)]) for k in (0, 1)]
    return torch.stack(both, 1).half()


@torch.no_grad()
def rebuilt_by(vae: PretrainedVae, moments: Tensor) -> Pixels:
    """What comes back of images (n, h, w, 3), by the means of their moments."""
    return np.concatenate([to_pixels(vae.decode(part)) for part in moments[:, 0, :4].float().split(32)])


def likeness(rebuilt: Pixels, images: Pixels) -> dict[str, float]:
    """PSNR and SSIM of images that came back."""
    both = (to_model_range(torch.from_numpy(one)) for one in (rebuilt, images))
    return measure_reconstruction(*both).means


def captioned(phantoms: Phantoms, moments: Tensor, diagnoses: tuple[Diagnosis, ...]) -> Captioned:
    rows = phantoms.of(diagnoses)
    places = [diagnoses.index(DRAWN[index]) for index in phantoms.diagnoses[rows]]
    return Captioned(moments[rows], torch.tensor(places), [phantoms.captions[row] for row in rows])


def tune(
    base: PretrainedConfig, stage: Stage, images: Captioned, diagnoses: tuple[Diagnosis, ...], work: Path
) -> FineTuned:
    config = FineTuning(base=base, stages=(stage,), caption_dropout=0.1, balance=1.0, grid=None)
    classes = {"diagnosis": tuple(diagnosis.value for diagnosis in diagnoses)}
    return fine_tune(images, classes, config, work=work)


def publish(config: PretrainedConfig, trained: Path, folder: Path) -> PretrainedConfig:
    """The pipeline with its denoiser as it was trained (the averages), as a base of its own."""
    base = load_base(config)
    put_denoiser(trained, base.denoiser)
    base.pipeline().save_pretrained(folder, safe_serialization=True)
    return config.model_copy(update={"model": str(folder)})


@torch.no_grad()
def held_out_losses(generator: Path, images: Captioned, budget: Budget) -> Tensor:
    """The mean loss (n,) of each image, over times and noise that depend on nothing but the images' number."""
    spec, network = load_network(generator, torch.device("cpu"))
    assert isinstance(network, PretrainedNetwork)  # that is what a base is tuned to
    assert isinstance(images.moments, Tensor)  # and `captioned` makes tensors
    told = load_embedder(generator)(images.captions)
    latents = spec.whiten(images.moments[:, 0, :4].float())
    stream = torch.Generator().manual_seed(5)
    losses = []
    for _ in range(budget.loss_repeats):
        noise = spec.law.draw(tuple(latents.shape), stream)
        losses.append(spec.law.loss(lambda x, time: network(x, time, told), latents, noise))
    return torch.stack(losses).mean(0)


def requests_for(budget: Budget) -> list[SampleRequest]:
    """The new diagnosis on every skin type, then the known ones."""
    types = list(SkinType)
    wanted = [(NEW, types[place % 6]) for place in range(budget.num_samples)]
    wanted += [(known, types[place % 6]) for known in KNOWN for place in range(max(1, budget.num_samples // 8))]
    return [
        SampleRequest(number, 1000 + number, diagnosis, skin, text=caption_of(diagnosis, skin), prompting=Prompting())
        for number, (diagnosis, skin) in enumerate(wanted)
    ]


def drawn_by(generator: Path, autoencoder: Path, budget: Budget, work: Path) -> Pixels:
    """Samples of all requests."""
    work.mkdir(exist_ok=True)
    return draw_samples(
        requests_for(budget),
        Sampling(num_steps=budget.sampling_steps, guidance=budget.guidance, precision="fp32"),
        generator=generator,
        autoencoder=autoencoder,
        work=work,
        embed_text=load_embedder(generator),
    )


def judged(judge: SmallResNet, images: Pixels, asked: npt.NDArray[np.int64]) -> dict[str, float]:
    found = agreement(predict(judge, images), asked, [diagnosis.value for diagnosis in DRAWN])
    others = [found[known.value] for known in KNOWN if known.value in found]
    return {"new": round(found[NEW.value], 3), "known": round(float(np.mean(others)), 3)}


def told_apart(before: Tensor, after: Tensor) -> dict[str, float]:
    """Mean losses, and their mean difference with its standard error over images."""
    change = after - before
    return {
        "before": round(float(before.mean()), 4),
        "after": round(float(after.mean()), 4),
        "change": round(float(change.mean()), 4),
        "standard_error": round(float(change.std() / len(change) ** 0.5), 4),
    }


class Clock:
    """Processor seconds of each part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.process_time()

    def note(self, name: str) -> None:
        now = time.process_time()
        self.seconds[name] = round(now - self._last, 1)
        self._last = now
        logging.getLogger(__name__).info("%s: %.1f s of processor time", name, self.seconds[name])


def run(budget: Budget, folder: Path, grid: Path | None = None) -> dict[str, Any]:
    """Everything, in a folder whose finished trainings are taken up again; the report."""
    clock = Clock()
    train_set, held_out = (
        draw_phantoms(num, seed, budget.size_px) for seed, num in enumerate((budget.num_train, budget.num_held_out))
    )
    clock.note("phantoms")
    start = write_start(folder / "start", train_set, budget, folder / "vae")
    vae = load_pretrained_vae(vae_config(start))
    (folder / "autoencoder").mkdir(exist_ok=True)
    save_autoencoder(vae, folder / "autoencoder")
    clock.note("autoencoder")
    train_moments, moments = moments_of(vae, train_set.images), moments_of(vae, held_out.images)
    rebuilt = rebuilt_by(vae, moments)
    clock.note("latents")
    data = LabelledImages(train_set.images, train_set.diagnoses, len(DRAWN))
    again = LabelledImages(rebuilt_by(vae, train_moments), train_set.diagnoses, len(DRAWN))
    config = ClassifierConfig(width=16, num_steps=budget.classifier_steps, batch_size=32, lr=4e-3)
    judges = {name: train_classifier(own, config, seed=0) for name, own in (("sharp", data), ("both", data + again))}
    clock.note("classifiers")
    full = FullStage(training=training(budget.base_steps, 16, 1.5e-3, ema_decay=0.995))
    known = tune(start, full, captioned(train_set, train_moments, KNOWN), KNOWN, folder / "base")
    clock.note("base")
    base = publish(start, known.folder, folder / "published")
    lora = LoraStage(
        denoiser=LoraConfig(rank=budget.lora_rank, targets=TARGETS),
        training=training(budget.lora_steps, 16, 2e-3, ema_decay=0.98),
    )
    tuned = tune(base, lora, captioned(train_set, train_moments, (NEW,)), (NEW,), folder / "lora")
    clock.note("lora")
    folders = {"before": known.folder, "after": tuned.folder}
    new, old = captioned(held_out, moments, (NEW,)), captioned(held_out, moments, KNOWN)
    losses = {
        name: told_apart(*(held_out_losses(one, images, budget) for one in folders.values()))
        for name, images in (("new", new), ("known", old))
    }
    clock.note("held-out losses")
    asked = np.array([DRAWN.index(one.diagnosis) for one in requests_for(budget) if one.diagnosis])
    samples = {
        name: drawn_by(one, folder / "autoencoder", budget, folder / f"samples-{name}") for name, one in folders.items()
    }
    clock.note("samples")
    labelled = [
        ("held_out_phantoms", held_out.images, held_out.diagnoses),
        ("the_same_rebuilt", rebuilt, held_out.diagnoses),
        *((f"samples_{name}", images, asked) for name, images in samples.items()),
    ]
    report = {
        "budget": asdict(budget),
        "num_weights": {
            "autoencoder": _num_weights(vae),
            "denoiser": known.stages[0].num_weights,
            "lora": tuned.stages[0].num_weights,
        },
        "reconstruction": {name: round(value, 3) for name, value in likeness(rebuilt, held_out.images).items()},
        "training_loss_of_the_base": {
            "first_50": round(float(np.mean(known.losses[:50])), 4),
            "last_50": round(float(np.mean(known.losses[-50:])), 4),
        },
        "held_out_loss": losses,
        "class_agreement": {
            judge: {name: judged(model, images, diagnoses) for name, images, diagnoses in labelled}
            for judge, model in judges.items()
        },
        "cpu_seconds": clock.seconds,
    }
    if grid is not None:
        _write_grid(grid, held_out, rebuilt, samples, asked)
    return report


def _num_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _write_grid(
    path: Path, held_out: Phantoms, rebuilt: Pixels, samples: dict[str, Pixels], asked: npt.NDArray[np.int64]
) -> None:
    """Two rows each: phantoms, the same rebuilt, the new diagnosis before and after, known ones before and after."""
    columns, new = 12, DRAWN.index(NEW)
    parts = [held_out.images[: 2 * columns], rebuilt[: 2 * columns]]
    for chosen in (np.flatnonzero(asked == new), np.flatnonzero(asked != new)):
        spread = chosen[np.linspace(0, len(chosen) - 1, 2 * columns).round().astype(int)]
        parts += [images[spread] for images in samples.values()]
    write_grid(path, np.concatenate(parts), columns=columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the report goes; without it, it is printed")
    parser.add_argument("--grid", type=Path, help="png of phantoms and samples")
    parser.add_argument("--work", type=Path, help="folder that is kept, where a stopped run goes on")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger(__name__).setLevel(logging.INFO)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        report = run(Budget(), options.work or Path(temporary), options.grid)
    machine = {"processor": platform.processor() or platform.machine(), "load": [round(x, 1) for x in os.getloadavg()]}
    report |= {"machine": machine, "torch": torch.__version__}
    if options.out is None:
        print(json.dumps(report, indent=1))
    else:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
