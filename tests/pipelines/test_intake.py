"""Taking in a table of links: what is spilled where, and the name of what came in."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coca.contract import Reason, link_bucket
from coca.errors import BadInput
from coca.storage import Store
from pipelines import intake as intake_module
from pipelines.config import RefreshConfig
from pipelines.intake import INTAKE, Intake, LinksTable, take_in

TakeIn = Callable[..., Intake]


@pytest.fixture
def take_in_pairs(tmp_path: Path) -> TakeIn:
    def run(pairs: list[tuple[str, str]], name: str = "links", row_group: int = 1000, **settings: object) -> Intake:
        path = tmp_path / f"{name}.parquet"
        if not path.exists():
            table = pa.table({"url": [u for u, _ in pairs], "caption": [c for _, c in pairs]})
            pq.write_table(table, path, row_group)
        config = RefreshConfig.model_validate({"links": {"uri": str(path)}, **settings})
        return take_in(Store(tmp_path / "dataset"), LinksTable.open(config.links), config)

    return run


def pairs(count: int) -> list[tuple[str, str]]:
    return [(f"http://host{number % 7}.org/{number}", f"caption {number}") for number in range(count)]


def all_rows(intake: Intake) -> list[dict[str, object]]:
    return [row for shard in range(intake.shards) for row in intake.read_shard(shard).to_pylist()]


def test_every_row_lies_in_the_shard_of_its_bucket(take_in_pairs: TakeIn) -> None:
    links = [*pairs(200), ("nonsense", "a caption"), ("http://a.org/", "")]
    intake = take_in_pairs(links, publish={"links_per_batch": 30, "links_per_part": 10})
    assert (intake.rows, intake.shards) == (202, 8)
    rows = all_rows(intake)
    assert sorted(row["place"] for row in rows) == list(range(202))
    assert [row["caption"] for row in sorted(rows, key=lambda row: row["place"])] == [caption for _, caption in links]
    assert {row["reason"] for row in rows} == {None, Reason.INVALID_URL, Reason.EMPTY_CAPTION}
    for shard in range(intake.shards):
        table = intake.read_shard(shard)
        assert table.schema == INTAKE
        assert {link_bucket(url) for url in table["url"].to_pylist()} <= set(intake.buckets(shard))
    assert sorted(bucket for shard in range(8) for bucket in intake.buckets(shard)) == [f"{b:02x}" for b in range(256)]


def test_a_small_table_is_one_shard(take_in_pairs: TakeIn) -> None:
    assert take_in_pairs(pairs(20)).shards == 1


def test_content_does_not_know_the_order_but_counts_what_occurs_twice(take_in_pairs: TakeIn) -> None:
    links = pairs(50)
    first = take_in_pairs(links, "a")
    assert take_in_pairs(links[::-1], "b", row_group=7).content == first.content
    assert take_in_pairs([*links, links[0]], "c").content != first.content
    assert take_in_pairs([*links[1:], ("http://b.org/", "another")], "d").content != first.content


def test_pieces_that_are_done_are_passed_over(take_in_pairs: TakeIn, monkeypatch: pytest.MonkeyPatch) -> None:
    first = take_in_pairs(pairs(40))

    def fail(*_: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(intake_module, "read_piece", fail)
    assert take_in_pairs(pairs(40)).content == first.content


def test_rows_are_spilled_in_stretches(take_in_pairs: TakeIn, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = take_in_pairs(pairs(90), "whole", row_group=10)
    monkeypatch.setattr(intake_module, "_SPILL_ROWS", 25)
    monkeypatch.setattr("pipelines.links.MAX_ROWS", 10, raising=False)
    parts = take_in_pairs(pairs(90), "parts", row_group=10)
    assert parts.content == whole.content
    assert all_rows(parts) == all_rows(whole)


def test_a_table_without_rows_is_refused(take_in_pairs: TakeIn) -> None:
    with pytest.raises(BadInput, match="no row"):
        take_in_pairs([])


def test_a_small_table_against_a_large_ledger_is_cut_as_the_ledger_is(tmp_path: Path) -> None:
    path = tmp_path / "links.parquet"
    pq.write_table(pa.table({"url": ["http://a/1"], "caption": ["a caption"]}), path)
    config = RefreshConfig.model_validate({"links": {"uri": str(path)}})
    source, store = LinksTable.open(config.links), Store(tmp_path / "dataset")
    assert take_in(store, source, config, ledger_rows=100_000).shards == 1
    assert take_in(store, source, config, ledger_rows=1_000_000).shards == 8
    assert take_in(store, source, config, ledger_rows=10**9).shards == 256
