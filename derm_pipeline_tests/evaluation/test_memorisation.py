"""Planted copies are found, all of them; independent draws are not flagged beyond chance."""

import cv2
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from derm_pipeline.evaluation.memorisation import (
    CopyConfig,
    ImageSet,
    find_copies,
    orientations,
    pixel_descriptors,
)

SIZE = 48


def draw(rng, count):
    """Soft spots of random colour on a ground common to all, with a texture of their own."""
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE - 0.5
    images = np.empty((count, SIZE, SIZE, 3))
    for image in images:
        cx, cy, radius = rng.normal(0, 0.06, 2).tolist() + [rng.uniform(0.15, 0.35)]
        inside = 1 / (1 + np.exp((np.hypot(x - cx, (y - cy) * rng.uniform(0.7, 1.4)) - radius) * 30))
        texture = gaussian_filter(rng.normal(size=(SIZE, SIZE)), 2.5) * 150
        image[:] = [205, 165, 145] - inside[..., None] * rng.uniform(60, 120, 3) + (inside * texture)[..., None]
    return np.clip(images, 0, 255).astype(np.uint8)


def features(images):
    """Channel means and spreads: blind to flips and rotations, as a good network's would be."""
    flat = images.reshape(len(images), -1, 3).astype(float)
    return np.concatenate([flat.mean(1), flat.std(1), np.quantile(flat, 0.1, axis=1)], axis=1)


def image_set(images, prefix=None):
    lesions = [f"{prefix}{i}" for i in range(len(images))] if prefix else None
    return ImageSet(images, features(images), lesions)


@pytest.fixture(scope="module")
def rng():
    return np.random.default_rng()


@pytest.fixture(scope="module")
def world(rng):
    images = draw(rng, 900)
    return image_set(images[:500], "t"), image_set(images[500:700], "h"), images[700:]


def jpeg(image, quality=50):
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_COLOR)


CHANGES = {
    "nothing": lambda image, rng: image,
    "flip or rotation": lambda image, rng: orientations(image[None])[rng.integers(8)][0],
    "jpeg": lambda image, rng: jpeg(image),
    "noise": lambda image, rng: np.clip(image + rng.normal(0, 6, image.shape), 0, 255),
    "brightness": lambda image, rng: np.clip(image.astype(float) + 20, 0, 255),
    "contrast": lambda image, rng: np.clip((image - 128.0) * 1.2 + 128, 0, 255),
    "blur": lambda image, rng: cv2.GaussianBlur(image, (0, 0), 1),
    "flip, jpeg and brightness": lambda image, rng: jpeg(
        np.clip(orientations(image[None])[rng.integers(8)][0] * 0.9 + 10, 0, 255).astype(np.uint8)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_planted_copies_are_found_and_their_originals_named(world, rng, change):
    train, held_out, _ = world
    originals = rng.choice(500, 60, replace=False)
    planted = np.stack([CHANGES[change](train.images[i], rng) for i in originals]).astype(np.uint8)
    report = find_copies(image_set(planted), train, held_out)
    # The threshold is that of a random held-out set, so that now and then a noisy copy lies just beyond it.
    assert report.copies >= 57
    assert (report.table.pixel_nearest.to_numpy() == originals).sum() >= 59
    assert report.beyond_chance


def test_independent_draws_are_not_flagged_beyond_chance(world):
    train, held_out, unseen = world
    report = find_copies(image_set(unseen), train, held_out)
    assert not find_copies(image_set(unseen), train, held_out, CopyConfig(significance=1e-4)).beyond_chance
    assert report.copy_rate < 0.08
    assert 0 < report.held_out_rate < 0.04
    assert report.near_by_both_rate < 0.02


def test_a_few_copies_among_many_new_samples_are_beyond_chance(world):
    train, held_out, unseen = world
    mixed = np.concatenate([unseen, train.images[:30]])
    report = find_copies(image_set(mixed), train, held_out)
    assert report.table.is_copy[200:].all()
    assert report.beyond_chance
    assert report.n == 230
    assert report.copy_rate == report.copies / 230


def test_the_nearest_image_and_its_calibrated_distance_agree_with_a_plain_loop(world, rng):
    train, held_out, unseen = world
    few = ImageSet(train.images[:40], train.features[:40], [f"l{i // 2}" for i in range(40)])
    report = find_copies(image_set(unseen[:5]), few, held_out, CopyConfig(num_neighbours=3))
    by_train = pixel_descriptors(few.images).astype(float)
    for i in range(5):
        turned = orientations(pixel_descriptors(unseen[i : i + 1]).astype(float))
        gaps = [min(np.linalg.norm(t[0] - known) for t in turned) for known in by_train]
        nearest = int(np.argmin(gaps))
        others = sorted(gap for j, gap in enumerate(gaps) if j // 2 != nearest // 2)
        row = report.table.iloc[i]
        assert row.pixel_nearest == nearest
        assert row.pixel_calibrated == pytest.approx(gaps[nearest] / np.mean(others[:3]), rel=1e-3)
        by_features = np.linalg.norm(few.features - features(unseen[i : i + 1]), axis=1)
        nearest = int(np.argmin(by_features))
        others = sorted(gap for j, gap in enumerate(by_features) if j // 2 != nearest // 2)
        assert row.feature_nearest == nearest
        assert row.feature_calibrated == pytest.approx(by_features[nearest] / np.mean(others[:3]), rel=1e-6)


def test_features_of_several_orientations_count_by_the_nearest(world, rng):
    train, held_out, unseen = world

    def turned(images):
        far = features(images)[:, None] + np.array([1000.0, 0.0, 500.0])[None, :, None]
        return ImageSet(images, far)

    plain = find_copies(image_set(unseen), train, held_out)
    of_three = find_copies(
        turned(unseen), train, ImageSet(held_out.images, turned(held_out.images).features, held_out.lesion_id)
    )
    assert of_three.table.feature_nearest.equals(plain.table.feature_nearest)


def test_a_descriptor_turns_with_its_image_and_ignores_brightness_and_contrast(rng):
    images = draw(rng, 4)
    turned = [pixel_descriptors(np.ascontiguousarray(o)) for o in orientations(images)]
    for a, b in zip(turned, orientations(pixel_descriptors(images)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    faded = (images // 2 + 40).astype(np.uint8)
    assert (np.einsum("nijc,nijc->n", pixel_descriptors(faded), pixel_descriptors(images)) > 0.99).all()


def test_descriptors_of_any_shape_have_unit_norm_and_flat_images_none(rng):
    images = rng.integers(0, 256, (3, 37, 51, 3), np.uint8)
    images[1] = 77
    norms = np.linalg.norm(pixel_descriptors(images, 12).reshape(3, -1), axis=1)
    np.testing.assert_allclose(norms, [1, 0, 1], atol=1e-5)


def test_a_flat_sample_is_no_copy(world):
    train, held_out, unseen = world
    flat = np.full((3, SIZE, SIZE, 3), 128, np.uint8)
    assert not find_copies(image_set(flat), train, held_out).table.near_by_pixels.any()


def test_a_lesion_on_both_sides_is_refused(world):
    train, held_out, unseen = world
    leaking = ImageSet(held_out.images, held_out.features, ["t3", *held_out.lesion_id[1:]])
    with pytest.raises(ValueError, match="'t3'"):
        find_copies(image_set(unseen), train, leaking)


def test_too_few_held_out_images_give_no_verdict_but_the_reason(world):
    train, held_out, unseen = world
    few = ImageSet(held_out.images[:20], held_out.features[:20], held_out.lesion_id[:20])
    report = find_copies(image_set(unseen), train, few)
    assert "20 held-out images" in report.reason
    assert (report.copies, report.copy_rate, report.p_value, report.beyond_chance) == (None, None, None, None)
    assert len(report.table) == 200


def test_what_does_not_fit_together_is_refused(world):
    train, held_out, unseen = world
    with pytest.raises(ValueError, match="uint8"):
        find_copies(ImageSet(unseen.astype(float), features(unseen)), train, held_out)
    with pytest.raises(ValueError, match="features"):
        find_copies(ImageSet(unseen, features(unseen)[:5]), train, held_out)
    with pytest.raises(ValueError, match="lesion id"):
        find_copies(image_set(unseen), ImageSet(train.images, train.features), held_out)


def test_progress_is_reported_up_to_all_images(world, monkeypatch):
    train, held_out, unseen = world
    monkeypatch.setattr("derm_pipeline.evaluation.memorisation._CHUNK_ELEMENTS", 500 * 60)
    calls = []
    chunked = find_copies(image_set(unseen), train, held_out, on_progress=lambda *call: calls.append(call))
    assert calls[-1] == (400, 400)
    assert len(calls) > 4
    monkeypatch.undo()
    assert chunked.copies == find_copies(image_set(unseen), train, held_out).copies
