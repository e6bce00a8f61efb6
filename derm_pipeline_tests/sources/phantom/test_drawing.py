import dataclasses
import math
from collections import Counter, defaultdict

import cv2
import numpy as np
import pytest

from derm_pipeline.images import to_square
from derm_pipeline.records import Diagnosis, SkinType
from derm_pipeline.sources.phantom.drawing import DRAWN, Phantom, PhantomCase, PhantomConfig, draw, plan

BALANCED = {diagnosis.value: 1.0 for diagnosis in DRAWN}
BARE = {"p_hair": 0.0, "p_ruler": 0.0, "p_ink": 0.0, "p_bubbles": 0.0, "p_vignette": 0.0}


def cases_of(num_images: int, seed: int, **settings: float) -> list[PhantomCase]:
    return plan(PhantomConfig(num_images=num_images, seed=seed, **(BALANCED | settings)))


def lab(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)


def test_the_same_case_gives_the_same_pixels_whatever_is_drawn_before():
    cases = cases_of(14, seed=3)
    alone = draw(cases[-1])
    in_turn = [draw(case) for case in cases][-1]
    assert alone.image.tobytes() == in_turn.image.tobytes()
    assert np.array_equal(alone.hair_mask, in_turn.hair_mask)
    assert np.array_equal(alone.lesion_mask, in_turn.lesion_mask)


def test_no_two_cases_give_the_same_pixels():
    images = [draw(case).image.tobytes() for case in cases_of(30, seed=4)]
    assert len(set(images)) == len(images)


def test_a_larger_plan_begins_with_the_smaller_one():
    assert plan(PhantomConfig(num_images=400, seed=5))[:150] == plan(PhantomConfig(num_images=150, seed=5))


def test_another_seed_is_another_dataset():
    assert plan(PhantomConfig(num_images=50, seed=1)) != plan(PhantomConfig(num_images=50, seed=2))


def test_identifiers_name_one_image_one_lesion_and_one_patient():
    cases = plan(PhantomConfig(num_images=2000, seed=6))
    assert len({case.image_id for case in cases}) == len(cases)
    lesions, patients = defaultdict(set), defaultdict(set)
    for case in cases:
        lesions[case.lesion_id].add((case.patient_id, case.diagnosis, case.site, case.lesion_seed, case.subtlety))
        patients[case.patient_id].add((case.skin_type, case.sex, case.age_years, case.patient_seed))
    assert all(len(facts) == 1 for facts in (*lesions.values(), *patients.values()))
    assert len(cases) / len(lesions) == pytest.approx(1.34, abs=0.08)
    assert len(lesions) > 1.2 * len(patients)


def test_diagnoses_come_in_the_configured_frequencies_even_in_a_small_dataset():
    config = PhantomConfig(num_images=300, seed=7)
    counts = Counter(case.diagnosis for case in plan(config))
    assert set(counts) == set(DRAWN)
    large = plan(config.model_copy(update={"num_images": 6000}))
    for diagnosis, frequency in zip(DRAWN, config.frequencies, strict=True):
        assert np.mean([case.diagnosis is diagnosis for case in large]) == pytest.approx(frequency, abs=0.02)


def test_malignant_lesions_are_rare_on_dark_skin():
    cases = plan(PhantomConfig(num_images=6000, seed=8))
    dark = {
        malignant: np.mean([case.skin_type >= SkinType.V for case in cases if case.diagnosis.is_malignant is malignant])
        for malignant in (False, True)
    }
    assert dark[False] == pytest.approx(0.24, abs=0.03)
    assert dark[True] == pytest.approx(0.10, abs=0.03)


def test_artefacts_come_in_the_configured_shares():
    config = PhantomConfig(num_images=5000, seed=9)
    counts = Counter(artefact for case in plan(config) for artefact in case.artefacts)
    for artefact in ("hair", "ruler", "ink", "bubbles", "vignette"):
        assert counts[artefact] / 5000 == pytest.approx(getattr(config, f"p_{artefact}"), abs=0.025)


def test_some_ages_sexes_and_sites_are_unknown_and_the_others_plausible():
    cases = plan(PhantomConfig(num_images=4000, seed=10))
    for field in ("age_years", "sex", "site"):
        assert 0.005 < np.mean([getattr(case, field) is None for case in cases]) < 0.05
    ages = [case.age_years for case in cases if case.age_years is not None]
    assert min(ages) >= 5
    assert max(ages) <= 90
    median = {d: np.median([c.age_years for c in cases if c.diagnosis is d and c.age_years]) for d in DRAWN}
    assert median[Diagnosis.NV] < median[Diagnosis.MEL] <= median[Diagnosis.BCC]


@pytest.mark.parametrize(
    ("skin_type", "low", "high"),
    [(1, 55, 90), (2, 41, 55), (3, 28, 41), (4, 10, 28), (5, -30, 10), (6, -90, -30)],
)
def test_bare_skin_has_the_typology_angle_of_its_type(skin_type: int, low: float, high: float):
    for case in cases_of(12, seed=11, **BARE):
        phantom = draw(dataclasses.replace(case, skin_type=SkinType(skin_type)))
        away = cv2.dilate(phantom.lesion_mask.astype(np.uint8), np.ones((41, 41), np.uint8)) == 0
        lightness, _, yellow = np.median(lab(phantom.image)[away], axis=0)
        angle = math.degrees(math.atan2(lightness - 50, yellow))
        assert low - 3 <= angle <= high + 3


def test_a_lesion_stands_out_from_every_skin():
    for number, case in enumerate(cases_of(60, seed=12, **BARE)):
        subtlety = (number // 6 % 5) / 4
        phantom = draw(dataclasses.replace(case, skin_type=SkinType(1 + number % 6), subtlety=subtlety))
        mask = phantom.lesion_mask.astype(np.uint8)
        inner = cv2.erode(mask, np.ones((9, 9), np.uint8)) > 0
        outer = cv2.dilate(mask, np.ones((41, 41), np.uint8)) == 0
        colours = lab(phantom.image)
        apart = np.linalg.norm(colours - np.median(colours[outer], axis=0), axis=2)
        # 2.3 is a just noticeable difference of CIELAB colours.
        assert apart[inner].mean() > (7 if subtlety == 0 else 3.5), case.diagnosis
        assert apart[inner].mean() > 2.5 * apart[outer].mean(), case.diagnosis


def test_another_size_shows_the_same_scene():
    for case in cases_of(10, seed=13, p_hair=1.0):
        small, large = draw(case, 200, 150), draw(case, 600, 450)
        reduced = cv2.resize(large.image, (200, 150), interpolation=cv2.INTER_AREA)
        assert np.abs(reduced.astype(int) - small.image).mean() < 3
        lesion = cv2.resize(large.lesion_mask.astype(np.uint8), (200, 150), interpolation=cv2.INTER_AREA) > 0
        assert (lesion & small.lesion_mask).sum() / (lesion | small.lesion_mask).sum() > 0.93
        # Hair is as wide in proportion, so it covers the same share of the image.
        assert large.hair_mask.mean() == pytest.approx(small.hair_mask.mean(), rel=0.25)


def test_hair_is_marked_where_it_was_drawn_and_nowhere_else():
    for case in cases_of(20, seed=14, **BARE):
        bare, hairy = draw(case), draw(dataclasses.replace(case, artefacts=("hair",)))
        assert not bare.hair_mask.any()
        assert 0.005 < hairy.hair_mask.mean() < 0.4
        change = np.abs(hairy.image.astype(int) - bare.image).max(axis=2)
        far = cv2.dilate(hairy.hair_mask.astype(np.uint8), np.ones((5, 5), np.uint8)) == 0
        assert change[far].max() <= 0.4 * 255
        assert (change[far] > 25).mean() < 0.01
        assert np.median(change[hairy.hair_mask]) > 10
        assert np.array_equal(bare.lesion_mask, hairy.lesion_mask)


@pytest.mark.parametrize("artefact", ["ruler", "ink", "bubbles", "vignette"])
def test_each_artefact_changes_the_image_and_not_the_truth(artefact: str):
    changed = 0
    for case in cases_of(12, seed=15, **BARE):
        bare, shown = draw(case), draw(dataclasses.replace(case, artefacts=(artefact,)))
        changed += (bare.image != shown.image).any()
        assert np.array_equal(bare.lesion_mask, shown.lesion_mask)
        assert not shown.hair_mask.any()
    assert changed >= 10


def test_photographs_of_one_lesion_show_one_lesion_moved():
    cases = cases_of(200, seed=16, **BARE)
    by_lesion: dict[str, list[Phantom]] = defaultdict(list)
    for case in cases:
        by_lesion[case.lesion_id].append(draw(case))
    pairs = [photos[:2] for photos in by_lesion.values() if len(photos) > 1]
    assert len(pairs) > 15
    for first, second in pairs:
        assert (first.image != second.image).any()
        assert first.structures == second.structures
        assert 0.65 < first.lesion_mask.sum() / second.lesion_mask.sum() < 1.55
        apart = lab(first.image)[first.lesion_mask].mean(axis=0) - lab(second.image)[second.lesion_mask].mean(axis=0)
        assert np.linalg.norm(apart) < 6


def _features(image: np.ndarray) -> np.ndarray:
    """What a plain eye uses at 64 px: how the middle's colours differ and at which scale they vary."""
    colours = lab(to_square(image, 64))
    colours = (colours - np.median(colours, axis=(0, 1)))[12:52, 12:52]
    parts = [np.quantile(colours, (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98), axis=(0, 1)).ravel()]
    for sigma in (1, 2, 4):
        band = cv2.GaussianBlur(colours, (0, 0), sigma) - cv2.GaussianBlur(colours, (0, 0), 2 * sigma)
        parts += [band.std(axis=(0, 1)), band.min(axis=(0, 1)), band.max(axis=(0, 1))]
    return np.concatenate(parts)


def test_typical_lesions_can_be_told_apart_at_64_px_on_light_and_dark_skin_and_subtle_ones_hardly():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def sample(num_images: int, seed: int, **changes: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        cases = cases_of(num_images, seed, p_subtle=0.0)
        cases = [dataclasses.replace(case, skin_type=SkinType(1 + n % 6), **changes) for n, case in enumerate(cases)]
        features = np.stack([_features(draw(case).image) for case in cases])
        return features, np.array([case.diagnosis for case in cases]), np.array([case.skin_type for case in cases])

    features, diagnoses, _ = sample(180, seed=17)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=150)).fit(features, diagnoses)
    unseen, truth, skin = sample(120, seed=18)
    right = classifier.predict(unseen) == truth
    assert right.mean() >= 0.95
    assert right[skin >= SkinType.V].mean() >= 0.9
    subtle, truth, _ = sample(120, seed=18, subtlety=0.9)
    assert (classifier.predict(subtle) == truth).mean() < 0.7
    # Hard, but not hopeless: what was learnt from subtle lesions names others far better than 1 in 7.
    features, diagnoses, _ = sample(100, seed=17, subtlety=0.9)
    classifier.fit(features, diagnoses)
    assert (classifier.predict(subtle) == truth).mean() > 0.35


def test_most_lesions_are_typical_and_twice_as_many_are_subtle_on_dark_skin():
    cases = plan(PhantomConfig(num_images=6000, seed=19, p_subtle=0.3))
    for dark, share in ((False, 0.3), (True, 0.6)):
        levels = np.array([case.subtlety for case in cases if (case.skin_type >= SkinType.V) is dark])
        subtle = levels > 0.2
        assert subtle.mean() == pytest.approx(share, abs=0.05)
        assert levels[~subtle].max() <= 0.1
        assert levels[subtle].min() >= 0.45
        assert levels[subtle].max() <= 0.95
        assert levels[subtle].mean() == pytest.approx(0.7, abs=0.03)
    assert max(case.subtlety for case in plan(PhantomConfig(num_images=300, p_subtle=0.0))) <= 0.1
    assert min(case.subtlety for case in plan(PhantomConfig(num_images=300, p_subtle=1.0))) >= 0.45


def test_a_lesion_changes_continuously_with_its_subtlety():
    first = {case.diagnosis: case for case in cases_of(60, seed=20, **BARE)}
    assert len(first) == 7
    for case in first.values():
        levels = [0.0, 0.005, 0.45, 0.455, 0.94, 0.945]
        phantoms = [draw(dataclasses.replace(case, subtlety=level)) for level in levels]
        for before, after in zip(phantoms[::2], phantoms[1::2], strict=True):
            lesion = before.lesion_mask | after.lesion_mask
            assert (before.lesion_mask != after.lesion_mask).sum() < 0.05 * lesion.sum()
            assert np.abs(before.image.astype(int) - after.image)[lesion].mean() < 4, case.diagnosis
        assert np.abs(phantoms[0].image.astype(int) - phantoms[-1].image)[phantoms[0].lesion_mask].mean() > 5


def test_lesions_grow_alike_with_subtlety_and_name_fewer_structures():
    first = {case.diagnosis: case for case in cases_of(60, seed=21, **BARE)}
    colours = []
    for subtlety in (0.0, 0.5, 0.9):
        phantoms = [draw(dataclasses.replace(c, subtlety=subtlety, skin_type=SkinType.II)) for c in first.values()]
        colours.append(np.array([lab(phantom.image)[phantom.lesion_mask].mean(axis=0) for phantom in phantoms]))
    spreads = [colour.std(axis=0).sum() for colour in colours]
    assert spreads[0] > 1.2 * spreads[1] > 1.2 * spreads[2]
    for case in first.values():
        seen = [set(draw(dataclasses.replace(case, subtlety=level)).structures) for level in np.linspace(0, 1, 6)]
        assert seen[0]
        assert all(more >= fewer for more, fewer in zip(seen, seen[1:], strict=False))
        assert len(seen[-1]) < len(seen[0])


def test_an_unusable_setting_is_refused_with_its_reason():
    case = cases_of(1, seed=0)[0]
    with pytest.raises(ValueError, match="32 x 32"):
        draw(case, 16, 150)
    with pytest.raises(ValueError, match="0 to 1"):
        draw(dataclasses.replace(case, subtlety=1.2))
    with pytest.raises(ValueError, match="all 0"):
        PhantomConfig(**dict.fromkeys(BALANCED, 0.0))
    with pytest.raises(ValueError, match="num_images"):
        PhantomConfig(num_images=0)
