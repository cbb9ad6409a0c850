"""Parts and batches: a function of the pairs, whatever their order."""

from pathlib import Path

import pyarrow as pa
import pytest

from coca.contract import Reason, sample_id
from coca.storage import Store
from pipelines.config import PublishConfig, RefreshConfig
from pipelines.fetch_config import FetchConfig
from pipelines.image_config import ImageConfig
from pipelines.judge import JUDGED
from pipelines.links_config import LinksConfig
from pipelines.plan import PLAN, load_or_write_plan, make_plan, refresh_id


def pairs(urls: int, captions: int = 1, refused: int = 0) -> pa.Table:
    rows = [(f"http://a/{url}", f"caption {caption}", None) for url in range(urls) for caption in range(captions)]
    rows += [(f"http://a/{number}", "", Reason.EMPTY_CAPTION.value) for number in range(refused)]
    return pa.Table.from_pylist(
        [{"sample_id": sample_id(u, c), "url": u, "caption": c, "reason": r} for u, c, r in rows], schema=JUDGED
    )


def test_the_plan_does_not_depend_on_the_order_of_the_links() -> None:
    table = pairs(50, captions=3, refused=5)
    shuffled = table.take(pa.array([(7 * i) % table.num_rows for i in range(table.num_rows)]))
    config = PublishConfig(links_per_part=10, links_per_batch=40)
    assert make_plan(table, config).equals(make_plan(shuffled, config))


def test_parts_hold_whole_urls_and_batches_whole_parts() -> None:
    plan = make_plan(pairs(50, captions=3, refused=5), PublishConfig(links_per_part=10, links_per_batch=40))
    assert plan.schema == PLAN
    assert plan.num_rows == 155
    rows = [row for row in plan.to_pylist() if row["part"] is not None]
    for key in ("part", "batch"):
        assert all(len({row[key] for row in rows if row["url"] == url}) == 1 for url in {row["url"] for row in rows})
    sizes = [sum(row["part"] == part for row in rows) for part in sorted({row["part"] for row in rows})]
    assert sum(sizes) == 150
    assert max(sizes) <= 12  # a url may reach over the end of its part
    assert {row["batch"] for row in rows} == {0, 1, 2, 3}
    assert {row["batch"] for row in plan.to_pylist() if row["part"] is None} == {0}


def test_earlier_batches_hold_the_lower_ids() -> None:
    plan = make_plan(pairs(50, captions=3), PublishConfig(links_per_part=10, links_per_batch=10)).to_pylist()
    lowest: dict[str, tuple[str, int]] = {}
    for row in plan:
        lowest[row["url"]] = min(lowest.get(row["url"], ("g", 0)), (row["sample_id"], row["batch"]))
    batches = [batch for _, batch in sorted(lowest.values())]
    assert batches == sorted(batches)


def test_nothing_to_fetch_is_one_batch_without_parts() -> None:
    plan = make_plan(pairs(0, refused=3), PublishConfig())
    assert plan["part"].to_pylist() == [None] * 3
    assert plan["batch"].to_pylist() == [0] * 3


def test_the_name_of_a_refresh_follows_what_decides_its_rows() -> None:
    table, config = pairs(5, captions=2), RefreshConfig(to="a")
    name = refresh_id(table, config, "tokenizer", 3)
    backwards = table.take(list(range(table.num_rows - 1, -1, -1)))
    assert refresh_id(backwards, config, "tokenizer", 3) == name
    moved = RefreshConfig(to="b", tokenizer="x.json", links=LinksConfig(uri="elsewhere.csv"))
    fewer = RefreshConfig(to="a", fetch=FetchConfig(workers=1, concurrency_per_worker=2))
    assert refresh_id(table, moved, "tokenizer", 3) == refresh_id(table, fewer, "tokenizer", 3) == name
    others = {
        refresh_id(table.slice(1), config, "tokenizer", 3),
        refresh_id(table, RefreshConfig(image=ImageConfig(size=64)), "tokenizer", 3),
        refresh_id(table, RefreshConfig(publish=PublishConfig(links_per_part=7)), "tokenizer", 3),
        refresh_id(table, config, "another", 3),
        refresh_id(table, config, "tokenizer", 4),
        refresh_id(table, config, "tokenizer", None),
    }
    assert len(others | {name}) == 7


@pytest.mark.parametrize("restarts", [1, 2])
def test_the_first_plan_stands(tmp_path: Path, restarts: int) -> None:
    store, first = Store(tmp_path), make_plan(pairs(4), PublishConfig())
    assert load_or_write_plan(store, "plan.parquet", first).equals(first)
    for _ in range(restarts):
        assert load_or_write_plan(store, "plan.parquet", make_plan(pairs(9), PublishConfig())).equals(first)
