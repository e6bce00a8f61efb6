"""Moments: stored once, in every orientation, resumable, reused by digest."""

import hashlib

import numpy as np
import pytest
import torch

from derm_pipeline import images, latents
from derm_pipeline.latents import ImageFile, LatentConfig


def encode(batch):
    """A stand-in with the shape of an encoder: block means, and a constant log-variance."""
    mean = torch.nn.functional.avg_pool2d(batch, 4)
    return mean, torch.full_like(mean, -2.0)


@pytest.fixture
def files(tmp_path):
    made = []
    for number in range(10):
        content = images.encode_png(np.random.default_rng(number).integers(0, 256, (20, 24, 3)).astype(np.uint8))
        path = tmp_path / f"{number}.png"
        path.write_bytes(content)
        made.append(ImageFile(path, hashlib.sha256(content).hexdigest()))
    return made


CONFIG = LatentConfig(size_px=16, orientations=8, shard_size=4, batch_size=3)


def read(files):
    return latents.read_squares(files, size_px=16)


def test_moments_of_every_orientation_are_those_of_the_oriented_image(files, tmp_path):
    latents.encode_images(files, read, encode, CONFIG, out=tmp_path / "out")
    digests, moments = latents.load_moments(tmp_path / "out")
    assert digests == [file.sha256 for file in files]
    assert moments.shape == (10, 8, 6, 4, 4)
    batch = latents.to_model_range(torch.from_numpy(read(files)))
    for orientation in range(8):
        mean, logvar = encode(latents.orient(batch, orientation))
        expected = torch.cat([mean, logvar], 1).half()
        assert torch.equal(moments[:, orientation], expected)


def test_the_eight_orientations_differ_and_the_second_is_the_mirror_image():
    batch = torch.randn(2, 3, 5, 5)
    turned = [latents.orient(batch, k) for k in range(8)]
    assert all(not torch.equal(a, b) for i, a in enumerate(turned) for b in turned[:i])
    assert torch.equal(turned[1], batch.flip(3))


def test_an_interrupted_encoding_keeps_its_finished_shards(files, tmp_path):
    seen = []

    def interrupted(some):
        seen.append(len(some))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return read(some)

    with pytest.raises(KeyboardInterrupt):
        latents.encode_images(files, interrupted, encode, CONFIG, out=tmp_path / "out")
    again = []
    latents.encode_images(
        files, lambda some: again.append(len(some)) or read(some), encode, CONFIG, out=tmp_path / "out"
    )
    assert sum(again) == 6  # the first shard of four was kept
    latents.encode_images(files, read, encode, CONFIG, out=tmp_path / "whole")
    assert torch.equal(latents.load_moments(tmp_path / "out")[1], latents.load_moments(tmp_path / "whole")[1])


def test_rows_of_an_earlier_folder_are_reused_by_digest(files, tmp_path):
    latents.encode_images(files[:7], read, encode, CONFIG, out=tmp_path / "old")
    encoded = []
    num_reused = latents.encode_images(
        files[::-1],
        lambda some: encoded.extend(some) or read(some),
        encode,
        CONFIG,
        out=tmp_path / "new",
        previous=tmp_path / "old",
    )
    assert num_reused == 7
    assert {file.path for file in encoded} == {file.path for file in files[7:]}
    latents.encode_images(files[::-1], read, encode, CONFIG, out=tmp_path / "fresh")
    assert torch.equal(latents.load_moments(tmp_path / "new")[1], latents.load_moments(tmp_path / "fresh")[1])


def test_statistics_are_those_of_sampled_latents(files, tmp_path):
    latents.encode_images(files, read, encode, CONFIG, out=tmp_path / "out")
    moments = latents.load_moments(tmp_path / "out")[1].float()
    statistics = latents.latent_statistics(moments)
    mean, logvar = moments.repeat(60, 1, 1, 1, 1).chunk(2, 2)
    drawn = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
    assert statistics["mean"] == pytest.approx(drawn.mean((0, 1, 3, 4)).tolist(), abs=0.01)
    assert statistics["std"] == pytest.approx(drawn.std((0, 1, 3, 4)).tolist(), rel=0.01)


def test_a_file_changed_behind_our_back_is_refused(files):
    files[3].path.write_bytes(files[4].path.read_bytes())
    with pytest.raises(ValueError, match=r"3\.png was changed"):
        read(files)


def test_pixels_survive_the_way_to_the_model_range_and_back():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    back = latents.to_pixels(latents.to_model_range(torch.from_numpy(pixels)))
    assert np.abs(back.astype(int) - pixels.astype(int)).max() <= 1


def test_artefacts_are_removed_where_asked(files):
    restored = latents.read_squares(files, size_px=16, restore=lambda image, digest: np.zeros_like(image))
    assert restored.max() == 0
