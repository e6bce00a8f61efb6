"""A source's folder may hold archives, what was unpacked from them, or both."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from derm_pipeline.sources.layout import Layout, NotUnpackedError

TABLE = "truth/truth.csv"
LAYOUT = Layout(
    title="A dataset",
    expected="Expected there: truth.csv and the images in part_1/, or their archives.",
    tables=(("truth.csv", TABLE),),
    image_folders=("images", "part_1"),
    side_folders=("masks",),
    archives=("truth", "part_1", "masks"),
)


def write_zip(path: Path, names: list[str]) -> None:
    with zipfile.ZipFile(path, "w") as packed:
        for name in names:
            packed.writestr(name, np.random.default_rng().bytes(50))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Nothing but the publisher's archives."""
    write_zip(tmp_path / "truth.zip", [TABLE])
    write_zip(tmp_path / "part_1.zip", ["a.jpg", "b.JPG"])
    write_zip(tmp_path / "masks.zip", ["a.png"])
    return tmp_path


def test_a_table_in_an_archive_is_not_unpacked_rather_than_missing(folder):
    with pytest.raises(NotUnpackedError, match=r"no truth.csv in .* yet; truth.zip lies there and is unpacked when"):
        LAYOUT.find_tables(folder)
    LAYOUT.unpack(folder)
    assert LAYOUT.find_tables(folder) == (TABLE,)
    assert LAYOUT.find_images(folder) == {"a": ["part_1/a.jpg"], "b": ["part_1/b.JPG"]}


def test_an_archive_that_holds_no_table_does_not_excuse_a_missing_one(folder):
    (folder / "truth.zip").unlink()
    for look in (LAYOUT.find_tables, LAYOUT.fingerprint):
        with pytest.raises(FileNotFoundError, match="Expected there") as raised:
            look(folder)
        assert not isinstance(raised.value, NotUnpackedError)


def test_archives_have_a_fingerprint_before_they_are_unpacked(folder):
    seen = [LAYOUT.fingerprint(folder)]
    assert LAYOUT.fingerprint(folder) == seen[0]
    for name in ("truth.zip", "part_1.zip", "masks.zip"):
        (folder / name).write_bytes((folder / name).read_bytes() + b" ")
        seen.append(LAYOUT.fingerprint(folder))
    assert len(set(seen)) == len(seen)


def test_an_archive_whose_table_or_images_lie_there_already_stays_packed(folder):
    (folder / "truth.csv").write_text("image")
    (folder / "images").mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (folder / "images" / name).write_bytes(b"image")
    LAYOUT.unpack(folder)
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["images", "masks"]
    assert LAYOUT.find_tables(folder) == ("truth.csv",)
    assert set(LAYOUT.find_images(folder)) == {"a", "b", "c"}


def test_an_archive_with_one_image_that_is_not_there_is_unpacked(folder):
    (folder / "images").mkdir()
    (folder / "images" / "a.jpg").write_bytes(b"image")
    LAYOUT.unpack(folder)
    assert LAYOUT.find_images(folder) == {"a": ["images/a.jpg", "part_1/a.jpg"], "b": ["part_1/b.JPG"]}
