"""Moments on disk: float16 safetensors shards with an index by image digest, read where they lie.

A shard holds `moments` (n, orientations, 2 c, h, w), mean and log-variance. safetensors maps a shard into memory: its
bytes are read when they are used, are shared by all processes, and may be more than there is memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

if TYPE_CHECKING:
    import torch
    from torch import Tensor

INDEX = "index.parquet"
_CHUNK_BYTES = 64 * 2**20
"""Moments that are looked at together; eight times as many bytes in float64 with what is computed from them."""


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard lies."""
    return folder / f"moments-{number:05d}.safetensors"


class Moments:
    """The moments of many images, float16 (n, orientations, 2 c, h, w), read from their shards row by row.

    Indexed as a tensor of that shape is: `moments[rows]` or `moments[rows, orientations]`.
    """

    def __init__(self, shards: Sequence[Tensor], shard: npt.NDArray[np.int64], row: npt.NDArray[np.int64]) -> None:
        """Made by `open_moments`: image i is row `row[i]` of `shards[shard[i]]`."""
        import torch

        self.device = torch.device("cpu")
        self._shards, self._shard, self._row = shards, shard, row
        self._bytes = [tensor.numpy().view(np.uint8).reshape(-1).data for tensor in shards]

    @property
    def shape(self) -> torch.Size:
        import torch

        return torch.Size((len(self), *self._shards[0].shape[1:]))

    @property
    def num_bytes(self) -> int:
        return 2 * self.shape.numel()

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, key: Tensor | Sequence[int] | tuple[Tensor, Tensor]) -> Tensor:
        if isinstance(key, tuple):
            return self.gather(*key)
        rows, orientations = _integers(key), np.arange(self.shape[1])
        every = self.gather(np.repeat(rows, len(orientations)), np.tile(orientations, len(rows)))
        return every.unflatten(0, (len(rows), len(orientations)))

    def gather(
        self, rows: Tensor | Sequence[int] | npt.NDArray[np.int64], orientations: Tensor | Sequence[int] | npt.NDArray
    ) -> Tensor:
        """The moments (k, 2 c, h, w) of k images, each in the orientation named beside it, on `device`.

        The rows are copied once; where they go on to a GPU once more, into pinned memory, and without waiting for it.
        Give rows and orientations as they lie on the CPU: to fetch them from a GPU would wait.

        Raises:
            IndexError: a row or orientation that there is not.
        """
        import torch

        images, turned = _integers(rows), _integers(orientations)
        _check_range("row", images, len(self))
        _check_range("orientation", turned, self.shape[1])
        if not len(images):
            return torch.empty((0, *self.shape[2:]), dtype=torch.float16, device=self.device)
        size = 2 * self.shape[2:].numel()
        starts = (size * (self._row[images] * self.shape[1] + turned)).tolist()
        places = zip(self._shard[images].tolist(), starts, strict=True)
        # One call copies all rows: 16 KB each at 32 x 32 x 4, so that an assignment of each would cost a quarter more.
        joined = bytearray().join([self._bytes[shard][start : start + size] for shard, start in places])
        taken = torch.frombuffer(joined, dtype=torch.float16).view(-1, *self.shape[2:])
        on_gpu = self.device.type == "cuda"
        return taken.pin_memory().to(self.device, non_blocking=True) if on_gpu else taken

    def chunks(self, num_bytes: int = _CHUNK_BYTES) -> Iterator[Tensor]:
        """All rows in their order, as many at a time as `num_bytes` hold and at least one, on the CPU."""
        count = max(1, num_bytes * len(self) // max(1, self.num_bytes))
        host = self._on("cpu")
        for start in range(0, len(self), count):
            yield host[range(start, min(start + count, len(self)))]

    def to(self, device: torch.device | str) -> Tensor | Moments:
        """These moments for use on `device`: resident there when they fit in half of what is free, else gathered.

        On the CPU they stay as they are: the pages of the mapped shards are what is resident.
        """
        import torch

        target = torch.device(device)
        if target.type == "cuda" and self.num_bytes <= torch.cuda.mem_get_info(target)[0] // 2:
            return self.resident(target)
        return self._on(target)

    def resident(self, device: torch.device | str = "cpu") -> Tensor:
        """A tensor of all rows on `device`; on the CPU a view of the shard where there is only one."""
        import torch

        if torch.device(device).type == "cpu" and len(self._shards) == 1 and self._is_run(0, len(self)):
            return self._shards[0][self._row[0] : self._row[-1] + 1]
        whole = torch.empty(self.shape, dtype=torch.float16, device=device)
        starts = [0, *(np.flatnonzero(np.diff(self._shard)) + 1).tolist(), len(self)]
        for start, end in itertools.pairwise(starts):  # each stretch lies in one shard
            rows = self._row[start:end]
            shard = self._shards[self._shard[start]]
            whole[start:end] = shard[rows[0] : rows[-1] + 1] if self._is_run(start, end) else shard[rows]
        return whole

    def _is_run(self, start: int, end: int) -> bool:
        """Whether images start to end, of one shard, lie one after another in it."""
        return bool((np.diff(self._row[start:end]) == 1).all())

    def _on(self, device: torch.device | str) -> Moments:
        import torch

        same = Moments(self._shards, self._shard, self._row)
        same.device = torch.device(device)
        return same


def open_moments(folder: Path, *, rows: Sequence[int] | None = None) -> tuple[list[str], Moments]:
    """The image digests and the moments of a folder of shards, mapped into memory, nothing read yet.

    Args:
        folder: what `encode_images` wrote.
        rows: places in the index of the only images wanted, in the order wanted; all of them by default.

    Raises:
        ValueError: a shard is damaged, or not of the index.
    """
    index = pq.read_table(folder / INDEX)
    if rows is not None:
        index = index.take(np.asarray(rows, np.int64))
    shard, row = (index[name].to_numpy().astype(np.int64) for name in ("shard", "row"))
    numbers, place = np.unique(shard, return_inverse=True)
    if not len(numbers):
        raise ValueError(f"{folder} holds the moments of no image")
    shards = [_map_shard(shard_path(folder, int(number))) for number in numbers]
    for number, tensor, most in zip(numbers, shards, _last_rows(place, row, len(numbers)), strict=True):
        if tensor.shape[1:] != shards[0].shape[1:] or most >= len(tensor):
            raise ValueError(
                f"{shard_path(folder, int(number))} holds {tuple(tensor.shape)} and is not the shard that the index "
                "describes: remove the folder and make its latents again"
            )
    return index["sha256"].to_pylist(), Moments(shards, place.astype(np.int64), row)


def load_moments(
    folder: Path, *, device: torch.device | str = "cpu", rows: Sequence[int] | None = None
) -> tuple[list[str], Tensor]:
    """The image digests and all moments of a folder of shards: float16 (n, orientations, 2 c, h, w) on `device`.

    `open_moments(folder)[1].to(device)` does without the copy where they do not fit. See there for `rows`.
    """
    digests, moments = open_moments(folder, rows=rows)
    return digests, moments.resident(device)


def latent_statistics(moments: Tensor | Moments) -> dict[str, list[float]]:
    """Per-channel mean and standard deviation of the latents of these moments (n, o, 2 c, h, w), in float64.

    The variance of a latent is the variance of the means plus the mean of the variances. Chunk by chunk, so that the
    memory needed does not grow with n (Chan, Golub and LeVeque 1979).
    """
    import torch

    axes = (0, 1, 3, 4)
    channels = moments.shape[2] // 2
    count, centre, spread, noise = 0, *torch.zeros(3, channels, dtype=torch.float64)
    for chunk in _chunks(moments):
        mean, logvar = chunk.double().chunk(2, dim=2)
        size = mean.numel() // channels
        total, shift = count + size, mean.mean(axes).cpu() - centre
        share = size / total
        here = mean.var(axes, unbiased=False).cpu()
        spread = (1 - share) * spread + share * here + (1 - share) * share * shift.square()
        noise = (1 - share) * noise + share * logvar.exp().mean(axes).cpu()
        centre, count = centre + share * shift, total
    return {"mean": centre.tolist(), "std": (spread + noise).sqrt().tolist()}


def _chunks(moments: Tensor | Moments) -> Iterator[Tensor]:
    if isinstance(moments, Moments):
        yield from moments.chunks()
        return
    row_bytes = 2 * moments[0].numel()
    yield from moments.split(max(1, _CHUNK_BYTES // row_bytes))


def _map_shard(path: Path) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ValueError(f"{path} is missing: remove the folder and make its latents again")
    try:
        return load_file(path)["moments"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it and make the latents again") from error


def _last_rows(place: npt.NDArray[np.int64], row: npt.NDArray[np.int64], num_shards: int) -> list[int]:
    last = np.zeros(num_shards, np.int64)
    np.maximum.at(last, place, row)
    return last.tolist()


def _integers(values: Tensor | Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    import torch

    return np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values, dtype=np.int64).reshape(-1)


def _check_range(what: str, values: npt.NDArray[np.int64], count: int) -> None:
    if len(values) and not 0 <= values.min() <= values.max() < count:
        raise IndexError(f"{what}s {values.min()} to {values.max()} were asked for; there are 0 to {count - 1}")
