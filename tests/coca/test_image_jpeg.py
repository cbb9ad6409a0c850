"""JPEG straight to an array: Pillow's pixels bit for bit, or left to Pillow."""

import io
from itertools import product
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from coca.image_jpeg import jpeg_pixels, scaled_size
from coca.images import ImageLimits, ImageProblem, decode, decode_pixels, decode_rgb

LIMITS = ImageLimits()
SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0", "4:1:1")


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    coarse = np.random.default_rng(width).integers(0, 256, (height // 3 + 1, width // 3 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height)).convert(mode)


def saved(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", **options)
    return buffer.getvalue()


def straight(image: Image.Image, **options: Any) -> np.ndarray | None:
    return jpeg_pixels(saved(image, **options), *image.size)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}, {"keep_rgb": True}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_are_those_of_pillow(mode: str, options: dict[str, Any]) -> None:
    for size, subsampling, quality in product([(7, 9), (16, 17), (255, 257), (33, 600)], SUBSAMPLINGS, [10, 75, 100]):
        if "keep_rgb" in options and subsampling != "4:4:4":
            continue
        data = saved(picture(*size, mode), subsampling=subsampling, quality=quality, **options)
        pixels_HWC = jpeg_pixels(data, *size)
        assert pixels_HWC is not None
        np.testing.assert_array_equal(pixels_HWC, np.asarray(decode(data, LIMITS).image))


def test_metadata_that_turns_a_picture_is_heeded() -> None:
    image = picture(40, 24)
    for orientation in range(1, 10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = saved(image, exif=exif)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
        assert (jpeg_pixels(data, 40, 24) is None) == (2 <= orientation <= 8)
        np.testing.assert_array_equal(decode_pixels(data, LIMITS), expected)
        np.testing.assert_array_equal(np.asarray(decode_rgb(data, LIMITS)), expected)


def test_xmp_that_turns_a_picture_is_heeded() -> None:
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    assert straight(picture(40, 24), xmp=xmp) is None
    assert decode_pixels(saved(picture(40, 24), xmp=xmp), LIMITS).shape == (40, 24, 3)


def test_what_is_not_plain_is_left_to_pillow() -> None:
    whole = saved(picture(80, 60))
    assert straight(picture(80, 60, "CMYK")) is None
    assert jpeg_pixels(whole, 80, 61) is None  # a header that another reader reads otherwise
    for damaged in (whole[: len(whole) // 2], whole[:40], b"", whole[:-500] + b"\xff\x55" + whole[-498:]):
        assert jpeg_pixels(damaged, 80, 60) is None


def test_what_pillow_refuses_stays_refused() -> None:
    whole = saved(picture(80, 60))
    with pytest.raises(ImageProblem, match="the data ends before the picture does"):
        decode_pixels(whole[: len(whole) // 2] + b"\xff\xd9", LIMITS)
    with pytest.raises(ImageProblem, match="at most 1,000"):
        decode_pixels(whole, ImageLimits(max_pixels=1000))


@pytest.mark.parametrize(
    ("short_side", "expected"), [(400, None), (201, None), (200, (400, 600)), (150, (300, 450)), (60, (120, 180))]
)
def test_scaled_decoding_keeps_twice_the_short_side(short_side: int, expected: tuple[int, int] | None) -> None:
    assert scaled_size(800, 1200, short_side) == expected
    shape = decode_pixels(saved(picture(800, 1200)), LIMITS, short_side=short_side).shape
    assert shape == np.asarray(decode(saved(picture(800, 1200)), LIMITS, short_side=short_side).image).shape
    assert (shape[1] < 800) == (expected is not None)
    assert min(shape[:2]) >= 2 * short_side or expected is None


def test_a_picture_is_never_asked_for_at_no_pixels() -> None:
    assert scaled_size(10_000, 1, 1) is None
    assert scaled_size(4000, 4, 1) == (2000, 2)
