"""Which names mean the same image, lesion or patient: within one source, and across sources by what an archive named.

An archive's names mean the same everywhere; any other name means something only within its source.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

# ISIC 2019 calls a reduced image ISIC_0000091_downsampled and keeps the lesion_id of HAM10000 and of BCN20000.
# Fitzpatrick17k names an image by the md5 of its published bytes, and so does every selection of it.
# Programs and people change the case of names, and an image that is not known again leaks: case does not count.
_ARCHIVE = r"(?i)^(?P<name>(?:ISIC|HAM|BCN|MSK4|IL|IP)_[0-9]{4,}|[0-9a-f]{32})(?:_downsampled)?$"
_MD5_LENGTH = 32


def archive_names(ids: pa.Array | pa.ChunkedArray) -> pa.Array:
    """The name that a shared archive (ISIC, BCN20000 ...) gave, for each id (string) of an image, lesion or patient.

    Null for ids that no archive gave out, and for null. ISIC_0000091_downsampled and isic_0000091 are ISIC_0000091.
    """
    names = _whole(pc.struct_field(pc.extract_regex(ids, pattern=_ARCHIVE), "name"))
    is_md5 = pc.equal(pc.binary_length(names), _MD5_LENGTH)
    return pc.if_else(is_md5, pc.ascii_lower(names), pc.ascii_upper(names))


def shared_names(rows: pa.Table) -> Iterator[tuple[str, pa.Array]]:
    """What joins rows of `records`: (lesion, patient, digest or image, the name or null of every row).

    Two rows that have the same name are of the same lesion or patient, hold the same bytes, or are the same image of an
    archive. An empty id is none.
    """
    yield "lesion", _scoped(rows, "lesion_id")
    yield "patient", _scoped(rows, "patient_id")
    yield "digest", _whole(rows["sha256"])
    yield "image", archive_names(rows["image_id"])


def _scoped(rows: pa.Table, column: str) -> pa.Array:
    """An id made unique by its source, unless it is an archive's, which means the same everywhere."""
    ids = _whole(pc.if_else(pc.equal(rows[column], ""), None, rows[column]))
    within = pc.binary_join_element_wise(_whole(rows["source"]), ids, "/")
    return pc.coalesce(archive_names(ids), within)


def _whole(column: Any) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
