"""The withdrawn list: it grows, it stands still for who knows its files, and a list that is damaged hides nothing."""

import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from coca.contract import ROW_GROUPS
from coca.errors import BadInput
from coca.storage import Store
from coca.withdrawn import WITHDRAWN, Withdrawn, append_withdrawn, list_withdrawn, read_withdrawn

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def entries(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist([{"reason": "takedown", "withdrawn_at": NOW, **row} for row in rows], schema=WITHDRAWN)


def stored(number: int, path: str = "a.parquet", row_group: int = 0) -> dict[str, Any]:
    return {
        "sample_id": f"{number:032x}",
        "url": f"http://example.com/{number}",
        "source_sha256": f"{number:064x}",
        "samples_path": path,
        "row_group": row_group,
    }


@pytest.fixture(params=["disk", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(f"{request.getfixturevalue('s3')}/d" if request.param == "s3" else tmp_path / "d")


def test_it_grows_and_an_addition_counts_once(store: Store) -> None:
    assert len(read_withdrawn(store)) == 0
    assert append_withdrawn(store, entries(stored(2), stored(1)), "first")
    assert not append_withdrawn(store, entries(stored(3)), "first")
    assert not append_withdrawn(store, entries(), "nothing")
    before = list_withdrawn(store)
    assert append_withdrawn(store, entries(stored(2), {"url": "http://example.com/gone"}), "second")
    whole = read_withdrawn(store)
    assert whole.sample_ids.to_pylist() == [f"{1:032x}", f"{2:032x}"]
    assert whole.urls.to_pylist() == [f"http://example.com/{name}" for name in ("1", "2", "gone")]
    assert whole.source_sha256.to_pylist() == [f"{1:064x}", f"{2:064x}"]
    # Who knew the files of before still sees that list.
    assert before == ("first.parquet",)
    assert len(read_withdrawn(store, before).table) == 2


def test_the_digest_is_of_the_entries_and_not_of_their_files(tmp_path: Path) -> None:
    one, two = Store(tmp_path / "one"), Store(tmp_path / "two")
    append_withdrawn(one, entries(stored(1), stored(2), stored(3)), "all")
    append_withdrawn(two, entries(stored(3), stored(1)), "some")
    assert read_withdrawn(one).digest != read_withdrawn(two).digest
    append_withdrawn(two, entries(stored(2, "b.parquet", 7), stored(3)), "others")
    assert read_withdrawn(one).digest == read_withdrawn(two).digest
    lines = [f"{n:032x}\thttp://example.com/{n}\t{n:064x}\n" for n in (1, 2, 3)]
    assert read_withdrawn(one).digest == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert read_withdrawn(Store(tmp_path / "none")).digest == hashlib.sha256(b"").hexdigest()


def test_membership_is_exact() -> None:
    numbers = np.random.default_rng(0).integers(0, 2**60, 500)
    listed = Withdrawn(entries(*(stored(int(number)) for number in numbers[:250])))
    keys = pa.chunked_array([[f"{number:032x}" for number in numbers], ["", "zz", "0", "é"]])
    assert listed.mask(keys).tolist() == [True] * 250 + [False] * 254
    assert Withdrawn(entries()).mask(keys).sum() == 0
    assert listed.mask(keys.slice(0, 0)).shape == (0,)


def test_places_are_those_of_the_index() -> None:
    groups = [("a", 0), ("a", 1), ("b", 0), ("c", 0)]
    index = pa.Table.from_pylist(
        [{"samples_path": p, "annotations_path": p, "row_group": n, "rows": 1, "selected": 1} for p, n in groups],
        schema=ROW_GROUPS,
    )
    rows = [stored(1, "b", 0), stored(2, "b", 0), stored(3, "a", 1), stored(4, "a", 7), stored(5, "gone", 0)]
    assert Withdrawn(entries(*rows, {"url": "http://example.com/never"})).places_in(index).tolist() == [1, 2]
    assert Withdrawn(entries({"url": "http://example.com/never"})).places_in(index).tolist() == []


def test_a_damaged_or_missing_file_is_named(store: Store) -> None:
    append_withdrawn(store, entries(stored(1)), "first")
    with pytest.raises(BadInput, match=r"withdrawn/second.parquet is missing"):
        read_withdrawn(store, ("first.parquet", "second.parquet"))
    store.write("withdrawn/first.parquet", b"no parquet")
    with pytest.raises(BadInput, match=r"withdrawn/first.parquet cannot be read: .*Restore the file"):
        read_withdrawn(store)
    with pytest.raises(ValueError, match="is no file name"):
        append_withdrawn(store, entries(stored(1)), "../first")
