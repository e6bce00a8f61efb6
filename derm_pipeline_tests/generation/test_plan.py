"""Samples: the right number of each, each its own, all of them traceable and readable by others."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from derm_pipeline.captions.metadata import names_unknown
from derm_pipeline.generation import (
    SampleRequest,
    SamplingConfig,
    captions_of,
    diagnosis_called,
    plan_samples,
    requests_of_cells,
    sample_seed,
)
from derm_pipeline.records import Diagnosis, SkinType
from derm_pipeline_tests.generation.networks import SEVEN

CELLS = [(diagnosis, skin_type) for diagnosis in SEVEN for skin_type in (None, *SkinType)]


def tally(requests, cells):
    return {cell: sum((request.diagnosis, request.skin_type) == cell for request in requests) for cell in cells}


@given(st.integers(1, 2000), st.lists(st.sampled_from(SkinType), unique=True))
@settings(max_examples=30, deadline=None)
def test_balanced_samples_differ_by_one_at_most_in_every_cell_and_every_diagnosis(num_samples, skin_types):
    requests = plan_samples(SamplingConfig(num_samples=num_samples, skin_types=tuple(skin_types)), SEVEN, {})
    cells = [(diagnosis, skin_type) for diagnosis in SEVEN for skin_type in (skin_types or [None])]
    by_cell = tally(requests, cells)
    assert sum(by_cell.values()) == len(requests) == num_samples
    assert max(by_cell.values()) - min(by_cell.values()) <= 1
    by_diagnosis = [sum(request.diagnosis == diagnosis for request in requests) for diagnosis in SEVEN]
    assert max(by_diagnosis) - min(by_diagnosis) <= 1


@given(
    st.integers(1, 1500),
    st.lists(st.sampled_from(SkinType), unique=True),
    st.dictionaries(st.sampled_from(CELLS), st.integers(1, 500)),
)
@settings(max_examples=60, deadline=None)
def test_filling_up_is_in_proportion_to_what_each_cell_lacks(num_samples, skin_types, train_counts):
    config = SamplingConfig(plan="fill", num_samples=num_samples, skin_types=tuple(skin_types))
    requests = plan_samples(config, SEVEN, train_counts)
    assert len(requests) == num_samples
    if skin_types:
        there = {(d, s): train_counts.get((d, s), 0) for d in SEVEN for s in skin_types}
    else:
        there = {(d, None): sum(n for (other, _), n in train_counts.items() if other == d) for d in SEVEN}
    found = tally(requests, there)
    assert sum(found.values()) == num_samples
    lacking = {cell: max(there.values()) - count for cell, count in there.items()}
    total = sum(lacking.values())
    for cell, count in found.items():
        share = num_samples * lacking[cell] / total if total else num_samples / len(there)
        assert abs(count - share) < 1 + 1e-6
        assert count == 0 or lacking[cell] > 0 or total == 0  # the fullest cell gets nothing


def test_samples_are_numbered_and_seeded_in_order():
    requests = plan_samples(SamplingConfig(num_samples=500, seed=3), SEVEN, {})
    assert [request.number for request in requests] == list(range(500))
    assert [request.seed for request in requests] == [sample_seed(3, number) for number in range(500)]
    assert len({request.seed for request in requests}) == 500
    assert all(0 <= request.seed < 2**63 for request in requests)
    assert requests[7].file_name == "images/000007.png"
    assert requests != plan_samples(SamplingConfig(num_samples=500, seed=4), SEVEN, {})


def test_captions_name_no_unknown():
    requests = [SampleRequest(0, 0, *cell) for cell in CELLS]
    captions = captions_of(requests)
    assert not [caption for caption in captions if names_unknown(caption)]
    assert all(r.diagnosis.phrase in caption for r, caption in zip(requests, captions, strict=True))
    assert len(set(captions)) == len(CELLS)


def test_samples_of_cells_are_told_apart_by_their_seeds_and_in_a_grid_the_columns_are():
    cells = [(diagnosis, skin_type) for diagnosis in SEVEN[:3] for skin_type in (SkinType.I, SkinType.VI)]
    requests = requests_of_cells(SEVEN[:3], (SkinType.I, SkinType.VI), 4, seed=8, further={"sex": "female"})
    assert [(one.diagnosis, one.skin_type) for one in requests] == [cell for cell in cells for _ in range(4)]
    assert [one.number for one in requests] == list(range(24))
    assert len({one.seed for one in requests}) == 24
    assert {one.prompt for one in requests[:4]} == {"diagnosis=akiec, skin_type=1, sex=female"}
    side_by_side = requests_of_cells(SEVEN[:3], (SkinType.I, SkinType.VI), 4, seed=8, same_noise=True)
    assert [one.seed for one in side_by_side] == [sample_seed(8, number) for number in range(4)] * 6


def test_a_diagnosis_goes_by_its_code_or_its_words():
    for diagnosis in Diagnosis:
        for words in (diagnosis.value, diagnosis.value.upper(), diagnosis.phrase, f" {diagnosis.phrase.title()} "):
            assert diagnosis_called(words, tuple(Diagnosis)) == diagnosis
    with pytest.raises(ValueError, match=r"'psoriasis'.*akiec \(actinic.*mel \(melanoma\)"):
        diagnosis_called("psoriasis", SEVEN)


def test_an_interval_that_holds_no_noise_level_is_refused():
    for wrong in ((1.0, 1.0), (2.0, 1.0), (-1.0, 1.0)):
        with pytest.raises(ValueError, match="holds no noise level"):
            SamplingConfig(guidance_interval=wrong)
