"""Random views: repeatable, bounded, different at each pass."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from coca.augment import kept_patches, random_view
from coca.images import model_pixels
from coca.train_config import AugmentConfig

GRADIENT = np.add.outer(np.arange(60), 2 * np.arange(80)).astype(np.uint8)
IMAGE_HWC = np.stack([GRADIENT] * 3, axis=-1)
HALF = AugmentConfig(min_crop_area=0.5)


def view(config: AugmentConfig, seed: int = 0, sample_id: str = "0" * 31 + "a", lane_pass: int = 0) -> np.ndarray:
    return drawn(IMAGE_HWC, config, seed=seed, sample_id=sample_id, lane_pass=lane_pass)


def drawn(image_HWC: np.ndarray, config: AugmentConfig, size: int = 24, **of: Any) -> np.ndarray:
    pixels_HWC = np.zeros((size, size, 3), np.uint8)
    random_view(image_HWC, pixels_HWC, config, **of)
    return pixels_HWC


def test_off_gives_what_evaluation_sees() -> None:
    assert np.array_equal(view(AugmentConfig()), model_pixels(Image.fromarray(IMAGE_HWC), 24))


def test_the_same_sample_seed_and_pass_give_the_same_view() -> None:
    assert np.array_equal(view(HALF), view(HALF))


def test_seed_sample_and_pass_each_change_the_view() -> None:
    others = [view(HALF, seed=1), view(HALF, sample_id="0" * 31 + "b"), view(HALF, lane_pass=1)]
    assert not any(np.array_equal(view(HALF), other) for other in others)


def test_the_crop_keeps_at_least_the_area() -> None:
    """The horizontal gradient grows by 2 a pixel: its span tells the side of the crop."""
    for lane_pass in range(50):
        seen = view(HALF, lane_pass=lane_pass).astype(int)
        side = (seen[0, -1, 0] - seen[0, 0, 0]) / 2 * 24 / 23
        assert 60 * np.sqrt(0.5) - 1.5 <= side <= 61.5


@pytest.mark.parametrize(("width", "height", "size"), [(400, 300, 224), (1000, 640, 224), (60, 80, 224), (1, 1, 7)])
def test_views_are_resized_as_by_pillow(width: int, height: int, size: int) -> None:
    """Shrunk and enlarged: of photographs' values few are another, by little."""
    coarse = np.random.default_rng(0).integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    whole = AugmentConfig(min_crop_area=1 - 1e-9)  # the largest square, somewhere
    view = drawn(np.asarray(image), whole, size, seed=0, sample_id="a", lane_pass=0)
    side = min(width, height)
    lefts = range(width - side + 1) if width > height else [0]
    tops = range(height - side + 1) if height > width else [0]
    crops = (image.crop((left, top, left + side, top + side)) for left in lefts for top in tops)
    by_pillow = (np.asarray(crop.resize((size, size), Image.Resampling.BICUBIC)) for crop in crops)
    difference = min((np.abs(view.astype(int) - each) for each in by_pillow), key=np.sum)
    assert difference.max() <= 2
    assert (difference > 0).mean() < 0.02


def test_a_view_is_drawn_into_its_place_in_a_batch() -> None:
    batch = np.zeros((3, 24, 24, 3), np.uint8)
    random_view(IMAGE_HWC, batch[1], HALF, seed=0, sample_id="0" * 31 + "a", lane_pass=0)
    assert np.array_equal(batch[1], view(HALF))
    assert not batch[::2].any()


def kept(seed: int = 0, sample_id: str = "0" * 31 + "a", lane_pass: int = 0) -> list[int]:
    patches: list[int] = kept_patches(16, 6, seed=seed, sample_id=sample_id, lane_pass=lane_pass).tolist()
    return patches


def test_kept_patches_follow_from_seed_sample_and_pass() -> None:
    assert kept() == kept()
    assert kept() not in (kept(seed=1), kept(sample_id="0" * 31 + "b"), kept(lane_pass=1))


def test_kept_patches_are_ascending_and_each_as_likely() -> None:
    counts = np.zeros(16)
    for lane_pass in range(2000):
        patches = kept(lane_pass=lane_pass)
        assert patches == sorted(set(patches))
        assert len(patches) == 6
        counts[patches] += 1
    assert np.abs(counts / 2000 - 6 / 16).max() < 0.05


THREADS = """
import os, numpy, torch
from coca.augment import random_view
from coca.train_config import AugmentConfig
torch.set_num_threads(4)
torch.zeros(1).sum()
before = set(os.listdir("/proc/self/task"))
image, pixels = numpy.ones((1000, 1000, 3), numpy.uint8), numpy.zeros((600, 600, 3), numpy.uint8)
random_view(image, pixels, AugmentConfig(min_crop_area=0.5), seed=0, sample_id="a", lane_pass=0)
print(len(set(os.listdir("/proc/self/task")) - before), pixels.min())
"""


def test_drawing_starts_no_threads_of_torch() -> None:
    """Decoders have a CPU each: what each would start beside waits for the same CPUs, by spinning."""
    found = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["0", "1"]
