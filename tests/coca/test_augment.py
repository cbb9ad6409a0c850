"""Random views: repeatable, bounded, different at each pass."""

import numpy as np
from PIL import Image

from coca.augment import kept_patches, random_view
from coca.images import model_pixels
from coca.train_config import AugmentConfig

GRADIENT = np.add.outer(np.arange(60), 2 * np.arange(80)).astype(np.uint8)
IMAGE = Image.fromarray(np.stack([GRADIENT] * 3, axis=-1))
HALF = AugmentConfig(min_crop_area=0.5)


def view(config: AugmentConfig, seed: int = 0, sample_id: str = "0" * 31 + "a", lane_pass: int = 0) -> np.ndarray:
    return random_view(IMAGE, 24, config, seed=seed, sample_id=sample_id, lane_pass=lane_pass)


def test_off_gives_what_evaluation_sees() -> None:
    assert np.array_equal(view(AugmentConfig()), model_pixels(IMAGE, 24))


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
