"""HAM10000's adapter and the scan, on a small folder in the publisher's layout."""

from __future__ import annotations

import csv
import io
import os
import struct
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from derm_pipeline.images import BadImageError, encode_jpeg, encode_png
from derm_pipeline.records import QUARANTINE_SCHEMA, RECORD_SCHEMA
from derm_pipeline.sources import scan
from derm_pipeline.sources.ham10000 import COLUMNS, MASK_FOLDER, Ham10000, read_lesion_mask

HAM = Ham10000()
PARTS = ("HAM10000_images_part_1", "HAM10000_images_part_2")


def jpeg() -> bytes:
    rng = np.random.default_rng()
    return encode_jpeg(rng.integers(0, 256, (15, 20, 3), dtype=np.uint8))


def row(number: int, **cells: str) -> dict[str, str]:
    usual = {
        "lesion_id": f"HAM_{number // 2:07d}",
        "image_id": f"ISIC_{number:07d}",
        "dx": "nv",
        "dx_type": "histo",
        "age": "45.0",
        "sex": "male",
        "localization": "back",
    }
    return usual | cells


def image_path(folder: Path, number: int) -> Path:
    return folder / PARTS[number % 2] / f"ISIC_{number:07d}.jpg"


def write_table(folder: Path, rows: list[dict[str, str]], name: str = "HAM10000_metadata.csv") -> None:
    with (folder / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images with six rows."""
    for part in PARTS:
        (tmp_path / part).mkdir()
    for number in range(6):
        image_path(tmp_path, number).write_bytes(jpeg())
    write_table(tmp_path, [row(number) for number in range(6)])
    return tmp_path


def reasons(folder: Path) -> dict[str | None, str]:
    return {line["image_id"]: line["reason"] for line in scan(HAM, folder).quarantined.to_pylist()}


def bomb(width: int, height: int) -> bytes:
    header = struct.pack(">II5B", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b""))
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_every_row_with_its_image_becomes_a_record_in_order_of_image_id(folder):
    rows = [row(number, dx=dx) for number, dx in enumerate(["vasc", "df", "mel", "nv", "bcc", "akiec"])]
    write_table(folder, rows[::-1])
    found = scan(HAM, folder)
    assert found.records.schema == RECORD_SCHEMA
    assert found.quarantined.schema == QUARANTINE_SCHEMA
    assert found.quarantined.num_rows == 0
    assert found.records["image_id"].to_pylist() == [cells["image_id"] for cells in rows]
    assert found.records["diagnosis"].to_pylist() == ["vasc", "df", "mel", "nv", "bcc", "akiec"]
    assert found.records["malignant"].to_pylist() == [False, False, True, False, True, True]
    first = found.records.to_pylist()[0]
    assert first["file"] == "HAM10000_images_part_1/ISIC_0000000.jpg"
    assert (first["width_px"], first["height_px"]) == (20, 15)
    assert first["size_bytes"] == image_path(folder, 0).stat().st_size
    assert (first["age_years"], first["sex"], first["site"], first["skin_type"]) == (45, "male", "back", None)
    assert dict(first["concepts"]) == {"dx_type": "histo"}


@pytest.mark.parametrize("name", ["HAM10000_metadata", "HAM10000_metadata.tab"])
def test_the_table_may_have_the_publishers_other_names(folder, name):
    text = (folder / "HAM10000_metadata.csv").read_text()
    (folder / "HAM10000_metadata.csv").unlink()
    (folder / name).write_text(text.replace(",", "\t") if name.endswith("tab") else "\ufeff" + text)
    assert scan(HAM, folder).records.num_rows == 6


@pytest.mark.parametrize("subfolder", ["images", "."])
def test_the_images_may_lie_in_one_folder_or_flat(folder, subfolder):
    (folder / subfolder).mkdir(exist_ok=True)
    for number in range(6):
        image_path(folder, number).rename(folder / subfolder / f"ISIC_{number:07d}.jpg")
    assert scan(HAM, folder).records.num_rows == 6


def test_other_folders_and_hidden_files_are_passed_over(folder):
    for name in ("HAM10000_segmentations_lesion_tschandl", "originals_600x450"):
        (folder / name).mkdir()
        (folder / name / "ISIC_0000000.png").write_bytes(b"not looked at")
    (folder / PARTS[0] / "._ISIC_0000000.jpg").write_bytes(b"a file browser's")
    assert scan(HAM, folder).quarantined.num_rows == 0


def test_unknown_cells_become_none(folder):
    cells = {"age": "", "sex": "unknown", "localization": "unknown", "lesion_id": "", "dx_type": ""}
    others = [row(1, age="0.0"), row(2, age="NaN"), row(3, age="unknown", dataset="rosendahl")]
    write_table(folder, [row(0, dataset="", **cells)] + [{"dataset": ""} | other for other in others])
    records = {line["image_id"]: line for line in scan(HAM, folder).records.to_pylist()}
    first = records["ISIC_0000000"]
    assert [first[name] for name in ("age_years", "sex", "site", "lesion_id")] == [None] * 4
    assert first["concepts"] == []
    assert [records[f"ISIC_{number:07d}"]["age_years"] for number in (1, 2, 3)] == [None] * 3
    assert dict(records["ISIC_0000003"]["concepts"]) == {"dx_type": "histo", "dataset": "rosendahl"}


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ({"dx": "nevus"}, ["dx 'nevus'", "akiec, bcc, bkl, df, mel, nv, vasc"]),
        ({"dx": "scc"}, ["dx 'scc'", "outside the vocabulary"]),
        ({"dx": ""}, ["dx ''"]),
        ({"age": "forty"}, ["age 'forty'"]),
        ({"age": "-5"}, ["age '-5'"]),
        ({"age": "1e2"}, ["age '1e2'"]),
        ({"age": "45.5"}, ["age '45.5'"]),
        ({"age": "121"}, ["age '121'", "1 to 120"]),
        ({"sex": "m"}, ["sex 'm'", "female, male"]),
        ({"localization": "left knee"}, ["localization 'left knee'", "lower extremity"]),
    ],
)
def test_a_word_outside_the_vocabulary_is_quarantined_with_the_allowed_ones(folder, cells, words):
    write_table(folder, [row(0, **cells)] + [row(number) for number in range(1, 6)])
    found = scan(HAM, folder)
    assert found.records.num_rows == 5
    (bad,) = found.quarantined.to_pylist()
    assert bad["image_id"] == "ISIC_0000000"
    assert bad["file"] == "HAM10000_images_part_1/ISIC_0000000.jpg"
    assert all(word in bad["reason"] for word in ["table line 2", *words])


def test_the_case_of_words_does_not_matter(folder):
    write_table(folder, [row(0, dx="NV", sex="Male", localization="Lower Extremity"), *(row(n) for n in range(1, 6))])
    found = scan(HAM, folder).records.to_pylist()[0]
    assert (found["diagnosis"], found["sex"], found["site"]) == ("nv", "male", "lower extremity")
    assert found["source_label"] == "NV"


@pytest.mark.parametrize(
    "image_id", ["../../etc/passwd", "/etc/passwd", ".hidden", "a/b", "a\\b", "x" * 129, "nul\0", "ü"]
)
def test_an_image_id_that_is_no_plain_name_is_quarantined(folder, image_id):
    write_table(folder, [row(number) for number in range(6)] + [row(9, image_id=image_id)])
    found = scan(HAM, folder)
    assert found.records.num_rows == 6
    (bad,) = found.quarantined.to_pylist()
    assert bad["image_id"] == image_id
    assert bad["file"] is None
    assert "not a safe name" in bad["reason"]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "zero bytes"),
        (jpeg()[:-200], "truncated"),
        (encode_png(np.zeros((9, 9, 3), np.uint8))[:-30], "truncated"),
        (b"<html>no picture</html>", "not a JPEG or PNG"),
        (bomb(30_000, 30_000), "100,000,000 pixels"),
        (bomb(10_001, 10_000), "100,000,000 are read"),
    ],
    ids=["empty", "half a JPEG", "half a PNG", "a page", "a bomb", "a little too large"],
)
def test_a_bad_file_is_quarantined_with_what_is_wrong(folder, content, word):
    image_path(folder, 3).write_bytes(content)
    found = scan(HAM, folder)
    assert found.records.num_rows == 5
    (bad,) = found.quarantined.to_pylist()
    assert (bad["source"], bad["image_id"]) == ("ham10000", "ISIC_0000003")
    assert bad["file"] == "HAM10000_images_part_2/ISIC_0000003.jpg"
    assert word in bad["reason"]


def test_an_image_missing_on_disk_and_a_file_missing_in_the_table_are_quarantined(folder):
    image_path(folder, 0).rename(folder / PARTS[0] / "ISIC_0000077.JPG")
    (folder / "images").mkdir()
    (folder / "images" / "ISIC_0000088.tif").write_bytes(b"a format that is not read")
    found = reasons(folder)
    assert found.keys() == {"ISIC_0000000", "ISIC_0000077", "ISIC_0000088"}
    assert "missing on disk" in found["ISIC_0000000"]
    assert "not in the table" in found["ISIC_0000077"]
    assert "not in the table" in found["ISIC_0000088"]


def test_of_two_rows_with_one_image_id_the_first_is_kept(folder):
    write_table(folder, [row(number) for number in range(6)] + [row(2, dx="mel")])
    found = scan(HAM, folder)
    assert found.records["diagnosis"].to_pylist() == ["nv"] * 6
    (bad,) = found.quarantined.to_pylist()
    assert "line 8" in bad["reason"]
    assert "already in line 4" in bad["reason"]


def test_of_two_files_with_one_image_id_neither_is_guessed(folder):
    (folder / PARTS[1] / "ISIC_0000000.png").write_bytes(encode_png(np.zeros((9, 9, 3), np.uint8)))
    found = scan(HAM, folder)
    assert found.records.num_rows == 5
    assert {line["file"] for line in found.quarantined.to_pylist()} == {
        "HAM10000_images_part_1/ISIC_0000000.jpg",
        "HAM10000_images_part_2/ISIC_0000000.png",
    }
    assert all("several files" in line["reason"] for line in found.quarantined.to_pylist())


def test_a_row_with_the_wrong_number_of_cells_is_quarantined_with_its_file(folder):
    with (folder / "HAM10000_metadata.csv").open() as file:
        lines = file.read().splitlines()
    lines[1], lines[2] = lines[1] + ",surplus", lines[2].rpartition(",")[0]
    (folder / "HAM10000_metadata.csv").write_text("\n".join(lines))
    found = scan(HAM, folder)
    assert found.records.num_rows == 4
    assert [line["reason"].partition(": ")[2] for line in found.quarantined.to_pylist()] == [
        "the row has 8 cells; the table has 7 columns",
        "the row has 6 cells; the table has 7 columns",
    ]
    assert [Path(line["file"]).stem for line in found.quarantined.to_pylist()] == ["ISIC_0000000", "ISIC_0000001"]


def test_a_link_that_leaves_the_folder_is_not_followed(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "private.jpg"
    outside.write_bytes(jpeg())
    for number, target in ((0, outside), (1, "nowhere"), (2, image_path(folder, 3))):
        image_path(folder, number).unlink()
        image_path(folder, number).symlink_to(target)
    found = reasons(folder)
    assert found.keys() == {"ISIC_0000000", "ISIC_0000001"}
    assert "leaves the source's folder" in found["ISIC_0000000"]
    assert "missing on disk" in found["ISIC_0000001"]


def test_a_pipe_does_not_stop_the_scan(folder):
    image_path(folder, 0).unlink()
    os.mkfifo(image_path(folder, 0))
    assert "not a regular file" in reasons(folder)["ISIC_0000000"]


def test_the_source_folder_itself_may_be_a_link(folder, tmp_path_factory):
    link = tmp_path_factory.mktemp("elsewhere") / "ham10000"
    link.symlink_to(folder)
    assert scan(HAM, link).records.num_rows == 6


def test_a_file_name_that_is_not_utf8_is_quarantined(folder):
    Path(os.fsdecode(os.fsencode(folder / PARTS[0]) + b"/caf\xe9.jpg")).write_bytes(jpeg())
    assert list(reasons(folder)) == ["caf\ufffd"]


def test_same_bytes_under_two_ids_stay_two_records(folder):
    image_path(folder, 4).write_bytes(image_path(folder, 1).read_bytes())
    records = scan(HAM, folder).records.to_pylist()
    assert {line["image_id"]: line["duplicate_of"] for line in records if line["duplicate_of"]} == {
        "ISIC_0000004": "ISIC_0000001"
    }
    assert len(records) == 6


def test_nothing_is_lost_whatever_is_wrong(folder):
    """Rows and files without a row = records + quarantined, for random damage of every kind at once."""
    rng = np.random.default_rng()
    numbers = [int(number) for number in rng.integers(0, 60, 60)]
    rows = []
    for number in numbers:
        damage = [{}, {}, {}, {"dx": "what"}, {"age": "old"}, {"image_id": "../up"}, {"image_id": ""}][rng.integers(7)]
        rows.append(row(number, **damage))
    write_table(folder, rows)
    for number in range(60):
        content = [jpeg(), jpeg(), b"", jpeg()[:200], None][rng.integers(5)]
        if content is not None:
            image_path(folder, number).write_bytes(content)
    image_path(folder, 0).write_bytes(jpeg())
    write_table(folder, [row(0), *rows])
    found = scan(HAM, folder)
    files = {path.relative_to(folder).as_posix() for part in PARTS for path in (folder / part).iterdir()}
    named = Counter(
        found.records["file"].to_pylist() + [file for file in found.quarantined["file"].to_pylist() if file]
    )
    assert set(named) == files
    assert max(named.values()) == 1
    with_row = {f"ISIC_{number:07d}" for number in [0, *numbers]} & {cells["image_id"] for cells in [row(0), *rows]}
    orphans = [file for file in files if Path(file).stem not in with_row]
    assert found.records.num_rows + found.quarantined.num_rows == len(rows) + 1 + len(orphans)


def test_unchanged_files_are_reused_and_a_changed_one_is_not(folder):
    before = scan(HAM, folder)
    assert before.num_reused == 0
    again = scan(HAM, folder, before.statistics)
    assert again.num_reused == 6
    assert again.records.equals(before.records)
    image_path(folder, 2).write_bytes(jpeg())
    image_path(folder, 3).write_bytes(b"broken")
    changed = scan(HAM, folder, before.statistics)
    assert changed.num_reused == 4
    assert changed.records.equals(scan(HAM, folder).records)
    assert changed.quarantined.num_rows == 1


def test_new_words_of_the_table_reach_reused_rows(folder):
    before = scan(HAM, folder)
    write_table(folder, [row(number, dx="mel") for number in range(6)])
    after = scan(HAM, folder, before.statistics)
    assert after.num_reused == 6
    assert set(after.records["diagnosis"].to_pylist()) == {"mel"}


def test_the_number_of_workers_changes_nothing(folder):
    done = []
    one = scan(HAM, folder, num_workers=1, on_progress=lambda *progress: done.append(progress))
    assert scan(HAM, folder, num_workers=3).records.equals(one.records)
    assert done[-1] == (6, 6)


def test_the_fingerprint_changes_with_any_file_and_only_then(folder):
    first = HAM.fingerprint(folder)
    (folder / "notes.txt").write_text("no part of the source")
    assert HAM.fingerprint(folder) == first
    content = image_path(folder, 0).read_bytes()
    image_path(folder, 0).write_bytes(content + b"\0")
    second = HAM.fingerprint(folder)
    image_path(folder, 9).write_bytes(jpeg())
    third = HAM.fingerprint(folder)
    with (folder / "HAM10000_metadata.csv").open("a") as file:
        file.write("\n")
    assert len({first, second, third, HAM.fingerprint(folder)}) == 4


@pytest.mark.parametrize("look", [HAM.prepare, HAM.list_images, HAM.fingerprint, lambda folder: scan(HAM, folder)])
def test_a_missing_folder_or_table_says_where_it_was_looked_for_and_what_is_expected(tmp_path, look):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*HAM10000_metadata.csv.*HAM10000_images_part_1"):
        look(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no HAM10000_metadata.csv in .*Expected there"):
        look(tmp_path)


def test_a_table_without_a_needed_column_is_an_error_that_names_those_found(folder):
    rows = [row(number) for number in range(6)]
    for cells in rows:
        del cells["dx"]
    write_table(folder, rows)
    with pytest.raises(
        ValueError, match=r"HAM10000_metadata.csv has no column 'dx'; columns found: lesion_id, image_id"
    ):
        scan(HAM, folder)
    with pytest.raises(ValueError, match="no column 'dx'"):
        HAM.prepare(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no column .* columns found: none"),
        (b"\xff\xfe\x00\x01", "not a text table"),
        ((",".join(COLUMNS) + "\n" + '"HAM_1,ISIC_0000000,nv').encode(), "line 2"),
        ((",".join([*COLUMNS, "dx"]) + "\n").encode(), "'dx' more than once"),
    ],
)
def test_a_table_that_is_none_is_an_error_that_names_it(folder, content, words):
    (folder / "HAM10000_metadata.csv").write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        scan(HAM, folder)
    assert "HAM10000_metadata.csv" in str(error.value)


def test_two_tables_are_an_error(folder):
    write_table(folder, [row(0)], "HAM10000_metadata")
    with pytest.raises(ValueError, match="several tables"):
        scan(HAM, folder)


def test_not_one_readable_image_is_an_error_with_the_first_reason(folder):
    for number in range(6):
        image_path(folder, number).write_bytes(b"")
    with pytest.raises(ValueError, match=r"not one readable image in .* first of 6 reasons: .*zero bytes"):
        scan(HAM, folder)
    for number in range(6):
        image_path(folder, number).unlink()
    with pytest.raises(FileNotFoundError, match="no image file in"):
        HAM.prepare(folder)


@pytest.mark.parametrize("word", ["vidir_modern", "rosendahl", "vidir_molemax", "vienna_dias"])
def test_where_an_image_comes_from_is_kept_where_the_table_says_it(folder, word):
    write_table(folder, [row(number, dataset=word if number else "") for number in range(6)])
    concepts = [dict(line["concepts"]) for line in scan(HAM, folder).records.to_pylist()]
    assert [line.get("dataset") for line in concepts] == [None] + [word] * 5


def test_images_of_one_lesion_share_it_and_those_of_none_do_not(folder):
    cells = [{"lesion_id": "HAM_0000001"}] * 2 + [{"lesion_id": text} for text in ("", "nan", "NaN", "unknown")]
    write_table(folder, [row(number, **line) for number, line in enumerate(cells)])
    assert scan(HAM, folder).records["lesion_id"].to_pylist() == ["HAM_0000001"] * 2 + [None] * 4


def test_a_lesion_mask_is_named_in_the_record_of_its_image(folder):
    before = HAM.fingerprint(folder)
    (folder / MASK_FOLDER).mkdir()
    for number in (1, 4, 999):
        (folder / MASK_FOLDER / f"ISIC_{number:07d}_segmentation.png").write_bytes(png(random_mask()))
    (folder / MASK_FOLDER / "ISIC_0000002.png").write_bytes(b"no mask's name")
    found = scan(HAM, folder)
    assert found.quarantined.num_rows == 0, "a mask is no image"
    masks = [dict(line["concepts"]).get("lesion_mask") for line in found.records.to_pylist()]
    name = MASK_FOLDER + "/ISIC_{:07d}_segmentation.png"
    assert masks == [None, name.format(1), None, None, name.format(4), None]
    assert HAM.fingerprint(folder) != before


def random_mask() -> np.ndarray:
    mask = np.random.default_rng().random((23, 31)) < 0.3
    mask[0, :2] = True, False
    return mask


def png(mask: np.ndarray, mode: str = "grey") -> bytes:
    """The mask as a PNG in one of the modes that occur; white is lesion."""
    if mode == "one bit":
        image = Image.fromarray(mask)
    elif mode == "0 and 1":
        image = Image.fromarray(mask.astype(np.uint8))
    elif mode == "RGB":
        image = Image.fromarray(np.repeat(mask[..., None] * np.uint8(255), 3, axis=2))
    else:
        image = Image.fromarray(mask * np.uint8(255))
    if mode == "palette":  # the publisher's: white first, black last, the grey levels between
        image = Image.fromarray(~mask * np.uint8(255))
        image.putpalette([255 - level for level in range(256) for _ in range(3)])
    if mode == "short palette":
        image = Image.fromarray(mask.astype(np.uint8))
        image.putpalette([0, 0, 0, 255, 255, 255])
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


@pytest.mark.parametrize("mode", ["grey", "palette", "short palette", "one bit", "0 and 1", "RGB"])
def test_a_lesion_mask_is_read_alike_in_every_mode(tmp_path, mode):
    for mask in (random_mask(), np.zeros((5, 7), bool), np.ones((5, 7), bool)):
        (tmp_path / "mask.png").write_bytes(png(mask, mode))
        found = read_lesion_mask(tmp_path / "mask.png")
        assert found.dtype == bool
        assert np.array_equal(found, mask)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "missing"),
        (b"", "zero bytes"),
        (b"<html>", "not a JPEG or PNG"),
        (png(random_mask())[:-30], "broken"),
        (bomb(30_000, 30_000), "100,000,000 pixels"),
    ],
    ids=["missing", "empty", "a page", "cut short", "a bomb"],
)
def test_a_bad_lesion_mask_is_an_error(tmp_path, content, word):
    if content is not None:
        (tmp_path / "mask.png").write_bytes(content)
    with pytest.raises(BadImageError, match=word):
        read_lesion_mask(tmp_path / "mask.png")


def test_the_publishers_archives_are_unpacked(folder, tmp_path_factory):
    (folder / MASK_FOLDER).mkdir()
    (folder / MASK_FOLDER / "ISIC_0000003_segmentation.png").write_bytes(png(random_mask()))
    zipped = tmp_path_factory.mktemp("zipped")
    (zipped / "HAM10000_metadata").write_bytes((folder / "HAM10000_metadata.csv").read_bytes())
    for name in (*PARTS, MASK_FOLDER):
        inside = name + "/" if name == MASK_FOLDER else ""
        with zipfile.ZipFile(zipped / f"{name}.zip", "w") as archive:
            for path in (folder / name).iterdir():
                archive.write(path, inside + path.name)
    done = []
    HAM.prepare(zipped, lambda *progress: done.append(progress))
    assert done[-1][0] == done[-1][1] > 0
    assert scan(HAM, zipped).records.equals(scan(HAM, folder).records)
