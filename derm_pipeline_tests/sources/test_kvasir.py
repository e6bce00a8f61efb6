"""Kvasir: a folder a finding, and what its images are called."""

import numpy as np

from derm_pipeline.captions.metadata import MetadataCaptionConfig, metadata_captions
from derm_pipeline.images import encode_jpeg
from derm_pipeline.records import Diagnosis
from derm_pipeline.sources import SOURCES, scan

FINDINGS = {
    "dyed-lifted-polyps": "endoscopic image of dyed lifted polyps",
    "dyed-resection-margins": "endoscopic image of dyed resection margins",
    "esophagitis": "endoscopic image of esophagitis",
    "normal-cecum": "endoscopic image of normal cecum",
    "normal-pylorus": "endoscopic image of normal pylorus",
    "normal-z-line": "endoscopic image of normal Z-line",
    "polyps": "endoscopic image of polyps",
    "ulcerative-colitis": "endoscopic image of ulcerative colitis",
}


def test_every_folder_is_a_finding_that_is_learnt_and_named(tmp_path):
    for folder in FINDINGS:
        (tmp_path / folder).mkdir()
        pixels = np.random.default_rng().integers(0, 256, (12, 16, 3), dtype=np.uint8)
        (tmp_path / folder / "0.jpg").write_bytes(encode_jpeg(pixels))
    source = SOURCES["kvasir"]
    source.prepare(tmp_path)
    found = scan(source, tmp_path)
    assert found.quarantined.num_rows == 0
    rows = found.records.to_pylist()
    assert {row["source_label"] for row in rows} == set(FINDINGS)
    assert [row["diagnosis"] for row in rows] == [row["source_label"].replace("-", "_") for row in rows]
    assert {row["malignant"] for row in rows} == {False}
    assert not any(Diagnosis(row["diagnosis"]).is_malignant for row in rows)
    said = metadata_captions(rows, config=MetadataCaptionConfig(style="rich"))
    assert dict(zip((row["source_label"] for row in rows), said, strict=True)) == FINDINGS
