"""Asking stored links again: unchanged, changed, gone, opted out; budgets; what a later refresh goes on with."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from deltalake import DeltaTable

from coca.contract import State
from coca.dataset import Dataset
from coca.storage import Store
from coca.withdrawn import read_withdrawn
from pipelines.config import RefreshConfig
from pipelines.history import rollback
from pipelines.refresh import refresh
from pipelines.select import select_dataset
from pipelines.select_config import SelectConfig
from pipelines.verify import verify

Build = Callable[..., RefreshConfig]
RECHECK = {"max_stored": 100, "stored_after_s": 0}


def pairs(web: Any, pages: Any, *names: str, tag: bool = True) -> list[tuple[str | None, str | None]]:
    for name in names:
        web.pages[f"/{name}"] = pages.image(name, *([f'ETag: "{name}"'] if tag else []))
    return [(f"/{name}", f"picture {name}") for name in names]


def states(dataset: str) -> dict[str, str]:
    table = DeltaTable(f"{dataset}/links").to_pyarrow_table().sort_by("event_at").to_pylist()
    return {row["url"].rpartition("/")[2]: row["state"] for row in table}


def captions(dataset: str, version: int | None = None) -> set[str]:
    opened = Dataset(dataset, version)
    groups = (opened.read_row_group(i)["caption"].to_pylist() for i in range(opened.row_groups.num_rows))
    return {caption for group in groups for caption in group}


def check_whole(dataset: str) -> None:
    faults: list[Any] = []
    verify(dataset, report=faults.append)
    assert faults == []


def not_modified_unless(tag: str, page: Any, answer: Any) -> Any:
    """A server that knows its validators: counts as one page, answers 304 to the tag it gave."""

    async def serve(writer: Any, number: int) -> None:
        await (page if number == 0 else answer(304, b"", f'ETag: "{tag}"'))(writer, number)

    return serve


def test_an_unchanged_link_costs_a_conditional_request(
    web: Any, pages: Any, refresh_config: Build, without_ray: None
) -> None:
    links = pairs(web, pages, "a", "b")
    for name in "ab":
        web.pages[f"/{name}"] = not_modified_unless(name, web.pages[f"/{name}"], pages.answer)
    first = refresh(refresh_config(links))
    config = refresh_config(links, recheck=RECHECK)
    again = refresh(config)
    assert (again.requests, again.bytes, again.samples, again.rejected) == (2, 0, 2, {})
    assert web.headers["/a"]["if-none-match"] == '"a"'
    assert states(config.to) == {"a": State.OK, "b": State.OK}
    assert Dataset(config.to).record.samples.rows == first.samples == 2
    check_whole(config.to)


def test_a_changed_or_dead_link_keeps_its_sample(
    web: Any, pages: Any, refresh_config: Build, without_ray: None
) -> None:
    links = pairs(web, pages, "same", "changed", "gone", "html", tag=False)
    refresh(refresh_config(links))
    web.pages["/changed"] = pages.image("something else")
    web.pages["/gone"] = pages.answer(404)
    web.pages["/html"] = pages.answer(200, b"<html>parked</html>")
    config = refresh_config(links, recheck=RECHECK)
    again = refresh(config)
    assert (again.samples, again.rejected, again.withdrawn) == (4, {}, 0)
    assert states(config.to) == {"same": "ok", "changed": "changed", "gone": "dead", "html": "changed"}
    assert captions(config.to) == {f"picture {name}" for name in ("same", "changed", "gone", "html")}


@pytest.mark.parametrize("header", ["X-Robots-Tag: noai", "tdm-reservation: 1"])
def test_an_opted_out_picture_is_in_no_version_from_then_on(
    web: Any, pages: Any, refresh_config: Build, without_ray: None, header: str
) -> None:
    links = pairs(web, pages, "a", "b", tag=False)
    web.pages["/copy"] = pages.image("a")
    links.append(("/copy", "picture copy"))
    refresh(refresh_config(links))
    before = captions(refresh_config(links).to)
    web.pages["/a"] = pages.image("a", header)
    config = refresh_config(links, recheck=RECHECK)
    again = refresh(config)
    assert again.withdrawn == 2  # the copy is the same picture
    assert before >= {"picture b"}
    for version in (1, 2):
        assert captions(config.to, version) == {"picture b"}
    rollback(config.to, 1)
    assert captions(config.to) == {"picture b"}
    web.pages["/a"] = web.pages["/new"] = pages.image("a")  # open again, and under another url
    web.requests.clear()
    more = refresh_config([*links, ("/new", "picture new")])
    last = refresh(more)
    assert captions(config.to) == {"picture b"}
    assert set(web.requests) <= {"/new"}
    assert last.rejected.get("withdrawn", 0) + last.rejected.get("opted_out", 0) == 3
    assert len(read_withdrawn(Store(config.to))) == 2
    check_whole(config.to)


def test_a_budget_of_links_leaves_the_others_for_the_next_refresh(
    web: Any, pages: Any, refresh_config: Build, without_ray: None
) -> None:
    links = pairs(web, pages, *map(str, range(20)))
    config = refresh_config(links, budget={"max_links": 7})
    seen = []
    for _ in range(4):
        result = refresh(config)
        seen.append((result.changed, result.samples, result.rejected.get("waiting", 0)))
    assert seen == [(True, 7, 13), (True, 14, 6), (True, 20, 0), (False, 20, 0)]
    assert all(count == 1 for count in web.requests.values())


def test_a_budget_of_bytes_ends_between_parts(web: Any, pages: Any, refresh_config: Build, without_ray: None) -> None:
    links = pairs(web, pages, *map(str, range(20)))
    publish = {"links_per_part": 4, "links_per_batch": 8}
    config = refresh_config(links, budget={"max_bytes": 1}, publish=publish)
    first = refresh(config)
    assert 0 < first.samples <= 4
    assert first.samples + first.rejected["waiting"] == 20
    whole = refresh_config(links, publish=publish)
    assert refresh(whole).samples == 20
    assert sum(web.requests.values()) == 20


def test_a_refresh_that_its_budget_ended_is_only_published_after_a_kill(
    web: Any, pages: Any, refresh_config: Build, without_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines import finish

    links = pairs(web, pages, *map(str, range(20)))
    publish = {"links_per_part": 4, "links_per_batch": 8}
    config = refresh_config(links, budget={"max_bytes": 1}, publish=publish)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finish, "publish_version", killed)
        refresh(config)
    asked = sum(web.requests.values())
    result = refresh(config)
    assert sum(web.requests.values()) == asked
    assert 0 < result.samples <= 4
    assert result.samples + result.rejected["waiting"] == 20
    check_whole(config.to)


def test_a_budget_of_minutes_goes_on_after_a_kill(
    web: Any, pages: Any, refresh_config: Build, without_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines import run

    links = pairs(web, pages, *map(str, range(20)))
    # One batch: how many parts several have is up to the hashes of the links, and the server's port is in them.
    config = refresh_config(links, budget={"max_minutes": 2}, publish={"links_per_part": 4, "links_per_batch": 20})
    clock = iter(range(0, 10_000, 50))  # each part takes 50 seconds
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run.Progress, "advance", killed)  # told of a part once its seconds are noted
        refresh(config)
    before = sum(web.requests.values())
    result = refresh(config)
    asked = sum(web.requests.values())
    assert (before, asked) == (4, 12)  # two parts more, and the two minutes are over
    assert result.samples == asked
    assert result.samples + result.rejected["waiting"] == 20
    check_whole(config.to)


def test_what_is_withdrawn_between_a_kill_and_the_restart_is_not_asked(
    web: Any, pages: Any, refresh_config: Build, without_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines import refresh as refresh_module
    from pipelines.withdraw import withdraw

    refresh(refresh_config(pairs(web, pages, "before")))
    links = pairs(web, pages, "before", "a", "b", "c")
    config = refresh_config(links)
    write_plan = refresh_module.write_plan

    def killed(*arguments: Any) -> None:
        write_plan(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(refresh_module, "write_plan", killed)
        refresh(config)
    withdraw(config.to, urls=[f"{web.url}/a"], reason="takedown")
    result = refresh(config)
    assert web.requests["/a"] == 0
    assert (result.samples, result.rejected) == (3, {"withdrawn": 1})
    assert captions(config.to) == {"picture before", "picture b", "picture c"}
    check_whole(config.to)


def test_an_opt_out_met_under_a_new_caption_withdraws_the_stored_pair(
    web: Any, pages: Any, refresh_config: Build, without_ray: None
) -> None:
    links = pairs(web, pages, "a", "b")
    refresh(refresh_config(links))
    web.pages["/a"] = pages.image("a", "X-Robots-Tag: noai")
    config = refresh_config([*links, ("/a", "another caption")])
    assert refresh(config).withdrawn == 1
    assert captions(config.to) == {"picture b"}


def test_loosened_rules_reopen_links_over_several_refreshes(
    web: Any, pages: Any, refresh_config: Build, without_ray: None
) -> None:
    for number in range(4):
        web.pages[f"/{number}"] = pages.image(str(number), size=(40, 40))
    links: list[tuple[str | None, str | None]] = [(f"/{number}", f"picture {number}") for number in range(4)]
    strict = {"limits": {"min_side": 50, "max_bytes": 100_000}}
    assert refresh(refresh_config(links, image=strict)).rejected == {"image_too_small": 4}
    seen = []
    for _ in range(5):
        result = refresh(refresh_config(links, budget={"max_links": 1}))
        seen.append((result.samples, result.changed))
    assert seen == [(1, True), (2, True), (3, True), (4, True), (4, False)]


def test_a_server_s_absurd_retry_after_ends_nothing(
    web: Any, pages: Any, refresh_config: Build, without_ray: None
) -> None:
    links = pairs(web, pages, "a")
    for name, value in (("b", "9" * 18), ("c", "4" * 12), ("d", "-1"), ("e", "nan")):
        web.pages[f"/{name}"] = pages.answer(503, b"", f"Retry-After: {value}")
        links.append((f"/{name}", f"picture {name}"))
    result = refresh(refresh_config(links, fetch={"max_retry_after_s": 0.1}))
    assert (result.samples, result.rejected) == (1, {"server_error": 4})


def test_a_refresh_goes_on_with_the_dataset_s_own_selection(
    web: Any, pages: Any, refresh_config: Build, without_ray: None
) -> None:
    links = pairs(web, pages, "a", "b")
    config = refresh_config(links)
    refresh(config)
    select_dataset(config.to, SelectConfig(min_words=3))
    links += [("/c", "a picture of three"), ("/d", "picture d")]
    web.pages["/c"], web.pages["/d"] = pages.image("c"), pages.image("d")
    result = refresh(refresh_config(links))
    assert (result.samples, result.rejected) == (1, {"caption_too_short": 3})
    assert captions(config.to) == {"a picture of three"}


def test_a_selection_puts_off_no_check(web: Any, pages: Any, refresh_config: Build, without_ray: None) -> None:
    config = refresh_config(pairs(web, pages, "a", "b"))
    refresh(config)
    select_dataset(config.to, SelectConfig(min_words=9))
    select_dataset(config.to, SelectConfig())
    events = DeltaTable(f"{config.to}/links").to_pyarrow_table().sort_by("event_at").to_pylist()
    for name in "ab":
        mine = [event for event in events if event["url"].endswith(name)]
        assert [event["reason"] for event in mine] == [None, "caption_too_short", None]
        assert mine[-1]["event_at"] - mine[0]["event_at"] == timedelta(microseconds=2)


def test_language_and_extra_columns_reach_the_dataset(
    web: Any, pages: Any, refresh_config: Build, without_ray: None, tmp_path: Path
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    web.pages["/a"] = pages.image("a")
    table = {
        "URL": [f"{web.url}/a"],
        "TEXT": ["a small brown dog on the beach"],
        "similarity": [0.25],
        "NSFW": ["UNLIKELY"],
    }
    pq.write_table(pa.table(table), tmp_path / "laion.parquet")
    config = refresh_config([("/a", "unused")], links={"uri": str(tmp_path / "laion.parquet"), "columns": "laion"})
    assert refresh(config).samples == 1
    opened = Dataset(config.to)
    row = opened.read_row_group(0, columns=("extra",)).to_pylist()[0]
    assert '"similarity": 0.25' in row["extra"]
