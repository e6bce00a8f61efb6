"""Embeddings of texts on disk: every distinct text once, in float16 safetensors shards with an index by its sha256.

What an embedding is made of is its encoder's matter: any tensors by name, a row a text (tokens and their mask, pooled
features, those of two encoders). Training then gathers rows and runs no encoder. Shards are mapped into memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from derm_pipeline.store import replacing, write_table

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TEXT_INDEX = "index.parquet"
EMPTY = ""
"""The text of nothing, which is always there: guidance of many generators goes by it."""

_LARGEST = 65504.0
"""The largest finite float16."""
_ENCODER = b"encoder"

Embed = Callable[[list[str]], Mapping[str, "Tensor"]]
"""Texts -> tensors by name, each with a row a text, on any device."""


def text_digest(text: str) -> str:
    """What a text is found by: sha256 of its UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


class Embeddings:
    """The embeddings of many texts, read from their shards row by row."""

    def __init__(
        self,
        shards: Sequence[Mapping[str, Tensor]],
        shard: npt.NDArray[np.int64],
        row: npt.NDArray[np.int64],
        digests: Sequence[str],
        encoder: Any,
    ) -> None:
        """Made by `open_embeddings`: text i is row `row[i]` of `shards[shard[i]]`."""
        self._shards, self._shard, self._row = shards, shard, row
        self._place = {digest: place for place, digest in enumerate(digests)}
        self.encoder = encoder
        """The identity of the encoder that made them."""

    def __len__(self) -> int:
        return len(self._row)

    def __contains__(self, text: str) -> bool:
        return text_digest(text) in self._place

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By name, the shape of one text's tensor."""
        return {name: tuple(tensor.shape[1:]) for name, tensor in self._shards[0].items()}

    @property
    def num_bytes(self) -> int:
        return len(self) * sum(tensor[0].nbytes for tensor in self._shards[0].values())

    def rows_of(self, texts: Iterable[str]) -> npt.NDArray[np.int64]:
        """The row of each text, for `gather`.

        Raises:
            ValueError: a text that has no embedding here.
        """
        rows = []
        for text in texts:
            place = self._place.get(text_digest(text))
            if place is None:
                raise ValueError(f"the text {text[:80]!r} has no embedding here: materialise `latents` again")
            rows.append(place)
        return np.asarray(rows, np.int64)

    def gather(self, rows: npt.NDArray[np.int64] | Tensor | Sequence[int]) -> dict[str, Tensor]:
        """The tensors of k texts by name, each (k, ...), on the CPU.

        Raises:
            IndexError: a row that there is not.
        """
        import torch

        wanted = np.asarray(rows, dtype=np.int64).reshape(-1)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"rows {wanted.min()} to {wanted.max()} were asked for; there are 0 to {len(self) - 1}")
        places = list(zip(self._shard[wanted].tolist(), self._row[wanted].tolist(), strict=True))
        found = {}
        for name, like in self._shards[0].items():
            taken = torch.empty((len(wanted), *like.shape[1:]), dtype=like.dtype)
            out = taken.numpy()
            arrays = [shard[name].numpy() for shard in self._shards]
            for place, (shard, row) in enumerate(places):
                out[place] = arrays[shard][row]
            found[name] = taken
        return found

    def resident(self, device: torch.device | str) -> dict[str, Tensor] | None:
        """All rows by name on a GPU, where they fit in half of what is free there; else None: gather them.

        On the CPU, None too: the pages of the mapped shards are what is resident.
        """
        import torch

        target = torch.device(device)
        if target.type != "cuda" or self.num_bytes > torch.cuda.mem_get_info(target)[0] // 2:
            return None
        return {name: tensor.to(target) for name, tensor in self.gather(np.arange(len(self))).items()}


def write_embeddings(
    out: Path,
    texts: Iterable[str],
    embed: Embed,
    *,
    encoder: Any,
    previous: Path | None = None,
    shard_size: int = 256,
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write the embeddings of every distinct text, and of the empty one, and return how many were reused.

    Shards already in `out` (of an interrupted run) are kept. Floats become float16; other tensors stay as they are.

    Args:
        out: folder to write to.
        texts: in any number; the index keeps the order in which they first come, after the empty one.
        embed: called with at most `shard_size` texts at a time.
        encoder: identity of what embeds, as JSON: embeddings of another are never taken over.
        previous: folder of an earlier artifact to reuse rows of, if its encoder is this one.
        shard_size: texts in one shard, at most; also what an interruption can lose.
        on_progress: called with (texts done, texts in all).

    Raises:
        ValueError: an embedding that is not finite or too large for float16 (its text is named), tensors of other
            names, shapes or numbers of rows than the first's, or a shard in `out` of other texts.
    """
    out.mkdir(parents=True, exist_ok=True)
    distinct = list(dict.fromkeys([EMPTY, *texts]))
    old = _earlier(previous, encoder)
    first: Mapping[str, Tensor] | None = None
    for number, start in enumerate(range(0, len(distinct), shard_size)):
        chunk = distinct[start : start + shard_size]
        path, plan = _shard_path(out, number), _plan(chunk, encoder)
        if not path.exists():
            tensors = _embedded(chunk, embed, old)
            _check_alike(tensors, first, len(chunk))
            _save(path, tensors, plan)
        shard = _map_shard(path, plan)
        first = first or shard
        if on_progress:
            on_progress(start + len(chunk), len(distinct))
    index = pa.table(
        {
            "sha256": pa.array([text_digest(text) for text in distinct], pa.string()),
            "shard": pa.array([place // shard_size for place in range(len(distinct))], pa.int64()),
            "row": pa.array([place % shard_size for place in range(len(distinct))], pa.int64()),
        }
    )
    write_table(out / TEXT_INDEX, index.replace_schema_metadata({_ENCODER: _written(encoder)}))
    return sum(text in old for text in distinct) if old is not None else 0


def open_embeddings(folder: Path) -> Embeddings:
    """The embeddings that `write_embeddings` wrote, mapped into memory, nothing read yet.

    Raises:
        ValueError: a shard is missing, damaged, or not of the index.
    """
    index = pq.read_table(folder / TEXT_INDEX)
    shard, row = (index[name].to_numpy().astype(np.int64) for name in ("shard", "row"))
    if not len(shard):
        raise ValueError(f"{folder / TEXT_INDEX} names no text: remove {folder} and make it again")
    shards = [_map_shard(_shard_path(folder, number)) for number in range(int(shard.max()) + 1)]
    for number, tensors in enumerate(shards):
        _check_alike(tensors, shards[0], int(row[shard == number].max(initial=-1)) + 1)
    encoder = json.loads((index.schema.metadata or {}).get(_ENCODER, b"null"))
    return Embeddings(shards, shard, row, index["sha256"].to_pylist(), encoder)


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"texts-{number:05d}.safetensors"


def _written(encoder: Any) -> bytes:
    return json.dumps(encoder, sort_keys=True).encode()


def _plan(texts: Sequence[str], encoder: Any) -> str:
    """Digest of the texts and their encoder, kept in a shard: those of others are not taken."""
    return hashlib.sha256("\n".join([_written(encoder).decode(), *map(text_digest, texts)]).encode()).hexdigest()


def _earlier(folder: Path | None, encoder: Any) -> Embeddings | None:
    if folder is None or not (folder / TEXT_INDEX).is_file():
        return None
    old = open_embeddings(folder)
    return old if _written(old.encoder) == _written(encoder) else None


def _embedded(texts: Sequence[str], embed: Embed, old: Embeddings | None) -> dict[str, Tensor]:
    """Tensors (n, ...) of texts: taken over where an earlier artifact has them."""
    import torch

    fresh = [place for place, text in enumerate(texts) if old is None or text not in old]
    kept = [place for place in range(len(texts)) if place not in set(fresh)]
    parts: list[Mapping[str, Tensor]] = []
    if old is not None and kept:
        parts.append(old.gather(old.rows_of(texts[place] for place in kept)))
    if fresh:
        wanted = [texts[place] for place in fresh]
        parts.append(_halved(embed(wanted), wanted))
    if len(parts) == 2:
        _check_alike(parts[1], parts[0], len(fresh))
    order = torch.tensor(np.argsort(kept + fresh))
    return {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}


def _halved(tensors: Mapping[str, Tensor], texts: Sequence[str]) -> dict[str, Tensor]:
    """As they are stored, on the CPU."""
    found = {}
    for name, tensor in tensors.items():
        if len(tensor) != len(texts):
            raise ValueError(f"the encoder gave {len(tensor)} rows of {name!r} for {len(texts)} texts")
        if not tensor.is_floating_point():
            found[name] = tensor.cpu()
            continue
        largest = tensor.flatten(1).abs().amax(1).float().cpu()  # NaN where a value is NaN
        for text, value in zip(texts, largest.tolist(), strict=True):
            if not value <= _LARGEST:
                raise ValueError(
                    f"the largest value of {name!r} of the text {text[:80]!r} is {value:g}, which float16 cannot hold; "
                    "encode in float32 or bfloat16"
                )
        found[name] = tensor.half().cpu()
    return found


def _check_alike(tensors: Mapping[str, Tensor], first: Mapping[str, Tensor] | None, num_rows: int) -> None:
    """See that a shard has so many rows, of the same names and shapes as the first."""
    described = {name: (tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in tensors.items()}
    expected = {name: (tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in (first or tensors).items()}
    if described != expected or not described or any(len(tensor) < num_rows for tensor in tensors.values()):
        raise ValueError(
            f"embeddings are {described} of {num_rows} texts, and the first were {expected}: they are not of one "
            "encoder; remove them and make them again"
        )


def _save(path: Path, tensors: Mapping[str, Tensor], plan: str) -> None:
    from safetensors.torch import save_file

    with replacing(path) as aside:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside, metadata={"plan": plan})


def _map_shard(path: Path, plan: str | None = None) -> dict[str, Tensor]:
    """The tensors of a shard; of the texts that a plan says, where one is given."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    if not path.is_file():
        raise ValueError(f"{path} is missing: remove its folder and make the embeddings again")
    try:
        with safe_open(path, framework="pt") as handle:
            found = (handle.metadata() or {}).get("plan")
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it and run again") from error
    if plan is not None and found != plan:
        raise ValueError(f"{path} holds embeddings of other texts or of another encoder: remove it and run again")
    return tensors
