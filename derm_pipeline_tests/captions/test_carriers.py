from __future__ import annotations

import csv
import json
import re
import tempfile
import unicodedata
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from derm_pipeline.captions.carriers import CARRIERS, Caption, image_key, read_captions, write_captions

TEXTS = st.text(st.characters(exclude_categories=["Cs"])).filter(
    lambda text: any(not char.isspace() and unicodedata.category(char) not in ("Cc", "Cf") for char in text)
)
AWKWARD = "a “quoted”, \"word\";\tits\r\nnext line, 'e\u0301' and \u2028 more\x00\n"
FOLDED = "a “quoted”, \"word\"; its next line, '\u00e9' and more"
ROWS = [
    Caption("ISIC_1.jpg", "melanoma, on the back", "melanoma", 6),
    Caption("part 1/ISIC_2.jpeg", AWKWARD, "wart", None),
    Caption("part 1/ISIC.3.png", "NA", "acne", 1),
]


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def touch_images(folder, rows):
    for row in rows:
        (folder / row[0]).parent.mkdir(parents=True, exist_ok=True)
        (folder / row[0]).touch()


@pytest.mark.parametrize("carrier", CARRIERS)
@settings(deadline=None, max_examples=30)
@given(st.lists(TEXTS, min_size=1, max_size=4), st.data())
def test_what_is_written_is_read_back_on_one_line_in_normal_form(carrier, texts, data):
    letters = st.text("aé漢 -.()'\"0,", max_size=5)
    folders = st.sampled_from(["", "part 1/", "a/b.c/"])
    names = data.draw(
        st.lists(st.tuples(folders, letters), min_size=len(texts), max_size=len(texts), unique_by=lambda name: name)
    )
    rows = [Caption(f"{where}x{name}x.jpg", text, "wart", 3) for (where, name), text in zip(names, texts, strict=True)]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        touch_images(folder, rows)
        paths = write_captions(folder, rows, carrier)
        read = {caption.file_name: caption for caption in read_captions(folder, carrier)}
        assert all(path.is_file() for path in paths)
        first = files(folder)
        write_captions(folder, rows, carrier)
        assert files(folder) == first
    assert {name: caption.text for name, caption in read.items()} == {
        row.file_name: " ".join(
            unicodedata.normalize("NFC", re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", row.text.replace("\ufeff", ""))).split()
        )
        for row in rows
    }
    if carrier == "skin_diff":
        assert {(caption.label, caption.skin_type) for caption in read.values()} == {("wart", 3)}


def test_side_files_hold_the_text_and_nothing_else(tmp_path):
    paths = write_captions(tmp_path, ROWS, ".caption")
    assert [str(path.relative_to(tmp_path)) for path in paths] == [
        "ISIC_1.caption",
        "part 1/ISIC_2.caption",
        "part 1/ISIC.3.caption",
    ]
    assert files(tmp_path)["ISIC_1.caption"] == b"melanoma, on the back"
    assert files(tmp_path)["part 1/ISIC_2.caption"].decode() == FOLDED
    assert len(files(tmp_path)) == 3


def test_metadata_csv_is_read_by_others_as_it_was_meant(tmp_path):
    write_captions(tmp_path, ROWS, "metadata.csv")
    table = pd.read_csv(tmp_path / "metadata.csv", keep_default_na=False)
    assert list(table.columns) == ["file_name", "text"]
    assert table["file_name"].tolist() == [row.file_name for row in ROWS]
    assert table["text"].tolist() == ["melanoma, on the back", FOLDED, "NA"]
    assert b"\r" not in (tmp_path / "metadata.csv").read_bytes()
    assert len((tmp_path / "metadata.csv").read_text().splitlines()) == 4


def test_metadata_jsonl_is_one_object_a_line(tmp_path):
    write_captions(tmp_path, ROWS, "metadata.jsonl")
    lines = (tmp_path / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines][1] == {"file_name": "part 1/ISIC_2.jpeg", "text": FOLDED}


def test_kohya_json_is_keyed_by_the_stem_as_its_own_scripts_key_it(tmp_path):
    write_captions(tmp_path, ROWS, "kohya")
    assert json.loads((tmp_path / "meta_cap.json").read_text()) == {
        "ISIC_1": {"caption": "melanoma, on the back"},
        "part 1/ISIC_2": {"caption": FOLDED},
        "part 1/ISIC.3": {"caption": "NA"},
    }


def test_skin_diff_json_is_the_list_that_its_training_reads(tmp_path):
    write_captions(tmp_path, ROWS[:1], "skin_diff")
    assert json.loads((tmp_path / "skin_diff.json").read_text()) == [
        {"image_path": "ISIC_1.jpg", "label": "melanoma", "skin_type": 6, "prompt": "melanoma, on the back"}
    ]
    assert read_captions(tmp_path, "skin_diff") == ROWS[:1]


@pytest.mark.parametrize("carrier", CARRIERS)
def test_another_text_takes_the_place_of_the_first(tmp_path, carrier):
    write_captions(tmp_path, ROWS, carrier)
    later = [row._replace(text=f"{number} later") for number, row in enumerate(ROWS)]
    write_captions(tmp_path, later, carrier)
    assert sorted(caption.text for caption in read_captions(tmp_path, carrier)) == ["0 later", "1 later", "2 later"]
    assert not list(tmp_path.rglob("*.aside"))


@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_file_that_is_right_already_is_left_alone(tmp_path, carrier):
    paths = write_captions(tmp_path, ROWS, carrier)
    before = [path.stat().st_mtime_ns for path in paths], [path.stat().st_ino for path in paths]
    write_captions(tmp_path, ROWS, carrier)
    assert ([path.stat().st_mtime_ns for path in paths], [path.stat().st_ino for path in paths]) == before


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize(
    "name",
    [
        "../a.jpg",
        "/a.jpg",
        "a/../../b.jpg",
        "a\\b.jpg",
        "C:/a.jpg",
        "",
        "a//b.jpg",
        ".hidden.jpg",
        "a\n.jpg",
        "./a.jpg",
    ],
)
def test_a_name_that_leaves_the_folder_is_refused(tmp_path, carrier, name):
    folder = tmp_path / "images"
    with pytest.raises(ValueError, match="is not the name of an image"):
        write_captions(folder, [("good.jpg", "good"), (name, "bad")], carrier)
    assert not list(tmp_path.rglob("*.*"))


def test_a_link_that_leads_out_of_the_folder_is_not_followed(tmp_path):
    folder, outside = tmp_path / "images", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (folder / "part").symlink_to(outside)
    with pytest.raises(ValueError, match="leads out of"):
        write_captions(folder, [("part/sub/a.jpg", "words")], ".txt")
    assert not list(outside.iterdir())
    target = outside / "secret.txt"
    target.write_text("kept")
    (folder / "a.txt").symlink_to(target)
    with pytest.raises(ValueError, match="leads out of"):
        read_captions(folder, ".txt")
    (folder / ".a.txt.aside").symlink_to(target)
    write_captions(folder, [("a.jpg", "words")], ".txt")
    assert target.read_text() == "kept"
    assert (folder / "a.txt").read_text() == "words"


@pytest.mark.parametrize(
    ("rows", "carrier", "message"),
    [
        ([("a.jpg", "x"), ("a.jpg", "y")], "metadata.csv", "'a.jpg' comes twice"),
        ([("a.jpg", "x"), ("a.png", "y")], ".txt", "'a' comes twice"),
        ([("a.jpg", "x"), ("a.png", "y")], "kohya", "'a' comes twice"),
        ([("a.txt", "x")], ".txt", "overwritten by its own caption"),
        ([("a", "x")], "kohya", "no suffix"),
        ([("a.jpg", " \n")], "metadata.csv", "caption of 'a.jpg' is empty"),
        ([("a.jpg", "x\ud800")], ".caption", "UTF-8"),
        ([("a.jpg", "x")], "skin_diff", "'a.jpg' has no label"),
        ([("a.jpg", "x", "wart", 7)], "skin_diff", "7 is not a valid SkinType"),
        ([("a.jpg", "x")], "metadata.xml", "'metadata.xml' is not known.*metadata.csv"),
    ],
)
def test_wrong_rows_are_refused_by_name_and_nothing_is_written(tmp_path, rows, carrier, message):
    with pytest.raises(ValueError, match=message):
        write_captions(tmp_path, rows, carrier)
    assert not files(tmp_path)


@pytest.mark.parametrize(
    ("carrier", "name", "content", "message"),
    [
        ("metadata.csv", "metadata.csv", "file_name,text,age\na.jpg,x,5\n", "also holds age"),
        ("metadata.csv", "metadata.csv", 'file_name,text\na.jpg,"x\n', "not a file of captions"),
        ("metadata.jsonl", "metadata.jsonl", '{"file_name": "a.jpg", "text": "x", "sex": "male"}\n', "also holds sex"),
        ("kohya", "meta_cap.json", '{"a": {"caption": "x", "tags": "y"}}', "also holds tags"),
        ("kohya", "meta_cap.json", "[" * 100_000, "not a file of captions"),
    ],
)
def test_a_file_that_says_more_than_captions_is_not_overwritten(tmp_path, carrier, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        write_captions(tmp_path, [("a.jpg", "new")], carrier)
    assert (tmp_path / name).read_text() == content


def test_files_that_other_tools_wrote_are_read(tmp_path):
    (tmp_path / "metadata.csv").write_bytes('\ufefffile_name,text,age\r\na.jpg,"two\r\nlines, é",5\r\n'.encode())
    assert read_captions(tmp_path, "metadata.csv") == [Caption("a.jpg", "two lines, é")]
    (tmp_path / "b.txt").write_text("a caption\n")
    (tmp_path / "b.PNG").touch()
    (tmp_path / "README.txt").write_text("read me")
    (tmp_path / "._b.txt").write_bytes(b"\xff")
    assert read_captions(tmp_path, ".txt") == [Caption("README", "read me"), Caption("b.PNG", "a caption")]


@pytest.mark.parametrize(
    ("carrier", "name", "content", "message"),
    [
        ("metadata.csv", "metadata.csv", b"image,caption\na.jpg,x\n", "entry 1 has no file_name"),
        ("metadata.csv", "metadata.csv", b"file_name,text\n../a.jpg,x\n", "not the name of an image"),
        ("metadata.csv", "metadata.csv", b"file_name,text\na.jpg,\xff\n", "not UTF-8"),
        ("metadata.jsonl", "metadata.jsonl", b"[1]\n", "list of objects"),
        ("metadata.jsonl", "metadata.jsonl", b"{", "metadata.jsonl"),
        ("kohya", "meta_cap.json", b"[]", "object of"),
        ("kohya", "meta_cap.json", b'{"/etc/a": {"caption": "x"}}', "not the name of an image"),
        ("kohya", "meta_cap.json", b'{"a": {"tags": "x"}}', "'a' has no caption"),
        ("skin_diff", "skin_diff.json", b'[{"image_path": "a.jpg", "prompt": "x"}]', "no label"),
        (".caption", "a.caption", b"x" * 70_000, "larger than"),
        (".caption", "a.caption", b"\xff", "not UTF-8"),
    ],
)
def test_a_file_that_is_no_carrier_is_refused_by_name(tmp_path, carrier, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_captions(tmp_path, carrier)
    assert name in str(error.value)


def test_a_side_file_between_two_images_is_refused(tmp_path):
    for name in ("a.jpg", "a.png"):
        (tmp_path / name).touch()
    (tmp_path / "a.txt").write_text("which?")
    with pytest.raises(ValueError, match=r"a.jpg or a.png"):
        read_captions(tmp_path, ".txt")


@pytest.mark.parametrize("carrier", CARRIERS)
def test_captions_that_are_not_there_are_said(tmp_path, carrier):
    with pytest.raises(FileNotFoundError):
        read_captions(tmp_path, carrier)


def test_the_key_of_an_image_is_its_path_without_the_suffix():
    assert [image_key(name) for name in ("a.jpg", "b/a.b.png")] == ["a", "b/a.b"]


def test_a_table_written_by_hand_with_python_reads_the_same(tmp_path):
    with (tmp_path / "metadata.csv").open("w", newline="") as handle:
        csv.writer(handle).writerows([["file_name", "text"], ["a.jpg", 'say "a, b"']])
    assert read_captions(tmp_path, "metadata.csv") == [Caption("a.jpg", 'say "a, b"')]
