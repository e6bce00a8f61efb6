"""What an image costs: ours, against 000's full ancestral sampler and against ours drawn one image at a time.

Process time on the CPU (wall time between synchronised points on a GPU), arms alternated A-B-C-C-B-A, one warm-up
each, medians of seconds an image. The network is a DiT of the size named, with random weights, on latents of the size
named; the images that it draws mean nothing, their cost does. On the CPU the ancestral arm is measured over
`--ancestral-steps` of its 1000 steps and scaled to 1000, since each step costs the same; the report says so. Ours
includes loading the networks and writing batches; the baselines have theirs loaded, and ancestral does not decode.

    OMP_NUM_THREADS=1 python benchmarks/generation.py [--preset S/2] [--latent 16] > benchmarks/results/generation.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from derm_pipeline.generation import SamplingConfig, draw_samples, requests_of_cells
from derm_pipeline.models.autoencoder import Autoencoder, AutoencoderConfig
from derm_pipeline.models.diffusion import Conditional, guided, noise_for, sample
from derm_pipeline.models.dit import DiT, preset
from derm_pipeline.models.generator import GeneratorSpec, load_autoencoder, load_network, save_autoencoder
from derm_pipeline.models.laws import DDPM
from derm_pipeline.models.runtime import Precision, autocast, computes_bf16, pick_device, save_weights
from derm_pipeline.records import Diagnosis


class Loaded(NamedTuple):
    """Networks, ready."""

    spec: GeneratorSpec
    network: Conditional
    decode: Callable[[torch.Tensor], torch.Tensor]


SEVEN = tuple(Diagnosis)[:7]
NUM_STEPS_OF_000 = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="S/2", help="size of the DiT")
    parser.add_argument("--latent", type=int, default=16, help="side of the latent, in cells")
    parser.add_argument("--samples", type=int, default=8, help="images a measurement")
    parser.add_argument("--steps", type=int, default=20, help="evaluations an image, ours (dpm2m)")
    parser.add_argument("--ancestral-steps", type=int, default=20, help="of 1000, measured on the CPU and scaled up")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"), help="ours; 000 is fp32")
    options = parser.parse_args()
    device = pick_device()
    with tempfile.TemporaryDirectory() as temporary:
        folders = _write_networks(Path(temporary), options.preset, options.latent)
        arms = _arms(folders, Path(temporary), options, device)
        for arm in arms.values():
            arm()  # warm-up
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for name in [*arms, *reversed(arms)]:
            seconds[name].append(_seconds(arms[name], device) / options.samples)
    print(json.dumps(_report(seconds, options, device), indent=2))


def _write_networks(folder: Path, name: str, latent_size: int) -> dict[str, Path]:
    """A generator and an autoencoder as a recipe leaves them, with random weights."""
    torch.manual_seed(0)
    network = preset(name, latent_size=latent_size, conditions={"diagnosis": 7}, learn_sigma=False)
    model = DiT(network)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.03)
    spec = GeneratorSpec(
        network=network,
        law=DDPM(prediction="epsilon"),
        classes={"diagnosis": tuple(diagnosis.value for diagnosis in SEVEN)},
        latent_mean=(0.0,) * 4,
        latent_std=(1.0,) * 4,
    )
    folders = {role: folder / role for role in ("generator", "autoencoder")}
    for path in folders.values():
        path.mkdir()
    spec.save(folders["generator"])
    save_weights(folders["generator"] / "weights.safetensors", model.state_dict())
    save_autoencoder(Autoencoder(AutoencoderConfig()), folders["autoencoder"])
    return folders


def _arms(
    folders: dict[str, Path], temporary: Path, options: argparse.Namespace, device: torch.device
) -> dict[str, Callable[[], object]]:
    spec, network = load_network(folders["generator"], device)
    decoder = load_autoencoder(folders["autoencoder"], device)
    loaded = Loaded(spec, network, decoder.decode)
    common = {"num_steps": options.steps, "compile": options.compile, "precision": options.precision}
    batched = SamplingConfig(batch_size=options.batch_size, guidance=1.5, **common)
    requests = requests_of_cells(SEVEN[:1], [None], options.samples, 0)

    def ours(config: SamplingConfig, num_at_once: int) -> None:
        for start in range(0, options.samples, num_at_once):
            with tempfile.TemporaryDirectory(dir=temporary) as work:
                part = requests[start : start + num_at_once]
                draw_samples(part, config, **folders, work=Path(work))

    return {
        "ours": lambda: ours(batched, options.samples),
        "ours_without_guidance": lambda: ours(batched.model_copy(update={"guidance": 1.0}), options.samples),
        "one_at_a_time": lambda: _one_at_a_time(loaded, options, device),
        "ancestral_1000": lambda: _ancestral(loaded, options, device, "fp32"),
        "ancestral_1000_our_arithmetic": lambda: _ancestral(loaded, options, device, options.precision),
    }


@torch.no_grad()
def _one_at_a_time(loaded: Loaded, options: argparse.Namespace, device: torch.device) -> None:
    """The same sampler, steps, guidance and arithmetic in the loop that scripts have: an image, then the next."""
    spec, network, decode = loaded
    shape = (4, options.latent, options.latent)
    for seed in range(options.samples):
        told = {"diagnosis": torch.zeros(1, dtype=torch.long, device=device)}
        with autocast(device, options.precision):
            latents = sample(guided(network, told, 1.5), spec.law, noise_for([seed], shape).to(device), options.steps)
            decode(spec.unwhiten(latents.float()))


@torch.no_grad()
def _ancestral(loaded: Loaded, options: argparse.Namespace, device: torch.device, precision: Precision) -> None:
    """000's sampler: every one of 1000 DDPM steps, batched, no guidance, fresh noise but at the last."""
    betas = torch.linspace(1e-4, 0.02, NUM_STEPS_OF_000, device=device)
    alphas = 1 - betas
    products = alphas.cumprod(0)
    x = torch.randn(options.samples, 4, options.latent, options.latent, device=device)
    told = {"diagnosis": torch.zeros(options.samples, dtype=torch.long, device=device)}
    for step in reversed(range(_ancestral_steps(options, device))):
        with autocast(device, precision):
            noise_seen = loaded.network(x, torch.full((options.samples,), float(step), device=device), told).float()
        before = products[step - 1] if step else torch.ones((), device=device)
        deviation = (betas[step] * (1 - before) / (1 - products[step])).sqrt()
        x = (x - betas[step] / (1 - products[step]).sqrt() * noise_seen) / alphas[step].sqrt()
        if step:
            x = x + deviation * torch.randn_like(x)


def _ancestral_steps(options: argparse.Namespace, device: torch.device) -> int:
    return NUM_STEPS_OF_000 if device.type == "cuda" else options.ancestral_steps


def _seconds(arm: Callable[[], object], device: torch.device) -> float:
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    start = clock()
    arm()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def _report(seconds: dict[str, list[float]], options: argparse.Namespace, device: torch.device) -> dict[str, object]:
    scale = NUM_STEPS_OF_000 / _ancestral_steps(options, device)
    scaled = {
        name: [value * (scale if name.startswith("ancestral") else 1) for value in values]
        for name, values in seconds.items()
    }
    medians = {name: statistics.median(values) for name, values in scaled.items()}
    return {
        "what": "seconds an image: process time on a CPU, wall time on a GPU",
        "settings": vars(options),
        "ancestral_steps_measured_of_1000": _ancestral_steps(options, device),
        "seconds_an_image": {name: round(value, 4) for name, value in medians.items()},
        "measurements": {name: [round(value, 4) for value in values] for name, values in scaled.items()},
        "times_faster_than_ancestral": round(medians["ancestral_1000"] / medians["ours"], 1),
        "times_faster_than_ancestral_in_our_arithmetic": round(
            medians["ancestral_1000_our_arithmetic"] / medians["ours"], 1
        ),
        "times_faster_than_one_at_a_time": round(medians["one_at_a_time"] / medians["ours"], 2),
        "times_faster_without_guidance": round(medians["ours"] / medians["ours_without_guidance"], 2),
        "machine": {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else _processor(),
            "threads": torch.get_num_threads(),
            "computes_bf16": computes_bf16(device),
            "load_average": [round(load, 2) for load in os.getloadavg()],
            "python": platform.python_version(),
            "torch": torch.__version__,
            "commit": subprocess.run(
                ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
            ).stdout.strip(),
        },
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else platform.processor()


if __name__ == "__main__":
    main()
