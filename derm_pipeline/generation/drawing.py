"""Drawing samples by the thousand: batches kept as they are finished, shared among processes, the same in any order.

Sample i depends on its own seed and conditions only. On the CPU that holds to the last bit, whatever the batch size,
the number of processes or threads, the order, and what else is asked for. A matrix product's last bits depend on its
shape and on the number of threads, so every network sees chunks of one fixed size, filled up where samples end, each
on a single thread, and the threads take chunks in turn. Kernels may also treat the rows of one product unequally
(fp32 with odd widths): `Drawer` tries that once and, where they do, evaluates one sample at a time.
On a GPU samples are evaluated in batches of `batch_size`, filled up: the last bits may depend on batch size and device.
"""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from derm_pipeline.generation.plan import SampleRequest, SamplingConfig
from derm_pipeline.images import Pixels
from derm_pipeline.latents import to_pixels
from derm_pipeline.models.conditions import TEXT, TEXT_MASK
from derm_pipeline.models.diffusion import Conditional, guided, noise_for, sample
from derm_pipeline.models.generator import GeneratorSpec, class_index, load_autoencoder, load_network
from derm_pipeline.models.runtime import autocast, pick_device
from derm_pipeline.store import MANIFEST, digest_of_file, digest_of_json, replacing

OnProgress = Callable[[int, int], None]
EmbedText = Callable[[Sequence[SampleRequest]], tuple[Tensor, Tensor]]
"""Text embeddings (n, s, e) of n samples and their mask (n, s), row i from request i alone; for one told text."""

CPU_CHUNK = 8
"""Samples that a network sees at once on the CPU. Part of what a sample is, as its seed: never a setting."""

_DRAWING = ("num_steps", "solver", "guidance", "guidance_interval", "precision", "compile")
"""Settings on which pixels depend."""


def draw_samples(
    requests: Sequence[SampleRequest],
    config: SamplingConfig,
    *,
    generator: Path,
    autoencoder: Path,
    work: Path,
    embed_text: EmbedText | None = None,
    on_progress: OnProgress | None = None,
) -> Pixels:
    """Draw the samples: uint8 (n, h, w, 3), in the order of the requests.

    Finished batches lie in `work` and are not drawn again; several processes may draw the same requests there at once.

    Raises:
        ValueError: see `draw_batches`.
    """
    paths = draw_batches(
        requests,
        config,
        generator=generator,
        autoencoder=autoencoder,
        work=work,
        embed_text=embed_text,
        on_progress=on_progress,
    )
    images: Pixels | None = None
    start = 0
    for path in paths:
        batch = np.load(path, allow_pickle=False)
        if images is None:
            images = np.empty((len(requests), *batch.shape[1:]), np.uint8)
        images[start : start + len(batch)] = batch
        start += len(batch)
    if images is None:
        raise ValueError("no samples are asked for")
    return images


def draw_batches(
    requests: Sequence[SampleRequest],
    config: SamplingConfig,
    *,
    generator: Path,
    autoencoder: Path,
    work: Path,
    embed_text: EmbedText | None = None,
    on_progress: OnProgress | None = None,
) -> list[Path]:
    """Draw the samples in batches and return the files of all of them, in order: npy, uint8 (n, h, w, 3).

    A file is named after what it holds (seeds, conditions, settings, weights): one of another request is never taken
    for it. Each batch is drawn by one process; a process that finds nothing free waits for what others are drawing,
    and draws it if they die.

    Args:
        requests: What to draw.
        config: How, in batches of `batch_size`.
        generator: Folder of the generator.
        autoencoder: Folder of its autoencoder.
        work: Folder of finished batches.
        embed_text: The text of each sample, for a generator that is told text.
        on_progress: Called as (samples done, samples in all).

    Raises:
        ValueError: the generator is not told what is asked for, or the batch does not fit the device.
    """
    check_requests(requests, GeneratorSpec.load(generator), has_text=embed_text is not None)
    # Batches are filled up, so one that is larger than all that is asked for would be work for nothing.
    enough = 1 << (len(requests) - 1).bit_length() if requests else 1
    config = config.model_copy(update={"batch_size": min(config.batch_size, enough)})
    drawer = Drawer(generator, autoencoder, config, embed_text)
    batches = [requests[start : start + config.batch_size] for start in range(0, len(requests), config.batch_size)]
    paths = [
        work / f"samples-{place * config.batch_size:08d}-{drawer.digest_of(batch)}.npy"
        for place, batch in enumerate(batches)
    ]
    done = 0
    taken: list[tuple[Path, Sequence[SampleRequest]]] = []
    for waits in (False, True):  # what is free, then what others were drawing
        for path, batch in [*zip(paths, batches, strict=True)] if not waits else taken:
            if not _obtain(path, batch, drawer, waits=waits):
                taken.append((path, batch))
                continue
            done += len(batch)
            if on_progress:
                on_progress(done, len(requests))
    return paths


def _obtain(path: Path, batch: Sequence[SampleRequest], drawer: Drawer, *, waits: bool) -> bool:
    """Have a batch drawn, by whomever; False if somebody is drawing it now and we do not wait."""
    if path.exists():
        return True
    lock = path.with_name(f".{path.stem}.lock")
    with lock.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        if not path.exists():  # else somebody finished it meanwhile
            images = drawer.draw(batch)
            with replacing(path) as aside, aside.open("wb") as file:
                np.save(file, images, allow_pickle=False)
        lock.unlink(missing_ok=True)  # after the file is there, so whoever locks anew finds it
    return True


def check_requests(requests: Sequence[SampleRequest], spec: GeneratorSpec, *, has_text: bool = False) -> None:
    """Refuse what the generator is not told or never saw, before any work.

    Each condition by itself: values that no training image shows together may be asked for (see `num_unseen`).

    Raises:
        ValueError: a condition, or a value of one, that it does not know or no training image has, with those it knows.
    """
    hears_text = getattr(spec.network, "has_text", False)
    told = {*spec.network.conditions, *([TEXT] if hears_text else [])}
    asked = {name for request in requests for name in request.conditions}
    asked |= {TEXT} if any(request.text is not None for request in requests) else set()
    if not asked <= told:
        raise ValueError(f"asked for {sorted(asked)}, but the generator is told {sorted(told)} only")
    for name in spec.network.conditions:
        for value in {request.told(name) for request in requests}:
            class_index(spec.classes, name, value)
            spec.check_seen(name, value)
    if hears_text and not has_text:
        raise ValueError("the generator is told text, and no text embeddings are given: pass embed_text")


class Drawer:
    """A generator and its autoencoder, loaded when there is something to draw."""

    def __init__(
        self, generator: Path, autoencoder: Path, config: SamplingConfig, embed_text: EmbedText | None = None
    ) -> None:
        self._generator, self._autoencoder = generator, autoencoder
        self._config, self._embed_text = config, embed_text
        self._device = pick_device()

    def digest_of(self, batch: Sequence[SampleRequest]) -> str:
        """What the pixels of a batch follow from, in 16 digits."""
        settings = self._config.model_dump(mode="json", include=set(_DRAWING))
        identity: list[Any] = [settings, self._device.type, self._weights]
        identity += [[request.seed, request.prompt] for request in batch]
        if self._embed_text is not None:
            identity += [_digest_of_tensor(part) for part in self._embed_text(batch)]
        return digest_of_json(identity)[:16]

    def draw(self, batch: Sequence[SampleRequest]) -> Pixels:
        """The samples of a batch: uint8 (n, h, w, 3).

        Raises:
            ValueError: it does not fit the device.
        """
        if self._device.type == "cpu":
            return self._draw_chunks(batch)
        try:
            return to_pixels(self._evaluate(_filled(batch, self._config.batch_size)))[: len(batch)]
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"{self._config.batch_size} samples at once do not fit the memory of {self._device}: "
                "choose a smaller batch_size"
            ) from error

    def _draw_chunks(self, batch: Sequence[SampleRequest]) -> Pixels:
        size = self._chunk_size
        chunks = [batch[start : start + size] for start in range(0, len(batch), size)]

        def draw(chunk: Sequence[SampleRequest]) -> Pixels:
            return to_pixels(self._evaluate(_filled(chunk, size)))[: len(chunk)]

        with self._single_threads() as pool:
            return np.concatenate(list(pool.map(draw, chunks)))

    @contextmanager
    def _single_threads(self) -> Iterator[ThreadPoolExecutor]:
        """As many threads as torch may use, in each of which it uses one (and none beside, if it compiles)."""
        num_threads = torch.get_num_threads()
        workers = 1 if self._config.compile else num_threads
        try:
            with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                yield pool
        finally:
            torch.set_num_threads(num_threads)

    @cached_property
    def _chunk_size(self) -> int:
        """`CPU_CHUNK` if this network treats all rows of a chunk alike on this machine, else 1."""
        with self._single_threads() as pool:
            images = pool.submit(self._evaluate, None).result()
        return CPU_CHUNK if all(torch.equal(images[0], image) for image in images) else 1

    @torch.no_grad()
    def _evaluate(self, batch: Sequence[SampleRequest] | None) -> Tensor:
        """Images (n, 3, h, w) of a batch of the full size, float32; None is one sample in every row, tried in brief."""
        config, (spec, network, decode) = self._config, self._networks
        seeds = [request.seed for request in batch] if batch else [0] * CPU_CHUNK
        conditions = network.null_conditions(len(seeds))
        if batch:
            conditions |= self._told(spec, batch)
        is_brief = batch is None and config.guidance_interval is None
        num_steps = min(config.num_steps, 2) if is_brief else config.num_steps
        denoise = guided(network, conditions, config.guidance, interval=config.guidance_interval)
        shape = (spec.network.channels, spec.network.latent_size, spec.network.latent_size)
        noise = noise_for(seeds, shape).to(self._device)
        with autocast(self._device, config.precision):
            latents = sample(denoise, spec.law, noise, num_steps, config.solver, seeds=seeds)
            return decode(spec.unwhiten(latents.float())).float()

    def _told(self, spec: GeneratorSpec, batch: Sequence[SampleRequest]) -> dict[str, Tensor]:
        told = {
            name: torch.tensor([class_index(spec.classes, name, one.told(name)) for one in batch], device=self._device)
            for name in spec.network.conditions
        }
        if self._embed_text is not None:
            text, mask = self._embed_text(batch)
            told |= {TEXT: text.to(self._device), TEXT_MASK: mask.to(self._device)}
        return told

    @cached_property
    def _networks(self) -> tuple[GeneratorSpec, Conditional, Callable[[Tensor], Tensor]]:
        spec, network = load_network(self._generator, self._device)
        decode: Callable[[Tensor], Tensor] = load_autoencoder(self._autoencoder, self._device).decode
        if self._config.compile:
            network.compile(dynamic=False)
            decode = torch.compile(decode, dynamic=False)
        return spec, network, decode

    @cached_property
    def _weights(self) -> list[list[str]]:
        """Name and digest of every file that the networks are made of."""
        return [
            [path.name, digest_of_file(path)]
            for folder in (self._generator, self._autoencoder)
            for path in sorted(folder.iterdir())
            if path.suffix in (".json", ".safetensors") and path.name != MANIFEST
        ]


def _digest_of_tensor(tensor: Tensor) -> str:
    """sha256 of a tensor's type, shape and values."""
    said = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return hashlib.sha256(said + tensor.contiguous().numpy().tobytes()).hexdigest()


def _filled(chunk: Sequence[SampleRequest], size: int) -> list[SampleRequest]:
    """The chunk, with its last sample again until it has the full size."""
    return [*chunk, *[chunk[-1]] * (size - len(chunk))]
