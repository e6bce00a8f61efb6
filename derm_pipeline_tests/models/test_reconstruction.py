import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from derm_pipeline.models.reconstruction import (
    ReconstructionMinimum,
    measure_reconstruction,
    psnr_db,
    psnr_db_each,
    reconstruction_problems,
    ssim,
    ssim_each,
)


def images(n: int = 5, height: int = 33, width: int = 40, seed: int = 0) -> torch.Tensor:
    """Smooth images with some noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 5, 5, generator=generator) * 1.6 - 0.8
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return smooth + 0.1 * torch.randn(smooth.shape, generator=generator)


def reference_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Of one image (3, h, w) in float64, by scipy's Gaussian filter, cut to windows inside the image."""

    def blur(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, (0, 1.5, 1.5), truncate=3.5)[:, 5:-5, 5:-5]  # radius 5: a window of 11

    a, b = a.astype(np.float64), b.astype(np.float64)
    mean_a, mean_b = blur(a), blur(b)
    covariance = blur(a * b) - mean_a * mean_b
    variances = blur(a * a) - mean_a**2 + blur(b * b) - mean_b**2
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    found = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return float((found / ((mean_a**2 + mean_b**2 + c1) * (variances + c2))).mean())


@pytest.mark.parametrize("strength", [0.01, 0.1, 0.5])
def test_ssim_is_the_standard_one_image_by_image(strength):
    a = images()
    b = a + strength * torch.randn(a.shape, generator=torch.Generator().manual_seed(1))
    expected = [reference_ssim(x, y) for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    np.testing.assert_allclose(ssim_each(a, b).numpy(), expected, atol=2e-5)
    assert ssim(a, b) == pytest.approx(np.mean(expected), abs=2e-5)


def test_ssim_equals_that_of_scikit_image_and_of_torchmetrics_where_they_are_installed():
    a, b = images(4, seed=2), images(4, seed=2).flip(3) * 0.3
    metrics = pytest.importorskip("skimage.metrics")
    expected = [
        metrics.structural_similarity(
            x, y, data_range=2, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for x, y in zip(a.double().numpy(), b.double().numpy(), strict=True)
    ]
    np.testing.assert_allclose(ssim_each(a, b).numpy(), expected, atol=2e-5)
    image_metrics = pytest.importorskip("torchmetrics.functional.image")
    _, windows = image_metrics.structural_similarity_index_measure(a, b, data_range=2.0, return_full_image=True)
    inside = windows[:, :, 5:-5, 5:-5]  # torchmetrics also counts windows over a mirrored border
    np.testing.assert_allclose(ssim_each(a, b).numpy(), inside.mean((1, 2, 3)).numpy(), atol=2e-5)


def test_ssim_is_one_of_equals_and_symmetric_and_falls_with_noise():
    a, noise = images(), torch.randn(images().shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(ssim_each(a, a), torch.ones(5))
    torch.testing.assert_close(ssim_each(a, a + 0.1 * noise), ssim_each(a + 0.1 * noise, a))
    falling = [ssim(a, a + strength * noise) for strength in (0.02, 0.1, 0.5, 2.0)]
    assert falling == sorted(falling, reverse=True)
    assert ssim(0.5 + 0.2 * noise, 0.5 - 0.2 * noise) < -0.5


def test_a_constant_shift_is_judged_by_luminance_alone():
    x, y = 0.2, 0.6
    a, b = torch.full((1, 3, 16, 16), x), torch.full((1, 3, 16, 16), y)
    assert ssim(a, b) == pytest.approx((2 * x * y + 4e-4) / (x * x + y * y + 4e-4), abs=1e-4)


def test_psnr_of_a_known_error():
    a = images()
    offsets = torch.tensor([0.02, 0.1, 0.5, 1.0, 2.0])
    each = psnr_db_each(a, a + offsets.view(-1, 1, 1, 1))
    np.testing.assert_allclose(each.numpy(), [20 * math.log10(2 / offset) for offset in offsets], atol=1e-3)
    assert psnr_db(a, a + 0.02) == pytest.approx(40, abs=1e-2)
    assert psnr_db(a, a) == pytest.approx(10 * math.log10(4 / 1e-10))


def test_many_images_are_measured_like_few():
    a, b = images(70, 16, 16, seed=4), images(70, 16, 16, seed=5)
    found = measure_reconstruction(a, b)
    assert found.psnr_db.shape == found.ssim.shape == (70,)
    for row in (0, 31, 32, 69):
        alone = measure_reconstruction(a[row : row + 1], b[row : row + 1])
        torch.testing.assert_close(found.ssim[row : row + 1], alone.ssim)
        torch.testing.assert_close(found.psnr_db[row : row + 1], alone.psnr_db)
    assert found.means == {"psnr_db": psnr_db(a, b), "ssim": ssim(a, b)}


def test_what_cannot_be_compared_is_refused():
    a = images()
    for figure in (ssim, psnr_db):
        with pytest.raises(ValueError, match="cannot be compared"):
            figure(a, a[:1])
    with pytest.raises(ValueError, match="at least 11 px a side, not 40 x 10"):
        ssim(a[:, :, :10], a[:, :, :10])


def test_a_good_reconstruction_has_no_problems_and_a_bad_one_says_which_figure_is_low():
    minimum = ReconstructionMinimum(psnr_db=25, ssim=0.8)
    good, bad = torch.tensor([24.5, 26.0]), torch.tensor([30.0, 10.0])
    high, low = torch.tensor([0.9, 0.8]), torch.tensor([0.9, 0.2])
    assert reconstruction_problems(good, high, minimum) == []
    [problem] = reconstruction_problems(bad, high, minimum)
    assert "PSNR of 2 rebuilt images is 20 dB, below 25 dB (the worst image: 10 dB)" in problem
    [problem] = reconstruction_problems(good, low, minimum)
    assert "SSIM of 2 rebuilt images is 0.55, below 0.8 (the worst image: 0.2)" in problem
    assert len(reconstruction_problems(bad, low, minimum)) == 2


def test_broken_and_absent_figures_are_problems():
    some = torch.tensor([30.0, math.nan, math.inf])
    [problem] = reconstruction_problems(some, torch.ones(3), ReconstructionMinimum())
    assert "2 of 3 images" in problem
    assert reconstruction_problems(torch.empty(0), torch.empty(0), ReconstructionMinimum())
    broken = measure_reconstruction(torch.full((1, 3, 16, 16), math.nan), images(1, 16, 16))
    assert reconstruction_problems(broken.psnr_db, broken.ssim, ReconstructionMinimum())
