"""The user's own sources, as `sources.yaml` says them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from derm_pipeline.images import encode_jpeg
from derm_pipeline.records import Diagnosis, Modality
from derm_pipeline.sources import SOURCES, scan
from derm_pipeline.sources.ham10000 import Ham10000
from derm_pipeline.sources.imagefolder import ImageFolder
from derm_pipeline.sources.own import own_sources

KINDS = {"ham10000": Ham10000()}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "sources.yaml"


def test_an_imagefolder_carries_its_settings(file):
    file.write_text("""
kvasir:
  kind: imagefolder
  path: /data/kvasir
  title: Kvasir
  licence: CC BY 4.0
  homepage: https://datasets.simula.no/kvasir
  modality: endoscopic
  malignant: false
  columns: {file_name: picture, diagnosis: finding}
  diagnoses: {Polyps: null, Wart: wart, 3: nv}
mine:
  kind: imagefolder
  path: mine/photos
  licence: our own
""")
    found = own_sources(file, KINDS)
    assert {name: own.path for name, own in found.items()} == {
        "kvasir": Path("/data/kvasir"),
        "mine": Path("mine/photos"),
    }
    kvasir = found["kvasir"].source
    assert isinstance(kvasir, ImageFolder)
    assert (kvasir.name, kvasir.title, kvasir.licence) == ("kvasir", "Kvasir", "CC BY 4.0")
    assert (kvasir.citation, kvasir.homepage) == ("", "https://datasets.simula.no/kvasir")
    assert (kvasir.settings.modality, kvasir.settings.malignant) == (Modality.ENDOSCOPIC, False)
    assert kvasir.settings.columns == {"file_name": "picture", "diagnosis": "finding"}
    assert kvasir.settings.diagnoses == {"polyps": None, "wart": Diagnosis.WART, "3": Diagnosis.NV}
    assert kvasir.diagnoses["mel"] == Diagnosis.MEL
    assert found["mine"].source.title == "mine"


def test_a_shipped_layout_is_read_under_the_own_name(file, tmp_path):
    file.write_text("our_ham: {kind: ham10000, licence: ours}\n")
    own = own_sources(file, KINDS)["our_ham"]
    assert own.path is None
    assert (own.source.name, own.source.licence) == ("our_ham", "ours")
    assert own.source.citation == KINDS["ham10000"].citation
    assert own.source.diagnoses == KINDS["ham10000"].diagnoses
    folder = tmp_path / "our_ham"
    (folder / "images").mkdir(parents=True)
    pixels = np.random.default_rng().integers(0, 256, (9, 12, 3), dtype=np.uint8)
    (folder / "images" / "A_1.jpg").write_bytes(encode_jpeg(pixels))
    (folder / "images" / "A_2.jpg").write_bytes(b"")
    (folder / "images" / "A_3.jpg").write_bytes(b"")
    (folder / "HAM10000_metadata.csv").write_text(
        "lesion_id,image_id,dx,dx_type,age,sex,localization\nL,A_1,nv,histo,40,male,back\nL,A_2,nv,histo,40,male,back\n"
    )
    own.source.prepare(folder)
    found = scan(own.source, folder)
    assert found.records["source"].to_pylist() == ["our_ham"]
    assert found.quarantined["source"].to_pylist() == ["our_ham"] * 2
    assert own.source.fingerprint(folder) == KINDS["ham10000"].fingerprint(folder)


def test_an_imagefolder_of_a_shipped_name_takes_its_place_and_keeps_what_labels_mean(file):
    file.write_text(
        "kvasir: {kind: imagefolder, path: /data/k, licence: ours, diagnoses: {Polyps: null, wart: wart}}\n"
    )
    own = own_sources(file, SOURCES)["kvasir"]
    assert (own.path, own.source.licence) == (Path("/data/k"), "ours")
    shipped = SOURCES["kvasir"].settings.diagnoses
    assert own.source.settings.diagnoses == shipped | {"polyps": None, "wart": Diagnosis.WART}


@pytest.mark.parametrize("text", [None, "", "# nothing yet\n"])
def test_no_file_or_an_empty_one_is_no_source(file, text):
    if text is not None:
        file.write_text(text)
    assert own_sources(file, KINDS) == {}


FOLDER = "kind: imagefolder, licence: x"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mine: {kind: folder}", r"mine.kind: 'folder' is not known; allowed: imagefolder, ham10000"),
        ("mine: {path: x}", r"mine.kind: is missing; allowed: imagefolder, ham10000"),
        ("mine: {kind: [imagefolder]}", r"mine.kind: .* allowed: imagefolder, ham10000"),
        ("mine:", r"mine: its settings are expected, at least `kind`"),
        ("[mine]", r"a mapping of source names is expected"),
        (f"Mine: {{{FOLDER}}}", r"'Mine': a source's name is of a to z"),
        (f"a/b: {{{FOLDER}}}", r"'a/b': a source's name"),
        (f"2020: {{{FOLDER}}}", r"2020: a source's name"),
        (f"ham10000: {{{FOLDER}}}", r"ham10000: is the name of a shipped source"),
        (
            f"mine: {{{FOLDER}, colums: {{}}}}",
            r"mine.colums: unknown key; the kind imagefolder allows kind, path, .*unmapped",
        ),
        (
            "mine: {kind: ham10000, columns: {}}",
            r"mine.columns: unknown key; the kind ham10000 allows kind, path, title",
        ),
        ("mine: {kind: imagefolder}", r"mine.licence: is missing"),
        (f"mine: {{{FOLDER}, diagnoses: {{a: naevus}}}}", r"mine.diagnoses.a: Input should be 'akiec', 'bcc'"),
        (f"mine: {{{FOLDER}, diagnoses: {{A: nv, a: mel}}}}", r"mine.diagnoses: the label 'a' is there twice"),
        (f"mine: {{{FOLDER}, columns: {{age: a}}}}", r"mine.columns.age: unknown here; Input should be 'file_name', "),
        (
            f"mine: {{{FOLDER}, modality: x-ray}}",
            r"mine.modality: Input should be 'dermoscopic', 'clinical' or 'endoscopic'",
        ),
        (f"mine: {{{FOLDER}, table: ../t.csv}}", r"mine.table: .* leaves the source's folder"),
        (f"mine: {{{FOLDER}}}\nmine: {{{FOLDER}}}", r"not YAML \(line 2: the key 'mine' is there twice"),
        (
            f"mine: {{{FOLDER},\n  diagnoses: {{1: mel,\n  true: nv}}}}",
            r"not YAML \(line 3: the key True is there twice",
        ),
        (
            f"mine: {{{FOLDER}, diagnoses: {{no: nv}}}}",
            r"mine.diagnoses: the label False is no text; write it in quotes",
        ),
        ("mine: {kind: imagefolder", r"not YAML \(line \d"),
        ("a: &a [1]\nb: [*a, *a]", r"not YAML \(line 2: aliases"),
        ("mine: !!python/object/apply:os.getcwd []", r"not YAML \(line 1: could not determine a constructor"),
        ("[" * 5000, r"not YAML"),
        ("é: 1".encode("latin-1"), r"not YAML"),
    ],
)
def test_a_file_that_cannot_be_used_names_the_key_and_what_is_allowed(file, text, words):
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"sources.yaml: " + words):
        own_sources(file, KINDS)
