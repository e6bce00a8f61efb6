from __future__ import annotations

import dataclasses
import math

import cv2
import numpy as np
import pytest

from derm_pipeline.sources.phantom.drawing import PhantomConfig, draw, plan
from derm_pipeline.sources.phantom.truth import COLOURS, TRUTHS, truth_of

SKIN = np.array((232, 198, 180), np.float32)
EVERYWHERE = np.ones((150, 200), bool)
PAINT = {
    "white": (252, 246, 240),
    "pink": (232, 156, 154),
    "red": (176, 40, 50),
    "light brown": (180, 128, 88),
    "dark brown": (84, 50, 36),
    "blue-grey": (104, 112, 138),
    "black": (20, 15, 15),
}


def shape(*points: tuple[float, float]) -> np.ndarray:
    mask = np.zeros((150, 200), np.uint8)
    return cv2.fillPoly(mask, [np.array(points, np.int32)], 1).astype(bool)


def disc(x=100, y=75, radius=40) -> np.ndarray:
    rows, columns = np.mgrid[:150, :200]
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


def truth(mask, *patches, view=EVERYWHERE, colour="dark brown"):
    bare = np.broadcast_to(SKIN, (150, 200, 3)).astype(np.float32)
    painting = bare.copy()
    for where, word in ((mask, colour), *patches):
        painting[where] = PAINT[word]
    return truth_of(painting, bare, SKIN, mask, view)


def test_a_disc_and_a_turned_rectangle_are_symmetric_and_whole():
    turned = shape(*(cv2.boxPoints(((100, 75), (80, 40), 33))))
    for mask in (disc(), turned):
        found = truth(mask)
        assert found.asymmetry < 0.04
        assert found.border_irregularity < 0.03
        assert found.cut_off_fraction == 0
        assert found.lesion_fraction == pytest.approx(mask.mean(), rel=0.02)


def test_a_triangle_misses_what_geometry_says():
    # An isosceles triangle mirrored about the line through its centroid parallel to its base: worked out by sampling.
    triangle = shape((60, 110), (140, 110), (100, 20))
    rng = np.random.default_rng(0)
    depth = 90 * np.sqrt(rng.uniform(size=200_000))  # below the apex
    across = rng.uniform(-0.5, 0.5, 200_000) * 80 * depth / 90
    mirrored = 2 * 60 - depth
    missed = (mirrored < 0) | (mirrored > 90) | (np.abs(across) > 40 * mirrored / 90)
    assert truth(triangle).asymmetry == pytest.approx(missed.mean(), abs=0.03)


def test_a_bite_out_of_a_disc_is_missing_from_its_hull():
    bitten = disc() & ~shape((100, 75), (160, 30), (160, 120))
    angle = math.atan2(45, 60)
    # A sector of 2 * angle is gone; the hull spans its chord.
    area, sector = math.pi * 40**2, angle * 40**2
    hull = area - sector + 40**2 * math.sin(2 * angle) / 2
    assert truth(bitten).border_irregularity == pytest.approx(1 - (area - sector) / hull, abs=0.03)


def test_a_lesion_at_the_edge_of_the_picture_or_of_the_view_is_cut_off():
    half = truth(disc(x=0, y=75))
    assert half.cut_off_fraction == pytest.approx(80 / (80 + 40 * math.pi), abs=0.08)
    window = disc(radius=60)
    beyond = truth(disc(x=150), view=window)
    assert beyond.cut_off_fraction > 0.2
    assert beyond.lesion_fraction == pytest.approx((disc(x=150) & window).sum() / window.sum(), rel=0.05)


@pytest.mark.parametrize("colour", COLOURS)
def test_a_quarter_painted_in_a_colour_is_a_quarter_of_that_colour(colour):
    other = "light brown" if colour == "dark brown" else "dark brown"
    quarter = disc() & (np.arange(200) > 100) & (np.arange(150)[:, None] > 75)
    shares = dict(zip(COLOURS, truth(disc(), (quarter, colour), colour=other).colours, strict=True))
    assert shares[colour] == pytest.approx(quarter.sum() / disc().sum(), abs=1e-6)
    assert shares[other] == pytest.approx(1 - shares[colour], abs=1e-6)


def test_skin_has_no_colour_and_white_is_whiter_than_skin():
    bare = np.broadcast_to(SKIN, (150, 200, 3)).astype(np.float32)
    assert sum(truth_of(bare, bare, SKIN, disc(), EVERYWHERE).colours) == 0
    dark = np.array((120, 80, 60), np.float32)
    bare = np.broadcast_to(dark, (150, 200, 3)).astype(np.float32)
    painting = bare.copy()
    painting[disc()] = (170, 160, 150)  # grey elsewhere, white on dark skin
    assert truth_of(painting, bare, dark, disc(), EVERYWHERE).colours[COLOURS.index("white")] == 1


def test_the_concepts_are_the_facts_by_name():
    found = truth(disc())
    concepts = found.concepts()
    assert tuple(concepts) == TRUTHS
    assert float(concepts["dark_brown"]) == 1
    assert float(concepts["lesion_fraction"]) == pytest.approx(found.lesion_fraction, abs=1e-4)


def test_the_truth_of_a_phantom_does_not_depend_on_light_and_artefacts():
    for case in plan(PhantomConfig(num_images=12, seed=int(np.random.default_rng().integers(10_000)))):
        bare = draw(dataclasses.replace(case, artefacts=())).truth
        covered = draw(dataclasses.replace(case, artefacts=("bubbles", "hair", "ink", "ruler"))).truth
        assert covered == bare
        veiled = draw(dataclasses.replace(case, artefacts=("vignette",))).truth
        assert (veiled.asymmetry, veiled.border_irregularity, veiled.colours) == (
            *(bare.asymmetry, bare.border_irregularity),
            bare.colours,
        )
        assert veiled.lesion_fraction >= 0.9 * bare.lesion_fraction
        assert 0 < bare.lesion_fraction < 1
        assert 0.2 < sum(bare.colours) <= 1 + 1e-9


def test_the_truth_is_nearly_the_same_at_another_size():
    for case in plan(PhantomConfig(num_images=8, seed=int(np.random.default_rng().integers(10_000)))):
        small, large = draw(case).truth, draw(case, 500, 375).truth
        assert small.asymmetry == pytest.approx(large.asymmetry, abs=0.03)
        assert small.border_irregularity == pytest.approx(large.border_irregularity, abs=0.02)
        assert small.lesion_fraction == pytest.approx(large.lesion_fraction, rel=0.05)
        assert np.abs(np.subtract(small.colours, large.colours)).max() < 0.12
