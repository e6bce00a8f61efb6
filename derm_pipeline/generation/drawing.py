"""Drawing samples by the thousand: batches kept as they are finished, shared among processes, the same in any order.

Sample i depends on its own seed, on what is told of it, and on the image that it begins from, if any. On the CPU that
holds to the last bit, whatever the batch size, the number of processes or threads, the order, and what else is asked
for. A matrix product's last bits depend on its shape and on the number of threads, so every network sees chunks of one
fixed size, filled up where samples end, each on a single thread, and the threads take chunks in turn. Kernels may also
treat the rows of one product unequally (fp32 with odd widths): `Drawer` tries that once and, where they do, evaluates
one sample at a time.
On a GPU samples are evaluated in batches of `batch_size`, filled up: the last bits may depend on batch size and device.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from derm_pipeline.generation.origins import ReadOrigin
from derm_pipeline.generation.plan import SampleRequest, Sampling, manner_of
from derm_pipeline.generation.told import EmbedText, Origins, ToldTexts, digest_of_origin
from derm_pipeline.images import Pixels
from derm_pipeline.latents import to_pixels
from derm_pipeline.models.conditions import TEXT
from derm_pipeline.models.diffusion import Conditional, guided, noise_for, sample
from derm_pipeline.models.generator import (
    AnyAutoencoder,
    GeneratorSpec,
    class_index,
    load_autoencoder,
    load_network,
)
from derm_pipeline.models.runtime import autocast, pick_device
from derm_pipeline.store import MANIFEST, digest_of_file, digest_of_json, replacing

OnProgress = Callable[[int, int], None]

CPU_CHUNK = 8
"""Samples that a network sees at once on the CPU. Part of what a sample is, as its seed: never a setting."""

_DRAWING = ("num_steps", "solver", "guidance", "guidance_interval", "precision", "compile", "spacing")
"""Settings on which pixels depend."""


class Batch(NamedTuple):
    """Samples that were drawn together."""

    path: Path
    """npy, uint8 (n, h, w, 3)."""
    places: tuple[int, ...]
    """Of each of them, its place among the requests."""


def draw_samples(
    requests: Sequence[SampleRequest],
    config: Sampling,
    *,
    generator: Path,
    autoencoder: Path,
    work: Path,
    embed_text: EmbedText | None = None,
    read_origin: ReadOrigin | None = None,
    on_progress: OnProgress | None = None,
) -> Pixels:
    """Draw the samples: uint8 (n, h, w, 3), in the order of the requests.

    Finished batches lie in `work` and are not drawn again; several processes may draw the same requests there at once.

    Raises:
        ValueError: see `draw_batches`.
    """
    batches = draw_batches(
        requests,
        config,
        generator=generator,
        autoencoder=autoencoder,
        work=work,
        embed_text=embed_text,
        read_origin=read_origin,
        on_progress=on_progress,
    )
    images: Pixels | None = None
    for path, places in batches:
        batch = np.load(path, allow_pickle=False)
        if images is None:
            images = np.empty((len(requests), *batch.shape[1:]), np.uint8)
        images[list(places)] = batch
    if images is None:
        raise ValueError("no samples are asked for")
    return images


def in_order(batches: Sequence[Batch]) -> Iterator[Pixels]:
    """The samples of all batches in the order of their requests, in blocks (n, h, w, 3); little of them in memory."""
    found = sorted((place, number, row) for number, one in enumerate(batches) for row, place in enumerate(one.places))
    for (number, _), block in groupby(found, key=lambda one: (one[1], one[2] - one[0])):
        rows = [row for _, _, row in block]
        yield np.load(batches[number].path, mmap_mode="r", allow_pickle=False)[rows[0] : rows[-1] + 1]


def draw_batches(
    requests: Sequence[SampleRequest],
    config: Sampling,
    *,
    generator: Path,
    autoencoder: Path,
    work: Path,
    embed_text: EmbedText | None = None,
    read_origin: ReadOrigin | None = None,
    on_progress: OnProgress | None = None,
) -> list[Batch]:
    """Draw the samples in batches, each of samples that are drawn alike, and return the files of all of them.

    A file is named after what it holds (seeds, prompts, settings, weights): one of another request is never taken for
    it. Each batch is drawn by one process; a process that finds nothing free waits for what others are drawing, and
    draws it if they die.

    Args:
        requests: What to draw.
        config: How, in batches of `batch_size`, where a request does not say so itself.
        generator: Folder of the generator.
        autoencoder: Folder of its autoencoder.
        work: Folder of finished batches.
        embed_text: The text encoder, for a generator that is told text.
        read_origin: The images that samples begin from, for requests that name one.
        on_progress: Called as (samples done, samples in all).

    Raises:
        ValueError: the generator is not told what is asked for, or the batch does not fit the device.
    """
    check_requests(
        requests, GeneratorSpec.load(generator), has_text=embed_text is not None, has_origins=read_origin is not None
    )
    # Batches are filled up, so one that is larger than all that is asked for would be work for nothing.
    enough = 1 << (len(requests) - 1).bit_length() if requests else 1
    config = config.model_copy(update={"batch_size": min(config.batch_size, enough)})
    drawer = Drawer(generator, autoencoder, config, embed_text, read_origin)
    batches = []
    for start, places in _alike(requests, config):
        digest = drawer.digest_of([requests[place] for place in places])
        batches.append(Batch(work / f"samples-{start:08d}-{digest}.npy", tuple(places)))
    done = 0
    taken: list[Batch] = []
    for waits in (False, True):  # what is free, then what others were drawing
        for one in batches if not waits else taken:
            if not _obtain(one.path, [requests[place] for place in one.places], drawer, waits=waits):
                taken.append(one)
                continue
            done += len(one.places)
            if on_progress:
                on_progress(done, len(requests))
    return batches


def _alike(requests: Sequence[SampleRequest], config: Sampling) -> Iterator[tuple[int, list[int]]]:
    """Places of requests that can be drawn together, at most `batch_size`, each with the samples before them."""
    groups: dict[Any, list[int]] = {}
    for place, request in enumerate(requests):
        groups.setdefault(manner_of(request, config), []).append(place)
    before = 0
    for places in groups.values():
        for start in range(0, len(places), config.batch_size):
            yield before + start, places[start : start + config.batch_size]
        before += len(places)


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


def check_requests(
    requests: Sequence[SampleRequest], spec: GeneratorSpec, *, has_text: bool = False, has_origins: bool = False
) -> None:
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
        raise ValueError("the generator is told text, and no text encoder is given: pass embed_text")
    if any(request.origin for request in requests) and not has_origins:
        raise ValueError("samples begin from images, and nothing reads them: pass read_origin")
    _check_sizes(requests, getattr(spec.network, "downsampling", None))


def _check_sizes(requests: Sequence[SampleRequest], downsampling: int | None) -> None:
    sizes = {request.prompting.size_px if request.prompting else None for request in requests}
    if len(sizes) > 1:
        raise ValueError(f"samples of several sizes ({sizes}) cannot lie in one array: draw them apart")
    for size in sizes - {None}:
        if downsampling is None:
            raise ValueError(f"the generator draws images of one size only: leave out the size {size}")
        if any(side % downsampling for side in size or ()):
            raise ValueError(f"an image of {size} px does not divide into latent cells of {downsampling} px")
        if any(request.origin for request in requests):
            raise ValueError(f"samples that begin from images have their size: leave out the size {size}")


_ANY = SampleRequest(0, 0, None, None)


class _Networks(NamedTuple):
    spec: GeneratorSpec
    network: Conditional
    autoencoder: AnyAutoencoder
    decode: Callable[[Tensor], Tensor]


class Drawer:
    """A generator and its autoencoder, loaded when there is something to draw."""

    def __init__(
        self,
        generator: Path,
        autoencoder: Path,
        config: Sampling,
        embed_text: EmbedText | None = None,
        read_origin: ReadOrigin | None = None,
    ) -> None:
        self._generator, self._autoencoder = generator, autoencoder
        self._config, self._read_origin = config, read_origin
        self._device = pick_device()
        self._texts = None if embed_text is None else ToldTexts(embed_text, alone=self._device.type == "cpu")

    def digest_of(self, batch: Sequence[SampleRequest]) -> str:
        """What the pixels of a batch follow from, in 16 digits."""
        settings = self._config.model_dump(mode="json", include=set(_DRAWING))
        identity: list[Any] = [settings, self._device.type, self._weights]
        identity += [request.identity for request in batch]
        text = next((request.text for request in batch if request.text is not None), None)
        if self._texts is not None and text is not None:
            with self._single_threads() as pool:
                identity.append(pool.submit(self._texts.digest_of, text).result())
        if self._read_origin is not None:
            origins = dict.fromkeys(request.origin.sha256 for request in batch if request.origin)
            identity += [digest_of_origin(self._read_origin, sha256) for sha256 in origins]
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
        config, (spec, network, autoencoder, decode) = self._config, self._networks
        seeds = [request.seed for request in batch] if batch else [0] * CPU_CHUNK
        manner = manner_of((batch or [_ANY])[0], config)
        is_brief = batch is None and config.guidance_interval is None
        num_steps = min(config.num_steps, 2) if is_brief else manner.num_steps
        sides = [spec.network.latent_size] * 2
        if manner.size_px is not None:
            sides = [side // autoencoder.config.downsampling for side in reversed(manner.size_px)]
        noise = noise_for(seeds, (spec.network.channels, *sides)).to(self._device)
        by_time = getattr(config, "spacing", "angle") == "time" and spec.law.kind == "ddpm"
        conditions, null = self._told(spec, network, batch, len(seeds))
        denoise = guided(network, conditions, manner.guidance, interval=config.guidance_interval, null=null)
        start = None
        with autocast(self._device, config.precision):
            if batch and self._origins is not None and manner.strength is not None:
                start = self._origins.start([one.origin.sha256 for one in batch if one.origin], manner)
            latents = sample(
                denoise,
                spec.law,
                noise,
                num_steps,
                config.solver,
                seeds=seeds,
                spacing=str(num_steps) if by_time else None,
                start=start,
            )
            return decode(spec.unwhiten(latents.float())).float()

    def _told(
        self, spec: GeneratorSpec, network: Conditional, batch: Sequence[SampleRequest] | None, num: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What is told of a batch, and what guidance goes away from where that is not the network's own null."""
        told: dict[str, Tensor] = network.null_conditions(num)
        null: dict[str, Tensor] = {}
        if not batch:
            return told, null
        if self._texts is not None:
            null = self._texts.rows([one.negative_prompt for one in batch], told)
            told |= self._texts.rows([one.text for one in batch], told)
        for name in spec.network.conditions:
            indices = [class_index(spec.classes, name, one.told(name)) for one in batch]
            told[name] = torch.tensor(indices, device=self._device)
        return told, null

    @cached_property
    def _origins(self) -> Origins | None:
        if self._read_origin is None:
            return None
        return Origins(self._read_origin, self._networks.autoencoder, self._networks.spec, self._device)

    @cached_property
    def _networks(self) -> _Networks:
        spec, network = load_network(self._generator, self._device)
        autoencoder = load_autoencoder(self._autoencoder, self._device)
        decode: Callable[[Tensor], Tensor] = autoencoder.decode
        if self._config.compile:
            network.compile(dynamic=False)
            decode = torch.compile(decode, dynamic=False)
        return _Networks(spec, network, autoencoder, decode)

    @cached_property
    def _weights(self) -> list[list[str]]:
        """Name and digest of every file that the networks are made of."""
        return [
            [path.relative_to(folder).as_posix(), digest_of_file(path)]
            for folder in (self._generator, self._autoencoder)
            for path in sorted(folder.rglob("*"))
            if path.suffix in (".json", ".safetensors") and path.name != MANIFEST
        ]


def _filled(chunk: Sequence[SampleRequest], size: int) -> list[SampleRequest]:
    """The chunk, with its last sample again until it has the full size."""
    return [*chunk, *[chunk[-1]] * (size - len(chunk))]
