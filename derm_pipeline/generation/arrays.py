"""Samples as one file for others' programs: ADM's npz, and a contact sheet as the public DiT's sample.py draws one."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from derm_pipeline.images import Pixels, contact_sheet, encode_png
from derm_pipeline.store import replacing

NPZ_KEY = "arr_0"
"""The name under which ADM's evaluator looks for images."""

_WRITTEN_IN_1980 = (1980, 1, 1, 0, 0, 0)  # so that the same samples give the same bytes


def write_npz(path: Path, batches: Iterable[Pixels], num_samples: int) -> None:
    """Write samples as ADM's evaluator reads them: npz with `arr_0`, uint8 (n, h, w, 3), stored uncompressed.

    One batch is held in memory at a time.

    Args:
        path: The file; all of it or nothing.
        batches: uint8 (any, h, w, 3), `num_samples` rows in all.
        num_samples: n.

    Raises:
        ValueError: no samples, another number of them than said, or samples of several sizes.
    """
    written, size = 0, None
    with replacing(path) as aside, zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as archive:
        member = zipfile.ZipInfo(f"{NPZ_KEY}.npy", date_time=_WRITTEN_IN_1980)
        with archive.open(member, "w", force_zip64=True) as handle:
            for batch in batches:
                if size is None:
                    size = batch.shape[1:]
                    header = {"descr": "|u1", "fortran_order": False, "shape": (num_samples, *size)}
                    np.lib.format.write_array_header_1_0(handle, header)
                if batch.shape[1:] != size or batch.dtype != np.uint8:
                    raise ValueError(f"a batch is {batch.dtype} {batch.shape}, the first was uint8 (n, {size})")
                handle.write(np.ascontiguousarray(batch).data)
                written += len(batch)
        if size is None or written != num_samples:
            raise ValueError(f"{written} samples came of {num_samples} that were said; {path} is not written")


def write_grid(path: Path, images: Pixels, *, columns: int) -> None:
    """Write samples (n, h, w, 3) as one PNG, `columns` in a row."""
    with replacing(path) as aside:
        aside.write_bytes(encode_png(contact_sheet(images, columns=columns)))
