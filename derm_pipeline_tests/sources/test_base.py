"""The scan: bounded, in order, whatever the number of workers; what is known is not decoded again."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from derm_pipeline.images import encode_jpeg
from derm_pipeline.records import RECORD_SCHEMA, Diagnosis, Modality
from derm_pipeline.sources import base, scan
from derm_pipeline.sources.listing import Candidate, Listing
from derm_pipeline.sources.statistics import STATISTICS_SCHEMA


@dataclass
class Plain:
    """Every file of a folder is an image with no more known of it."""

    name: str = "plain"
    title: str = "Plain"
    licence: str = ""
    citation: str = ""
    homepage: str = ""
    modality: Modality = Modality.DERMOSCOPIC
    diagnoses: Mapping[str, Diagnosis | None] = field(default_factory=dict)

    def prepare(self, folder: Path, on_progress=None) -> None:
        pass

    def fingerprint(self, folder: Path) -> str:
        return ""

    def list_images(self, folder: Path) -> Listing:
        names = [path.name for path in folder.iterdir()]
        np.random.default_rng().shuffle(names)
        return Listing(tuple(self._candidate(name) for name in names), ())

    def _candidate(self, name: str) -> Candidate:
        image_id = name.partition(".")[0]
        return Candidate(image_id=image_id, file=name, source_label="", diagnosis=None, modality=self.modality)


def jpeg(height: int = 9, width: int = 12) -> bytes:
    return encode_jpeg(np.random.default_rng().integers(60, 256, (height, width, 3), dtype=np.uint8))


def fill(folder: Path, count: int, start: int = 0) -> None:
    for number in range(start, start + count):
        (folder / f"IMAGE_{number:05d}.jpg").write_bytes(jpeg())


def test_every_record_has_its_statistics_in_the_same_order(tmp_path):
    fill(tmp_path, 150)
    (tmp_path / "IMAGE_00070.jpg").write_bytes(b"broken")
    found = scan(Plain(), tmp_path)
    assert found.records.schema == RECORD_SCHEMA
    assert found.statistics.schema == STATISTICS_SCHEMA
    for name in ("source", "image_id", "sha256", "width_px", "height_px"):
        assert found.statistics[name].equals(found.records[name])
    assert found.records["image_id"].to_pylist() == [f"IMAGE_{n:05d}" for n in range(150) if n != 70]
    assert found.quarantined["image_id"].to_pylist() == ["IMAGE_00070"]
    assert (found.num_processed, found.num_reused) == (150, 0)


def test_neither_workers_nor_earlier_scans_nor_the_listings_order_change_the_tables(tmp_path):
    fill(tmp_path, 140)
    one = scan(Plain(), tmp_path, num_workers=1)
    part = tmp_path.parent / f"{tmp_path.name}_part"
    part.mkdir()
    for path in list(tmp_path.iterdir())[::2]:
        (part / path.name).write_bytes(path.read_bytes())
    others = [
        scan(Plain(), tmp_path, num_workers=5),
        scan(Plain(), tmp_path, one.statistics),
        scan(Plain(), tmp_path, scan(Plain(), part).statistics),
    ]
    assert [other.num_processed for other in others] == [140, 0, 70]
    for other in others:
        assert other.records.equals(one.records)
        assert other.statistics.equals(one.statistics)


def test_a_second_scan_after_adding_images_processes_those_and_the_changed_ones(tmp_path):
    fill(tmp_path, 100)
    first = scan(Plain(), tmp_path)
    fill(tmp_path, 7, start=100)
    (tmp_path / "IMAGE_00003.jpg").write_bytes(jpeg())
    (tmp_path / "IMAGE_00004.jpg").unlink()
    (tmp_path / "IMAGE_00005.jpg").rename(tmp_path / "RENAMED.jpg")
    second = scan(Plain(), tmp_path, first.statistics)
    assert (second.num_processed, second.num_reused) == (8, 98)
    assert second.statistics.equals(scan(Plain(), tmp_path).statistics)


def test_a_broken_file_is_tried_again_each_time(tmp_path):
    fill(tmp_path, 3)
    (tmp_path / "IMAGE_00001.jpg").write_bytes(jpeg()[:-90])
    first = scan(Plain(), tmp_path)
    again = scan(Plain(), tmp_path, first.statistics)
    assert (again.num_processed, again.num_reused) == (1, 2)
    assert again.quarantined.equals(first.quarantined)
    assert "truncated" in again.quarantined["reason"][0].as_py()


def test_the_first_of_the_same_bytes_is_named_by_all_others_however_far_apart(tmp_path):
    fill(tmp_path, 300)
    content = (tmp_path / "IMAGE_00002.jpg").read_bytes()
    for number in (66, 150, 299):
        (tmp_path / f"IMAGE_{number:05d}.jpg").write_bytes(content)
    duplicates = scan(Plain(), tmp_path).records["duplicate_of"].to_pylist()
    assert {n: first for n, first in enumerate(duplicates) if first} == dict.fromkeys((66, 150, 299), "IMAGE_00002")


def test_an_estimated_skin_type_is_no_label_and_endoscopic_images_have_none(tmp_path):
    fill(tmp_path, 5)
    seen = scan(Plain(), tmp_path)
    assert None not in seen.statistics["estimated_skin_type"].to_pylist()
    assert set(seen.records["skin_type"].to_pylist()) == {None}
    inside = scan(Plain(modality=Modality.ENDOSCOPIC), tmp_path, seen.statistics)
    assert set(inside.statistics["estimated_skin_type"].to_pylist()) == {None}


def test_a_previous_table_of_another_kind_is_refused(tmp_path):
    fill(tmp_path, 2)
    with pytest.raises(ValueError, match="must be the statistics of an earlier scan"):
        scan(Plain(), tmp_path, scan(Plain(), tmp_path).records)


def test_memory_does_not_grow_with_the_images(tmp_path):
    content = jpeg(500, 500)
    for number in range(240):
        (tmp_path / f"{number}.jpg").write_bytes(content)
    tracemalloc.start()
    try:
        found = scan(Plain(), tmp_path, num_workers=2)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.records.num_rows == 240
    decoded_in_all = 240 * 500 * 500 * 3
    assert peak < decoded_in_all / 4


def test_the_workers_are_never_far_ahead():
    taken, begun, lock = 0, 0, threading.Lock()
    furthest = 0

    def look(chunk):
        nonlocal begun, furthest
        with lock:
            begun += 1
            furthest = max(furthest, begun - taken)
        return chunk

    for number, chunk in enumerate(base._in_order(look, iter(range(500)), 3)):
        assert chunk == number
        with lock:
            taken += 1
    assert taken == begun == 500
    assert furthest <= base._AHEAD * 3 + 2


def test_an_error_in_a_worker_reaches_the_caller():
    def look(chunk):
        if chunk == 20:
            raise MemoryError
        return chunk

    with pytest.raises(MemoryError):
        list(base._in_order(look, iter(range(100)), 2))


def test_progress_ends_with_all_files(tmp_path):
    fill(tmp_path, 130)
    done = []
    scan(Plain(), tmp_path, on_progress=lambda *progress: done.append(progress))
    assert done == [(64, 130), (128, 130), (130, 130)]


def test_the_tables_are_one_chunk_each(tmp_path):
    fill(tmp_path, 130)
    found = scan(Plain(), tmp_path)
    assert {column.num_chunks for table in (found.records, found.statistics) for column in table.columns} == {1}
    assert isinstance(found.records, pa.Table)
