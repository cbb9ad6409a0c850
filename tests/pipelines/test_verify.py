"""Verification: a whole dataset has no fault, and every kind of damage is named with its file and row."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coca.contract import link_bucket, sample_id, version_path
from coca.dataset import Dataset
from coca.errors import BadInput
from coca.tokenizer import Tokenizer
from pipelines.compact import compact
from pipelines.history import rollback
from pipelines.purge import purge
from pipelines.verify import verify
from pipelines.verify_files import tally_of
from pipelines.withdraw import withdraw
from tests.pipelines.published import Pair, Published, pairs

FIRST = "refresh1-b00000-p00000.parquet"


@pytest.fixture
def published(tmp_path: Path, tokenizer: Tokenizer) -> Published:
    dataset = Published(str(tmp_path / "d"), tokenizer)
    dataset.refresh([*pairs(1, 2, 3, 4), Pair(5, reason="near_duplicate")], [Pair(6, rejected="timeout"), *pairs(7)])
    return dataset


def faults_of(published: Published, version: int | None = None) -> list[str]:
    faults: list[str] = []
    result = verify(published.uri, version, report=lambda fault: faults.append(str(fault)))
    assert result.faults == len(faults)
    return faults


def change(published: Published, table: str, path: str, alter: Callable[[list[dict[str, Any]]], object]) -> None:
    """Write a data file again with other rows and the size that its Delta log says, as far as that goes."""
    rows = published.read(table, path).to_pylist()
    alter(rows)
    published.write(table, path, rows)


def test_a_whole_dataset_has_no_fault(published: Published) -> None:
    published.refresh(pairs(8, 9), [])
    withdraw(published.uri, urls=[Pair(8).url, "http://example.com/never"], reason="takedown")
    published.refresh(pairs(10))
    withdraw(published.uri, urls=[Pair(1).url], reason="takedown")
    compact(published.uri)
    rollback(published.uri, 2)
    purge(published.uri)
    published.refresh(pairs(11), [Pair(6)])
    result = verify(published.uri, report=lambda fault: pytest.fail(str(fault)))
    assert result.versions == list(range(1, len(result.versions) + 1))
    assert result.samples == 11
    assert result.withdrawn == 2
    one = verify(published.uri, 1, report=lambda fault: pytest.fail(str(fault)))
    assert (one.versions, one.samples) == ([1], 6)


def test_on_s3(s3: str, tokenizer: Tokenizer) -> None:
    published = Published(f"{s3}/d", tokenizer)
    published.refresh(pairs(1, 2))
    assert faults_of(published) == []
    change(published, "samples", FIRST, lambda rows: rows[0].update(caption="another"))
    assert any(f"samples/{FIRST} row group 0 row 0" in fault for fault in faults_of(published))


def test_one_flipped_bit_of_an_image_is_found(published: Published) -> None:
    path = Path(published.uri, "samples", FIRST)
    data = bytearray(path.read_bytes())
    image = published.read("samples", FIRST)["image"][3].as_py()
    data[data.find(image) + 100] ^= 1
    path.write_bytes(data)
    digest = published.read("samples", FIRST)["sha256"][3].as_py()
    assert faults_of(published) == [f"samples/{FIRST} row group 1 row 0: the image does not match its sha256 {digest}"]


def test_zeros_are_a_fault_unless_withdrawn(published: Published) -> None:
    withdraw(published.uri, urls=[Pair(1).url], reason="takedown")
    purge(published.uri)
    assert faults_of(published) == []
    for name in published.store.list("withdrawn"):
        published.store.delete(f"withdrawn/{name}")
    assert [fault for fault in faults_of(published) if "does not match its sha256" in fault]


@pytest.mark.parametrize(
    ("alter", "wanted"),
    [
        (
            lambda rows: rows[0].update(caption="another"),
            "row group 0 row 0: {id} is not the key of its url and caption",
        ),
        (lambda rows: rows.pop(), "has 4 rows, the Delta log says 5"),
        (lambda rows: rows.reverse(), "has other rows than its samples file, or another order"),
        (lambda rows: rows.append(rows[0]), "has 6 rows, the Delta log says 5"),
    ],
)
def test_samples_that_are_not_what_they_were(published: Published, alter: Callable[..., object], wanted: str) -> None:
    key = published.read("samples", FIRST)["sample_id"][0].as_py()
    change(published, "samples", FIRST, alter)
    assert any(wanted.format(id=key) in fault for fault in faults_of(published))


@pytest.mark.parametrize(
    ("alter", "wanted"),
    [
        (lambda rows: rows[1].update(tokens=[1, 2]), "row group 0 row 1: its tokens are not what the tokenizer makes"),
        (lambda rows: rows[1].update(selected=False), "row group 0: has 3 rows, "),
        (
            lambda rows: rows[4].update(reason="timeout", selected=True),
            "row group 1 row 1: is selected with the reason",
        ),
        (lambda rows: rows[0].update(reason="mood", selected=False), "for the reason mood, which is none"),
        (lambda rows: rows.pop(), "row group 1: has other rows than its samples file"),
        (lambda rows: rows.__delitem__(slice(3, None)), "has 1 row groups, its samples file 2"),
    ],
)
def test_annotations_that_are_not_what_they_were(
    published: Published, alter: Callable[..., object], wanted: str
) -> None:
    change(published, "annotations", FIRST, alter)
    faults = faults_of(published)
    assert any(f"annotations/{FIRST}" in fault and wanted in fault for fault in faults), faults


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"url": "http://example.com/77"}, "row 0: {id} is not the key of its url and caption"),
        ({"url": "http://example.com/77"}, "row 0: http://example.com/77 belongs to the bucket {other}"),
        ({"state": "asleep"}, "row 0: the state asleep is none"),
        ({"reason": "mood"}, "row 0: the reason mood is none"),
        ({"stored": False}, "version 1: sample {id} is stored, and no event of links/bucket={bucket} says so"),
    ],
)
def test_events_that_are_not_what_they_were(published: Published, changes: dict[str, Any], wanted: str) -> None:
    pair = Pair(2)
    bucket = link_bucket(pair.url)
    change(published, "links", f"bucket={bucket}/refresh1-b00000.parquet", lambda rows: rows[0].update(changes))
    wanted = wanted.format(id=pair.id, bucket=bucket, other=link_bucket("http://example.com/77"))
    faults = faults_of(published)
    assert any(wanted in fault for fault in faults), faults


def test_an_event_without_its_sample_and_a_sample_stored_twice(published: Published) -> None:
    rejected = Pair(6)
    path = f"bucket={link_bucket(rejected.url)}/refresh1-b00000.parquet"
    change(published, "links", path, lambda rows: rows[0].update(stored=True))
    assert any(
        f"says that {rejected.id} is stored, and no samples file has it" in fault for fault in faults_of(published)
    )
    change(published, "links", path, lambda rows: rows[0].update(stored=False))
    published.refresh(pairs(7))
    assert f"version 2: sample {Pair(7).id} is stored 2 times" in faults_of(published)


def test_files_that_are_missing_or_no_parquet(published: Published) -> None:
    events = f"links/bucket={link_bucket(Pair(2).url)}/refresh1-b00000.parquet"
    published.store.write(f"annotations/{FIRST}", b"no parquet")
    published.store.delete(events)
    faults = faults_of(published)
    assert any(fault.startswith(f"annotations/{FIRST}: has 10 bytes, the Delta log says") for fault in faults)
    assert any(fault.startswith(f"annotations/{FIRST}: cannot be read") for fault in faults)
    assert f"{events}: is missing" in faults
    published.store.delete(f"samples/{FIRST}")
    assert f"samples/{FIRST}: is missing" in faults_of(published)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"version": 7}, "the record says that it is version 7"),
        ({"parent": 1}, "its parent 1 is no earlier version"),
        ({"selected": 3}, "5 samples of the index are selected, the record says 3"),
        ({"withdrawn_sha256": "0" * 64}, "the withdrawn list has never been what the record says"),
        ({"row_groups_sha256": "0" * 64}, "1.row_groups.parquet does not match its digest"),
        ({"rows_per_row_group": 2}, "has row groups of [3, 2] rows, the version says 2"),
        ({"contract_version": 9}, "follows contract version 9"),
        ({"samples": {"delta_version": 1, "files": 3, "rows": 6}}, "samples has 2 files and 6 rows, the record says 3"),
        ({"samples": {"delta_version": 99, "files": 2, "rows": 6}}, "the Delta version of samples cannot be opened"),
        ({"links": {"delta_version": 0, "files": 7, "rows": 7}}, "links has 0 files and 0 rows"),
    ],
)
def test_a_record_that_is_not_what_it_was(published: Published, changes: dict[str, Any], wanted: str) -> None:
    path = version_path(1)
    record = json.loads(published.store.read(path)) | changes
    published.store.write(path, json.dumps(record).encode())
    faults = faults_of(published)
    assert any(wanted in fault for fault in faults), faults


def test_an_index_that_leaves_files_out(published: Published) -> None:
    index = Dataset(published.uri).recorded_row_groups
    published.publish(index.slice(0, 2), "short")
    faults = faults_of(published, 2)
    orphan = "refresh1-b00000-p00001.parquet"
    assert f"version 2: samples/{orphan} is in the Delta table and not in the index" in faults
    assert f"version 2: annotations/{orphan} is in the Delta table and not in the index" in faults
    assert faults_of(published, 1) == []


def test_another_tokenizer_in_the_place_of_its_own(published: Published) -> None:
    stamp = Dataset(published.uri).record.tokenizer
    published.store.write(stamp.path, b"{}")
    assert any(fault.startswith("version 1: ") and stamp.path in fault for fault in faults_of(published))


def test_withdrawn_samples_that_the_list_cannot_leave_out(published: Published) -> None:
    withdraw(published.uri, urls=[Pair(1).url], reason="takedown")
    name = published.store.list("withdrawn")[0]
    rows = pq.read_table(Path(published.uri, "withdrawn", name))
    place = rows.schema.get_field_index("samples_path")
    pq.write_table(
        rows.set_column(place, "samples_path", pa.array(["another"])), Path(published.uri, "withdrawn", name)
    )
    published.refresh([Pair(12, picture=1)])
    faults = faults_of(published)
    assert any("has withdrawn samples that the list does not have here" in fault for fault in faults)
    assert any(f"{Pair(12).id} is a copy of a withdrawn picture" in fault for fault in faults)
    purge(published.uri)
    assert faults_of(published) == []


def test_a_dataset_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no published dataset version"):
        verify(str(tmp_path), report=print)
    with pytest.raises(BadInput, match="holds no published dataset version"):
        verify(str(tmp_path), 3, report=print)


def test_tallies_add_up_like_sets() -> None:
    ids = [sample_id("http://a/", str(number)) for number in range(50)]
    whole = tally_of(ids)
    assert np.array_equal(tally_of(ids[:20]) + tally_of(ids[20:]), whole)
    assert np.array_equal(tally_of(ids[::-1]), whole)
    assert not np.array_equal(tally_of([*ids[:-1], sample_id("http://a/", "50")]), whole)
    assert tally_of(ids)[0] == 50
    assert tally_of([]).tolist() == [0, 0, 0]
