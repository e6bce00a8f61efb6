"""How long ingestion takes and how much memory: HAM10000, the same again after adding images, and many drawn images.

Prints one JSON object. Each figure is taken in a process of its own, so that its peak memory is its own. The drawn
images (`--drawn N`, 96 x 72, flat shapes written with OpenCV) lie in a temporary folder; beside the scan stands the
naive loop over the same files: open with Pillow, load, digest, one after another, everything kept in a list.

    python benchmarks/ingestion.py [--raw FOLDER_OF_HAM10000] [--drawn 100000] [--added 100]
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import multiprocessing
import os
import platform
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from derm_pipeline.duplicates import near_duplicates
from derm_pipeline.records import Diagnosis
from derm_pipeline.sources.base import OnProgress, num_cores, scan
from derm_pipeline.sources.ham10000 import Ham10000
from derm_pipeline.sources.listing import Candidate, Listing

_STATISTICS, _RECORDS = "statistics.parquet", "records.parquet"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, help="HAM10000 as published; it is copied before images are added")
    parser.add_argument("--drawn", type=int, default=100_000, help="number of drawn images, 0 for none")
    parser.add_argument("--added", type=int, default=100, help="images added to HAM10000 before the second run")
    parser.add_argument("--temporary", type=Path, help="where drawn and copied files lie meanwhile")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    report: dict[str, object] = {**_machine(), "workers": num_cores()}
    with tempfile.TemporaryDirectory(dir=options.temporary) as temporary:
        folder = Path(temporary)
        report["start"] = _alone(_idle)
        if options.raw is not None:
            report["ham10000"] = _ham10000(options.raw, folder / "ham10000", options.added)
        if options.drawn:
            report["drawn"] = _drawn(folder / "drawn", options.drawn)
    print(json.dumps(report, indent=2))


def _machine() -> dict[str, object]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "python": platform.python_version(),
        "cv2": cv2.__version__,
        "cpu": platform.processor(),
        "load_average_before": [round(load, 2) for load in os.getloadavg()],
        "commit": commit,
    }


def _ham10000(raw: Path, folder: Path, num_added: int) -> dict[str, object]:
    """The published files; then a copy with `num_added` images more, whose bytes are new."""
    first = _alone(_scan_ham10000, raw, folder.parent, None)
    for images in raw.glob("HAM10000_images*"):
        shutil.copytree(images, folder / images.name)
    (table,) = raw.glob("HAM10000_metadata*")
    shutil.copy(table, folder)
    _add(folder, folder / table.name, num_added)
    second = _alone(_scan_ham10000, folder, folder.parent, folder.parent / _STATISTICS)
    return {"first": first, "added": num_added, "second": second}


def _add(folder: Path, table: Path, num_added: int) -> None:
    """Copies of the first images under new names; a byte after the end of the JPEG makes another digest."""
    with table.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))[:num_added]
    files = {path.stem: path for path in folder.rglob("*.jpg")}
    with table.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        for number, cells in enumerate(rows):
            source = files[cells["image_id"]]
            added = source.with_stem(f"ADDED_{number:07d}")
            added.write_bytes(source.read_bytes() + b"\0")
            writer.writerow({**cells, "image_id": added.stem})


def _scan_ham10000(raw: Path, kept: Path, previous: Path | None) -> dict[str, object]:
    found = scan(Ham10000(), raw, None if previous is None else pq.read_table(previous))
    pq.write_table(found.statistics, kept / _STATISTICS)
    return _counts(found.records.num_rows, found.num_processed, found.num_reused, found.quarantined.num_rows)


def _drawn(folder: Path, num_images: int) -> dict[str, object]:
    start = time.perf_counter()
    _alone(_draw, folder, num_images)
    report: dict[str, object] = {"n": num_images, "drawing_s": round(time.perf_counter() - start, 1)}
    report["naive"] = _alone(_naive, folder)
    report["first"] = _alone(_scan_drawn, folder, None)
    report["second"] = _alone(_scan_drawn, folder, folder.parent / _STATISTICS)
    report["near_duplicates"] = _alone(_compare, folder.parent / _STATISTICS)
    return report


class _Drawn:
    """The drawn folder as a source."""

    name = "drawn"
    title = "Drawn shapes"
    licence = "Apache-2.0"
    citation = ""
    homepage = ""
    diagnoses: Mapping[str, Diagnosis | None] = {"nv": Diagnosis.NV}

    def prepare(self, folder: Path, on_progress: OnProgress | None = None) -> None:
        """Nothing to do."""

    def list_images(self, folder: Path) -> Listing:
        with (folder / "metadata.csv").open(newline="") as file:
            return Listing(tuple(_candidate(cells["image_id"]) for cells in csv.DictReader(file)), ())

    def fingerprint(self, folder: Path) -> str:
        return ""


def _candidate(image_id: str) -> Candidate:
    return Candidate(image_id=image_id, file=f"images/{image_id}.jpg", source_label="nv", diagnosis=Diagnosis.NV)


def _draw(folder: Path, num_images: int) -> dict[str, object]:
    (folder / "images").mkdir(parents=True)
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_id"])
        writer.writerows([f"IMAGE_{number:07d}"] for number in range(num_images))
    with ThreadPoolExecutor(num_cores()) as executor:
        chunks = (range(start, min(start + 500, num_images)) for start in range(0, num_images, 500))
        for _ in executor.map(lambda numbers: [_draw_one(folder, number) for number in numbers], chunks):
            pass
    return {"n": num_images}


def _draw_one(folder: Path, number: int) -> None:
    """A few ellipses in skin's colours."""
    rng = np.random.default_rng([number])
    image = np.empty((72, 96, 3), np.uint8)
    image[:] = rng.integers(90, 230, 3)
    for _ in range(6):
        place, axes = rng.integers(0, 96, 2), rng.integers(4, 30, 2)
        colour = [int(value) for value in rng.integers(0, 256, 3)]
        angle = float(rng.uniform(0, 180))
        cv2.ellipse(image, [int(value) for value in place], [int(value) for value in axes], angle, 0, 360, colour, -1)
    cv2.imwrite(str(folder / "images" / f"IMAGE_{number:07d}.jpg"), image)


def _scan_drawn(folder: Path, previous: Path | None) -> dict[str, object]:
    found = scan(_Drawn(), folder, None if previous is None else pq.read_table(previous))
    pq.write_table(found.statistics, folder.parent / _STATISTICS)
    pq.write_table(found.records, folder.parent / _RECORDS)
    return _counts(found.records.num_rows, found.num_processed, found.num_reused, found.quarantined.num_rows)


def _naive(folder: Path) -> dict[str, object]:
    images = []
    for path in sorted((folder / "images").iterdir()):
        with Image.open(path) as image:
            image.load()
            images.append((path, hashlib.sha256(path.read_bytes()).hexdigest(), image))
    return {"n": len(images)}


def _compare(statistics: Path) -> dict[str, object]:
    table = pq.read_table(statistics)
    found = near_duplicates(table)
    return {"n": table.num_rows, "num_pairs": found.num_pairs, "num_rows": found.pairs.num_rows}


def _idle() -> dict[str, object]:
    """What a process with everything imported needs."""
    return {}


def _counts(num_records: int, num_processed: int, num_reused: int, num_quarantined: int) -> dict[str, object]:
    return {"n": num_records, "processed": num_processed, "reused": num_reused, "quarantined": num_quarantined}


def _alone(work: Callable[..., dict[str, object]], *arguments: object) -> dict[str, object]:
    """Run the work in a fresh process; its answer with wall and CPU seconds and peak memory, children included."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(sender, work, arguments))
    process.start()
    sender.close()
    try:
        answer: dict[str, object] = receiver.recv()
    except EOFError:
        raise RuntimeError(f"{work.__name__} ended without an answer; its error stands above") from None
    finally:
        process.join()
    return answer


def _measured(sender, work: Callable[..., dict[str, object]], arguments: tuple[object, ...]) -> None:  # noqa: ANN001
    cv2.setNumThreads(1)
    before, start = _cpu_s(), time.perf_counter()
    answer = work(*arguments)
    wall_s = time.perf_counter() - start
    kibi = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    answer |= {"wall_s": round(wall_s, 2), "cpu_s": round(_cpu_s() - before, 2), "peak_mib": round(kibi / 1024)}
    num_images = answer.get("n")
    if isinstance(num_images, int):
        answer["images_per_s"] = round(num_images / wall_s)
    sender.send(answer)


def _cpu_s() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in usage)


if __name__ == "__main__":
    main()
