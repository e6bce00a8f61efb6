"""Folders of images as their owners keep them: with a table of any kind, or with a folder a class."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from derm_pipeline.generation import SampleRequest, SamplingConfig, write_dataset
from derm_pipeline.images import encode_jpeg
from derm_pipeline.records import Diagnosis, SkinType
from derm_pipeline.sources import scan, tables
from derm_pipeline.sources.imagefolder import ImageFolder, ImageFolderConfig
from derm_pipeline.sources.imagefolder import files as imagefolder_files
from derm_pipeline.sources.imagefolder.files import clashes, image_ids
from derm_pipeline.sources.imagefolder.typed_tables import read_jsonl, read_parquet, value_as_text


def source(**settings: Any) -> ImageFolder:
    return ImageFolder(name="own", title="Own", licence="own", settings=ImageFolderConfig.model_validate(settings))


def add_images(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode_jpeg(np.random.default_rng().integers(0, 256, (9, 12, 3), dtype=np.uint8)))


def write_rows(folder: Path, rows: list[dict[str, Any]], kind: str = "csv") -> None:
    path = folder / f"metadata.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def records(folder: Path, **settings: Any) -> dict[str, dict[str, Any]]:
    return {row["image_id"]: row for row in scan(source(**settings), folder).records.to_pylist()}


def reasons(folder: Path, **settings: Any) -> dict[str | None, str]:
    return {row.file: row.reason for row in source(**settings).list_images(folder).quarantined}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_every_kind_of_table_gives_the_same_record(tmp_path, kind):
    add_images(tmp_path, "a/one.jpg", "two.jpg")
    known = {
        "text": "a mole, dark; large",
        "diagnosis": "mel",
        "source_label": "Melanoma in situ",
        "malignant": True,
        "age_years": 45,
        "age_range": "40-49",
        "sex": "female",
        "site": "back",
        "skin_type": 5,
        "skin_tone": "dark",
        "ethnicity": "self-described",
        "lesion_id": "L1",
        "patient_id": "P1",
        "split": "test",
        "modality": "clinical",
        "camera": "phone",
        "zoom": 1.5,
    }
    nothing = dict.fromkeys(known, None)
    write_rows(tmp_path, [{"file_name": "a/one.jpg", **known}, {"file_name": "two.jpg", **nothing}], kind)
    found = records(tmp_path)
    one, two = found["a__one"], found["two"]
    assert one["file"] == "a/one.jpg"
    same = ("text", "diagnosis", "source_label", "age_years", "age_range", "sex", "site", "skin_type", "skin_tone")
    assert {name: one[name] for name in same} == {name: known[name] for name in same}
    assert [one[name] for name in ("ethnicity", "lesion_id", "patient_id")] == ["self-described", "L1", "P1"]
    assert (one["malignant"], one["official_split"], one["modality"]) == (True, "test", "clinical")
    assert one["skin_type_origin"] == "labelled"
    assert dict(one["concepts"]) == {"camera": "phone", "zoom": "1.5"}
    unknown = [two[name] for name in known if name not in ("split", "source_label", "modality", "camera", "zoom")]
    assert unknown == [None] * 12
    assert (two["official_split"], two["source_label"], two["modality"]) == (None, "", "dermoscopic")
    assert two["concepts"] == []
    assert not reasons(tmp_path)


def test_a_folder_a_class_as_kvasir_has_it(tmp_path):
    add_images(tmp_path, "polyps/1.jpg", "polyps/2.JPG", "normal-cecum/1.jpg", "top.jpg", ".cache/3.jpg")
    found = records(tmp_path, modality="endoscopic", malignant=False)
    assert {name: row["source_label"] for name, row in found.items()} == {
        "normal-cecum__1": "normal-cecum",
        "polyps__1": "polyps",
        "polyps__2": "polyps",
        "top": "",
    }
    assert {(row["diagnosis"], row["modality"], row["malignant"]) for row in found.values()} == {
        (None, "endoscopic", False),
        ("polyps", "endoscopic", False),
    }


def test_folders_may_say_the_official_split_and_ours_or_the_users_words_for_a_diagnosis(tmp_path):
    add_images(tmp_path, "train/Melanoma/1.jpg", "validation/nv/1.jpg", "test/Other/1.jpg", "test/2.jpg")
    found = records(tmp_path, diagnoses={"melanoma": "mel"})
    assert {name: (row["official_split"], row["diagnosis"], row["source_label"]) for name, row in found.items()} == {
        "train__Melanoma__1": ("train", "mel", "Melanoma"),
        "validation__nv__1": ("val", "nv", "nv"),
        "test__Other__1": ("test", None, "Other"),
        "test__2": ("test", None, ""),
    }


def test_captions_beside_the_images_are_their_text(tmp_path):
    add_images(tmp_path, "ISIC_1.jpg", "ISIC_2.jpg", "ISIC_3.jpg")
    (tmp_path / "ISIC_1.caption").write_text("photo of male skin, at age 70\n")
    (tmp_path / "ISIC_2.txt").write_bytes(b"gr\xf6\xdfe")
    before = source().fingerprint(tmp_path)
    found = records(tmp_path)
    assert {name: row["text"] for name, row in found.items()} == {
        "ISIC_1": "photo of male skin, at age 70",
        "ISIC_3": None,
    }
    assert "ISIC_2.txt is not UTF-8" in reasons(tmp_path)["ISIC_2.jpg"]
    (tmp_path / "ISIC_1.caption").write_text("another")
    assert source().fingerprint(tmp_path) != before


def test_what_the_pipeline_wrote_is_read_back(tmp_path):
    (tmp_path / "images").mkdir()
    requests = [
        SampleRequest(number, 7, diagnosis, SkinType(1 + number % 6)) for number, diagnosis in enumerate(Diagnosis)
    ]
    pixels = np.random.default_rng().integers(0, 256, (len(requests), 8, 8, 3), dtype=np.uint8)
    table = write_dataset(
        requests,
        pixels,
        SamplingConfig(),
        recipe="tiny",
        generator_digest="a" * 64,
        autoencoder_digest="b" * 64,
        write_bytes=lambda name, content: (tmp_path / name).write_bytes(content),
    )
    pq.write_table(table, tmp_path / "metadata.parquet")
    found = records(tmp_path, skin_type_origin="drawn")
    assert len(found) == len(requests)
    for request, text in zip(requests, table["text"].to_pylist(), strict=True):
        row = found[f"images__{request.number:06d}"]
        assert (row["diagnosis"], row["skin_type"], row["text"]) == (request.diagnosis, request.skin_type, text)
        assert row["skin_type_origin"] == "drawn"
        assert dict(row["concepts"])["seed"] == "7"
        assert dict(row["concepts"])["sample_id"] == f"tiny/{request.number:06d}"


def test_columns_and_words_may_be_the_owners(tmp_path):
    add_images(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    rows = [
        {
            "": "0",
            "picture": "1.jpg",
            "dx": "Psoriasis vulgaris",
            "diagnosis": "free words",
            "where": "Torso",
            "fst": "IV",
        },
        {"": "1", "picture": "2.jpg", "dx": "NA", "diagnosis": "nan", "where": "n/a", "fst": "-1"},
        {"": "2", "picture": "3.jpg", "dx": "unheard of", "diagnosis": "x", "where": "BACK", "fst": "2.0"},
    ]
    write_rows(tmp_path, rows)
    settings = {
        "columns": {"file_name": "picture", "diagnosis": "dx", "site": "where", "skin_type": "fst"},
        "diagnoses": {"psoriasis vulgaris": "psoriasis"},
        "sites": {"torso": "trunk"},
    }
    found = records(tmp_path, **settings)
    assert [row["diagnosis"] for row in found.values()] == ["psoriasis", None, None]
    assert [row["source_label"] for row in found.values()] == ["Psoriasis vulgaris", "", "unheard of"]
    assert [row["site"] for row in found.values()] == ["trunk", None, "back"]
    assert [row["skin_type"] for row in found.values()] == [4, None, 2]
    assert [dict(row["concepts"]) for row in found.values()] == [{"diagnosis": "free words"}, {}, {"diagnosis": "x"}]
    refused = reasons(tmp_path, **settings, unmapped="refuse")
    assert list(refused) == ["3.jpg"]
    assert "table line 4: the label 'unheard of' means no diagnosis here; known: akiec, " in refused["3.jpg"]


def test_images_may_go_by_an_id_that_is_their_stem_in_a_table_of_any_name(tmp_path):
    add_images(tmp_path, "x/ab12.jpg", "y/CD34.JPG", "y/left.jpg")
    (tmp_path / "Fitz.csv").write_text(",md5hash,label\n3,AB12,psoriasis\n4,cd34,mel\n5,ef56,mel\n")
    listing = source(table="Fitz.csv", columns={"image_id": "md5hash", "diagnosis": "label"}).list_images(tmp_path)
    assert [(found.image_id, found.file, found.diagnosis) for found in listing.candidates] == [
        ("AB12", "x/ab12.jpg", Diagnosis.PSORIASIS),
        ("cd34", "y/CD34.JPG", Diagnosis.MEL),
        ("ef56", None, Diagnosis.MEL),
    ]
    assert [bad.file for bad in listing.quarantined] == ["y/left.jpg"]


@pytest.mark.parametrize(
    "cell", ["../secret.jpg", "/etc/secret.jpg", "a/../../secret.jpg", "C:\\secret.jpg", "a\\b.jpg"]
)
def test_a_path_that_leaves_the_folder_is_refused(tmp_path, cell):
    folder = tmp_path / "folder"
    add_images(tmp_path, "secret.jpg", "folder/fine.jpg")
    write_rows(folder, [{"file_name": cell}, {"file_name": "./fine.jpg"}, {"file_name": ""}])
    listing = source().list_images(folder)
    assert [found.file for found in listing.candidates] == ["fine.jpg"]
    first, second = listing.quarantined
    assert first.file is None
    assert first.reason.startswith("table line 2: file_name ")
    assert "leaves the source's folder" in first.reason or "backslash" in first.reason
    assert second.reason == "table line 4: the row has no file_name"


def test_links_that_leave_the_folder_are_refused(tmp_path):
    folder = tmp_path / "folder"
    add_images(tmp_path, "outside/secret.jpg", "folder/nv/fine.jpg")
    (folder / "nv" / "link.jpg").symlink_to(tmp_path / "outside" / "secret.jpg")
    (folder / "mel").symlink_to(tmp_path / "outside")
    (folder / "round").symlink_to(folder)
    found = scan(source(), folder)
    assert found.records["file"].to_pylist() == ["nv/fine.jpg"]
    assert {row["file"]: row["reason"] for row in found.quarantined.to_pylist()} == {
        "nv/link.jpg": "the path leaves the source's folder",
        "mel": "a link to a folder is not followed",
        "round": "a link to a folder is not followed",
    }


def test_names_become_image_ids_that_stay_different():
    rng = np.random.default_rng()
    files = sorted({"".join(rng.choice(list("ab_ é/-."), rng.integers(1, 6))) + ".jpg" for _ in range(300)})
    files += ["x" * 200 + "1.jpg", "x" * 200 + "2.jpg", "deep/ISIC_0000001.jpg", "deep/ISIC_01.jpg"]
    ids = image_ids(files)
    refused = clashes(ids)
    assert set(refused) <= set(files)
    kept = [ids[file] for file in files if file not in refused]
    assert len(set(kept)) == len(kept)
    assert all(len(image_id) <= 128 and image_id[0].isalnum() and image_id.isascii() for image_id in ids.values())
    for file in refused:
        assert file in refused[file]
        assert sum(ids[other] == ids[file] for other in files) > 1
    assert ids["deep/ISIC_0000001.jpg"] == "ISIC_0000001"
    assert ids["deep/ISIC_01.jpg"] == "deep__ISIC_01"


def test_of_files_with_one_image_id_only_the_one_of_that_very_name_is_kept(tmp_path):
    add_images(tmp_path, "a b.jpg", "a_b.jpg", "c d.jpg", "c?d.jpg", "e.jpg", "e.JPG", "é f.jpg")
    listing = source().list_images(tmp_path)
    assert {found.image_id: found.file for found in listing.candidates} == {"a_b": "a_b.jpg", "x__f": "é f.jpg"}
    assert {bad.file for bad in listing.quarantined} == {"a b.jpg", "c d.jpg", "c?d.jpg", "e.jpg", "e.JPG"}
    assert all("several files for one image_id" in bad.reason for bad in listing.quarantined)


def test_every_row_and_file_is_accounted_for_whatever_is_wrong(tmp_path):
    rng = np.random.default_rng()
    names = [f"{folder}{stem}.jpg" for folder in ("", "a/", "A/") for stem in ("1", "2", "3 4", "3_4", "é")]
    add_images(tmp_path, *names)
    cells = [*names, "a__1.jpg", "A/1.JPG", "../1.jpg", "", "absent.jpg"]
    rows = [
        {"file_name": str(rng.choice(cells)), "diagnosis": "mel", "age_years": str(rng.choice(["50", "old"]))}
        for _ in range(30)
    ]
    write_rows(tmp_path, rows)
    listing = source().list_images(tmp_path)
    told = [found.file for found in (*listing.candidates, *listing.quarantined) if found.file]
    assert set(names) <= set(told)
    assert len(told) == len(set(told))
    assert len({found.image_id for found in listing.candidates}) == len(listing.candidates)
    lines = {
        int(bad.reason.split()[2].rstrip(":")) for bad in listing.quarantined if bad.reason.startswith("table line")
    }
    assert len(listing.candidates) + len(lines) == len(rows)


def test_two_rows_never_share_a_file(tmp_path):
    add_images(tmp_path, "1.jpg")
    rows = [{"file_name": name, "image_id": image_id} for name, image_id in (("1.jpg", "a"), ("./1.jpg", "b"))]
    write_rows(tmp_path, rows)
    listing = source().list_images(tmp_path)
    assert [(found.image_id, found.file) for found in listing.candidates] == [("a", "1.jpg")]
    (bad,) = listing.quarantined
    assert bad.reason == "table line 3: the file 1.jpg is already that of line 2, which is kept"


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ({"age_range": "39-30"}, "'39-30' is not a range of years"),
        ({"skin_type": "7"}, "skin_type '7' is outside the vocabulary"),
        ({"skin_type": "1", "skin_tone": "dark"}, "skin type 1 is light, and the skin tone says dark"),
        ({"modality": "x-ray"}, "allowed: dermoscopic, clinical, endoscopic"),
        ({"malignant": "maybe"}, "malignant 'maybe'"),
        ({"split": "holdout"}, "allowed: train, val, test"),
    ],
)
def test_a_word_that_is_not_understood_is_quarantined_with_the_allowed_ones(tmp_path, cells, words):
    add_images(tmp_path, "1.jpg")
    write_rows(tmp_path, [{"file_name": "1.jpg", **cells}])
    found = reasons(tmp_path)["1.jpg"]
    assert found.startswith("table line 2: ")
    assert words in found


def test_broken_lines_of_json_are_named_and_the_others_read(tmp_path):
    path = tmp_path / "metadata.jsonl"
    good = [json.dumps({"file_name": f"{number}.jpg"}).encode() for number in range(50)]
    bad = [
        b'{"file_name": ',
        b"[1, 2]",
        b'{"file_name": "gr\xf6.jpg"}',
        b'{"a": 1, "a": 2}',
        b"[" * 50_000,
        b"1" * 9000,
    ]
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([good[0], *bad, b"", *good[1:]]))
    rows = read_jsonl(path, ("file_name",))
    assert [row.line for row in rows if row.problem] == [2, 3, 4, 5, 6, 7]
    assert [row.cells["file_name"] for row in rows if not row.problem] == [f"{number}.jpg" for number in range(50)]
    reason = {bad.reason for bad in source().list_images(tmp_path).quarantined}
    assert "table line 3: the row is no JSON object" in reason
    with pytest.raises(ValueError, match="no column 'picture'; columns found: file_name"):
        read_jsonl(path, ("picture",))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (float("nan"), ""),
        (3.0, "3"),
        (3.25, "3.25"),
        (1e300, "1e+300"),
        (7, "7"),
        (True, "true"),
        (" a ", "a"),
        ("\ud800", "\ufffd"),
        (["é", 1], '["é", 1]'),
        ({"a": None}, '{"a": null}'),
    ],
)
def test_typed_values_become_text(value, text):
    assert value_as_text(value) == text


def test_a_parquet_table_is_read_within_bounds(tmp_path, monkeypatch):
    path = tmp_path / "metadata.parquet"
    path.write_bytes(b"PAR1 is not all that it takes PAR1")
    with pytest.raises(ValueError, match=r"metadata.parquet is not a parquet table"):
        read_parquet(path, ())
    pq.write_table(pa.table({"file_name": ["a"], "image": [{"bytes": b"1"}]}), path)
    with pytest.raises(ValueError, match=r"the column 'image' holds struct"):
        read_parquet(path, ("file_name",))
    with pytest.raises(ValueError, match=r"no column 'picture'; columns found: file_name, image"):
        read_parquet(path, ("picture",))
    many = pa.DictionaryArray.from_arrays(np.zeros(20_000, np.int32), ["x" * (tables.MAX_ROW_CHARS + 1)])
    pq.write_table(pa.table({"file_name": many}), path)
    assert path.stat().st_size < 200_000
    with pytest.raises(ValueError, match=r"a cell of 'file_name' has more than 100,000 bytes"):
        read_parquet(path, ())
    pq.write_table(pa.table({"file_name": ["a", "b"], "__index_level_0__": [5, 6]}), path)
    assert [dict(row.cells) for row in read_parquet(path, ())] == [{"file_name": "a"}, {"file_name": "b"}]
    monkeypatch.setattr("derm_pipeline.sources.imagefolder.typed_tables.MAX_ROWS", 1)
    with pytest.raises(ValueError, match="2 rows; at most 1"):
        read_parquet(path, ())


def test_a_tree_that_is_too_deep_or_too_large_is_an_error(tmp_path, monkeypatch):
    add_images(tmp_path, "/".join("d" * 16) + "/1.jpg", "2.jpg")
    assert len(source().list_images(tmp_path).candidates) == 2
    monkeypatch.setattr(imagefolder_files, "MAX_FILES", 1)
    with pytest.raises(ValueError, match="more than 1 files"):
        source().list_images(tmp_path)
    monkeypatch.undo()
    add_images(tmp_path, "/".join("d" * 17) + "/1.jpg")
    with pytest.raises(ValueError, match="more than 16 folders deep"):
        source().list_images(tmp_path)


def test_the_fingerprint_follows_tables_images_and_settings(tmp_path):
    add_images(tmp_path, "a/1.jpg")
    write_rows(tmp_path, [{"file_name": "a/1.jpg"}])
    seen = [source().fingerprint(tmp_path)]
    (tmp_path / "README.md").write_text("no part of it")
    assert source().fingerprint(tmp_path) == seen[0]
    seen.append(source(modality="clinical").fingerprint(tmp_path))
    write_rows(tmp_path, [{"file_name": "a/1.jpg", "text": "said"}])
    seen.append(source().fingerprint(tmp_path))
    add_images(tmp_path, "a/b/2.jpg")
    seen.append(source().fingerprint(tmp_path))
    assert len(set(seen)) == 4


def test_what_is_missing_or_not_clear_says_what_to_do(tmp_path):
    own = source()
    for look in (own.prepare, own.list_images, own.fingerprint):
        with pytest.raises(FileNotFoundError, match=r"Own is looked for in .*nowhere.*Expected there: images"):
            look(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no image file"):
        own.prepare(tmp_path)
    add_images(tmp_path, "train/1.jpg")
    own.prepare(tmp_path)
    with pytest.raises(FileNotFoundError, match="`columns` needs one"):
        source(columns={"diagnosis": "dx"}).list_images(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no table all.csv"):
        source(table="all.csv").list_images(tmp_path)
    write_rows(tmp_path / "train", [{"file_name": "1.jpg"}])
    with pytest.raises(ValueError, match=r"no table at the top, but train/metadata.csv"):
        own.list_images(tmp_path)
    write_rows(tmp_path, [{"picture": "train/1.jpg"}])
    with pytest.raises(ValueError, match="no column 'file_name'; columns found: picture"):
        own.prepare(tmp_path)
    write_rows(tmp_path, [{"file_name": "train/1.jpg"}], "jsonl")
    with pytest.raises(ValueError, match=r"metadata.csv, metadata.jsonl; say in `table`"):
        own.list_images(tmp_path)
    assert source(table="metadata.jsonl").list_images(tmp_path).candidates


@pytest.mark.parametrize("table", ["../metadata.csv", "/etc/passwd"])
def test_the_table_stays_within_the_folder(tmp_path, table):
    with pytest.raises(ValueError, match="leaves the source's folder"):
        ImageFolderConfig(table=table)
    add_images(tmp_path, "folder/1.jpg")
    write_rows(tmp_path, [{"file_name": "1.jpg"}])
    (tmp_path / "folder" / "metadata.csv").symlink_to(tmp_path / "metadata.csv")
    with pytest.raises(ValueError, match="a link that leaves the source's folder"):
        source().list_images(tmp_path / "folder")
