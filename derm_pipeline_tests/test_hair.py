import dataclasses

import cv2
import numpy as np
import pytest

from derm_pipeline.hair import CONTOUR_LIMIT_PX, HairConfig, contour_length_px, detect_hair, remove_hair
from derm_pipeline.sources.phantom.drawing import DRAWN, Phantom, PhantomConfig, draw, plan

BALANCED = {diagnosis.value: 1.0 for diagnosis in DRAWN}
MIXED = {"p_hair": 0.5, "p_ruler": 0.3, "p_ink": 0.2, "p_bubbles": 0.3, "p_vignette": 0.4}


def phantoms(num_images: int, width: int, seed: int, **chances: float) -> list[Phantom]:
    cases = plan(PhantomConfig(num_images=num_images, seed=seed, **BALANCED, **(MIXED | chances)))
    return [draw(case, width, width * 3 // 4) for case in cases]


def auroc(positive: list[float], negative: list[float]) -> float:
    high, low = np.array(positive)[:, None], np.array(negative)
    return float((high > low).mean() + 0.5 * (high == low).mean())


def dice(found: np.ndarray, truth: np.ndarray) -> float:
    return 2 * (found & truth).sum() / (found.sum() + truth.sum())


@pytest.mark.parametrize(("width", "num_images"), [(200, 70), (450, 24), (1200, 8)])
def test_hair_is_told_from_all_else_that_is_thin_and_dark(width: int, num_images: int):
    drawn = phantoms(num_images, width, seed=31)
    found = [detect_hair(phantom.image) for phantom in drawn]
    with_hair = [hair for hair, phantom in zip(found, drawn, strict=True) if "hair" in phantom.artefacts]
    without = [hair for hair, phantom in zip(found, drawn, strict=True) if "hair" not in phantom.artefacts]
    assert min(len(with_hair), len(without)) >= 2
    assert auroc([hair.score for hair in with_hair], [hair.score for hair in without]) >= 0.99
    masks = [(h.mask, p.hair_mask) for h, p in zip(found, drawn, strict=True) if "hair" in p.artefacts]
    assert np.mean([dice(mask, truth) for mask, truth in masks]) >= 0.75
    assert np.mean([hair.is_hairy for hair in with_hair]) >= 0.95
    assert np.mean([hair.is_hairy for hair in without]) <= 0.05


def test_a_ruler_alone_is_not_hair():
    rulers = phantoms(60, 200, seed=32, p_hair=0, p_ruler=1, p_ink=0, p_bubbles=0, p_vignette=0)
    assert sum(detect_hair(phantom.image).is_hairy for phantom in rulers) <= 1


def test_the_score_hardly_depends_on_the_size_of_the_image():
    cases = plan(PhantomConfig(num_images=10, seed=33, **BALANCED, **(MIXED | {"p_hair": 1.0})))
    small = np.array([detect_hair(draw(case, 300, 225).image).score for case in cases])
    large = np.array([detect_hair(draw(case, 900, 675).image).score for case in cases])
    assert np.median(np.abs(large / small - 1)) < 0.15


def test_004s_count_depends_on_the_size_of_the_image():
    case = next(c for c in plan(PhantomConfig(num_images=99, seed=34, **BALANCED)) if c.artefacts == ("hair",))
    assert contour_length_px(draw(case, 1200, 900).image) > 3 * contour_length_px(draw(case, 200, 150).image)


def test_plain_skin_has_no_hair():
    found = detect_hair(np.full((150, 200, 3), (220, 170, 150), np.uint8))
    assert not found.mask.any()
    assert (found.coverage, found.score, found.is_hairy) == (0.0, 0.0, False)


@pytest.mark.parametrize("angle", [0, 11, 30, 45, 77, 90, 140])
def test_the_score_is_the_length_in_image_diagonals_and_the_mask_is_the_line(angle: int):
    image, truth = np.full((600, 800, 3), (220, 170, 150), np.uint8), np.zeros((600, 800), np.uint8)
    step = 250 * np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))])
    ends = [tuple(int(v) for v in np.round(np.array([400, 300]) + sign * step)) for sign in (-1, 1)]
    cv2.line(image, *ends, (40, 30, 25), 5, cv2.LINE_AA)
    cv2.line(truth, *ends, 1, 5)
    found = detect_hair(image)
    assert found.score == pytest.approx(500 / 1000, rel=0.15)
    assert dice(found.mask, truth > 0) > 0.8
    assert found.coverage == pytest.approx(found.mask.mean())


def test_what_is_thin_but_red_or_dark_but_wide_or_short_is_not_hair():
    skin = np.full((600, 800, 3), (225, 175, 160), np.uint8)
    vessel, blotch, dots = skin.copy(), skin.copy(), skin.copy()
    cv2.line(vessel, (100, 100), (700, 500), (200, 60, 70), 5, cv2.LINE_AA)
    cv2.line(blotch, (100, 100), (700, 500), (60, 40, 35), 60, cv2.LINE_AA)
    for x in range(60, 760, 70):
        cv2.line(dots, (x, 300), (x + 20, 320), (40, 30, 25), 5, cv2.LINE_AA)
    for image in (vessel, blotch, dots):
        assert detect_hair(image).score < 0.02


def test_the_flag_is_the_score_against_the_threshold():
    image = next(p.image for p in phantoms(20, 200, seed=35) if "hair" in p.artefacts)
    score = detect_hair(image).score
    assert detect_hair(image, HairConfig(hairy_score=score)).is_hairy
    assert not detect_hair(image, HairConfig(hairy_score=score + 1e-6)).is_hairy


@pytest.mark.parametrize("shape", [(150, 200), (200, 150), (33, 400), (64, 64), (401, 399)])
def test_the_mask_has_the_images_size(shape: tuple[int, int]):
    image = np.random.default_rng(36).integers(0, 256, (*shape, 3), dtype=np.uint8)
    for config in (HairConfig(), HairConfig(method="canny_004")):
        found = detect_hair(image, config)
        assert found.mask.shape == shape
        assert found.mask.dtype == bool
        assert np.isfinite(found.score)


def test_004s_law_sums_open_contours_of_at_least_100_px():
    image = np.full((1000, 1000, 3), 255, np.uint8)
    for x in range(50, 950, 100):
        cv2.rectangle(image, (x, 100), (x + 20, 900), (0, 0, 0), cv2.FILLED)
    cv2.rectangle(image, (500, 20), (510, 30), (0, 0, 0), cv2.FILLED)  # its outline is shorter than 100 px
    grey = cv2.GaussianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (5, 5), 0)
    contours = cv2.findContours(cv2.Canny(grey, 50, 250), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0]
    lengths = [cv2.arcLength(contour, False) for contour in contours]
    assert contour_length_px(image) == pytest.approx(sum(length for length in lengths if length >= 100))
    assert min(lengths) < 100
    # Nine bars of 21 x 801 px, outlined all around but for the gap between the last point and the first.
    assert contour_length_px(image) == pytest.approx(9 * 2 * (21 + 801), rel=0.1)
    found = detect_hair(image, HairConfig(method="canny_004"))
    assert found.is_hairy == (contour_length_px(image) > CONTOUR_LIMIT_PX)
    assert found.score == pytest.approx(contour_length_px(image) / np.hypot(1000, 1000))


def test_removing_hair_brings_the_bare_image_back():
    for phantom in phantoms(12, 200, seed=37, p_hair=1, p_ruler=0, p_ink=0, p_bubbles=0, p_vignette=0):
        bare = draw(dataclasses.replace(phantom.case, artefacts=())).image.astype(int)
        mask = phantom.hair_mask
        cleaned = remove_hair(phantom.image, mask)
        before, after = (np.abs(image.astype(int) - bare)[mask].mean() for image in (phantom.image, cleaned))
        assert after < 0.45 * before
        far = cv2.dilate(mask.astype(np.uint8), np.ones((5, 5), np.uint8)) == 0
        assert np.array_equal(cleaned[far], phantom.image[far])


def test_removing_nothing_changes_nothing():
    image = np.random.default_rng(38).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    cleaned = remove_hair(image, np.zeros((60, 80), bool))
    assert np.array_equal(cleaned, image)
    assert cleaned is not image


def test_an_unusable_input_is_refused_with_its_reason():
    with pytest.raises(ValueError, match="uint8 RGB"):
        detect_hair(np.zeros((10, 10), np.uint8))
    with pytest.raises(ValueError, match="uint8 RGB"):
        contour_length_px(np.zeros((10, 10, 3), np.float32))
    with pytest.raises(ValueError, match="must be equal"):
        remove_hair(np.zeros((10, 10, 3), np.uint8), np.zeros((9, 10), bool))
