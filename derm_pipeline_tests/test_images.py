"""Decoding is bounded and whole; the named geometries are the published ones."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from derm_pipeline import images


def picture(height=60, width=80, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def huge_png(side=30_000):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def test_png_round_trips_exactly():
    image = picture()
    assert np.array_equal(images.decode(images.encode_png(image)), image)


def test_a_reduced_jpeg_is_no_smaller_than_asked_for():
    image = images.decode(images.encode_jpeg(picture(480, 640)), reduce_to_px=64)
    assert image.shape == (120, 160, 3)
    assert images.decode(images.encode_jpeg(picture(480, 640)), reduce_to_px=300).shape == (480, 640, 3)


def test_reduced_decoding_keeps_the_channel_order():
    red = np.zeros((256, 256, 3), np.uint8)
    red[..., 0] = 200
    assert images.decode(images.encode_jpeg(red), reduce_to_px=32).mean((0, 1)).argmax() == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"not an image at all", "not a JPEG or PNG"),
        (images.encode_jpeg(picture())[:-400], "truncated"),
        (images.encode_png(picture())[:-400], "truncated"),
        (huge_png(), "more than 100,000,000 pixels"),
    ],
)
def test_a_bad_file_is_refused_with_its_reason(tmp_path, content, message):
    path = tmp_path / "image"
    path.write_bytes(content)
    with pytest.raises(images.BadImageError, match=message):
        images.inspect(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(images.BadImageError, match="missing"):
        images.read_image(tmp_path / "none.jpg")


def test_inspect_reports_the_facts(tmp_path):
    path = tmp_path / "image.jpg"
    path.write_bytes(images.encode_jpeg(picture(30, 40)))
    facts = images.inspect(path)
    assert (facts.width_px, facts.height_px, facts.size_bytes) == (40, 30, path.stat().st_size)


def test_the_centre_crop_is_adms():
    ramp = np.broadcast_to((np.arange(600) % 256).astype(np.uint8)[None, :, None], (450, 600, 3))
    square = images.to_square(np.ascontiguousarray(ramp), 256)
    assert square.mean() == pytest.approx(139.09765625)
    assert square[0, :4, 0].tolist() == [74, 76, 78, 80]


@pytest.mark.parametrize("geometry", ["crop", "squash", "pad"])
@pytest.mark.parametrize("shape", [(150, 200), (33, 500), (64, 64), (20, 10)])
def test_every_geometry_gives_a_square(geometry, shape):
    assert images.to_square(picture(*shape), 64, geometry).shape == (64, 64, 3)


def test_padding_keeps_the_aspect_ratio():
    white = np.full((50, 100, 3), 255, np.uint8)
    padded = images.to_square(white, 64, "pad")
    assert (padded.max((1, 2)) > 0).sum() == 32


def test_a_contact_sheet_holds_every_image():
    batch = np.stack([np.full((4, 4, 3), value, np.uint8) for value in (10, 20, 30)])
    sheet = images.contact_sheet(batch, columns=2)
    assert set(np.unique(sheet)) == {10, 20, 30, 255}


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(picture(20, 40)).save(buffer, "JPEG", exif=exif)
    assert images.decode(buffer.getvalue()).shape == (40, 20, 3)
