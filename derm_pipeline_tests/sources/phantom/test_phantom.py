"""The phantom source's folder: drawn once, whole, and the same however often it was interrupted."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import cv2
import pytest

from derm_pipeline.images import read_image
from derm_pipeline.records import SkinTypeOrigin
from derm_pipeline.sources import SOURCES, phantom, scan
from derm_pipeline.sources.phantom import HAIR_MASKS, IMAGES, LESION_MASKS, SETTINGS, TABLE, PhantomSource
from derm_pipeline.sources.phantom.drawing import PhantomConfig, draw, plan

CONFIG = PhantomConfig(num_images=80, width_px=40, height_px=32, p_hair=0.5)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("raw") / "phantom"
    PhantomSource(CONFIG).prepare(folder)
    return folder


def test_every_case_becomes_a_record_that_tells_the_truth(drawn):
    found = scan(PhantomSource(CONFIG), drawn)
    assert found.quarantined.num_rows == 0
    records = {record["image_id"]: record for record in found.records.to_pylist()}
    cases = plan(CONFIG)
    assert records.keys() == {case.image_id for case in cases}
    for case in cases:
        record = records[case.image_id]
        for name in ("lesion_id", "patient_id", "diagnosis", "skin_type", "sex", "age_years", "site"):
            assert record[name] == getattr(case, name)
        assert record["skin_type_origin"] == SkinTypeOrigin.DRAWN
        assert (record["width_px"], record["height_px"]) == (40, 32)
        concepts = dict(record["concepts"])
        assert {name for name in phantom.ARTEFACTS if concepts[name] == "yes"} == set(case.artefacts)
        assert "hair" in concepts


def test_the_files_are_the_drawing_and_its_masks(drawn):
    for case in plan(CONFIG)[::13]:
        truth = draw(case, 40, 32)
        image = read_image(drawn / IMAGES / f"{case.image_id}.jpg")
        assert abs(image.astype(int) - truth.image).mean() < 8
        for subfolder, mask in ((LESION_MASKS, truth.lesion_mask), (HAIR_MASKS, truth.hair_mask)):
            stored = cv2.imread(str(drawn / subfolder / f"{case.image_id}.png"), cv2.IMREAD_UNCHANGED)
            assert ((stored == 255) == mask).all()
            assert ((stored == 0) == ~mask).all()


def test_a_finished_folder_is_left_alone(drawn):
    before = contents(drawn)
    fingerprint = PhantomSource(CONFIG).fingerprint(drawn)
    edited = drawn / IMAGES / f"{plan(CONFIG)[0].image_id}.jpg"
    try:
        edited.write_bytes(before[f"{IMAGES}/{plan(CONFIG)[1].image_id}.jpg"])
        PhantomSource(CONFIG).prepare(drawn)
        assert edited.read_bytes() != before[f"{IMAGES}/{edited.name}"]
        assert PhantomSource(CONFIG).fingerprint(drawn) != fingerprint
    finally:
        edited.write_bytes(before[f"{IMAGES}/{edited.name}"])
    assert contents(drawn) == before


def test_interrupted_drawing_goes_on_and_gives_the_same_bytes(drawn, tmp_path):
    class StopError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done < total:
            raise StopError

    folder = tmp_path / "phantom"
    for _ in range(2):
        with pytest.raises(StopError):
            PhantomSource(CONFIG).prepare(folder, stop)
        assert not (folder / SETTINGS).exists()
        with pytest.raises(FileNotFoundError, match="prepare"):
            PhantomSource(CONFIG).list_images(folder)
    PhantomSource(CONFIG).prepare(folder)
    assert contents(folder) == contents(drawn)


def test_killed_drawing_goes_on_and_gives_the_same_bytes(drawn, tmp_path):
    folder = tmp_path / "phantom"
    script = (
        "import sys; from pathlib import Path; from derm_pipeline.sources.phantom import *; "
        "PhantomSource(PhantomConfig.model_validate_json(sys.argv[2])).prepare(Path(sys.argv[1]))"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(folder), CONFIG.model_dump_json()])
    deadline = time.monotonic() + 60
    while process.poll() is None and not list(folder.glob(f"{IMAGES}/*.jpg")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not (folder / SETTINGS).exists()
    PhantomSource(CONFIG).prepare(folder)
    assert contents(folder) == contents(drawn)


def test_more_images_are_drawn_beside_those_there(drawn, tmp_path):
    folder = tmp_path / "phantom"
    PhantomSource(CONFIG.model_copy(update={"num_images": 50})).prepare(folder)
    before = {path: path.stat().st_mtime_ns for path in (folder / IMAGES).iterdir()}
    PhantomSource(CONFIG).prepare(folder)
    assert contents(folder) == contents(drawn)
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in before.items())


def test_other_settings_are_an_error_that_names_them(drawn, tmp_path):
    with pytest.raises(ValueError, match=r"drawn with other settings \(seed is 0, not 5\).*remove the folder"):
        PhantomSource(CONFIG.model_copy(update={"seed": 5})).prepare(drawn)
    with pytest.raises(ValueError, match=r"num_images is 80, not 10"):
        PhantomSource(CONFIG.model_copy(update={"num_images": 10})).prepare(drawn)
    (tmp_path / IMAGES).mkdir()
    (tmp_path / IMAGES / "holiday.jpg").write_bytes(b"somebody's")
    with pytest.raises(ValueError, match="not drawn as phantoms"):
        PhantomSource(CONFIG).prepare(tmp_path)
    assert (tmp_path / IMAGES / "holiday.jpg").read_bytes() == b"somebody's"


def test_the_source_without_settings_of_its_own_takes_a_folder_as_it_is(drawn, tmp_path):
    before = contents(drawn)
    PhantomSource().prepare(drawn)
    assert contents(drawn) == before

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        PhantomSource(CONFIG).prepare(tmp_path, stop)
    PhantomSource().prepare(tmp_path)  # what was begun is finished with the settings that it was begun with
    assert contents(tmp_path) == before


def test_broken_settings_are_an_error_that_names_the_file(tmp_path):
    (tmp_path / SETTINGS).write_text('{"num_images": "many"}')
    with pytest.raises(ValueError, match=r"phantom\.json does not hold"):
        PhantomSource(CONFIG).prepare(tmp_path)


def test_an_edited_table_is_checked_like_any_other(drawn, tmp_path):
    folder = tmp_path / "phantom"
    small = CONFIG.model_copy(update={"num_images": 3})
    PhantomSource(small).prepare(folder)
    table = (folder / "metadata.csv").read_text().splitlines()
    cells = table[1].split(",")
    cells[4] = "7"
    (folder / "metadata.csv").write_text("\n".join([table[0], ",".join(cells), *table[2:]]))
    found = scan(PhantomSource(small), folder)
    assert found.records.num_rows == 2
    assert "skin_type '7'" in found.quarantined["reason"][0].as_py()


def test_progress_counts_up_to_the_number_of_images(tmp_path):
    done = []
    PhantomSource(CONFIG).prepare(tmp_path, lambda *progress: done.append(progress))
    assert [total for _, total in done] == [80] * len(done)
    assert [number for number, _ in done] == [32, 64, 80]


def test_every_source_goes_by_its_own_name():
    assert {source.name: source for source in SOURCES.values()} == SOURCES


def test_importing_the_sources_imports_nothing_heavy():
    script = "import sys, derm_pipeline.sources, derm_pipeline.splits; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "diffusers", "dagster", "sklearn", "scipy", "pandas", "matplotlib"} & set(loaded)


def test_the_truth_of_every_drawing_becomes_concepts(drawn):
    records = {row["image_id"]: row for row in scan(PhantomSource(CONFIG), drawn).records.to_pylist()}
    for case in plan(CONFIG)[::17]:
        concepts = dict(records[case.image_id]["concepts"])
        assert float(concepts["subtlety"]) == pytest.approx(case.subtlety, abs=1e-4)
        assert concepts.items() >= draw(case, 40, 32).truth.concepts().items()


def test_a_folder_that_an_earlier_version_drew_is_read_and_goes_on(drawn, tmp_path):
    folder = tmp_path / "phantom"
    PhantomSource(CONFIG.model_copy(update={"num_images": 50})).prepare(folder)
    lines = (folder / TABLE).read_text().splitlines()
    num_old = lines[0].split(",").index("subtlety")
    (folder / TABLE).write_text("\n".join(",".join(line.split(",")[:num_old]) for line in lines) + "\n")
    found = scan(PhantomSource(), folder)
    assert (found.records.num_rows, found.quarantined.num_rows) == (50, 0)
    assert "asymmetry" not in dict(found.records["concepts"][0].as_py())
    PhantomSource(CONFIG).prepare(folder)
    found = scan(PhantomSource(), folder)
    assert found.records.num_rows == 80
    assert sum("asymmetry" in dict(concepts) for concepts in found.records["concepts"].to_pylist()) == 30
