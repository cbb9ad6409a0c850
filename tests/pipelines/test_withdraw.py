"""Withdrawing: every stored copy, wherever it lies, and in no version from then on."""

from pathlib import Path

import pytest

from coca.contract import version_path
from coca.dataset import Dataset, list_versions
from coca.errors import BadInput
from coca.storage import Store
from coca.tokenizer import Tokenizer
from coca.withdrawn import WITHDRAWN, append_withdrawn, read_withdrawn
from pipelines.history import rollback
from pipelines.lease import hold_lease
from pipelines.withdraw import find_stored, read_targets, unlisted, withdraw
from tests.pipelines.published import Pair, Published, everything, pairs


@pytest.fixture(params=["disk", "s3"])
def published(request: pytest.FixtureRequest, tmp_path: Path, tokenizer: Tokenizer) -> Published:
    uri = f"{request.getfixturevalue('s3')}/d" if request.param == "s3" else str(tmp_path / "d")
    return Published(uri, tokenizer)


def ids(uri: str, version: int) -> set[str]:
    return {row["sample_id"] for row in everything(Dataset(uri, version))}


def test_an_opted_out_picture_is_in_no_version_not_after_a_rollback_either(published: Published) -> None:
    copy = Pair(90, picture=2)
    published.refresh(pairs(1, 2, 3, 4), [*pairs(5), copy])
    published.refresh(pairs(6, 7))
    gone = {Pair(2).id, copy.id}
    result = withdraw(published.uri, urls=["HTTP://example.com:80/2"], reason="takedown")
    assert (result.samples, result.pictures, result.refused, result.withdrawn) == (2, 1, 0, 2)
    everyone = {pair.id for pair in [*pairs(1, 3, 4, 5, 6, 7)]}
    assert ids(published.uri, 2) == everyone
    assert ids(published.uri, 1) == everyone - {pair.id for pair in pairs(6, 7)}
    record = rollback(published.uri, 1)
    assert ids(published.uri, record.version) == everyone - {pair.id for pair in pairs(6, 7)}
    if not published.store.is_s3:  # restoring a table holds the GIL: the S3 server of this process could not answer
        published.refresh(pairs(6, 8))
        assert ids(published.uri, 4) == {pair.id for pair in pairs(1, 3, 4, 5, 6, 8)}
    assert not any(gone & ids(published.uri, version) for version in list_versions(published.store))
    for version in list_versions(published.store):
        opened = Dataset(published.uri, version)
        counts = opened.row_groups["selected"].to_pylist()
        assert [opened.read_row_group(n).num_rows for n in range(len(counts))] == counts


def test_a_copy_is_one_of_the_same_fetched_or_stored_bytes_and_copies_of_copies_count(published: Published) -> None:
    fetched, stored, both = Pair(1, picture=1), Pair(2, picture=2), Pair(3, picture=3)
    fetched.source = Pair(9, picture=9).source  # fetched as 9 was, stored otherwise
    stored.image = fetched.image  # stored as 1 is, fetched otherwise
    both.source = stored.source
    published.refresh([fetched, *pairs(5, 6)], [stored, both, Pair(9, picture=9)])
    found = find_stored(published.store, sample_ids=[Pair(9).id])
    assert set(found["sample_id"].to_pylist()) == {each.id for each in (fetched, stored, both, Pair(9))}
    assert found.schema == WITHDRAWN


def test_rows_of_other_versions_and_of_a_refresh_that_waits_are_found(published: Published) -> None:
    published.refresh(pairs(1, 2))
    published.refresh(pairs(3))
    rollback(published.uri, 1)
    published.commit([[Pair(4, picture=3)]], "killed")
    published.store.write(
        "samples/staged-b00000-p00000.parquet", published.store.read("samples/refresh2-b00000-p00000.parquet")
    )
    found = find_stored(published.store, source_sha256=[Pair(3).source])
    assert sorted(path.partition("-")[0] for path in found["samples_path"].to_pylist()) == [
        "killed",
        "refresh2",
        "staged",
    ]


def test_the_row_group_is_the_one_that_holds_the_row(published: Published) -> None:
    published.refresh(pairs(*range(8)))
    found = find_stored(published.store, sample_ids=[Pair(number).id for number in range(8)])
    ordered = sorted(Pair(number).id for number in range(8))
    places = dict(zip(found["sample_id"].to_pylist(), found["row_group"].to_pylist(), strict=True))
    assert places == {key: place // 3 for place, key in enumerate(ordered)}


def test_the_same_withdrawal_again_adds_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    published = Published(str(tmp_path), tokenizer)
    published.refresh(pairs(1, 2))
    unknown = "http://example.com/never%20seen"
    first = withdraw(published.uri, urls=["http://example.com/1", unknown], source_sha256=["F" * 64], reason="r")
    again = withdraw(published.uri, urls=["http://example.com/1", unknown], source_sha256=["f" * 64], reason="r")
    assert (first.samples, first.refused) == (1, 2)
    assert (again.samples, again.refused, again.withdrawn) == (0, 0, 1)
    listed = read_withdrawn(published.store)
    assert unknown in listed.urls.to_pylist()
    assert "f" * 64 in listed.source_sha256.to_pylist()
    assert len(list(Path(published.uri, "withdrawn").iterdir())) == 1
    found = find_stored(published.store, urls=["http://example.com/1"])
    assert unlisted(found, listed).num_rows == 0
    assert not append_withdrawn(published.store, unlisted(found, listed), "more")


def test_input_that_means_nothing_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    published = Published(str(tmp_path), tokenizer)
    with pytest.raises(BadInput, match="holds no published dataset version"):
        withdraw(published.uri, urls=["http://example.com/1"], reason="r")
    published.refresh(pairs(1))
    with pytest.raises(BadInput, match="nothing to withdraw is named"):
        withdraw(published.uri, reason="r")
    with pytest.raises(BadInput, match="'ftp://x' is no http"):
        withdraw(published.uri, urls=["ftp://x"], reason="r")
    with pytest.raises(BadInput, match=r"'abc' is not a SHA-256. Give 64 hex digits"):
        withdraw(published.uri, source_sha256=["abc"], reason="r")
    with pytest.raises(BadInput, match=r"'zz.*' is not a sample id"):
        withdraw(published.uri, sample_ids=["z" * 32], reason="r")


def test_a_dataset_that_is_written_is_left_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    published = Published(str(tmp_path), tokenizer)
    published.refresh(pairs(1))
    with (
        hold_lease(published.store, "coca data refresh", 0.6),
        pytest.raises(BadInput, match="is being written by `coca data refresh`"),
    ):
        withdraw(published.uri, urls=["http://example.com/1"], reason="r")
    assert published.store.list("withdrawn") == []
    assert Store(published.uri).exists(version_path(1))


def test_targets_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "takedowns.txt"
    file.write_text(f"# takedowns\n\n http://a/1 \n{'a' * 64}\n{'b' * 32}\n")
    assert read_targets(file) == {"urls": ["http://a/1"], "source_sha256": ["a" * 64], "sample_ids": ["b" * 32]}
    file.write_text("http://a/1\nwhat\n")
    with pytest.raises(BadInput, match=r"line 2 of .*takedowns.txt is no url, SHA-256 or sample id: 'what'"):
        read_targets(file)
