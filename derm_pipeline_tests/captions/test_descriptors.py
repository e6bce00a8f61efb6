from __future__ import annotations

import math

import cv2
import numpy as np
import pytest

from derm_pipeline.captions.descriptors import COLOURS, measure
from derm_pipeline.captions.segmentation import see
from derm_pipeline.records import SkinType
from derm_pipeline.sources.phantom.drawing import DRAWN, PhantomConfig, draw, plan
from derm_pipeline.sources.statistics import ita_degrees

SKIN_LAB = (72.0, 11.0, 16.0)
PALETTE_LAB = {
    "white": (88, 2, 4),
    "pink": (66, 34, 12),
    "red": (45, 48, 22),
    "light brown": (54, 16, 30),
    "dark brown": (30, 14, 18),
    "blue-grey": (45, 0, -12),
    "black": (8, 1, 1),
}


def to_rgb(lab):
    rgb = cv2.cvtColor(np.array([[lab]], np.float32), cv2.COLOR_LAB2RGB)[0, 0]
    return np.clip(np.rint(rgb * 255), 0, 255)


def picture(*shapes, skin=SKIN_LAB):
    """Skin of one colour with shapes, each (mask, Lab), and a little noise."""
    image = np.tile(to_rgb(skin), (144, 192, 1))
    for mask, lab in shapes:
        image[mask] = to_rgb(lab)
    noise = np.random.default_rng(0).normal(0, 1.5, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def ellipse(centre=(96, 72), axes=(36, 36), angle=0, start=0, end=360):
    mask = np.zeros((144, 192), np.uint8)
    cv2.ellipse(mask, centre, axes, angle, start, end, 1, -1)
    return mask.astype(bool)


BROWN = PALETTE_LAB["dark brown"]


@pytest.mark.parametrize("angle", [0, 30, 77])
def test_a_disc_and_an_ellipse_are_symmetric(angle):
    for axes in ((36, 36), (46, 26)):
        measured = measure(see(picture((ellipse(axes=axes, angle=angle), BROWN))))
        assert measured.has_lesion
        assert measured.asymmetry < 0.05
        assert measured.colour_asymmetry < 4
        assert measured.border_irregularity < 0.04
        assert measured.compactness < 1.2


@pytest.mark.parametrize("angle", [0, 45, 200])
def test_half_a_disc_is_asymmetric(angle):
    half = measure(see(picture((ellipse(axes=(42, 42), angle=angle, end=180), BROWN))))
    disc = measure(see(picture((ellipse(), BROWN))))
    assert half.asymmetry > 0.09
    assert half.asymmetry > 2 * disc.asymmetry


def test_two_colours_side_by_side_are_asymmetric_in_colour_and_rings_are_not():
    whole, left = ellipse(), ellipse() & (np.arange(192) < 96)
    side = measure(see(picture((whole, BROWN), (left, PALETTE_LAB["light brown"]))))
    rings = measure(see(picture((whole, BROWN), (ellipse(axes=(18, 18)), PALETTE_LAB["light brown"]))))
    assert side.colour_asymmetry > 14
    assert rings.colour_asymmetry < 7
    assert rings.centre_lightness > 8


def test_a_star_has_an_irregular_border():
    angles = np.arange(0, 2 * math.pi, 0.02)
    radius = 36 * (1 + 0.3 * np.cos(6 * angles))
    points = np.stack([96 + radius * np.cos(angles), 72 + radius * np.sin(angles)], axis=1).round().astype(np.int32)
    star = np.zeros((144, 192), np.uint8)
    cv2.fillPoly(star, [points], 1)
    measured = measure(see(picture((star.astype(bool), BROWN))))
    assert measured.border_irregularity > 0.1
    assert measured.compactness > 1.3


def test_a_blurred_border_is_less_sharp():
    image = picture((ellipse(), BROWN))
    sharpness = [measure(see(cv2.GaussianBlur(image, (0, 0), sigma))).border_sharpness for sigma in (0.5, 4, 8)]
    assert sharpness == sorted(sharpness, reverse=True)
    assert sharpness[0] > 0.6


@pytest.mark.parametrize("colour", COLOURS)
def test_a_patch_of_each_colour_of_the_palette_is_named(colour):
    other = "light brown" if colour == "dark brown" else "dark brown"
    patch = ellipse(axes=(18, 18))
    measured = measure(see(picture((ellipse(), PALETTE_LAB[other]), (patch, PALETTE_LAB[colour]))))
    assert 0.15 < measured.colour_fraction(colour) < 0.35
    assert measured.colour_fraction(other) > 0.5
    assert sum(measured.colour_fraction(name) for name in COLOURS) <= 1 + 1e-9


@pytest.mark.parametrize("gain", [(0.9, 1.0, 1.12), (1.05, 0.95, 1.0)])
def test_the_cast_of_the_light_does_not_paint_a_brown_lesion(gain):
    image = picture((ellipse(), BROWN))
    tinted = np.clip(image * np.array(gain), 0, 255).astype(np.uint8)
    assert measure(see(image)).dark_brown > 0.8
    assert measure(see(tinted)).dark_brown > 0.8


def test_the_area_of_the_lesion_is_its_fraction_of_the_view():
    for radius in (15, 30, 50):
        measured = measure(see(picture((ellipse(axes=(radius, radius)), BROWN))))
        found = math.sqrt(measured.lesion_fraction * 144 * 192 / math.pi)
        assert found == pytest.approx(radius, abs=3)  # the outline lies a little outside, as people draw it


def test_a_lesion_at_the_edge_is_cut_off():
    inside = measure(see(picture((ellipse(), BROWN))))
    outside = measure(see(picture((ellipse(centre=(96, 20), axes=(60, 50)), BROWN))))
    assert inside.cut_off_fraction == 0
    assert outside.cut_off_fraction > 0.1


def test_bare_skin_has_no_lesion():
    measured = measure(see(picture()))
    assert not measured.has_lesion
    assert measured.ita_deg == pytest.approx(ita_degrees(SKIN_LAB[0], SKIN_LAB[2]), abs=1.5)


def test_spots_are_counted():
    centres = [(80, 60), (96, 60), (112, 60), (80, 84), (96, 84), (112, 84)]
    for lightness, name, other in ((60, "num_bright_spots", "num_dark_dots"), (8, "num_dark_dots", "num_bright_spots")):
        dots = [(ellipse(centre=centre, axes=(2, 2)), (lightness, 10, 14)) for centre in centres]
        measured = measure(see(picture((ellipse(axes=(44, 44)), (34, 12, 18)), *dots)))
        assert getattr(measured, name) == 6
        assert getattr(measured, other) == 0


def phantoms(count_each, seed):
    cases = plan(PhantomConfig(num_images=1200, seed=seed))
    return [
        draw(case)
        for tone in SkinType
        for diagnosis in DRAWN
        for case in [case for case in cases if case.skin_type == tone and case.diagnosis == diagnosis][:count_each]
    ]


def test_the_estimated_skin_orders_phantoms_by_their_skin_type():
    from scipy.stats import spearmanr

    drawn = phantoms(2, seed=int(np.random.default_rng().integers(1000)))
    measured = [measure(see(phantom.image)) for phantom in drawn]
    truth = [int(phantom.skin_type) for phantom in drawn]
    assert spearmanr([-m.ita_deg for m in measured], truth).statistic >= 0.9
    assert np.mean([m.skin_type == t for m, t in zip(measured, truth, strict=True)]) >= 0.8


def test_drawn_structures_are_measured_where_they_are_drawn():
    drawn = phantoms(2, seed=int(np.random.default_rng().integers(1000)))
    measured = [measure(see(phantom.image)) for phantom in drawn]

    def mean(name, diagnosis):
        return np.mean([getattr(m, name) for m, p in zip(measured, drawn, strict=True) if p.diagnosis == diagnosis])

    assert mean("mesh_density", "nv") > 3 * mean("mesh_density", "mel")
    assert mean("num_bright_spots", "bkl") > 2 * mean("num_bright_spots", "mel")
    assert mean("num_red_blobs", "vasc") > 2 * mean("num_red_blobs", "mel")
    assert mean("blue_grey", "mel") > 0.1 > mean("blue_grey", "nv")
    assert mean("centre_lightness", "df") > mean("centre_lightness", "nv") + 10
    assert mean("asymmetry", "mel") > 1.5 * mean("asymmetry", "nv")
