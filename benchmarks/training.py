"""A DiT's training step: ours, beside a baseline loop written from what is known of fast-DiT.

Baseline: activation checkpointing of every block, always; fp16 autocast with a GradScaler on a GPU, float32 on a CPU
(its `--mixed_precision no`: fp16 is its GPU's), and bf16 besides, so that like is compared with like; AdamW as torch
makes it (1e-4, no decay); the average updated parameter by parameter, in Python, of the position table too; `.item()`
every step; two npy files a sample, read by a PyTorch data loader (four workers on a GPU, none on a CPU, where their
time would not be counted). Its network, attention and loss (epsilon, learned variance, on tables kept on the device)
are ours, so it is faster than the original, and what is compared is the loop.
Ours: `GeneratorObjective` and the steps of `loop.train`, moments resident on the device, latents drawn of them anew,
gradients clipped, losses fetched every 50 steps. No checkpointing; compiled with --compile.

On a CPU: CPU seconds of the process (all its threads; OMP_NUM_THREADS=1 is best, since a thread that waits spins, and
counts). On a GPU: wall seconds between synchronisations. Blocks of steps of all arms in the order A-B-C-C-B-A, after a
warm-up of each; medians over blocks. Counts that do not move are taken of eager steps of 2 images: floating-point
operations (matrix products, convolutions, attention), operations dispatched, and how often the host would wait; on a
GPU also the waits that CUDA itself reports in the steps as they are timed.

    OMP_NUM_THREADS=1 python benchmarks/training.py --size S/2 --batch 8 --out benchmarks/results/training.json
    python benchmarks/training.py --size XL/2 --batch 128 --compile

What a CPU keeps for the backward pass glibc returns to the system after every step, and every page of it must be got
again in the next: a cost of ours that checkpointing has not. `MALLOC_TRIM_THRESHOLD_=100000000000
MALLOC_MMAP_THRESHOLD_=100000000000` before the command keeps the memory, for both; figures are given with and without.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import resource
import statistics
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from measuring import DEVICE, IS_GPU, Dispatched, ceiling, cpu_attention, cuda_waits, machine, rounded, timed
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torch.utils.flop_counter import FlopCounterMode

from derm_pipeline.models.dit import DiT, DiTConfig, preset
from derm_pipeline.models.generator import GeneratorSpec
from derm_pipeline.models.laws import DDPM
from derm_pipeline.models.runtime import Precision, autocast, computes_bf16
from derm_pipeline.records import Diagnosis
from derm_pipeline.training.config import TrainingConfig
from derm_pipeline.training.objectives import GeneratorObjective
from derm_pipeline.training.processes import Processes
from derm_pipeline.training.settings import DiTTraining
from derm_pipeline.training.steps import Steps

LAW = DDPM(prediction="epsilon", learned_variance=True)
CLASSES = tuple(diagnosis.value for diagnosis in Diagnosis)[:7]
SIDE, CHANNELS = 32, 4
LR, DECAY = 1e-4, 0.9999
COUNTED = 2
"""Images of the steps whose operations are counted."""
ENDLESS = 1_000_000
"""Steps that no run reaches."""
TARGETS = {"XL/2": 2.5, "B/2": 4.0} if IS_GPU else {"S/2": 1.25}
TARGET_RATE = {"XL/2": 600.0} if IS_GPU else {}
"""Images a second that will do, too."""


class Arm(ABC):
    """A loop whose steps are measured."""

    name: str
    precision: Precision
    optimizer: torch.optim.Optimizer

    @abstractmethod
    def step(self) -> None:
        """One step, its data included."""

    @abstractmethod
    def states(self) -> Iterable[Tensor]:
        """What it keeps between steps: weights, gradients, the optimiser's, averages."""


class _NpyFiles(Dataset):
    """A sample's latent and label, each in a file of its own."""

    def __init__(self, folder: Path, count: int) -> None:
        self.latents = [folder / f"{number}.npy" for number in range(count)]
        self.labels = [folder / f"{number}_label.npy" for number in range(count)]

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(np.load(self.latents[place])), torch.from_numpy(np.load(self.labels[place]))


class _Loop:
    """The baseline's state, shared by its arms: they differ in autocast only, and weights stay float32."""

    def __init__(self, network: DiTConfig, files: _NpyFiles, batch: int) -> None:
        torch.manual_seed(0)
        self.model = DiT(network).to(DEVICE).train()
        self.model.is_checkpointing = True
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, weight_decay=0)
        self.scaler = torch.amp.GradScaler(DEVICE.type)
        self.random = torch.Generator(DEVICE).manual_seed(0)
        order = RandomSampler(files, replacement=True, num_samples=ENDLESS, generator=torch.Generator().manual_seed(0))
        workers = 4 if IS_GPU else 0
        loader = DataLoader(files, batch, sampler=order, num_workers=workers, pin_memory=IS_GPU, drop_last=True)
        self.batches: Iterator[tuple[Tensor, Tensor]] = iter(loader)
        self.losses: list[float] = []


class Baseline(Arm):
    """The loop as fast-DiT has it."""

    def __init__(self, loop: _Loop, precision: Precision) -> None:
        self.name, self.precision, self._loop = f"baseline {precision}", precision, loop
        self.optimizer = loop.optimizer

    def step(self) -> None:
        loop = self._loop
        latents, labels = (part.to(DEVICE, non_blocking=True).squeeze(1) for part in next(loop.batches))
        is_hidden = torch.rand(len(labels), generator=loop.random, device=DEVICE) < 0.1
        told = {"diagnosis": torch.where(is_hidden, len(CLASSES), labels)}
        draw = LAW.draw(tuple(latents.shape), loop.random)

        def denoise(x: Tensor, time: Tensor) -> Tensor:
            with autocast(DEVICE, self.precision):
                return loop.model(x, time, told).float()

        loss = LAW.loss(denoise, latents, draw).mean()
        loop.optimizer.zero_grad()
        if self.precision == "fp16":
            loop.scaler.scale(loss).backward()
            loop.scaler.step(loop.optimizer)
            loop.scaler.update()
        else:
            loss.backward()
            loop.optimizer.step()
        self._average()
        loop.losses.append(loss.item())

    @torch.no_grad()
    def _average(self) -> None:
        averages = dict(self._loop.average.named_parameters())
        for name, parameter in self._loop.model.named_parameters():
            averages[name].mul_(DECAY).add_(parameter.data, alpha=1 - DECAY)

    def states(self) -> Iterable[Tensor]:
        yield from _states(self._loop.model, self._loop.optimizer)
        yield from self._loop.average.parameters()


class Ours(Arm):
    """The steps of `loop.train`, and its looks at the losses."""

    def __init__(self, stack: ExitStack, options: argparse.Namespace, moments: Tensor, precision: Precision) -> None:
        self.name, self.precision = f"ours {precision}", precision
        training = TrainingConfig(
            num_steps=ENDLESS, batch_size=options.batch, micro_batch_size=options.micro_batch, lr=LR, warmup_steps=0,
            schedule="constant", ema_decay=DECAY, precision=precision, compile=options.compile,
        )  # fmt: skip
        shape = {name: getattr(_network(options.size), name) for name in ("patch", "width", "depth", "heads")}
        config = DiTTraining(
            **shape, condition_init_std=0.02, conditions=("diagnosis",), balance=0, law=LAW, training=training
        )
        network = config.network(SIDE, CHANNELS, {"diagnosis": len(CLASSES)})
        assert network == _network(options.size)
        spec = GeneratorSpec(
            network=network,
            law=LAW,
            classes={"diagnosis": CLASSES},
            latent_mean=(0.0,) * CHANNELS,
            latent_std=(1.0,) * CHANNELS,
        )
        torch.manual_seed(0)
        model = DiT(_network(options.size)).to(DEVICE)
        labels = {"diagnosis": torch.arange(len(moments)) % len(CLASSES)}
        objective = GeneratorObjective(model, spec, moments, labels, config)
        processes = stack.enter_context(Processes(training))
        self._steps = Steps(model, objective, None, training, processes)
        stack.enter_context(self._steps.compiled())
        self.optimizer = self._steps.state.optimizer
        self._taken = self._steps.take(0)

    def step(self) -> None:
        done = next(self._taken)
        if self._steps.due(done, may_sample=False).report:
            self._steps.collect()

    def states(self) -> Iterable[Tensor]:
        state = self._steps.state
        yield from _states(state.model, state.optimizer)
        for average in state.averages.values.values():
            yield from average


def _states(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from (parameter.grad for parameter in model.parameters() if parameter.grad is not None)
    yield from (value for kept in optimizer.state.values() for value in kept.values() if isinstance(value, Tensor))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="XL/2" if IS_GPU else "S/2", help="of the DiT, as S/2, B/2, XL/2")
    parser.add_argument("--batch", type=int, default=128 if IS_GPU else 8, help="images a step")
    parser.add_argument("--micro-batch", type=int, help="images that ours holds at once; all without it")
    parser.add_argument("--compile", action="store_true", help="compile ours")
    parser.add_argument("--steps", type=int, default=50 if IS_GPU else 2, help="steps a block")
    parser.add_argument("--warm-up", type=int, default=20 if IS_GPU else 1, help="steps of each arm before")
    parser.add_argument("--rounds", type=int, default=2, help="times A-B-C-C-B-A")
    parser.add_argument("--latents", type=int, default=2048, help="in the training set")
    parser.add_argument("--out", type=Path, help="also put the figures into the JSON there, beside other runs")
    options = parser.parse_args()
    if IS_GPU:  # as the baseline does; what is not under autocast gains by it in all arms alike
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    report = _report(options)
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        runs = json.loads(options.out.read_text()) if options.out.exists() else {}
        runs[_run_name(options)] = report
        options.out.write_text(json.dumps(runs, indent=1) + "\n")


def _run_name(options: argparse.Namespace) -> str:
    parts = [DEVICE.type, options.size, f"batch {options.batch}", "compiled" if options.compile else "eager"]
    return ", ".join([*parts, *(["memory kept"] if "MALLOC_TRIM_THRESHOLD_" in os.environ else [])])


def _report(options: argparse.Namespace) -> dict[str, object]:
    bf16: tuple[Precision, ...] = ("bf16",) if computes_bf16(DEVICE) else ()
    baselines: tuple[Precision, ...] = ("fp16" if IS_GPU else "fp32", *bf16)
    ours: tuple[Precision, ...] = bf16 if IS_GPU and bf16 else ("fp32", *bf16)
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        moments = _make_samples(folder, options.latents)
        files = _NpyFiles(folder, options.latents)
        counts = _counts(options, files, moments, ours[0])
        loop = _Loop(_network(options.size), files, options.batch)
        arms: list[Arm] = [Ours(stack, options, moments, precision) for precision in ours]
        arms = [*(Baseline(loop, precision) for precision in baselines), *arms]
        measured = _measure(arms, options)
    ceilings = {precision: ceiling(precision) for precision in dict.fromkeys((*baselines, *ours))}
    for arm in arms:
        row, kind = measured[arm.name], arm.name.split()[0]
        rate = options.batch / float(str(row["s_a_step"]))
        tflops = rate * float(str(counts[kind]["gflop_an_image"])) / 1e3
        row |= {
            "img_a_s": rounded(rate),
            "tflops": rounded(tflops),
            "part_of_ceiling": rounded(tflops / ceilings[arm.precision]),
        }
    ratio = float(str(counts["ours"]["gflop_an_image"])) / float(str(counts["baseline"]["gflop_an_image"]))
    return {
        "machine": machine("accelerate", "numpy"),
        "clock": "wall, synchronised" if IS_GPU else "CPU time of the process",
        "settings": {name: value for name, value in vars(options).items() if name != "out"},
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(("MALLOC_", "OMP_NUM"))
        },
        "baseline_precision": "fp16, as it is" if IS_GPU else "fp32: its --mixed_precision no, for want of a GPU",
        "matrix_product_ceiling_tflops": {name: rounded(value) for name, value in ceilings.items()},
        "counts": counts,
        "flops_of_ours_by_baseline": rounded(ratio),
        "flops_wanted": rounded(716 / 953),
        "arms": measured,
        "process_peak_gb": None if IS_GPU else rounded(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6),
        "comparisons": _comparisons(arms, measured, options.size),
    }


def _network(size: str) -> DiTConfig:
    return preset(size, latent_size=SIDE, channels=CHANNELS, conditions={"diagnosis": len(CLASSES)})


def _make_samples(folder: Path, count: int) -> Tensor:
    """Write the baseline's files; returns moments (n, 2, 2 c, h, w) of two orientations."""
    random = torch.Generator().manual_seed(0)
    for number in range(count):
        np.save(folder / f"{number}.npy", torch.randn(1, CHANNELS, SIDE, SIDE, generator=random).numpy())
        np.save(folder / f"{number}_label.npy", np.array([number % len(CLASSES)]))
    mean = torch.randn(count, 2, CHANNELS, SIDE, SIDE, generator=random)
    return torch.cat([mean, mean - 4], dim=2).half()


# Time


def _measure(arms: Sequence[Arm], options: argparse.Namespace) -> dict[str, dict[str, object]]:
    first = {arm.name: timed(arm.step, 1) for arm in arms}
    waits = {arm.name: cuda_waits(arm.step) for arm in arms}
    for arm in arms:
        timed(arm.step, options.warm_up)
    taken: dict[str, list[float]] = {arm.name: [] for arm in arms}
    faults: dict[str, list[float]] = {arm.name: [] for arm in arms}
    peaks: dict[str, float] = {}
    for arm in [*arms, *reversed(arms)] * options.rounds:
        before = _start_peak(arm)
        faults_before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        taken[arm.name].append(timed(arm.step, options.steps))
        faults[arm.name].append((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults_before) / options.steps)
        peaks[arm.name] = max(peaks.get(arm.name, 0), _peak_gb(before))
    rows: dict[str, dict[str, object]] = {}
    for name, seconds in taken.items():
        median = statistics.median(seconds)
        rows[name] = {
            "s_a_step": rounded(median),
            "s_a_step_by_block": [rounded(value) for value in seconds],
            "first_step_s": rounded(first[name]),
            "page_faults_a_step": round(statistics.median(faults[name])),
        }
        if options.compile and name.startswith("ours"):
            rows[name]["compile_s"] = rounded(first[name] - median)
        if IS_GPU:
            rows[name] |= {"peak_gb": rounded(peaks[name]), "cuda_waits_a_step": waits[name]}
    return rows


def _start_peak(arm: Arm) -> float:
    """What is held on the GPU by others."""
    if not IS_GPU:
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() - sum(tensor.nbytes for tensor in arm.states() if tensor.device.type == "cuda")


def _peak_gb(held_by_others: float) -> float:
    return (torch.cuda.max_memory_allocated() - held_by_others) / 1e9 if IS_GPU else 0.0


# Counts


def _counts(
    options: argparse.Namespace, files: _NpyFiles, moments: Tensor, precision: Precision
) -> dict[str, dict[str, float]]:
    small = argparse.Namespace(**vars(options) | {"batch": COUNTED, "micro_batch": None, "compile": False})
    counts = {}
    with ExitStack() as stack:
        loop = _Loop(_network(options.size), files, COUNTED)
        arms: dict[str, Arm] = {
            "baseline": Baseline(loop, "fp16" if IS_GPU else precision),
            "ours": Ours(stack, small, moments, precision),
        }
        for kind, arm in arms.items():
            arm.step()  # makes the optimiser's state
            with Dispatched(arm.optimizer) as seen:
                arm.step()
            with FlopCounterMode(display=False, custom_mapping=cpu_attention()) as counter:
                arm.step()
            counts[kind] = {
                "gflop_an_image": rounded(counter.get_total_flops() / COUNTED / 1e9),
                "host_waits_a_step": seen.num_waits,
                "operations_dispatched_a_step": seen.num,
            }
    del arms, arm, loop
    gc.collect()
    if IS_GPU:
        torch.cuda.empty_cache()
    return counts


# What is said of it


def _comparisons(
    arms: Sequence[Arm], measured: dict[str, dict[str, object]], size: str
) -> dict[str, dict[str, object]]:
    """Like with like, and each at its own default: the first baseline beside our last."""
    baselines = [arm for arm in arms if isinstance(arm, Baseline)]
    ours = [arm for arm in arms if isinstance(arm, Ours)]
    pairs = {f"both {a.precision}": (a, b) for a in baselines for b in ours if a.precision == b.precision}
    pairs["each as it comes"] = (baselines[0], ours[-1])
    found: dict[str, dict[str, object]] = {}
    for name, (baseline, our) in pairs.items():
        seconds = [float(str(measured[arm.name]["s_a_step"])) for arm in (baseline, our)]
        rate = float(str(measured[our.name]["img_a_s"]))
        found[name] = {"baseline": baseline.name, "ours": our.name, "times_faster": rounded(seconds[0] / seconds[1])}
        if size in TARGETS:
            is_met = seconds[0] / seconds[1] >= TARGETS[size] or rate >= TARGET_RATE.get(size, float("inf"))
            found[name] |= {"wanted": TARGETS[size], "is_met": is_met}
    return found


if __name__ == "__main__":
    main()
