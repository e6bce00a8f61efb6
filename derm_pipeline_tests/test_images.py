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
        (b"", "not a JPEG or PNG"),
        (b"not an image at all", "not a JPEG or PNG"),
        (images.encode_jpeg(picture())[:-400], "truncated"),
        (images.encode_png(picture())[:-400], "truncated"),
        (huge_png(), "more than 100,000,000 pixels"),
    ],
)
def test_a_bad_file_is_refused_with_its_reason(content, message):
    with pytest.raises(images.BadImageError, match=message):
        images.decode_strictly(content)


def test_a_missing_or_empty_file_is_refused(tmp_path):
    with pytest.raises(images.BadImageError, match="missing"):
        images.read_image(tmp_path / "none.jpg")
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(images.BadImageError, match="empty"):
        images.read_image(tmp_path / "empty.jpg")


@pytest.mark.parametrize("encode", [images.encode_jpeg, images.encode_png])
def test_strict_decoding_gives_the_same_pixels_and_the_headers_size(encode):
    content = encode(picture(300, 400))
    for reduce_to_px in (None, 64, 200):
        pixels, size = images.decode_strictly(content, reduce_to_px=reduce_to_px)
        assert np.array_equal(pixels, images.decode(content, reduce_to_px=reduce_to_px))
        assert size == (400, 300)


def jpegs(rng):
    """One picture in the shapes that JPEG has: plain, progressive, grey, CMYK."""
    smooth = np.kron(rng.integers(0, 256, (12, 16, 3)), np.ones((12, 12, 1))).astype(np.uint8)
    image = Image.fromarray(smooth)
    for mode, options in (("RGB", {}), ("RGB", {"progressive": True}), ("L", {}), ("CMYK", {})):
        buffer = io.BytesIO()
        image.convert(mode).save(buffer, "JPEG", **options)
        yield buffer.getvalue()


def damaged(content, rng):
    """The bytes cut short, changed in a few places, or with a piece cut out."""
    at = int(rng.integers(len(content)))
    changed = bytearray(content)
    for place in rng.integers(0, len(content), 3):
        changed[place] = rng.integers(256)
    return (content[:at], bytes(changed), content[:at] + content[at + 50 :])[rng.integers(3)]


def opens_fully(content):
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
            image.load()
    except (OSError, ValueError, SyntaxError):
        return False
    return images.cv2.imdecode(np.frombuffer(content, np.uint8), images.cv2.IMREAD_COLOR_RGB) is not None


def test_looking_at_fewer_pixels_refuses_exactly_the_files_that_full_decoding_refuses():
    rng = np.random.default_rng()
    verdicts = []
    for _ in range(60):
        for content in jpegs(rng):
            broken = damaged(content, rng)
            verdicts.append(opens_fully(broken))
            if verdicts[-1]:
                images.decode_strictly(broken, reduce_to_px=16)
            else:
                with pytest.raises(images.BadImageError):
                    images.decode_strictly(broken, reduce_to_px=16)
    assert 20 < sum(verdicts) < 220


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
