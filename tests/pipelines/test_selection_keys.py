"""Rules that compare rows see only those that share a key: cut into partitions by it, they say the same."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest

from pipelines.duplicates import band_masks
from pipelines.selection_keys import (
    KEYS,
    leaders,
    lost_hashes,
    mark_equal_pairs,
    mark_equal_pictures,
    mark_frequent_captions,
    mark_near_pictures,
    mark_popular_pictures,
    near_leaders,
)

COUNT = 400
HASH = 0x0F0F_3355_00FF_C3A5
Mark = Callable[[pa.Table], pa.Table]


def keys(seed: int) -> pa.Table:
    rng = np.random.default_rng(seed)
    hashes = HASH ^ (1 << rng.integers(0, 62, COUNT)) ^ (1 << rng.integers(0, 4, COUNT))
    columns = {
        "sample_id": [f"{number:032x}" for number in rng.permutation(COUNT)],
        "source": np.zeros(COUNT, dtype=np.int32),
        "url_key": rng.integers(0, COUNT // 2, COUNT).astype(np.uint64),
        "source_sha256": [f"{number:064x}" for number in rng.integers(0, COUNT // 2, COUNT)],
        "phash": hashes.astype(np.int64),
        "caption_key": rng.integers(0, COUNT // 4, COUNT).astype(np.uint64),
        "standing": [None if draw > 1 else bool(draw) for draw in rng.integers(0, 6, COUNT)],
        "reason": ["score" if draw == 0 else None for draw in rng.integers(0, 9, COUNT)],
    }
    return pa.table([pa.array(columns[field.name], field.type) for field in KEYS], schema=KEYS)


def partitions(table: pa.Table, key: str) -> list[pa.Table]:
    values, codes = np.unique(table[key].to_numpy(zero_copy_only=False), return_inverse=True)
    assert len(values) > 10
    return [table.filter(pa.array(codes % 3 == number)) for number in range(3)]


@pytest.mark.parametrize(
    ("key", "mark", "reason"),
    [
        ("caption_key", lambda table: mark_frequent_captions(table, 5), "caption_too_frequent"),
        ("source_sha256", lambda table: mark_popular_pictures(table, 3), "image_too_popular"),
        ("source_sha256", mark_equal_pictures, "duplicate_image"),
        ("phash", mark_equal_pairs, "near_duplicate"),
    ],
)
def test_partitions_say_what_the_whole_says(key: str, mark: Mark, reason: str) -> None:
    table = keys(0)
    whole = mark(table).sort_by("sample_id")
    parts = pa.concat_tables([mark(part) for part in partitions(table, key)]).sort_by("sample_id")
    assert parts == whole
    before = table.sort_by("sample_id")["reason"]
    changed = whole.filter(pa.array([a != b for a, b in zip(whole["reason"], before, strict=True)]))
    assert set(changed["reason"].to_pylist()) == {reason}
    assert changed["standing"].null_count == changed.num_rows  # only new rows are judged


def test_near_pictures_over_partitions() -> None:
    """Leaders by hash, pairs by each band, and the marks by hash again."""
    table, most = keys(1), 2
    masks = band_masks(most)

    def near(best: pa.Table) -> pa.Table:
        return pa.concat_tables([near_leaders(best, number, most) for number in range(len(masks))])

    whole = mark_near_pictures(table, lost_hashes(near(leaders(table)))).sort_by("sample_id")
    best = pa.concat_tables([leaders(part) for part in partitions(table, "phash")])
    found = []
    for number, mask in enumerate(masks):
        band = (best["phash"].to_numpy().view(np.uint64) & mask) % np.uint64(5)
        found += [near_leaders(best.filter(pa.array(band == part)), number, most) for part in range(5)]
    lost = lost_hashes(pa.concat_tables(found))
    assert 0 < lost.num_rows < best.num_rows
    parts = pa.concat_tables([mark_near_pictures(part, lost) for part in partitions(table, "phash")])
    assert parts.sort_by("sample_id") == whole
    assert whole["reason"].to_pylist().count("near_duplicate") > 10


def test_nothing_at_all() -> None:
    empty = KEYS.empty_table()
    for mark in (lambda table: mark_frequent_captions(table, 1), mark_equal_pictures, mark_equal_pairs):
        assert mark(empty) == empty
    lost = lost_hashes(near_leaders(leaders(empty), 0, 4))
    assert mark_near_pictures(empty, lost) == empty
    assert mark_near_pictures(keys(0), lost).num_rows == COUNT
