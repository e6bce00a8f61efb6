from __future__ import annotations

import cv2
import numpy as np
import pytest

from derm_pipeline.captions.segmentation import WORK_PX, see
from derm_pipeline.sources.phantom.drawing import PhantomConfig, draw, plan


def skin(rng, height=150, width=200, colour=(225, 185, 165)):
    return np.clip(np.array(colour) + rng.normal(0, 3, (height, width, 3)), 0, 255).astype(np.uint8)


def disc_lesion(rng, centre=(100, 75), radius=30, colour=(110, 70, 50)):
    image, mask = skin(rng), np.zeros((150, 200), np.uint8)
    cv2.circle(mask, centre, radius, 1, -1)
    image[mask > 0] = np.clip(np.array(colour) + rng.normal(0, 3, (int(mask.sum()), 3)), 0, 255)
    return image, mask.astype(bool)


def overlap(mask, truth):
    found = cv2.resize(mask.astype(np.float32), truth.shape[::-1]) > 0.5
    return (found & truth).sum() / (found | truth).sum()


@pytest.mark.parametrize("seed", range(3))
def test_a_disc_off_the_centre_is_found(seed):
    rng = np.random.default_rng(seed)
    image, truth = disc_lesion(rng, centre=tuple(int(v) for v in rng.integers((75, 60), (125, 90))))
    assert overlap(see(image).lesion, truth) > 0.85


def test_lesions_of_phantoms_are_found_on_every_skin():
    cases = plan(PhantomConfig(num_images=600, seed=int(np.random.default_rng().integers(1000))))
    chosen = [case for tone in range(1, 7) for case in [case for case in cases if case.skin_type == tone][:8]]
    phantoms = [draw(case) for case in chosen]
    overlaps = np.array([overlap(see(phantom.image).lesion, phantom.lesion_mask) for phantom in phantoms])
    assert np.median(overlaps) >= 0.75
    assert np.mean(overlaps > 0.5) >= 0.9


def test_a_vignette_is_not_skin():
    image, truth = disc_lesion(np.random.default_rng(0))
    rows, columns = np.mgrid[:150, :200]
    dark = np.hypot(rows - 75, columns - 100) > 95
    image[dark] = 5
    scene = see(image)
    assert overlap(~scene.field, dark) > 0.5
    assert overlap(scene.lesion, truth) > 0.85
    assert not (scene.skin & ~scene.field).any()


def test_hair_neither_joins_the_lesion_nor_counts_as_skin():
    rng = np.random.default_rng(1)
    image, truth = disc_lesion(rng)
    lines = np.zeros((150, 200), np.uint8)
    for start, end in zip(rng.integers(0, 150, 6), rng.integers(0, 150, 6), strict=True):
        cv2.line(lines, (0, int(start)), (199, int(end)), 1, 1)
    image[lines > 0] = 25
    for scene in (see(image), see(image, lines > 0)):
        assert overlap(scene.lesion, truth) > 0.8
        assert (scene.hair & scene.skin).sum() == 0
        assert overlap(scene.hair, lines > 0) > 0.4


def test_the_scale_is_fixed():
    image, truth = disc_lesion(np.random.default_rng(2))
    large = cv2.resize(image, (800, 600), interpolation=cv2.INTER_CUBIC)
    small, big = see(image), see(large)
    assert small.rgb.shape == big.rgb.shape == (144, WORK_PX, 3)
    assert overlap(big.lesion, truth) > 0.85
    assert overlap(small.lesion, truth) > 0.85


@pytest.mark.parametrize("value", [0, 128, 255])
@pytest.mark.parametrize("shape", [(150, 200, 3), (1, 1, 3), (400, 3, 3), (64, 64, 3)])
def test_an_empty_picture_has_no_lesion(value, shape):
    scene = see(np.full(shape, value, np.uint8))
    assert not scene.lesion.any()
    assert scene.skin.any()


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)])
def test_what_is_not_an_rgb_image_is_refused(image):
    with pytest.raises(ValueError, match="uint8 RGB"):
        see(image)
