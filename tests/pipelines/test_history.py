"""History, comparison and rollback of versions."""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from coca.contract import SAMPLES
from coca.dataset import Dataset, list_versions
from coca.errors import BadInput, RunFailed
from coca.tokenizer import Tokenizer
from coca.withdrawn import read_withdrawn
from pipelines.diff import VersionDiff, diff
from pipelines.history import history, publish_next, rollback
from pipelines.lease import hold_lease
from pipelines.tables import open_table, table_files
from pipelines.vacuum import vacuum
from pipelines.withdraw import withdraw
from tests.pipelines.published import Pair, Published, everything, pairs


@pytest.fixture(params=["disk", "s3"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path, tokenizer: Tokenizer) -> Published:
    uri = f"{request.getfixturevalue('s3')}/d" if request.param == "s3" else str(tmp_path / "d")
    return Published(uri, tokenizer)


@pytest.fixture
def published(tmp_path: Path, tokenizer: Tokenizer) -> Published:
    return Published(str(tmp_path / "d"), tokenizer)


def test_a_rollback_restores_a_version_bit_for_bit(anywhere: Published) -> None:
    anywhere.refresh(pairs(1, 2, 3, 4), [Pair(5, reason="duplicate_image")])
    anywhere.refresh(pairs(6, 7))
    record = rollback(anywhere.uri, 1)
    assert (record.version, record.parent, record.kind) == (3, 1, "rollback")
    old, new = Dataset(anywhere.uri, 1), Dataset(anywhere.uri)
    assert new.record.version == 3
    assert everything(new) == everything(old)
    assert new.row_groups.equals(old.row_groups)
    for index in range(old.row_groups.num_rows):
        columns = tuple(SAMPLES.names)
        assert new.read_row_group(index, columns).equals(old.read_row_group(index, columns))


def test_the_refresh_after_a_rollback_goes_on_from_it(published: Published) -> None:
    published.refresh(pairs(1, 2, 3, 4), [Pair(5, reason="duplicate_image")])
    published.refresh(pairs(6, 7))
    rollback(published.uri, 1)
    after = published.refresh(pairs(8))
    assert {row["caption"] for row in everything(after)} == {pair.caption for pair in pairs(1, 2, 3, 4, 5, 8)}
    tables = {"samples": 3, "annotations": 3}
    for name, files in tables.items():
        assert len(table_files(open_table(published.store, name))) == files


def test_a_rollback_keeps_withdrawals(published: Published) -> None:
    published.refresh(pairs(1, 2, 3))
    published.refresh(pairs(4))
    withdraw(published.uri, urls=["http://example.com/2"], reason="takedown")
    record = rollback(published.uri, 1)
    assert (
        record.withdrawn_sha256
        == read_withdrawn(published.store).digest
        != Dataset(published.uri, 1).record.withdrawn_sha256
    )
    assert {row["caption"] for row in everything(Dataset(published.uri))} == {pair.caption for pair in pairs(1, 3)}


def test_a_rollback_that_leads_nowhere_is_refused(published: Published) -> None:
    published.refresh(pairs(1))
    with pytest.raises(BadInput, match=r"has no version 9. It has 1"):
        rollback(published.uri, 9)
    with pytest.raises(BadInput, match="version 1 is the latest"):
        rollback(published.uri, 1)
    published.refresh(pairs(2))
    published.store.delete("versions/1.row_groups.parquet")
    with pytest.raises(BadInput, match=r"1.row_groups.parquet is missing"):
        rollback(published.uri, 1)
    assert list_versions(published.store) == [1, 2]


def test_two_who_publish_the_same_number(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    published.refresh(pairs(1))
    record = Dataset(published.uri).record
    published.refresh(pairs(2))
    monkeypatch.setattr("pipelines.history.list_versions", lambda store: [1])
    with (
        hold_lease(published.store, "coca data rollback") as lease,
        pytest.raises(RunFailed, match=r"version 2 of .* was published by another process"),
    ):
        publish_next(published.store, record, lease, kind="rollback", parent=1)


def test_history_names_every_version(anywhere: Published) -> None:
    anywhere.refresh(pairs(1, 2, 3), [Pair(4, reason="near_duplicate")])
    anywhere.refresh(pairs(5, 6))
    vacuum(anywhere.uri, pin=[1])
    rollback(anywhere.uri, 1)
    withdraw(anywhere.uri, urls=[Pair(1).url, Pair(5).url], reason="takedown")
    lines = history(anywhere.uri)
    assert [(line.version, line.kind, line.parent) for line in lines] == [
        (1, "refresh", None),
        (2, "refresh", 1),
        (3, "rollback", 1),
    ]
    assert [(line.selected, line.stored) for line in lines] == [(3, 4), (5, 6), (3, 4)]
    assert [(line.selected_change, line.stored_change) for line in lines] == [(None, None), (2, 2), (0, 0)]
    assert [line.withdrawn for line in lines] == [1, 2, 1]
    assert [line.pinned for line in lines] == [True, False, False]


def test_diff_of_a_refresh(anywhere: Published) -> None:
    anywhere.refresh([*pairs(1, 2), Pair(3, rejected="timeout"), Pair(4, rejected="not_found")])
    added = [*pairs(3, 5), Pair(6, reason="duplicate_image"), Pair(7, rejected="corrupt_image")]
    anywhere.refresh(added, config={"image": {"size": 128}, "fetch": {"timeout_s": 5}})
    found = diff(anywhere.uri, 1, 2)
    assert found.added == Counter(selected=2, duplicate_image=1)
    assert found.removed == found.newly_selected == found.unselected == Counter()
    assert found.retokenized == 0
    assert found.links == Counter({"new -> ok": 2, "timeout -> ok": 1, "new -> corrupt_image": 1})
    assert found.config == {"image.size": (64, 128), "fetch.timeout_s": (None, 5)}
    assert found.tokenizer is None
    back = diff(anywhere.uri, 2, 1)
    assert back.removed == found.added
    assert back.links == Counter({"ok -> gone": 2, "ok -> timeout": 1, "corrupt_image -> gone": 1})
    same = diff(anywhere.uri, 2, 2)
    assert same == VersionDiff(anywhere.uri, 2, 2)


def test_diff_of_a_selection_and_of_another_tokenizer(published: Published) -> None:
    published.refresh([*pairs(1, 2, 3), Pair(4, reason="duplicate_image")])
    reselect(published, {2: "near_duplicate", 4: None}, tokens={3: [1, 2]})
    found = diff(published.uri, 1, 2)
    assert found.newly_selected == Counter(duplicate_image=1)
    assert found.unselected == Counter(near_duplicate=1)
    assert found.retokenized == 1
    assert found.added == found.removed == found.links == Counter()


def test_diff_reads_no_file_that_both_have(published: Published) -> None:
    published.refresh(pairs(1, 2))
    published.refresh(pairs(3))
    published.store.delete("annotations/refresh1-b00000-p00000.parquet")
    assert diff(published.uri, 1, 2).added == Counter(selected=1)


def test_samples_that_were_written_anew_are_the_same_samples(published: Published) -> None:
    published.refresh(pairs(1, 2, 3))
    index = published.commit([[Pair(3, reason="near_duplicate")], pairs(2, 9)], "anew")
    published.publish(index, "anew")
    found = diff(published.uri, 1, 2)
    assert found.added == Counter(selected=1)
    assert found.removed == Counter(selected=1)  # 1
    assert found.unselected == Counter(near_duplicate=1)


def reselect(published: Published, reasons: dict[int, str | None], tokens: dict[int, list[int]]) -> None:
    """Version 2 with other annotations of the one samples file, as `coca data select` and `retokenize` write them."""
    of_id = {Pair(number).id: number for number in range(1, 5)}
    index = Dataset(published.uri).recorded_row_groups
    path = index["annotations_path"][0].as_py()
    notes = published.read("annotations", path).to_pylist()
    for row in notes:
        number = of_id[row["sample_id"]]
        row["reason"] = reasons.get(number, row["reason"])
        row["selected"] = row["reason"] is None
        row["tokens"] = tokens.get(number, row["tokens"])
    new = "select2.parquet"
    published.write("annotations", new, notes)
    groups = index.set_column(1, "annotations_path", pa.array([new] * index.num_rows))
    published.publish(groups, "select2", kind="select")
