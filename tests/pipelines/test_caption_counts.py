"""Captions that too many links share, counted over shards of keys."""

from pathlib import Path

import pyarrow as pa

from coca.contract import sample_id
from coca.storage import Store
from pipelines.caption_counts import KEYS, frequent_captions, spill_caption_keys, too_frequent
from pipelines.intake import read_spilled
from pipelines.judge import JUDGED


def judged(rows: list[tuple[str, str, str | None]]) -> pa.Table:
    records = [{"sample_id": sample_id(u, c), "url": u, "caption": c, "reason": r} for u, c, r in rows]
    return pa.Table.from_pylist(records, schema=JUDGED)


def test_captions_of_more_pairs_than_allowed(tmp_path: Path) -> None:
    rows: list[tuple[str, str, str | None]] = [(f"http://a/{n}", "stock photo", None) for n in range(4)]
    rows += [(f"http://a/{n}", "a red house", None) for n in range(3)]
    rows += [("http://a/1", "twice", None)] * 9  # one pair, whatever its rows
    rows += [(f"http://a/{n}", "refused anyway", "caption_too_short") for n in range(9)]
    rows += [(f"http://a/{n}", f"caption {n}", None) for n in range(40)]
    store, shards = Store(tmp_path), 4
    for number, start in enumerate(range(0, len(rows), 10)):
        spill_caption_keys(store, "captions", f"p{number}.parquet", judged(rows[start : start + 10]), shards)
    frequent = [
        int(key) for s in range(shards) for key in frequent_captions(read_spilled(store, f"captions/c{s:03d}", KEYS), 3)
    ]
    table = judged(rows)
    import numpy as np

    marked = too_frequent(table["caption"], np.array(sorted(frequent), dtype=np.uint64))
    assert {row["caption"] for row, hit in zip(table.to_pylist(), marked, strict=True) if hit} == {"stock photo"}


def test_nothing_is_too_frequent_without_frequent_captions() -> None:
    table = judged([("http://a/", "a", None)])
    assert not too_frequent(table["caption"], frequent_captions(KEYS.empty_table(), 1)).any()
