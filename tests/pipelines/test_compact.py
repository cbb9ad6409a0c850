"""Compaction: fewer files, the same events, and old versions that still open."""

from pathlib import Path

import pyarrow as pa
import pytest

from coca.contract import LINKS
from coca.dataset import Dataset
from coca.errors import BadInput, RunFailed
from coca.tokenizer import Tokenizer
from pipelines import compact as compact_module
from pipelines.compact import compact
from pipelines.lease import hold_lease
from pipelines.tables import DataFile, file_schema, open_table, read_data_files, table_files
from pipelines.verify import verify
from tests.pipelines.published import Pair, Published, everything, pairs

BODY = file_schema("links").names


@pytest.fixture
def published(tmp_path: Path, tokenizer: Tokenizer) -> Published:
    return Published(str(tmp_path / "d"), tokenizer)


def events(published: Published, version: int) -> pa.Table:
    delta_version = Dataset(published.uri, version).record.links.delta_version
    order = [("sample_id", "ascending"), ("event_at", "ascending")]
    files = table_files(open_table(published.store, "links", delta_version))
    return read_data_files(published.store, "links", sorted(files), BODY).sort_by(order)


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_every_event_stays(where: str, request: pytest.FixtureRequest, tmp_path: Path, tokenizer: Tokenizer) -> None:
    uri = f"{request.getfixturevalue('s3')}/d" if where == "s3" else str(tmp_path / "d")
    published = Published(uri, tokenizer)
    published.refresh([*pairs(1, 2), Pair(3, rejected="timeout")])
    published.refresh([Pair(3, rejected="not_found"), *pairs(4), Pair(1, rejected="timeout")])
    before, rows = events(published, 2), everything(Dataset(uri))
    result = compact(uri)
    assert (result.version, result.buckets) == (3, 2)
    assert result.files_after == result.files_before - 2
    record = Dataset(uri).record
    assert (record.kind, record.parent, record.samples) == ("compact", 2, Dataset(uri, 2).record.samples)
    assert (record.links.rows, record.links.files) == (6, result.files_after)
    assert events(published, 3).equals(before)
    assert events(published, 2).equals(before)
    assert everything(Dataset(uri)) == rows
    assert verify(uri, report=print).faults == 0
    # Every bucket has one file: nothing is left to do, and no version is published.
    again = compact(uri)
    assert (again.version, again.buckets, again.files_after) == (3, 0, result.files_after)
    published.refresh(pairs(5))
    assert events(published, 4).num_rows == 7


def test_only_crowded_buckets_are_touched(published: Published) -> None:
    for rejected in ("timeout", "timeout", "not_found"):
        published.refresh([Pair(1, rejected=rejected)])
    published.refresh([Pair(2, rejected="timeout")])
    published.refresh([Pair(2, rejected="timeout")])
    assert compact(published.uri, min_files=4).buckets == 0
    result = compact(published.uri, min_files=3)
    assert (result.buckets, result.files_before, result.files_after) == (1, 5, 3)
    merged = published.read("links", _compacted(published)[0])
    assert merged["reason"].to_pylist() == ["timeout", "timeout", "not_found"]
    assert merged.schema.names == [name for name in LINKS.names if name != "bucket"]


def test_a_killed_compaction_is_in_no_version_and_the_next_one_is_whole(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        published.refresh([Pair(number, rejected="timeout") for number in range(1, 6)])
    before = events(published, 2)
    replace, done = compact_module.replace_bucket, []

    def killed(store: object, file: DataFile, lease: object) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(file)
        replace(store, file, lease)

    with monkeypatch.context() as patch:
        patch.setattr(compact_module, "replace_bucket", killed)
        with pytest.raises(KeyboardInterrupt):
            compact(published.uri)
    assert Dataset(published.uri).record.version == 2
    assert verify(published.uri, report=print).faults == 0
    assert compact(published.uri).version == 3
    assert events(published, 3).equals(before)
    assert len(table_files(open_table(published.store, "links"))) == 5


def test_rows_lost_since_their_commit_stop_it(published: Published) -> None:
    published.refresh([Pair(1, rejected="timeout")])
    published.refresh([Pair(1, rejected="timeout")])
    path = sorted(table_files(open_table(published.store, "links")))[0]
    published.write("links", path, [])
    with pytest.raises(RunFailed, match="has lost rows since its commit"):
        compact(published.uri)


def test_a_dataset_that_is_written_is_left_alone(published: Published) -> None:
    published.refresh(pairs(1))
    with hold_lease(published.store, "coca data refresh", 0.6), pytest.raises(BadInput, match="is being written"):
        compact(published.uri)


def _compacted(published: Published) -> list[str]:
    return [path for path in sorted(table_files(open_table(published.store, "links"))) if "compact-" in path]
