"""What the benchmarks of steps measure by: the clock, what the host waits for, the machine."""

from __future__ import annotations

import os
import platform
import subprocess
import time
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import sdpa_backward_flop, sdpa_flop

from derm_pipeline.models.runtime import Precision, computes_bf16, pick_device
from derm_pipeline.sources.base import num_cores

DEVICE = pick_device()
IS_GPU = DEVICE.type == "cuda"


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def clock() -> float:
    if IS_GPU:
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def timed(work: Callable[[], object], times: int) -> float:
    """Mean seconds."""
    start = clock()
    for _ in range(times):
        work()
    return (clock() - start) / max(1, times)


def cuda_waits(step: Callable[[], object]) -> int:
    """Waits that CUDA reports in a step as it is timed."""
    if not IS_GPU:
        return 0
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in seen)


def ceiling(precision: Precision) -> float:
    """TFLOP/s of a large matrix product in this arithmetic, on random numbers; the best of several."""
    size = 8192 if IS_GPU else 2048
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    for _ in range(2):
        a @ b
    return 2 * size**3 / min(timed(lambda: a @ b, 10 if IS_GPU else 1) for _ in range(5)) / 1e12


class Dispatched(TorchDispatchMode):
    """Counts operations, and those for which the host waits: a value is read, or a size depends on values.

    AdamW's counters of its steps are read, too, but lie on the host everywhere, unless it is fused: nobody waits.
    """

    waits = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_unique2")

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self.num = self.num_waits = 0
        counters = (kept["step"] for kept in optimizer.state.values())
        self._kept_by_host = {counter.data_ptr() for counter in counters if counter.device.type == "cpu"}

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        self.num += 1
        if func.overloadpacket.__name__ in self.waits and args[0].data_ptr() not in self._kept_by_host:
            self.num_waits += 1
        return func(*args, **(kwargs or {}))


def cpu_attention() -> dict[object, Callable[..., int]]:
    """The counter does not know the CPU's fused attention by itself; it is given the law of the GPU's."""
    aten = torch.ops.aten

    # the counter hands shapes where a tensor was
    def forward(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: object, **__: object) -> int:
        return int(sdpa_flop(q, k, v))

    def backward(
        grad: Sequence[int], q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: object, **__: object
    ) -> int:
        return int(sdpa_backward_flop(grad, q, k, v))

    return {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }


def machine(*packages: str) -> dict[str, object]:
    """What a figure depends on beside the code."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": num_cores(),
        "load_average": [round(value, 1) for value in os.getloadavg()],
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if IS_GPU else None,
        "bf16": computes_bf16(DEVICE),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("torch", *packages)},
        "cuda": torch.version.cuda,
        "commit": commit,
    }
