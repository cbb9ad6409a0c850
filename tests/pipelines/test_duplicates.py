"""Near hashes: all pairs are found, and who is kept follows from the ranks alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from coca.images import phash
from pipelines.duplicates import band_masks, is_blank, near_any, near_pairs, resolve


def clustered(seed: int, count: int = 40) -> np.ndarray:
    """Hashes many of which lie near each other, and those within a bit of the bands' edges among them."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 2**64, size=count, dtype=np.uint64)
    copies = [base]
    for _ in range(4):
        flipped = np.uint64(1) << rng.integers(0, 64, (2, count), dtype=np.uint64)
        copies.append(copies[-1] ^ flipped[0] ^ flipped[1])
    hashes = np.unique(np.concatenate(copies))
    rng.shuffle(hashes)
    return hashes


def distances(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.asarray(np.bitwise_count(left[:, None] ^ right[None, :]))


@pytest.mark.parametrize("most", [0, 1, 2, 4, 7, 12])
def test_all_near_pairs_are_found_and_no_other(most: int) -> None:
    hashes = clustered(most)
    left, right = np.nonzero(np.triu(distances(hashes, hashes) <= most, 1))
    found = near_pairs(hashes, most)
    assert (most < 2) == (len(left) == 0)
    np.testing.assert_array_equal(found, (left, right))
    queries = np.concatenate([hashes[:30] ^ np.uint64(0b101), clustered(99)[:30]])
    np.testing.assert_array_equal(near_any(queries, hashes, most), (distances(queries, hashes) <= most).any(axis=1))


@given(st.integers(0, 12), st.integers(0, 2**64 - 1), st.randoms(use_true_random=False))
def test_near_hashes_agree_under_a_mask(most: int, value: int, random: st.DrawFn) -> None:
    other = value
    for bit in random.sample(range(64), most):  # type: ignore[attr-defined]
        other ^= 1 << bit
    masks = band_masks(most)
    assert ((np.uint64(value) & masks) == (np.uint64(other) & masks)).any()


def test_nothing_is_near_nothing() -> None:
    empty = np.empty(0, np.uint64)
    assert [len(side) for side in near_pairs(empty, 4)] == [0, 0]
    assert near_any(empty, clustered(0), 4).shape == (0,)
    assert not near_any(clustered(0), empty, 4).any()


@settings(max_examples=200)
@given(
    st.sets(st.tuples(st.integers(0, 11), st.integers(0, 11)).filter(lambda pair: pair[0] < pair[1])),
    st.randoms(use_true_random=False),
)
def test_the_kept_are_those_of_the_greedy_rule(pairs: set[tuple[int, int]], random: st.DrawFn) -> None:
    expected: list[int] = []
    for place in range(12):
        winners = [other for other in range(place) if expected[other] < 0 and (other, place) in pairs]
        expected.append(winners[0] if winners else -1)
    shuffled = [*pairs, *list(pairs)[:3]]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    ends = np.array(shuffled, dtype=np.int64).reshape(-1, 2)
    assert resolve(ends[:, 0], ends[:, 1], 12).tolist() == expected


def test_flat_pictures_are_blank_and_others_are_not() -> None:
    flat = [
        phash(Image.new("RGB", size, colour)) for colour in ("white", "red", "#123456") for size in ((9, 9), (300, 80))
    ]
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    ring = Image.new("RGB", (64, 64), "white")
    ring.paste((200, 0, 0), (20, 20, 50, 44))
    detailed = [phash(Image.fromarray(noise)), phash(ring)]
    hashes = np.array([*flat, 0, *detailed], dtype=np.int64).view(np.uint64)
    assert is_blank(hashes).tolist() == [True] * 7 + [False] * 2
