from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from derm_pipeline.captions.descriptors import Measurements, measure
from derm_pipeline.captions.metadata import names_unknown
from derm_pipeline.captions.segmentation import see
from derm_pipeline.captions.visual import (
    DESCRIPTOR_SCHEMA,
    VISUAL_CAPTION_SCHEMA,
    DescriptorConfig,
    described_table,
    descriptors_table,
    measurements_of,
    sentence,
)
from derm_pipeline.records import Diagnosis, Modality
from derm_pipeline.sources.phantom.drawing import PhantomConfig, draw, plan

DISEASE = re.compile(
    r"melanom|nevus|naev|carcinom|keratos|fibrom|vascular|angiom|malignan|benign|cancer|tumou?r|suspicious|"
    + "|".join(re.escape(diagnosis.phrase) for diagnosis in Diagnosis)
)
PLAIN = {
    "has_lesion": True,
    "lesion_fraction": 0.2,
    "contrast": 20.0,
    "compactness": 1.1,
    "dark_brown": 0.9,
    "ita_deg": 45.0,
    "border_irregularity": 0.07,
}


def measured(**changes):
    zero = dict.fromkeys(Measurements.__dataclass_fields__, 0)
    return Measurements(**(zero | PLAIN | changes))


FRACTION = st.floats(0, 1)
MEASUREMENTS = st.builds(
    Measurements,
    **{
        name: st.booleans() if kind == "bool" else st.integers(0, 300) if kind == "int" else FRACTION
        for name, kind in Measurements.__annotations__.items()
    }
    | {"ita_deg": st.floats(-90, 90), "colour_asymmetry": st.floats(0, 40), "centre_lightness": st.floats(-40, 40)},
)


@given(MEASUREMENTS, st.sampled_from([None, True, False]))
def test_every_sentence_is_short_clean_and_names_no_disease(measurements, is_hairy):
    text = sentence(measurements, is_hairy)
    assert len(text.split()) < 60
    assert text == " ".join(text.split())
    assert not DISEASE.search(text.replace("dermoscopic", ""))
    assert not names_unknown(text)
    assert ("hairs" in text) == (is_hairy if is_hairy is not None else measurements.hair_fraction > 0.008)
    assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text)


@pytest.mark.parametrize(
    ("changes", "is_hairy", "text"),
    [
        ({}, None, "dermoscopic image of a medium-sized, symmetric lesion on light skin, dark brown"),
        (
            {"border_irregularity": 0.2, "asymmetry": 0.3, "lesion_fraction": 0.5, "dark_brown": 0.6, "black": 0.2},
            True,
            "dermoscopic image of a large, asymmetric lesion with an irregular border on light skin, "
            "mostly dark brown with black; hairs visible",
        ),
        (
            {"ita_deg": -50, "lesion_fraction": 0.05, "border_irregularity": 0, "border_sharpness": 0.9}
            | {"dark_brown": 0.4, "blue_grey": 0.3, "red": 0.2, "colour_asymmetry": 20, "dark_corner_fraction": 0.1},
            True,
            "dermoscopic image of a small, symmetric lesion with a smooth, sharp border on very dark skin, "
            "unevenly coloured in dark brown, blue-grey and red; hairs and dark corners visible",
        ),
        (
            {"dark_brown": 0.0, "network_fraction": 0.5, "num_mesh_holes": 40, "mesh_density": 0.5}
            | {"num_bright_spots": 30, "centre_lightness": 12},
            False,
            "dermoscopic image of a medium-sized, symmetric lesion on light skin, close to the colour of the skin, "
            "with a network-like texture and a paler centre",
        ),
        (
            {"cut_off_fraction": 0.5, "asymmetry": 0.5},
            None,
            "dermoscopic image of a large lesion that reaches beyond the view on light skin, dark brown",
        ),
        ({"has_lesion": False}, True, "dermoscopic image of light skin on which no lesion stands out; hairs visible"),
    ],
)
def test_measurements_become_these_sentences(changes, is_hairy, text):
    assert sentence(measured(**changes), is_hairy) == text


def test_the_sentence_says_how_the_image_was_taken():
    assert sentence(measured(), modality=Modality.CLINICAL).startswith("clinical image of a medium-sized")
    assert sentence(measured(), modality=Modality.CLINICAL) == sentence(measured()).replace("dermoscopic", "clinical")


def test_a_threshold_of_the_settings_decides():
    config = DescriptorConfig(colour_fraction=0.01)
    assert sentence(measured(black=0.02), config=config).endswith("mostly dark brown with black")
    assert sentence(measured(black=0.02)).endswith("dark brown")


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(8, 90), st.integers(8, 90))
def test_noise_of_any_shape_gets_a_finite_sentence(seed, height, width):
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    found = measure(see(image))
    assert sentence(found).startswith("dermoscopic image of ")
    assert all(np.isfinite(value) for value in vars(found).values())


def phantoms(count):
    seed = int(np.random.default_rng().integers(1000))
    return [draw(case) for case in plan(PhantomConfig(num_images=count, seed=seed))]


def test_captions_of_phantoms_differ_and_know_hair_when_told():
    drawn = phantoms(60)
    hairy = ["hair" in phantom.artefacts for phantom in drawn]
    texts = [
        sentence(measure(see(phantom.image, phantom.hair_mask)), is_hairy)
        for phantom, is_hairy in zip(drawn, hairy, strict=True)
    ]
    assert [("hairs" in text) for text in texts] == hairy
    assert len(set(texts)) > 30


def test_measurements_come_back_from_their_table():
    found = [measure(see(phantom.image, phantom.hair_mask)) for phantom in phantoms(6)]
    table = descriptors_table(found)
    assert table.schema == DESCRIPTOR_SCHEMA
    assert measurements_of(table.append_column("sha256", pa.array(list("abcdef")))) == found
    assert table["estimated_skin_type"].to_pylist() == [int(one.skin_type) for one in found]
    assert descriptors_table([]).schema == DESCRIPTOR_SCHEMA


def test_sentences_become_a_table_with_its_schema():
    table = described_table(["a", "b"], ["a lesion", "another"])
    assert table.schema == VISUAL_CAPTION_SCHEMA
    row = table.to_pylist()[1]
    assert (row["sha256"], row["captioner"], row["text"]) == ("b", "descriptor", "another")
    assert row["verdict"] is row["raw_answer"] is row["gate_reasons"] is None
    with pytest.raises(ValueError, match="zip"):
        described_table(["a"], [])


def test_of_mucosa_nothing_is_measured_and_nothing_said():
    assert sentence(measured(), True, modality=Modality.ENDOSCOPIC) == "endoscopic image"


def test_captions_import_neither_torch_nor_their_siblings():
    code = (
        "import sys, derm_pipeline.captions.metadata, derm_pipeline.captions.symptoms;"
        "bad = {'torch', 'transformers', 'openai', 'scipy', 'pandas', 'dagster', 'derm_pipeline.hair'};"
        "bad &= set(sys.modules);"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
