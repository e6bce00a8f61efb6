"""Peak memory of one firing of Med-Art's hybrid-level loss (HLDF), forward and backward, by how it is drawn.

PixArt-XL-2 of its published size with Med-Art's LoRA (rank 8) and Stable Diffusion's VAE, random weights, M = 20 steps
with guidance 4.5, at 512 px. On a GPU: what CUDA says was allocated at most. Elsewhere: the same operations on tensors
that have a shape and no values; every storage is counted from its making to its end, which needs no such machine (and
leaves out what a kernel takes for itself). Beside it the same at a small size, computed, with the seconds.

The text encoder is not part of it: told embeddings take gradients, as if there were one.
    python benchmarks/hldf_memory.py --out benchmarks/results/hldf_memory.json
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from derm_pipeline.models.diffusion import DDPM
from derm_pipeline.models.runtime import autocast
from derm_pipeline.training.hldf import Hldf, HldfConfig

IS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if IS_GPU else "cpu")
TARGETS = [
    *("to_k", "to_q", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("proj", "linear", "linear_1", "linear_2"),
]
ARMS: dict[str, dict[str, object]] = {
    "as Med-Art: all steps, all kept": {"activation_checkpointing": False},
    "last 5 steps, kept": {"activation_checkpointing": False, "num_gradient_steps": 5},
    "all steps, checkpointed (default)": {},
    "last step": {"num_gradient_steps": 1},
}
SIZES: dict[str, dict[str, int]] = {
    "PixArt-XL-2-512x512": {"layers": 28, "heads": 16, "head": 72, "caption": 4096, "latent": 64, "vae": 128},
    "small": {"layers": 12, "heads": 4, "head": 16, "caption": 64, "latent": 16, "vae": 16},
}
TOKENS = 120


class Network(nn.Module):
    """PixArt's prediction of noise, without its variance, with LoRA."""

    def __init__(self, size: dict[str, int]) -> None:
        super().__init__()
        transformer = PixArtTransformer2DModel(
            num_attention_heads=size["heads"],
            attention_head_dim=size["head"],
            num_layers=size["layers"],
            sample_size=size["latent"],
            cross_attention_dim=size["heads"] * size["head"],
            caption_channels=size["caption"],
            use_additional_conditions=False,
        )
        transformer.requires_grad_(requires_grad=False)
        self.transformer = inject_adapter_in_model(LoraConfig(r=8, target_modules=TARGETS), transformer)

    def forward(self, x: Tensor, time: Tensor, told: Mapping[str, Tensor]) -> Tensor:
        output: Tensor = self.transformer(
            x, encoder_hidden_states=told["text"], timestep=time, added_cond_kwargs={}, return_dict=False
        )[0]
        return output[:, : x.shape[1]]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that live at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        found = func(*args, **(kwargs or {}))
        torch.utils._pytree.tree_map_only(Tensor, self._note, found)
        self.peak = max(self.peak, self.now)
        return found

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen.add(storage)
        num_bytes = storage.nbytes()
        self.now += num_bytes
        weakref.finalize(storage, self._forget, num_bytes)

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """These are weights: views of them are nothing new."""
        self._seen.update(tensor.untyped_storage() for tensor in tensors)

    def _forget(self, num_bytes: int) -> None:
        self.now -= num_bytes


class Counting:
    """Within it, operations are counted, and without values where they are not to be computed."""

    def __init__(self, *, is_computed: bool) -> None:
        self.live = LiveBytes()
        self._fake = None if is_computed else FakeTensorMode(allow_non_fake_inputs=True)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._fake or nullcontext(), nullcontext() if IS_GPU else self.live:
            yield


def _parts(size: dict[str, int], dtype: torch.dtype, *, is_computed: bool) -> tuple[Network, AutoencoderKL]:
    torch.set_default_dtype(dtype)
    with DEVICE if is_computed else torch.device("meta"):
        network, vae = Network(size), _vae(size["vae"])
    torch.set_default_dtype(torch.float32)
    return network, vae


def _without_values(module: nn.Module) -> None:
    """Weights and buffers as the fake tensors of the mode that is on."""
    for part in module.modules():
        for kept in (part._parameters, part._buffers):
            for name, tensor in kept.items():
                if tensor is not None:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)
                    is_trained = tensor.requires_grad
                    kept[name] = nn.Parameter(fake, is_trained) if isinstance(tensor, nn.Parameter) else fake


def _vae(width: int) -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        layers_per_block=2,
        norm_num_groups=8 if width < 128 else 32,
    )
    return vae.requires_grad_(requires_grad=False)


class Firing:
    """One size of network, ready to fire."""

    def __init__(self, size: dict[str, int], *, is_computed: bool) -> None:
        self.size, self.counting = size, Counting(is_computed=is_computed)
        self.dtype = torch.bfloat16 if IS_GPU or not is_computed else torch.float32
        self.network, self.vae = _parts(size, self.dtype, is_computed=is_computed)
        with self.counting():
            if not is_computed:
                _without_values(self.network)
                _without_values(self.vae)
        self.counting.live.leave_out((*self.network.parameters(), *self.vae.parameters()))

    def __call__(self, x: Tensor, time: Tensor, told: Mapping[str, Tensor]) -> Tensor:
        with self.counting():
            output: Tensor = self.network(x, time, told)
            return output

    def null_conditions(self, num: int) -> dict[str, Tensor]:
        return {"text": torch.zeros(num, TOKENS, self.size["caption"], device=DEVICE)}

    def decode(self, latents: Tensor) -> Tensor:
        with self.counting(), torch.autocast(DEVICE.type, enabled=False):
            images: Tensor = self.vae.decode(latents.to(self.dtype)).sample
            return images.float()

    def fire(self, arm: dict[str, object]) -> float:
        """Peak bytes of it, beyond the weights."""
        self.network.zero_grad(set_to_none=True)
        side, live = self.size["latent"], self.counting.live
        live.peak = live.now
        before = live.now
        if IS_GPU:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        term = Hldf(HldfConfig.model_validate(arm), DDPM(prediction="epsilon"), self, self.decode)
        told = {"text": torch.randn(1, TOKENS, self.size["caption"], device=DEVICE, requires_grad=True)}
        noise = torch.randn(1, 4, side, side, device=DEVICE)
        images = torch.zeros(1, 3, 8 * side, 8 * side, device=DEVICE)
        with autocast(DEVICE, "bf16" if self.dtype == torch.bfloat16 else "fp32"):
            losses = term.losses(told, noise, images=images)
        with self.counting():
            losses.mean().backward()
        return (torch.cuda.max_memory_allocated() if IS_GPU else live.peak) - before


def _measured(name: str, *, is_computed: bool) -> dict[str, dict[str, float]]:
    """Peak of each arm in GB, and seconds where it was computed."""
    firing, rows = Firing(SIZES[name], is_computed=is_computed), {}
    if is_computed:
        firing.fire({"num_steps": 1})  # warms up
    for arm, changes in ARMS.items():
        start = time.process_time()
        rows[arm] = {"peak_gb": float(f"{firing.fire(changes) / 1e9:.4g}")}
        if is_computed:
            rows[arm]["seconds"] = float(f"{time.process_time() - start:.3g}")
        print(name, arm, rows[arm], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the figures there, as JSON")
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    report = {
        "settings": {"num_steps": 20, "guidance": 4.5, "batch": 1, "sizes": SIZES},
        "peak": "CUDA's, beyond what lay there" if IS_GPU else "storages that an operation made, beyond the weights",
        "PixArt-XL-2-512x512": _measured("PixArt-XL-2-512x512", is_computed=IS_GPU),
        "small": _measured("small", is_computed=True),
        "clock": "CPU time of the process",
        "machine": {"gpu": torch.cuda.get_device_name() if IS_GPU else None, "python": platform.python_version()},
        "versions": {name: metadata.version(name) for name in ("torch", "diffusers", "peft")},
        "commit": commit,
    }
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
