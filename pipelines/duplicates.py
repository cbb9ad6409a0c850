"""Perceptual hashes that lie near each other: banding, and which of near pictures is kept.

Hashes are 64 bits wide. Of two that differ in at most ``d`` bits, cut into d + 2 bands, two bands at least are equal:
so pairs are looked for only among hashes that agree in two bands, and verified by counting bits.
"""

from collections.abc import Iterator
from functools import cache
from itertools import combinations, pairwise

import numpy as np
import pyarrow as pa

from coca.images import phash

# Hashes of pictures with detail have half their bits set, those over the median.
_MIN_SET_BITS = 12


def band_masks(max_hamming: int) -> np.ndarray:
    """uint64 masks, each of two bands; any two hashes within ``max_hamming`` bits agree under one of them."""
    edges = np.linspace(0, 64, max_hamming + 3).round().astype(int)
    bands = [(1 << int(high)) - (1 << int(low)) for low, high in pairwise(edges)]
    return np.array([first | second for first, second in combinations(bands, 2)], dtype=np.uint64)


def is_blank(hashes: np.ndarray) -> np.ndarray:
    """Which hashes (uint64) say nothing of the picture: those of flat colour, and those with hardly a bit set."""
    few = np.bitwise_count(hashes) < _MIN_SET_BITS
    return np.asarray(few | np.isin(hashes, _flat_hashes()))


@cache
def _flat_hashes() -> np.ndarray:
    # Of a flat picture all frequencies but the lowest are zero up to rounding, whose noise makes the bits.
    from PIL import Image

    greys = [phash(Image.new("L", (32, 32), grey)) for grey in range(256)]
    return np.unique(np.array(greys, dtype=np.int64).view(np.uint64))


def near_pairs(hashes: np.ndarray, max_hamming: int) -> tuple[np.ndarray, np.ndarray]:
    """All pairs (i, j), i < j, of places in ``hashes`` (uint64, distinct) within ``max_hamming`` bits, sorted."""
    found = [_within(hashes, mask, max_hamming) for mask in band_masks(max_hamming)]
    return _unique_pairs(np.concatenate(found) if found else np.empty((0, 2), np.int64))


def near_pairs_under(hashes: np.ndarray, mask: np.uint64, max_hamming: int) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of ``near_pairs`` that agree under one mask: what a partition of bands can find."""
    return _unique_pairs(_within(hashes, mask, max_hamming))


def _within(hashes: np.ndarray, mask: np.uint64, max_hamming: int) -> np.ndarray:
    order = np.argsort(hashes & mask, kind="stable")
    pairs = [np.empty((0, 2), np.int64)]
    for left, right in _pairs_in_runs((hashes & mask)[order]):
        first, second = order[left], order[right]
        near = np.bitwise_count(hashes[first] ^ hashes[second]) <= max_hamming
        pairs.append(np.stack([first[near], second[near]], axis=1))
    return np.concatenate(pairs)


def _pairs_in_runs(ordered: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every pair of places with equal keys of a sorted array, by their offset: memory stays linear."""
    if len(ordered) == 0:
        return
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    lengths = np.diff(np.r_[starts, len(ordered)])
    ends = np.repeat(starts + lengths, lengths)
    live, offset = np.arange(len(ordered)), 1
    while True:
        live = live[live + offset < ends[live]]
        if len(live) == 0:
            return
        yield live, live + offset
        offset += 1


def _unique_pairs(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pairs = np.unique(np.sort(pairs, axis=1), axis=0)
    return pairs[:, 0], pairs[:, 1]


def near_any(hashes: np.ndarray, references: np.ndarray, max_hamming: int) -> np.ndarray:
    """Which ``hashes`` lie within ``max_hamming`` bits of one of ``references`` (both uint64)."""
    near = np.zeros(len(hashes), dtype=bool)
    for mask in band_masks(max_hamming) if len(references) else ():
        order = np.argsort(references & mask, kind="stable")
        keys = (references & mask)[order]
        waiting = np.flatnonzero(~near)
        wanted = hashes[waiting] & mask
        place, end = np.searchsorted(keys, wanted, "left"), np.searchsorted(keys, wanted, "right")
        while (live := place < end).any():
            waiting, place, end = waiting[live], place[live], end[live]
            close = np.bitwise_count(hashes[waiting] ^ references[order[place]]) <= max_hamming
            near[waiting[close]] = True
            waiting, place, end = waiting[~close], place[~close] + 1, end[~close]
    return near


def resolve(better: np.ndarray, worse: np.ndarray, count: int) -> np.ndarray:
    """Which of near things give way, and to whom.

    In the order of rank, a thing is kept unless one that is kept lies near it. That is a property of the ranks and
    pairs alone, whatever the order in which they were found.

    Args:
        better, worse: the two ends of each near pair as places 0..count-1; the place is the rank, ``better < worse``.

    Returns:
        For each place the lowest kept place that it gives way to, or -1 where it is kept.
    """
    kept, decided = np.zeros(count, dtype=bool), np.zeros(count, dtype=bool)
    decided[np.setdiff1d(np.arange(count), worse)] = kept[np.setdiff1d(np.arange(count), worse)] = True
    first, second = better, worse
    while len(second):
        lost = np.unique(second[kept[first]])
        decided[lost] = True
        # Pairs whose outcome is settled: the worse end is decided, or the better end has given way itself.
        open_pairs = ~decided[second] & ~(decided[first] & ~kept[first])
        free = np.setdiff1d(np.unique(second[~decided[second]]), second[open_pairs])
        kept[free] = decided[free] = True
        still = ~decided[second]
        first, second = first[still & open_pairs], second[still & open_pairs]
    winner = np.full(count, count, dtype=np.int64)
    holds = kept[better]
    np.minimum.at(winner, worse[holds], better[holds])
    winner[winner == count] = -1
    return winner


def signed_hashes(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """The int64 column ``phash`` as uint64."""
    return np.asarray(column.to_numpy()).view(np.uint64)
