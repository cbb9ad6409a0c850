"""Vacuum: what no version kept needs goes, and versions kept are as they were."""

import os
import time
from pathlib import Path

import pytest

from coca.dataset import Dataset, list_versions
from coca.errors import BadInput
from coca.tokenizer import Tokenizer
from pipelines.compact import compact
from pipelines.history import rollback
from pipelines.lease import hold_lease
from pipelines.tables import lying_files, open_table, table_files
from pipelines.vacuum import list_pins, vacuum
from pipelines.verify import verify
from pipelines.withdraw import withdraw
from tests.pipelines.published import Pair, Published, everything, pairs
from tests.s3_uploads import begin_upload, begun_uploads


@pytest.fixture
def published(tmp_path: Path, tokenizer: Tokenizer) -> Published:
    return Published(str(tmp_path / "d"), tokenizer)


def all_files(published: Published) -> set[str]:
    root = Path(published.uri)
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and "leases" not in path.parts}


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_pinned_and_last_versions_are_as_they_were(
    where: str, request: pytest.FixtureRequest, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    uri = f"{request.getfixturevalue('s3')}/d" if where == "s3" else str(tmp_path / "d")
    published = Published(uri, tokenizer)
    published.refresh([Pair(1, rejected="timeout"), *pairs(2)])
    published.refresh(pairs(1, 3))
    compact(uri)  # the bucket of pair 1
    published.refresh(pairs(4))
    rows = {version: everything(Dataset(uri, version)) for version in (1, 4)}
    if where == "s3":
        for path in ("samples/cut-off.parquet", "runs/a/under-way"):
            begin_upload(published.store, path)
    dry = vacuum(uri, keep=1, pin=[1], dry_run=True)
    assert where == "disk" or begun_uploads(published.store) == ["runs/a/under-way", "samples/cut-off.parquet"]
    assert list_pins(published.store) == []
    assert list_versions(published.store) == [1, 2, 3, 4]
    result = vacuum(uri, keep=1, pin=[1])
    assert (result.kept, result.pinned, result.dropped) == ([1, 4], [1], [2, 3])
    assert [path for path in result.files if "leases" not in path] == [
        path for path in dry.files if "leases" not in path
    ]
    assert where == "disk" or begun_uploads(published.store) == ["runs/a/under-way"]
    assert list_versions(published.store) == [1, 4]
    assert {version: everything(Dataset(uri, version)) for version in (1, 4)} == rows
    assert verify(uri, report=print).faults == 0
    with pytest.raises(BadInput, match="has no version 2"):
        Dataset(uri, 2)
    # Unpinned, version 1 goes with the ledger file that only it has.
    before = len(lying_files(published.store, "links"))
    last = vacuum(uri, keep=1, unpin=[1])
    assert (last.kept, last.dropped) == ([4], [1])
    assert len(lying_files(published.store, "links")) == before - 1
    assert last.bytes > 0
    assert everything(Dataset(uri)) == rows[4]
    assert verify(uri, report=print).faults == 0
    assert vacuum(uri, keep=1).files == []


def test_files_of_a_version_rolled_back_from_go_with_it(published: Published) -> None:
    published.refresh(pairs(1, 2))
    published.refresh(pairs(3))
    rollback(published.uri, 1)
    result = vacuum(published.uri, keep=1)
    assert result.dropped == [1, 2]
    # Version 3 has the index of version 1.
    assert {path for path in all_files(published) if path.startswith("versions/")} == {
        "versions/3.json",
        "versions/1.row_groups.parquet",
    }
    assert list(lying_files(published.store, "samples")) == ["refresh1-b00000-p00000.parquet"]
    # The tables name no file that is gone, for other readers of Delta.
    assert list(table_files(open_table(published.store, "samples"))) == ["refresh1-b00000-p00000.parquet"]
    assert len(everything(Dataset(published.uri))) == 2
    assert len(everything(published.refresh(pairs(4)))) == 3


def test_a_refresh_that_can_go_on_keeps_its_files(published: Published) -> None:
    published.refresh(pairs(1))
    published.commit([pairs(2)], "waiting")
    published.store.write("staging/waiting/plan.json", b"{}")
    published.store.write("samples/waiting-b00001-p00000.parquet", b"x")
    published.commit([pairs(3)], "forgotten")
    published.store.write("staging/forgotten/b00000/p00000.parquet", b"{}")
    published.store.write("staging/refresh1/plan.json", b"{}")  # of a refresh that has published
    published.store.write("samples/.refresh9.tmp", b"x")
    published.store.write("tokenizers/0000.json", b"{}")
    old_s = time.time() - 8 * 86_400
    os.utime(Path(published.uri) / "staging/forgotten/b00000/p00000.parquet", (old_s, old_s))
    before = all_files(published)
    result = vacuum(published.uri)
    gone = before - all_files(published)
    assert set(result.files) == gone
    links = {path for path in gone if path.startswith("links/")}
    assert len(links) == 1
    assert gone - links == {
        "staging/forgotten/b00000/p00000.parquet",
        "staging/refresh1/plan.json",
        "samples/forgotten-b00000-p00000.parquet",
        "annotations/forgotten-b00000-p00000.parquet",
        "samples/.refresh9.tmp",
        "tokenizers/0000.json",
    }
    assert all("forgotten" not in path for path in table_files(open_table(published.store, "samples")))
    vacuum(published.uri, staging_days=0)
    assert not any("waiting" in path for path in all_files(published))
    assert verify(published.uri, report=print).faults == 0


def test_logs_pins_and_withdrawals_are_never_touched(published: Published) -> None:
    for number in range(4):
        published.refresh(pairs(number))
    withdraw(published.uri, urls=[Pair(0).url], reason="takedown")
    kept = {path for path in all_files(published) if "_delta_log" in path or path.startswith("withdrawn")}
    vacuum(published.uri, keep=1, pin=[2])
    assert kept <= all_files(published)
    assert "pins/2.json" in all_files(published)
    assert len(everything(Dataset(published.uri))) == 3


def test_a_kill_leaves_no_version_without_its_files(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    published.refresh([Pair(1, rejected="timeout")], pairs(2))
    published.refresh([Pair(1, rejected="timeout")])
    compact(published.uri)
    total = len(vacuum(published.uri, keep=1, dry_run=True).files)
    assert total >= 5
    store_type, deleted = type(published.store), []
    delete = store_type.delete

    def killed(self: object, path: str) -> None:
        if not path.startswith("leases"):
            if len(deleted) == 1:
                raise KeyboardInterrupt
            deleted.append(path)
        delete(self, path)

    for _ in range(total):
        deleted.clear()
        with monkeypatch.context() as patch:
            patch.setattr(store_type, "delete", killed)
            try:
                vacuum(published.uri, keep=1)
            except KeyboardInterrupt:
                assert verify(published.uri, report=print).faults == 0
            else:
                break
    assert list_versions(published.store) == [3]
    assert verify(published.uri, report=print).faults == 0


def test_what_makes_no_sense_is_refused(published: Published) -> None:
    published.refresh(pairs(1))
    with pytest.raises(BadInput, match="--keep 0 would keep no version"):
        vacuum(published.uri, keep=0)
    with pytest.raises(BadInput, match=r"has no version 7 to pin. It has 1"):
        vacuum(published.uri, pin=[7])
    with hold_lease(published.store, "coca data refresh", 0.6), pytest.raises(BadInput, match="is being written"):
        vacuum(published.uri)
