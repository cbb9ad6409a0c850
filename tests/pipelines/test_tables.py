"""Commits of files that lie ready, and snapshots of them."""

import subprocess
import sys
from pathlib import Path

import pytest

from coca.contract import LINKS
from coca.errors import RunFailed
from coca.storage import Store
from coca.tokenizer import Tokenizer
from pipelines.lease import hold_lease
from pipelines.tables import (
    DataFile,
    commit_files,
    create_tables,
    drop_foreign_files,
    file_schema,
    file_sizes,
    lying_files,
    open_table,
    read_data_files,
    table_files,
)
from tests.pipelines.published import Published, pairs

TAKE_BACK = """
import sys
from coca.storage import Store
from pipelines.tables import drop_foreign_files
drop_foreign_files(Store(sys.argv[1]), "samples", 1, "another")
"""


@pytest.fixture
def published(tmp_path: Path, tokenizer: Tokenizer) -> Published:
    return Published(str(tmp_path / "d"), tokenizer)


def test_a_commit_checks_the_lease_last(published: Published) -> None:
    create_tables(published.store)
    size = published.write("samples", "a.parquet", [])
    file = DataFile(path="a.parquet", size=size, rows=0)
    with hold_lease(published.store, "coca data refresh") as lease:
        commit_files(published.store, "samples", [file], "r", 0, lease=lease)
        published.store.write("leases/2.json", published.store.read("leases/1.json"))
        # What was committed needs no right to it; what was not, is not.
        commit_files(published.store, "samples", [file], "r", 0, lease=lease)
        more = DataFile(path="b.parquet", size=published.write("samples", "b.parquet", []), rows=0)
        with pytest.raises(RunFailed, match="was taken over by"):
            commit_files(published.store, "samples", [more], "r", 1, lease=lease)
    assert table_files(open_table(published.store, "samples")) == {"a.parquet": 0}
    assert file_sizes(open_table(published.store, "samples")) == {"a.parquet": (size, 0)}


def test_a_file_that_is_gone_or_another_is_not_committed(published: Published) -> None:
    create_tables(published.store)
    file = DataFile(path="a.parquet", size=5, rows=0)
    with pytest.raises(RunFailed, match=r"samples/a.parquet is gone before its commit"):
        commit_files(published.store, "samples", [file], "r", 0)
    published.store.write("samples/a.parquet", b"123456")
    with pytest.raises(RunFailed, match=r"a.parquet has 6 bytes, 5 were written"):
        commit_files(published.store, "samples", [file], "r", 0)
    assert open_table(published.store, "samples").version() == 0


def test_files_that_lie_there_are_those_of_every_version_and_none(published: Published) -> None:
    published.refresh(pairs(1))
    published.store.write("samples/staged.parquet", b"x")
    published.store.write("samples/.hidden.tmp", b"x")
    assert set(lying_files(published.store, "samples")) == {"refresh1-b00000-p00000.parquet", "staged.parquet"}
    links = lying_files(published.store, "links")
    assert links == {path: size for path, (size, _) in file_sizes(open_table(published.store, "links")).items()}
    assert all(path.startswith("bucket=") for path in links)
    assert lying_files(Store(published.uri + "/nothing"), "samples") == {}


def test_foreign_files_go_and_those_of_live_refreshes_stay(published: Published) -> None:
    published.refresh(pairs(1))
    version = open_table(published.store, "samples").version()
    published.commit([pairs(2)], "mine")
    drop_foreign_files(published.store, "samples", version, ("yours", "mine"))
    assert len(table_files(open_table(published.store, "samples"))) == 2
    with hold_lease(published.store, "coca data refresh") as lease:
        published.store.write("leases/2.json", published.store.read("leases/1.json"))
        with pytest.raises(RunFailed, match="was taken over by"):
            drop_foreign_files(published.store, "samples", version, "yours", lease=lease)
    assert len(table_files(open_table(published.store, "samples"))) == 2
    drop_foreign_files(published.store, "samples", version, ())
    assert list(table_files(open_table(published.store, "samples"))) == ["refresh1-b00000-p00000.parquet"]
    files = table_files(open_table(published.store, "samples", version))
    assert read_data_files(published.store, "samples", sorted(files), ["url"])["url"].to_pylist() == [
        "http://example.com/1"
    ]


def test_a_table_is_taken_back_on_s3(s3: str, tokenizer: Tokenizer) -> None:
    published = Published(f"{s3}/d", tokenizer)
    published.refresh(pairs(1))
    published.commit([pairs(2)], "killed")
    # In a process of its own: deltalake keeps the GIL while it restores, and the S3 server is a thread of this one.
    subprocess.run(
        [sys.executable, "-c", TAKE_BACK, published.uri], check=True, cwd=Path(__file__).parents[2], timeout=60
    )
    assert list(table_files(open_table(published.store, "samples"))) == ["refresh1-b00000-p00000.parquet"]


def test_columns_of_no_file(published: Published) -> None:
    assert read_data_files(published.store, "links", []).schema == file_schema("links")
    assert "bucket" in LINKS.names
    assert "bucket" not in file_schema("links").names
