"""Batches and parts: a function of the pairs, whatever their order; domains, budgets, and the name of a refresh."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pytest

from coca.contract import Reason, sample_id
from coca.storage import Store
from pipelines.config import PublishConfig, RecheckConfig, RefreshConfig
from pipelines.fetch_config import FetchConfig
from pipelines.image_config import ImageConfig
from pipelines.intake import INTAKE, Intake
from pipelines.join import DUE, JoinSettings, find_due
from pipelines.ledger import EVENTS, Ledger, latest_events
from pipelines.links_config import LinksConfig
from pipelines.plan import PLAN, cut_batch, deal_parts, load_plan, make_plan, read_part, refresh_id, write_plan
from pipelines.staging import Staging, write_table

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def due(urls: list[str], captions: int = 1, refused: int = 0) -> pa.Table:
    rows = [(url, f"caption {number}", None) for url in urls for number in range(captions)]
    rows += [(f"http://refused/{number}", "", Reason.EMPTY_CAPTION.value) for number in range(refused)]
    records = [{"sample_id": sample_id(u, c), "url": u, "caption": c, "reason": r} for u, c, r in rows]
    settings = JoinSettings(NOW, 0, 1000, 0, RecheckConfig())
    table = pa.Table.from_pylist(records, schema=INTAKE)
    return find_due(table, latest_events(EVENTS.empty_table()), settings)[0]


def many_hosts(count: int) -> list[str]:
    return [f"http://images.host{number}.org/{number}" for number in range(count)]


def test_parts_do_not_depend_on_the_order_of_the_pairs() -> None:
    table = due(many_hosts(50), captions=3, refused=5)
    shuffled = table.take(pa.array([(7 * i) % table.num_rows for i in range(table.num_rows)]))
    config = PublishConfig(links_per_part=10)
    parts, refused, waiting = deal_parts(table, 50, config)
    again, refused_again, _ = deal_parts(shuffled, 50, config)
    assert all(a.equals(b) for a, b in zip(parts, again, strict=True))
    assert (refused.num_rows, refused_again.num_rows, waiting) == (5, 5, 0)
    assert parts[0].schema == refused.schema == PLAN


def test_parts_hold_whole_urls_and_every_pair_once() -> None:
    table = due(many_hosts(95), captions=2)
    parts, _, _ = deal_parts(table, 95, PublishConfig(links_per_part=10))
    assert [len(set(part["url"].to_pylist())) for part in parts] == [10] * 5 + [9] * 5
    keys = [key for part in parts for key in part["sample_id"].to_pylist()]
    assert sorted(keys) == sorted(table["sample_id"].to_pylist())
    assert not any(part["leased"].to_pylist().count(True) for part in parts)


def test_a_small_domain_lies_in_one_part_and_a_large_one_in_few() -> None:
    urls = [f"http://i{n % 3}.large.org/{n}" for n in range(33)]
    urls += [f"http://small{n // 4}.org/{n}" for n in range(68)]
    parts, _, _ = deal_parts(due(urls), len(urls), PublishConfig(links_per_part=20))
    where: dict[str, dict[int, int]] = {}
    for number, part in enumerate(parts):
        for url, leased in zip(part["url"].to_pylist(), part["leased"].to_pylist(), strict=True):
            domain = ".".join((urlsplit(url).hostname or "").split(".")[-2:])
            assert leased
            where.setdefault(domain, {}).setdefault(number, 0)
            where[domain][number] += 1
    assert all(len(found) == 1 for domain, found in where.items() if domain != "large.org")
    # 33 urls at no more than half of a part of 20
    assert sorted(where["large.org"].values()) == [8, 8, 8, 9]
    assert max(part.num_rows for part in parts) <= 22


def test_domains_of_one_or_two_links_are_not_leased() -> None:
    urls = [f"http://host{size}.org/{n}" for size in range(1, 6) for n in range(size)]
    parts, _, _ = deal_parts(due(urls), len(urls), PublishConfig(links_per_part=20))
    leased = {url.split("/")[2] for url in parts[0].filter(parts[0]["leased"])["url"].to_pylist()}
    assert leased == {"host3.org", "host4.org", "host5.org"}


def test_one_domain_alone_is_dealt_to_all_parts() -> None:
    parts, _, _ = deal_parts(due([f"http://a.org/{n}" for n in range(40)]), 40, PublishConfig(links_per_part=10))
    assert [part.num_rows for part in parts] == [10] * 4
    assert all(all(part["leased"].to_pylist()) for part in parts)


def test_a_budget_of_urls_leaves_the_rows_of_the_others_waiting() -> None:
    table = due(many_hosts(30), captions=2, refused=3)
    parts, refused, waiting = deal_parts(table, 12, PublishConfig(links_per_part=10))
    assert sum(len(set(part["url"].to_pylist())) for part in parts) == 12
    assert (refused.num_rows, waiting) == (3, 36)


class Shards:
    """An intake of several shards in a folder."""

    def __init__(self, folder: Path, shards: int, urls: int) -> None:
        self.staging = Staging(Store(folder), "refresh")
        table = due(many_hosts(urls), refused=4).select(INTAKE.names)
        size = -(-table.num_rows // shards)
        for shard in range(shards):
            part = table.slice(shard * size, size)
            write_table(self.staging.dataset, f"in/s{shard:03d}/p.parquet", part)
        self.intake = Intake(self.staging.dataset, "in", shards, 1, table.num_rows, "content")

    def plan(self, max_links: int | None = None, **changes: Any) -> Any:
        values: dict[str, Any] = {"now": NOW, "seed": 0, "chunk_urls": 20, "rechecks_per_shard": 0}
        settings = JoinSettings(**{**values, "recheck": RecheckConfig(), **changes})
        ledger = Ledger(self.staging.dataset, {})
        return make_plan(self.staging, self.intake, ledger, settings, max_links)


def test_batches_are_whole_chunks_and_lose_nothing(tmp_path: Path) -> None:
    shards = Shards(tmp_path, shards=4, urls=100)
    plan = shards.plan()
    assert sum(batch.urls for batch in plan.batches) == 100
    assert sum(batch.rows for batch in plan.batches) == plan.links == 104
    assert all(batch.urls <= 20 for batch in plan.batches)
    keys = []
    for number, batch in enumerate(plan.batches):
        cut = cut_batch(shards.staging, number, batch, PublishConfig(links_per_part=8))
        assert sum(cut.urls) == batch.urls
        for part in range(len(cut.urls) + 1):
            keys += read_part(shards.staging, number, part)["sample_id"].to_pylist()
    assert len(keys) == len(set(keys)) == 104


def test_a_budget_ends_the_plan_within_a_batch(tmp_path: Path) -> None:
    plan = Shards(tmp_path, shards=4, urls=100).plan(max_links=30)
    assert sum(batch.urls for batch in plan.batches) == 30
    assert sum(batch.rows for batch in plan.batches) + plan.waiting == 104


def test_the_first_plan_stands(tmp_path: Path) -> None:
    shards = Shards(tmp_path, shards=2, urls=30)
    first = shards.plan()
    assert load_plan(shards.staging) is None
    assert write_plan(shards.staging, first) == first
    assert write_plan(shards.staging, first.model_copy(update={"waiting": 9})) == first
    assert load_plan(shards.staging) == first


def test_the_parts_of_a_batch_are_cut_once(tmp_path: Path) -> None:
    shards = Shards(tmp_path, shards=1, urls=30)
    batch = shards.plan(chunk_urls=100).batches[0]
    first = cut_batch(shards.staging, 0, batch, PublishConfig(links_per_part=8))
    assert cut_batch(shards.staging, 0, batch, PublishConfig(links_per_part=3)) == first


def test_the_name_of_a_refresh_follows_what_decides_its_rows(tmp_path: Path) -> None:
    def intake(content: str = "ab", rows: int = 5, folder: str = "a") -> Intake:
        return Intake(Store(tmp_path), folder, 1, 1, rows, content)

    config = RefreshConfig(to="a")
    name = refresh_id(intake(), config, "tokenizer", 3)
    moved = RefreshConfig(to="b", tokenizer="x.json", links=LinksConfig(uri="elsewhere.csv"))
    fewer = RefreshConfig(to="a", fetch=FetchConfig(workers=1, concurrency_per_worker=2))
    assert refresh_id(intake(folder="b"), moved, "tokenizer", 3) == refresh_id(intake(), fewer, "tokenizer", 3) == name
    others = {
        refresh_id(intake("ac"), config, "tokenizer", 3),
        refresh_id(intake(rows=6), config, "tokenizer", 3),
        refresh_id(intake(), RefreshConfig(image=ImageConfig(size=64)), "tokenizer", 3),
        refresh_id(intake(), RefreshConfig(publish=PublishConfig(links_per_part=7)), "tokenizer", 3),
        refresh_id(intake(), config, "another", 3),
        refresh_id(intake(), config, "tokenizer", 4),
        refresh_id(intake(), config, "tokenizer", None),
    }
    others.add(refresh_id(intake(), config, "tokenizer", 3, pieces="shards"))
    others.add(refresh_id(intake(), RefreshConfig(links=LinksConfig(extra_columns=("a",))), "tokenizer", 3))
    assert len(others | {name}) == 10


@pytest.mark.parametrize("links_per_part", [1, 3, 1000])
def test_the_schema_of_due_pairs_is_that_of_the_plan(links_per_part: int) -> None:
    parts, _, _ = deal_parts(due(many_hosts(5)), 5, PublishConfig(links_per_part=links_per_part))
    assert [name for name in parts[0].schema.names if name != "leased"] == DUE.names
