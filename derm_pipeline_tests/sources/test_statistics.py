"""Measures have their known values, do not depend on the batch, and estimate the skin that was drawn."""

from __future__ import annotations

import cv2
import numpy as np
import pyarrow as pa
import pytest
from scipy.fft import dctn

from derm_pipeline.images import Pixels, decode, encode_jpeg, to_square
from derm_pipeline.records import SkinType
from derm_pipeline.sources import statistics as st
from derm_pipeline.sources.phantom.drawing import PhantomConfig, draw, plan


def noise(count: int, side: int = st.WORK_PX) -> Pixels:
    return np.random.default_rng().integers(0, 256, (count, side, side, 3)).astype(np.uint8)


def smooth(count: int) -> Pixels:
    coarse = np.random.default_rng().integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)
    return np.stack([cv2.resize(one, (st.WORK_PX, st.WORK_PX), interpolation=cv2.INTER_CUBIC) for one in coarse])


def flat(*colour: int) -> Pixels:
    return np.broadcast_to(np.array(colour, np.uint8), (1, st.WORK_PX, st.WORK_PX, 3)).copy()


def patch(lightness: float, a: float, b: float) -> np.ndarray:
    lab = np.array([[[lightness, a, b]]], np.float32)
    return np.rint(cv2.cvtColor(lab, cv2.COLOR_LAB2RGB)[0, 0] * 255).astype(np.uint8)


def hamming(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    return np.bitwise_count(one ^ two)


def test_means_and_deviations_are_those_of_the_channels():
    images = noise(5)
    found = st.measure(images).to_pydict()
    for channel, name in enumerate(("red", "green", "blue")):
        values = images[..., channel].reshape(5, -1).astype(float)
        assert found[f"mean_{name}"] == pytest.approx(values.mean(1), rel=1e-5)
        assert found[f"std_{name}"] == pytest.approx(values.std(1), rel=1e-5)


def test_a_row_does_not_depend_on_the_rest_of_the_batch():
    images = np.concatenate([noise(7), smooth(7), flat(0, 0, 0)])
    together = pa.Table.from_batches([st.measure(images)])
    alone = pa.Table.from_batches([st.measure(image[None]) for image in images]).combine_chunks()
    assert together.equals(alone)
    assert st.measure(images[:0]).num_rows == 0


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match="1x64x64x3"):
        st.measure(noise(1, 64))


def test_sharpness_is_the_laplacians_variance_and_falls_with_blur():
    grey = noise(1)[..., 0]
    padded = np.pad(grey[0].astype(float), 1, mode="reflect")
    laplacian = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:] - 4 * padded[1:-1, 1:-1]
    assert st.sharpness(grey)[0] == pytest.approx(laplacian.var(), rel=1e-6)
    blurred = [st.sharpness(cv2.GaussianBlur(grey[0], (0, 0), sigma)[None])[0] for sigma in (0.6, 1, 2, 4)]
    assert blurred == sorted(blurred, reverse=True)
    assert st.sharpness(flat(9, 9, 9)[..., 0])[0] == 0


def test_the_hash_is_zauners():
    images = noise(20, 32)
    for image, found in zip(images, st.perceptual_hashes(images), strict=True):
        low = dctn(image @ np.array([0.299, 0.587, 0.114]), norm="ortho")[1:9, 1:9].ravel()
        bits = [found >> place & 1 for place in range(63, -1, -1)]
        clear = abs(low - np.median(low)) > 1e-3  # grey in float32 may put what is nearer on the other side
        assert clear.sum() >= 62
        assert [bit for bit, is_clear in zip(bits, clear, strict=True) if is_clear] == list(low[clear] > np.median(low))


def test_every_flat_image_has_the_hash_zero():
    found = [st.measure(flat(value, 255 - value, 40)).to_pydict()["phash"][0] for value in range(0, 256, 5)]
    assert found == [0] * len(found)


def test_the_hash_survives_compression_another_size_and_light_and_tells_images_apart():
    phantoms = [draw(case).image for case in plan(PhantomConfig(num_images=20, seed=31))]
    changed = {
        "compressed": [decode(encode_jpeg(image, quality=60)) for image in phantoms],
        "halved": [cv2.resize(image, (100, 75), interpolation=cv2.INTER_AREA) for image in phantoms],
        "brighter": [np.clip(image * 1.1 + 5, 0, 255).astype(np.uint8) for image in phantoms],
    }
    hashes = hashes_of(phantoms)
    for images in changed.values():
        assert np.quantile(hamming(hashes, hashes_of(images)), 0.95) <= 4
    others = hamming(hashes[:, None], hashes)[np.triu_indices(len(hashes), 1)]
    assert np.median(others) > 20


def hashes_of(images: list[np.ndarray]) -> np.ndarray:
    squares = np.stack([to_square(image, st.WORK_PX, "squash") for image in images])
    return np.array(st.measure(squares)["phash"], np.uint64)


def test_a_thumbnail_is_grey_and_goes_from_the_darkest_to_the_brightest_pixel():
    images = np.concatenate([noise(10, 32), noise(10, 32) // 20 + 100])
    grey = images @ np.array([0.299, 0.587, 0.114])
    for image, found in zip(grey, st.thumbnails(images), strict=True):
        means = image.reshape(st.THUMBNAIL_PX, 2, st.THUMBNAIL_PX, 2).mean((1, 3))
        assert np.abs((means - means.min()) / np.ptp(means) * 255 - found).max() < 0.51
        assert (found.min(), found.max()) == (0, 255)
    assert st.thumbnails(images[:0]).shape == (0, st.THUMBNAIL_PX, st.THUMBNAIL_PX)


def test_light_and_contrast_leave_the_thumbnail_as_it_is_and_one_colour_has_none():
    images = noise(10, 32) // 3
    assert np.array_equal(st.thumbnails(images), st.thumbnails(images * 2 + 50))
    plain = flat(200, 90, 40)
    plain[0, 60:, :, 2] += 3  # 0.34 grey levels
    assert set(st.measure(plain)["thumbnail"][0].as_py()) == {0}


def test_the_thumbnail_of_a_row_is_its_images():
    images = np.concatenate([noise(3), smooth(3)])
    small = np.stack([cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA) for image in images])
    found = st.measure(images)["thumbnail"]
    assert found.type == st.STATISTICS_SCHEMA.field("thumbnail").type
    assert found.to_pylist() == [one.tobytes() for one in st.thumbnails(small)]


@pytest.mark.parametrize(
    ("lightness", "b", "angle", "tone", "skin_type"),
    [
        (70, 10, 63.4349, "very light", 1),
        (65, 15, 45, "light", 2),
        (50, 20, 0, "brown", 5),
        (30, 10, -63.4349, "dark", 6),
    ],
)
def test_ita_has_its_known_values(lightness, b, angle, tone, skin_type):
    assert st.ita_degrees(lightness, b) == pytest.approx(angle, abs=1e-3)
    assert st.ita_class(angle) == (tone, SkinType(skin_type))


def test_bounds_of_the_tone_classes_belong_to_the_darker_one():
    assert [int(st.ita_class(angle)[1]) for angle in (90, 55, 41, 28, 10, -30, -90)] == [1, 2, 3, 4, 5, 6, 6]
    with pytest.raises(ValueError, match="not an angle"):
        st.ita_class(float("nan"))


@pytest.mark.parametrize(("lightness", "b"), [(75, 14), (62, 17), (54, 19), (42, 17), (33, 12)])
def test_flat_skin_has_its_own_angle_also_under_a_vignette_hair_and_a_lesion_at_the_edge(lightness, b):
    image = flat(*patch(lightness, 13, b))
    expected = st.ita_degrees(lightness, b)
    assert ita(image) == pytest.approx(expected, abs=2.5)
    image[0, 20:100, :40] = patch(0.4 * lightness, 10, 8)
    for place in range(3, st.WORK_PX, 16):
        cv2.line(image[0], (place, 0), (st.WORK_PX - place, st.WORK_PX), (20, 14, 12), 1)
    seen = cv2.circle(np.zeros(image.shape[1:3], np.uint8), (64, 64), 72, 1, -1)
    image[0][seen == 0] = 0
    assert ita(image) == pytest.approx(expected, abs=4)


def ita(image: Pixels) -> float | None:
    return st.measure(image)["ita_deg"][0].as_py()


def test_a_black_image_shows_no_skin():
    assert ita(flat(0, 0, 0)) is None
    assert ita(flat(3, 3, 3)) is None


def test_the_estimate_is_the_drawn_skin_type_or_next_to_it():
    rng = np.random.default_rng()
    config = PhantomConfig(num_images=100, seed=int(rng.integers(10**6)), p_hair=0.4, p_vignette=0.4, p_ink=0.2)
    cases = plan(config)
    squares = np.stack([to_square(draw(case, 100, 75).image, st.WORK_PX, "squash") for case in cases])
    modality = pa.repeat(pa.scalar("dermoscopic"), len(cases))
    found = st.estimated_skin_types(st.measure(squares)["ita_deg"], modality).to_pylist()
    apart = np.abs(np.array(found) - [int(case.skin_type) for case in cases])
    assert (apart == 0).mean() >= 0.9
    assert (apart <= 1).mean() >= 0.98


def test_nothing_is_estimated_where_no_skin_is_seen():
    ita_deg = pa.array([None, 60.0, 60.0], pa.float32())
    found = st.estimated_skin_types(ita_deg, pa.array(["dermoscopic", "endoscopic", "clinical"]))
    assert found.to_pylist() == [None, None, 1]
