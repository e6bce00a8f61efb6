"""Tables as publishers, spreadsheets and pandas leave them, and files whose names do not quite fit."""

from __future__ import annotations

import csv
import io
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from derm_pipeline.records import Sex
from derm_pipeline.sources import tables
from derm_pipeline.sources.listing import (
    UNKNOWN_WORDS,
    Candidate,
    Listing,
    Row,
    find_images,
    fingerprint_files,
    pair,
    parse_age,
    parse_mapped,
    parse_word_or_none,
    read_table,
)
from derm_pipeline.sources.words import known_or_none

WORDS = ["nv", "mel", 'a "quoted" word', "front, left; upper", "Größe", "", "45.0", "two\nlines"]


def random_rows(num_rows: int = 40) -> list[dict[str, str]]:
    rng = np.random.default_rng()
    return [
        {"image_id": f"ISIC_{number}", "dx": str(rng.choice(WORDS)), "note": str(rng.choice(WORDS))}
        for number in range(num_rows)
    ]


def as_csv(rows: list[dict[str, str]], separator: str = ",", line_end: str = "\n") -> str:
    file = io.StringIO()
    quoting = csv.QUOTE_ALL if line_end == "\r" else csv.QUOTE_MINIMAL  # else the writer leaves a bare \n unquoted
    writer = csv.DictWriter(file, list(rows[0]), delimiter=separator, lineterminator=line_end, quoting=quoting)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return tmp_path / "table.csv"


def cells(rows: list[Row]) -> list[dict[str, str]]:
    assert all(row.problem is None for row in rows)
    return [dict(row.cells) for row in rows]


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["no mark", "byte order mark"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_every_way_of_writing_a_table_gives_the_same_rows(table, mark, line_end, separator):
    rows = random_rows()
    table.write_bytes((mark + as_csv(rows, separator, line_end)).encode())
    assert cells(read_table(table, ("image_id", "dx"))) == rows


def test_a_table_of_one_column_needs_no_separator(table):
    table.write_text("image_id\na\nb\n")
    assert cells(read_table(table, ("image_id",))) == [{"image_id": "a"}, {"image_id": "b"}]


def test_a_header_with_two_separators_is_read_by_the_one_that_gives_the_needed_columns(table):
    table.write_text("image_id,dx;coded,note\na,nv,x;y\n")
    assert cells(read_table(table, ("image_id", "note"))) == [{"image_id": "a", "dx;coded": "nv", "note": "x;y"}]
    table.write_text("image_id;dx, coded;note\na;nv;x,y\n")
    assert cells(read_table(table, ("image_id", "note"))) == [{"image_id": "a", "dx, coded": "nv", "note": "x,y"}]


def test_a_quoted_name_may_hold_another_separator(table):
    table.write_text('image_id,"size; mm"\na,3\n')
    assert cells(read_table(table, ("image_id",))) == [{"image_id": "a", "size; mm": "3"}]


@pytest.mark.parametrize("header", ["image_id;dx,note", "a;image_id,b\t", "image_id,dx\tnote"])
def test_a_header_with_two_separators_of_which_none_fits_is_an_error(table, header):
    table.write_text(header + "\n")
    with pytest.raises(ValueError, match=r"table.csv: its header holds .* and .*needed: 'image_id', 'dx'"):
        read_table(table, ("image_id", "dx"))


@pytest.mark.parametrize(
    "header", [",image_id,dx", "Unnamed: 0,image_id,dx", ",Unnamed: 0,image_id,dx", "image_id,,dx,"]
)
def test_columns_without_a_name_are_kept_out_of_the_cells(table, header):
    values = [{"image_id": "a", "dx": "nv"}.get(name, "7") for name in header.split(",")]
    table.write_text(header + "\n" + ",".join(values) + "\n")
    assert cells(read_table(table, ("image_id", "dx"))) == [{"image_id": "a", "dx": "nv"}]


def test_a_named_column_that_is_there_twice_is_an_error(table):
    table.write_text("image_id,dx,dx\n")
    with pytest.raises(ValueError, match="the column 'dx' more than once"):
        read_table(table, ("image_id",))


def test_a_missing_column_is_an_error_that_names_those_found(table):
    table.write_text("image,dx\n")
    with pytest.raises(ValueError, match="no column 'image_id'; columns found: image, dx"):
        read_table(table, ("image_id",))


def test_rows_are_named_by_the_line_on_which_they_end(table):
    table.write_text('image_id,dx\na,nv\n\nb,"two\nlines"\nc\nd,nv,mel\n')
    rows = read_table(table, ("image_id",))
    assert [(row.line, row.cells["image_id"]) for row in rows] == [(2, "a"), (5, "b"), (6, "c"), (7, "d")]
    assert [row.problem for row in rows] == [
        None,
        None,
        "the row has 1 cells; the table has 2 columns",
        "the row has 3 cells; the table has 2 columns",
    ]


def test_rows_that_are_not_utf8_are_named_by_line_and_the_others_read(table):
    lines = [f"ISIC_{number},Größe".encode() for number in range(40)]
    lines[6] = "ISIC_6,Größe".encode("latin-1")
    lines[30] = b"ISIC_30,\0"
    table.write_bytes(b"\n".join([b"image_id,dx", *lines]))
    rows = read_table(table, ("image_id", "dx"))
    problems = {row.line: row.problem for row in rows if row.problem}
    assert problems == dict.fromkeys((8, 32), "the row holds bytes that are not UTF-8 text")
    assert rows[6].cells == {"image_id": "ISIC_6", "dx": "Gr\ufffd\ufffde"}
    listing = pair("own", rows, {f"ISIC_{number}": [f"ISIC_{number}.jpg"] for number in range(40)}, candidate)
    assert len(listing.candidates) == 38
    assert [(bad.image_id, bad.file) for bad in listing.quarantined] == [
        ("ISIC_6", "ISIC_6.jpg"),
        ("ISIC_30", "ISIC_30.jpg"),
    ]
    assert listing.quarantined[0].reason == "table line 8: the row holds bytes that are not UTF-8 text"


def test_an_image_id_that_is_not_utf8_is_quarantined_and_can_be_written(table):
    table.write_bytes(b"image_id,dx\ncaf\xe9,nv\nb,nv\n")
    listing = pair("own", read_table(table, ("image_id",)), {}, candidate)
    (bad,) = listing.quarantined
    assert bad.image_id == "caf\ufffd"
    assert "line 2" in bad.reason
    assert "not UTF-8" in bad.reason
    bad.reason.encode()


@pytest.mark.parametrize(
    "content",
    [
        "image_id,dx\na,nv\n".encode("utf-16"),
        b"image_id,gr\xf6\xdfe\na,3\n",
        b"PK\x03\x04\x14\x00image_id,dx\n",
        b"image_id,dx\n" + b"a,gr\xf6\xdfe\n" * 3 + b"a,b\n" * 26,
        b"image_id,dx\n" + b"a,\0\n" * 30,
    ],
    ids=["UTF-16", "Latin-1 header", "zip", "just more than a tenth", "NUL bytes"],
)
def test_a_file_that_is_no_text_is_an_error(table, content):
    table.write_bytes(content)
    with pytest.raises(ValueError, match=r"table.csv is not a text table: .*UTF-8"):
        read_table(table, ("image_id",))


def test_a_tenth_of_bad_rows_is_borne_and_two_of_very_few_are_too(table):
    table.write_bytes(b"image_id,dx\n" + b"a,gr\xf6\xdfe\n" * 3 + b"a,b\n" * 27)
    assert sum(row.problem is not None for row in read_table(table, ())) == 3
    table.write_bytes(b"image_id,dx\n" + b"a,gr\xf6\xdfe\n" * 2 + b"a,b\n")
    assert sum(row.problem is not None for row in read_table(table, ())) == 2


def test_a_row_or_cell_without_end_is_an_error_that_names_the_line(table):
    table.write_text("image_id,dx\na,nv\nb," + "x" * tables.MAX_ROW_CHARS + "\n")
    with pytest.raises(ValueError, match=r"table.csv, line 3: .* more than 100,000 characters; is a quote left open"):
        read_table(table, ("image_id",))
    table.write_text('image_id,dx\na,"nv\n' + "b,nv\n" * 50_000)
    with pytest.raises(ValueError, match=r"table.csv, line \d+: .* is a quote left open"):
        read_table(table, ("image_id",))
    table.write_text('image_id,dx\na,"nv\nb,nv\n')
    with pytest.raises(ValueError, match=r"table.csv, line 3: .*is a quote left open\?"):
        read_table(table, ("image_id",))


def test_a_cell_of_any_length_below_the_bound_is_read_whole(table):
    table.write_text("image_id,dx\na," + "x" * (tables.MAX_ROW_CHARS - 3) + "\n")
    assert len(read_table(table, ("image_id",))[0].cells["dx"]) == tables.MAX_ROW_CHARS - 3


def test_a_table_that_is_too_large_is_not_read(table, monkeypatch):
    with table.open("wb") as file:
        file.truncate(tables.MAX_TABLE_BYTES + 1)  # sparse: it takes no room
    with pytest.raises(ValueError, match=r"has 2,147,483,649 bytes; at most 2,147,483,648 are read"):
        read_table(table, ("image_id",))
    monkeypatch.setattr(tables, "MAX_ROWS", 10)
    table.write_text("image_id\n" + "a\n" * 11)
    with pytest.raises(ValueError, match="more than 10 rows"):
        read_table(table, ("image_id",))


def test_what_is_no_file_is_not_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.csv"):
        read_table(tmp_path / "nowhere.csv", ())
    with pytest.raises(ValueError, match="not a regular file"):
        read_table(tmp_path, ())


def test_a_hundred_thousand_rows_take_little_memory(table):
    """Twenty columns, of which four hold another value in every row; a tenth of the rows stands for all."""
    rng = np.random.default_rng()
    header = ["image_id"] + [f"c{number}" for number in range(19)]
    lines = [",".join(header)]
    for number in range(10_000):
        words = rng.choice(["nv", "anterior torso", "45.0", "unknown"], 16)
        lines.append(f"ISIC_{number:07d}," + ",".join(words) + "".join(f",{value:.12f}" for value in rng.random(3)))
    table.write_text("\n".join(lines))
    tracemalloc.start()
    rows = read_table(table, ("image_id",))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows) == 10_000
    assert peak < 15e6


def candidate(row_cells: dict[str, str], file: str | None) -> Candidate:
    return Candidate(image_id=row_cells["image_id"], file=file, source_label="", diagnosis=None)


def listing_of(folder: Path, image_ids: list[str], files: list[str]) -> Listing:
    for name in files:
        (folder / name).write_bytes(b"")
    rows = [Row(line, {"image_id": image_id}) for line, image_id in enumerate(image_ids, 2)]
    return pair("own", rows, find_images(folder, ["."]), candidate)


def files_of(listing: Listing) -> dict[str, str | None]:
    return {found.image_id: found.file for found in listing.candidates}


def reasons_of(listing: Listing) -> dict[str | None, str]:
    return {bad.file: bad.reason for bad in listing.quarantined}


def test_names_and_suffixes_may_differ_in_case(tmp_path):
    listing = listing_of(tmp_path, ["ISIC_1", "isic_2", "Isic_3"], ["ISIC_1.JPG", "ISIC_2.jpg", "isic_3.PnG"])
    assert files_of(listing) == {"ISIC_1": "ISIC_1.JPG", "isic_2": "ISIC_2.jpg", "Isic_3": "isic_3.PnG"}
    assert not listing.quarantined


def test_two_files_that_differ_in_case_only_are_both_named(tmp_path):
    listing = listing_of(tmp_path, ["isic_1", "b"], ["ISIC_1.jpg", "Isic_1.jpg", "b.jpg", "b.JPG"])
    assert not listing.candidates
    assert reasons_of(listing).keys() == {"ISIC_1.jpg", "Isic_1.jpg", "b.jpg", "b.JPG"}
    assert all(
        "several files for one image_id: ISIC_1.jpg, Isic_1.jpg" in reasons_of(listing)[name]
        for name in ("ISIC_1.jpg", "Isic_1.jpg")
    )


def test_the_file_of_the_same_name_goes_before_one_that_differs_in_case(tmp_path):
    listing = listing_of(tmp_path, ["ISIC_1"], ["ISIC_1.jpg", "isic_1.jpg"])
    assert files_of(listing) == {"ISIC_1": "ISIC_1.jpg"}
    assert "differs from ISIC_1.jpg in case only" in reasons_of(listing)["isic_1.jpg"]


def test_rows_that_differ_in_case_only_never_share_a_file(tmp_path):
    listing = listing_of(tmp_path, ["isic_1", "ISIC_1", "a2", "A2"], ["ISIC_1.jpg", "a2.png", "A2.png"])
    assert files_of(listing) == {"isic_1": None, "ISIC_1": "ISIC_1.jpg", "a2": "a2.png", "A2": "A2.png"}
    listing = listing_of(tmp_path, ["isic_1", "iSIC_1", "a2", "A2"], [])
    assert files_of(listing) == {"isic_1": None, "iSIC_1": None, "a2": "a2.png", "A2": "A2.png"}
    assert list(reasons_of(listing)) == ["ISIC_1.jpg"]


@pytest.mark.parametrize("word", ["", "NaN", "NA", "n/a", "None", "null", "NaT", "Not available", "<NA>", "unknown"])
def test_every_spelling_of_unknown_is_none_in_every_kind_of_column(word):
    assert word.lower() in UNKNOWN_WORDS
    assert known_or_none(word) is None
    assert parse_age("age", word) is None
    assert parse_word_or_none(Sex, "sex", word) is None
    assert parse_mapped({"torso": 1}, "site", word) is None
    (bad,) = pair("own", [Row(2, {"image_id": word})], {}, candidate).quarantined
    assert bad.reason == "table line 2: the row has no image_id"


def test_a_word_of_the_source_goes_before_the_spellings_of_unknown():
    assert parse_mapped({"na": 7}, "code", "NA") == 7
    assert files_of(pair("own", [Row(2, {"image_id": "nan"})], {"nan": ["nan.jpg"]}, candidate)) == {"nan": "nan.jpg"}
    assert known_or_none("Nanette") == "Nanette"


def test_every_row_and_file_is_accounted_for_whatever_the_case_of_their_names(tmp_path):
    rng = np.random.default_rng()

    def scrambled(name: str) -> str:
        return "".join(letter.upper() if rng.random() < 0.3 else letter for letter in name)

    image_ids = [scrambled(f"im_{number}") for number in rng.integers(0, 12, 30)]
    files = sorted({scrambled(f"im_{number}.jpg") for number in rng.integers(0, 15, 30)})
    listing = listing_of(tmp_path, image_ids, files)
    assert len(listing.candidates) + sum("table line" in bad.reason for bad in listing.quarantined) == len(image_ids)
    named = [found.file for found in (*listing.candidates, *listing.quarantined) if found.file]
    assert sorted(named) == files
    for found in listing.candidates:
        rivals = [name for name in files if name.lower().startswith(found.image_id.lower() + ".")]
        wanting = {image_id for image_id in image_ids if image_id.lower() == found.image_id.lower()}
        exact = [name for name in rivals if Path(name).stem == found.image_id]
        free = [name for name in rivals if Path(name).stem not in wanting]
        if exact:
            assert [found.file] == exact
        elif found.file is not None:
            assert [found.file] == free
            assert len([image_id for image_id in wanting if image_id not in {Path(name).stem for name in files}]) == 1


def test_a_file_that_may_be_read_now_changes_the_fingerprint(tmp_path):
    image = tmp_path / "a.jpg"
    image.write_bytes(b"image")
    image.chmod(0o000)
    before = fingerprint_files(tmp_path, (), (".",))
    assert fingerprint_files(tmp_path, (), (".",)) == before
    image.chmod(0o644)
    assert fingerprint_files(tmp_path, (), (".",)) != before
