"""Geometry of the resize modes, and how near the fast way of resizing is to a slow and good one."""

import io

import numpy as np
import pytest
from PIL import Image

from coca.image_resize import ResizeMode, center_crop, resize, resized_size
from coca.images import ImageLimits, decode

SOURCES = [(512, 384), (333, 500), (257, 256), (100, 37), (201, 603), (768, 1025), (1000, 40)]

# What img2dataset 1.47 gave for SOURCES and 256, with and without its resize_only_if_bigger.
THEIRS: dict[tuple[ResizeMode, bool], list[tuple[int, int]]] = {
    ("keep_ratio", True): [(341, 256), (256, 384), (257, 256), (692, 256), (256, 768), (256, 342), (6400, 256)],
    ("keep_ratio", False): [(341, 256), (256, 384), (257, 256), (100, 37), (201, 603), (256, 342), (1000, 40)],
    ("keep_ratio_largest", True): [(256, 192), (170, 256), (256, 255), (256, 95), (85, 256), (192, 256), (256, 10)],
    ("keep_ratio_largest", False): [(256, 192), (170, 256), (256, 255), (100, 37), (85, 256), (192, 256), (256, 10)],
    ("center_crop", True): [(256, 256)] * 7,
    ("border", True): [(256, 256)] * 7,
}


@pytest.mark.parametrize(("mode", "enlarge"), THEIRS)
def test_sizes_are_those_of_img2dataset(mode: ResizeMode, enlarge: bool) -> None:
    found = [resized_size(*source, mode, 256, enlarge=enlarge) for source in SOURCES]
    assert found == THEIRS[mode, enlarge]


@pytest.mark.parametrize("mode", ["no", "keep_ratio", "keep_ratio_largest", "center_crop", "border"])
@pytest.mark.parametrize("enlarge", [True, False])
def test_resize_gives_the_size_that_is_foretold(mode: ResizeMode, enlarge: bool) -> None:
    for source in SOURCES:
        target = resized_size(*source, mode, 64, enlarge=enlarge)
        assert resize(Image.new("RGB", source), mode, 64, enlarge=enlarge).size == target


def test_nothing_is_enlarged_unasked_and_squares_always_fill() -> None:
    assert resized_size(300, 200, "no", 10, enlarge=True) == (300, 200)
    assert resized_size(300, 200, "keep_ratio", 250) == (300, 200)
    assert resized_size(300, 200, "keep_ratio_largest", 400) == (300, 200)
    assert resized_size(300, 200, "center_crop", 512) == (512, 512)
    assert resized_size(300, 200, "border", 512) == (512, 512)
    assert resized_size(1000, 3, "keep_ratio_largest", 64) == (64, 1)


def test_an_image_of_the_right_size_is_left_alone() -> None:
    image = Image.new("RGB", (90, 64))
    assert resize(image, "keep_ratio", 64) is image
    assert resize(image, "no", 10) is image


def test_border_is_white_and_centred() -> None:
    square = resize(Image.new("RGB", (40, 20), "black"), "border", 40)
    pixels = np.asarray(square)[:, :, 0]
    assert (pixels[:10] == 255).all()
    assert (pixels[10:30] == 0).all()
    assert (pixels[30:] == 255).all()


def test_center_crop_takes_the_middle() -> None:
    pixels = np.zeros((30, 90, 3), np.uint8)
    pixels[:, 30:60] = 200
    assert (np.asarray(resize(Image.fromarray(pixels), "center_crop", 30)) == 200).all()


def test_what_the_model_sees_is_plain_bicubic() -> None:
    image = photograph(700, 500)
    expected = image.resize((90, 64), Image.Resampling.BICUBIC).crop((13, 0, 77, 64))
    np.testing.assert_array_equal(np.asarray(center_crop(image, 64)), np.asarray(expected))


@pytest.mark.parametrize("source", [(300, 280), (520, 390), (700, 1000), (1100, 1023), (1030, 1600), (2500, 2100)])
def test_scaled_decoding_and_reducing_stay_near_a_reference(source: tuple[int, int]) -> None:
    buffer = io.BytesIO()
    photograph(*source).save(buffer, "jpeg", quality=90)
    limits = ImageLimits()
    fast = resize(decode(buffer.getvalue(), limits, short_side=256).image, "keep_ratio", 256)
    full = decode(buffer.getvalue(), limits).image
    reference = full.resize(fast.size, Image.Resampling.LANCZOS)
    area = full.resize(fast.size, Image.Resampling.BOX)
    assert psnr(fast, reference) > max(34, psnr(area, reference))


def photograph(width: int, height: int) -> Image.Image:
    """Noise with the spectrum of photographs: amplitude falls as one over frequency."""
    random = np.random.default_rng(width)
    down, across = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :]
    frequency = np.maximum(np.hypot(down, across), 1 / max(width, height))
    planes = [np.fft.irfft2(np.fft.rfft2(random.normal(size=(height, width))) / frequency, (height, width))] * 3
    pixels = np.stack([plane / plane.std() * 50 + 128 for plane in planes], axis=-1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def psnr(left: Image.Image, right: Image.Image) -> float:
    """Peak signal-to-noise ratio in decibels."""
    error = (np.asarray(left, float) - np.asarray(right, float)) ** 2
    return float(10 * np.log10(255**2 / max(error.mean(), 1e-9)))
