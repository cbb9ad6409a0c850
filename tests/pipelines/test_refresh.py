"""A refresh from links to a published version: verdicts, repetition, growth, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray.data
from deltalake import DeltaTable

from coca.contract import CONTRACT_VERSION, Reason, sample_id
from coca.dataset import Dataset
from coca.storage import Store
from pipelines.config import RefreshConfig
from pipelines.refresh import RefreshResult, refresh

Build = Callable[..., RefreshConfig]


def verdicts(dataset: str, version: int | None = None) -> dict[str, str | None]:
    """url path and caption -> the reason in the latest ledger event, None for a sample."""
    table = DeltaTable(f"{dataset}/links", version=version).to_pyarrow_table().sort_by("event_at").to_pylist()
    return {f"{row['url'].rpartition('/')[2]} {row['caption']}": row["reason"] for row in table}


def selected(dataset: str) -> set[str]:
    opened = Dataset(dataset)
    ids = (opened.read_row_group(i)["sample_id"].to_pylist() for i in range(opened.row_groups.num_rows))
    return {key for group in ids for key in group}


DIRT: list[tuple[str, Callable[[Any], Any], Reason | None]] = [
    ("jpeg", lambda p: p.image("jpeg"), None),
    ("png", lambda p: p.image("png", kind="PNG"), None),
    ("webp", lambda p: p.image("webp", kind="WEBP"), None),
    ("gif", lambda p: p.image("gif", kind="GIF"), None),
    ("alpha", lambda p: p.image("alpha", kind="PNG", mode="RGBA"), None),
    ("labelled", lambda p: p.image("labelled", kind="PNG"), None),  # every page says image/jpeg
    ("flaky", lambda p: p.in_turn(p.answer(500), p.image("flaky")), None),
    ("moved", lambda p: p.redirect("/jpeg2"), None),
    ("404", lambda p: p.answer(404), Reason.NOT_FOUND),
    ("403", lambda p: p.answer(403), Reason.CLIENT_ERROR),
    ("429", lambda p: p.answer(429), Reason.RATE_LIMITED),
    ("500", lambda p: p.answer(500), Reason.SERVER_ERROR),
    ("trickle", lambda p: p.trickle, Reason.TIMEOUT),
    ("hang", lambda p: p.hang, Reason.TIMEOUT),
    ("hangup", lambda p: p.hang_up, Reason.CONNECT_ERROR),
    ("loop", lambda p: p.redirect("/loop"), Reason.TOO_MANY_REDIRECTS),
    ("inside", lambda p: p.redirect("http://169.254.169.254/latest/meta-data"), Reason.FORBIDDEN_ADDRESS),
    ("endless", lambda p: p.endless, Reason.BODY_TOO_LARGE),
    ("huge", lambda p: p.answer(200, b"", length=10**12), Reason.BODY_TOO_LARGE),
    ("gzip", lambda p: p.gzipped(p.picture("gzip")), Reason.BODY_ENCODED),
    ("cut", lambda p: p.answer(200, p.picture("cut")[:500], length=9000), Reason.BODY_INCOMPLETE),
    ("optout", lambda p: p.image("optout", "X-Robots-Tag: noai"), Reason.OPTED_OUT),
    ("html", lambda p: p.answer(200, b"<html>hello</html>", "Content-Type: image/jpeg"), Reason.NOT_AN_IMAGE),
    ("half", lambda p: p.answer(200, p.picture("half")[:700]), Reason.TRUNCATED_IMAGE),
    ("tiny", lambda p: p.image("tiny", size=(31, 31)), Reason.IMAGE_TOO_SMALL),
    ("long", lambda p: p.image("long", size=(200, 32)), Reason.ASPECT_RATIO),
    ("bomb", lambda p: p.image("bomb", size=(900, 900)), Reason.TOO_MANY_PIXELS),
]


def dirty_web(web: Any, pages: Any) -> list[tuple[str | None, str | None]]:
    for name, page, _ in DIRT:
        web.pages[f"/{name}"] = page(pages)
    web.pages["/jpeg2"] = pages.image("jpeg2")
    web.pages["/copy"] = pages.image("jpeg")  # the same picture under another url
    return [
        *((f"/{name}", f"picture {name}") for name, _, _ in DIRT),
        ("/copy", "picture copy"),
        ("/jpeg", "another caption"),
        ("/jpeg", "picture  jpeg"),  # the same pair
        ("/png#top", "picture png"),  # the same pair
        ("http://127.1/a", "picture odd host"),
        ("http://[::1]:80/a", "picture forbidden literal"),
        (None, "no url"),
        ("nonsense", "no url either"),
        ("/jpeg", None),
        ("/jpeg", " "),
        ("/jpeg", "x"),
        ("/jpeg", "word " * 300),
    ]


def expected_counts() -> dict[str, int]:
    counts: dict[str, int] = {}
    extra = [Reason.INVALID_URL] * 3 + [Reason.EMPTY_CAPTION] * 2 + [Reason.DUPLICATE_PAIR] * 2
    extra += [Reason.CAPTION_TOO_SHORT, Reason.CAPTION_TOO_LONG, Reason.FORBIDDEN_ADDRESS, Reason.DUPLICATE_IMAGE]
    for reason in [*(reason for _, _, reason in DIRT), *extra]:
        if reason is not None:
            counts[reason.value] = counts.get(reason.value, 0) + 1
    return counts


def check_dirty_web(config: RefreshConfig, web: Any, result: RefreshResult) -> None:
    """One copy of jpeg and /copy is not selected; jpeg has two captions, so it depends on the lowest id which."""
    counts = expected_counts()
    copies = {key: sample_id(f"{web.url}/{path}", key) for path, key in COPIES}
    winner_is_copy = min(copies, key=copies.__getitem__) == "picture copy"
    counts["duplicate_image"] = 2 if winner_is_copy else 1
    assert result.rejected == counts
    admitted = sum(reason is None for _, _, reason in DIRT) + 2
    assert result.samples == admitted - counts["duplicate_image"]
    assert result.links == result.samples + sum(result.rejected.values()) == len(DIRT) + 12
    ledger = verdicts(config.to)
    expected = {name: reason.value if reason else None for name, _, reason in DIRT}
    # The ledger tells of the selection, too.
    expected["jpeg"] = Reason.DUPLICATE_IMAGE.value if winner_is_copy else None
    assert {name: ledger[f"{name} picture {name}"] for name, _, _ in DIRT} == expected
    losers = {"picture jpeg", "another caption"} if winner_is_copy else {"picture copy"}
    chosen = selected(config.to)
    assert all((copies[key] in chosen) == (key not in losers) for key in copies)
    assert result.requests == sum(web.requests.values())


COPIES = [("jpeg", "picture jpeg"), ("jpeg", "another caption"), ("copy", "picture copy")]


@pytest.mark.ray
def test_every_kind_of_dirt_ends_under_its_reason_and_a_second_refresh_asks_nobody(
    web: Any, pages: Any, refresh_config: Build, ray_cluster: Any
) -> None:
    config = refresh_config(dirty_web(web, pages), image={"limits": DIRT_LIMITS}, fetch={"workers": 2} | FETCH)
    result = refresh(config)
    check_dirty_web(config, web, result)
    asked, published = sum(web.requests.values()), Path(config.to, "versions").iterdir()
    before = sorted(path.name for path in published)
    assert before == ["1.json", "1.row_groups.parquet"]
    tables = {name: DeltaTable(f"{config.to}/{name}").version() for name in TABLES}
    again = refresh(config.model_copy(update={"tokenizer": None}))
    assert sum(web.requests.values()) == asked
    assert (again.changed, again.version, again.requests) == (False, 1, 0)
    assert (again.links, again.samples, again.rejected) == (result.links, result.samples, result.rejected)
    assert sorted(path.name for path in Path(config.to, "versions").iterdir()) == before
    assert {name: DeltaTable(f"{config.to}/{name}").version() for name in TABLES} == tables
    assert living_fetchers(ray_cluster.address) == []


TABLES = ("samples", "annotations", "links")
DIRT_LIMITS = {"min_side": 32, "max_bytes": 100_000, "max_aspect_ratio": 5, "max_pixels": 100_000}
FETCH = {
    "allow_networks": ["127.0.0.0/8"],
    "timeout_s": 1.0,
    "retries": 1,
    "backoff_s": 0.01,
    "robots_txt": False,
    "breaker_failures": 100,
}


def living_fetchers(address: str) -> list[str]:
    from ray.util.state import list_actors

    return [
        actor.class_name
        for actor in list_actors(address=address, filters=[("state", "!=", "DEAD")])
        if "FetchPart" in actor.class_name
    ]


@pytest.mark.ray
def test_the_same_on_s3(
    web: Any,
    pages: Any,
    refresh_config: Build,
    ray_cluster: Any,
    s3: str,
    tokenizer_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Ray Data would split blocks of this size: a part must stay one block.
    monkeypatch.setattr(ray.data.DataContext.get_current(), "target_max_block_size", 1000)
    pairs = [(f"/{number}", f"picture {number}") for number in range(20)]
    for path, _ in pairs:
        web.pages[path] = pages.image(path)
    config = refresh_config([*pairs, ("/gone", "a dead link")])
    Store(s3).write("links/part.parquet", Path(config.links.uri).read_bytes())
    Store(s3).write("tokenizer.json", tokenizer_file.read_bytes())
    update = {
        "to": f"{s3}/dataset",
        "tokenizer": f"{s3}/tokenizer.json",
        "links": config.links.model_copy(update={"uri": f"{s3}/links/*.parquet"}),
    }
    config = config.model_copy(update=update)
    result = refresh(config)
    assert (result.samples, result.rejected) == (20, {"not_found": 1})
    assert len(selected(config.to)) == 20
    assert Dataset(config.to).tokenizer.fingerprint == Dataset(config.to).record.tokenizer.fingerprint
    assert Store(config.to).list("staging") == []
    assert ray.data.DataContext.get_current().target_max_block_size == 1000
    asked = sum(web.requests.values())
    assert refresh(config).changed is False
    assert sum(web.requests.values()) == asked


def pictures(web: Any, pages: Any, *names: str) -> list[tuple[str | None, str | None]]:
    for name in names:
        web.pages[f"/{name}"] = pages.image(name)
    return [(f"/{name}", f"picture {name}") for name in names]


def test_the_record_names_all_that_a_reader_needs(
    web: Any, pages: Any, refresh_config: Build, without_ray: None
) -> None:
    config = refresh_config([*pictures(web, pages, *map(str, range(30))), ("/gone", "gone away")])
    result = refresh(config)
    dataset = Dataset(config.to)
    record = dataset.record
    assert (record.version, record.parent, record.contract_version) == (1, None, CONTRACT_VERSION)
    assert (record.samples.rows, record.annotations.rows, record.links.rows, record.selected) == (30, 30, 31, 30)
    for name in TABLES:
        table, stamp = DeltaTable(f"{config.to}/{name}"), getattr(record, name)
        assert (table.version(), len(table.file_uris())) == (stamp.delta_version, stamp.files)
    assert record.funnel == {
        "links": 31,
        "samples": 30,
        "rejected": {"not_found": 1},
        "requests": 31,
        "bytes": result.bytes,
    }
    assert record.config.pop("scorers") == []
    assert RefreshConfig.model_validate(record.config) == config
    assert json.loads(Path(config.to, "versions/1.json").read_text())["rows_per_row_group"] == 4
    groups = dataset.row_groups.to_pylist()
    assert groups == sorted(groups, key=lambda group: (group["samples_path"], group["row_group"]))
    assert sum(group["rows"] for group in groups) == 30
    tokens = dataset.tokenizer.encode(["picture 7"])[0]
    rows = [row for i in range(len(groups)) for row in dataset.read_row_group(i).to_pylist()]
    assert next(row["tokens"] for row in rows if row["caption"] == "picture 7") == tokens


def test_samples_files_are_laid_out_for_the_feed(
    web: Any, pages: Any, refresh_config: Build, without_ray: None
) -> None:
    config = refresh_config(pictures(web, pages, *map(str, range(30))))
    refresh(config)
    files = sorted(Path(config.to, "samples").glob("*.parquet"))
    assert len(files) >= 4
    for path in files:
        parquet, notes = pq.ParquetFile(path), pq.ParquetFile(Path(config.to, "annotations", path.name))
        sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        assert sizes[:-1] == [4] * (len(sizes) - 1)
        assert [notes.metadata.row_group(i).num_rows for i in range(notes.num_row_groups)] == sizes
        assert parquet.read(["sample_id"]).equals(notes.read(["sample_id"]))
        ids = parquet.read(["sample_id"])["sample_id"].to_pylist()
        assert ids == sorted(ids)
        for i in range(parquet.num_row_groups):
            columns = [parquet.metadata.row_group(i).column(j) for j in range(parquet.metadata.num_columns)]
            by_name = {column.path_in_schema: column for column in columns}
            image = by_name.pop("image")
            assert image.compression == "UNCOMPRESSED"
            assert not {"RLE_DICTIONARY", "PLAIN_DICTIONARY"} & set(image.encodings)
            assert {column.compression for column in by_name.values()} == {"ZSTD"}


def test_a_dataset_is_read_without_this_code_as_the_docs_say(
    web: Any, pages: Any, refresh_config: Build, without_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.pages["/copy"] = pages.image("a")
    refresh(refresh_config([*pictures(web, pages, "a", "b"), ("/copy", "a copy")], to=str(tmp_path / "data/mine")))
    docs = Path(__file__).parents[2] / "docs/data-contract.md"
    snippet = docs.read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(snippet, names)
    assert set(names["pairs"]["sample_id"].to_pylist()) == selected("data/mine")
    assert names["pairs"].num_rows == 2


def test_ledger_files_lie_under_their_bucket(web: Any, pages: Any, refresh_config: Build, without_ray: None) -> None:
    from coca.contract import link_bucket

    config = refresh_config(pictures(web, pages, "a", "b", "c"))
    refresh(config)
    for row in DeltaTable(f"{config.to}/links").to_pyarrow_table().to_pylist():
        assert row["bucket"] == link_bucket(row["url"])
    assert {path.parent.name for path in Path(config.to, "links").rglob("*.parquet")} == {
        f"bucket={link_bucket(f'{web.url}/{name}')}" for name in "abc"
    }


def test_new_links_are_added_and_old_ones_left_alone(
    web: Any, pages: Any, refresh_config: Build, without_ray: None
) -> None:
    old, new = pictures(web, pages, "a", "b", "c"), pictures(web, pages, "d", "e")
    first = refresh(refresh_config(old))
    web.requests.clear()
    config = refresh_config([*old, *new, ("/a", "a second caption")], tokenizer=None)
    second = refresh(config)
    assert dict(web.requests) == {"/d": 1, "/e": 1, "/a": 1}
    assert (first.version, second.version, second.changed) == (1, 2, True)
    assert (second.links, second.samples, second.version_samples) == (6, 6, 6)
    assert Dataset(config.to).record.parent == 1
    assert (Dataset(config.to, 1).record.selected, Dataset(config.to, 1).row_groups["rows"].to_pylist()) == (3, [3])
    assert len(selected(config.to)) == 6
    web.requests.clear()
    only_old = refresh(refresh_config(old[:2], tokenizer=None))
    assert (only_old.changed, only_old.links, only_old.samples, only_old.version_samples) == (False, 2, 2, 6)
    assert not web.requests


def test_a_stored_picture_wins_over_a_lower_id_that_comes_later(
    web: Any, pages: Any, refresh_config: Build, without_ray: None
) -> None:
    for name in "ab":
        web.pages[f"/{name}"] = pages.image("the same")
    captions = [f"caption {number}" for number in range(20)]
    low, high = sorted(captions, key=lambda caption: sample_id(f"{web.url}/a", caption))[:: len(captions) - 1]
    high_id = sample_id(f"{web.url}/a", high)
    later = next(c for c in captions if sample_id(f"{web.url}/b", c) < high_id)
    refresh(refresh_config([("/a", high)]))
    config = refresh_config([("/a", high), ("/b", later), ("/a", low)], tokenizer=None)
    result = refresh(config)
    assert result.rejected == {"duplicate_image": 1}
    assert selected(config.to) == {high_id, sample_id(f"{web.url}/a", low)}


def test_the_lowest_id_wins_across_batches(web: Any, pages: Any, refresh_config: Build, without_ray: None) -> None:
    names = [str(number) for number in range(12)]
    for name in names:
        web.pages[f"/{name}"] = pages.image("the same")
    config = refresh_config(
        [(f"/{name}", "caption") for name in names], publish={"links_per_part": 1, "links_per_batch": 2}
    )
    result = refresh(config)
    assert (result.samples, result.rejected) == (1, {"duplicate_image": 11})
    assert selected(config.to) == {min(sample_id(f"{web.url}/{name}", "caption") for name in names)}
    assert Dataset(config.to).record.samples.rows == 12  # stored, though not selected


def test_a_passing_failure_is_due_again_when_its_time_has_come(
    web: Any, pages: Any, refresh_config: Build, without_ray: None
) -> None:
    web.pages["/late"] = pages.in_turn(pages.answer(503), pages.answer(503), pages.image("late"))
    pairs = [*pictures(web, pages, "a"), ("/late", "picture late")]
    config = refresh_config(pairs, recheck={"transient_after_s": 3600})
    assert refresh(config).rejected == {"server_error": 1}
    assert refresh(config).changed is False  # not due for an hour
    events = DeltaTable(f"{config.to}/links").to_pyarrow_table().to_pylist()
    event = next(event for event in events if event["state"] == "transient")
    assert (event["next_check_at"] - event["event_at"]).total_seconds() == 3600

    other = refresh_config(pairs, to=f"{config.to}-soon", recheck={"transient_after_s": 0})
    web.requests.clear()
    assert refresh(other).rejected == {"server_error": 1}
    second = refresh(other)
    assert (second.changed, second.version, second.samples, second.rejected) == (True, 2, 2, {})
    assert web.requests["/a"] == 1


def test_what_was_blocked_is_due_again_once_its_network_is_allowed(
    web: Any, pages: Any, refresh_config: Build, without_ray: None
) -> None:
    pairs = [*pictures(web, pages, "a", "b"), ("http://10.1.2.3/x", "picture elsewhere")]
    closed = refresh_config(pairs, fetch=FETCH | {"allow_networks": []})
    assert refresh(closed).rejected == {"forbidden_address": 3}
    assert not web.requests
    assert refresh(closed).changed is False
    opened = refresh_config(pairs)
    second = refresh(opened)
    assert (second.changed, second.samples, second.rejected) == (True, 2, {"forbidden_address": 1})
    assert refresh(opened).changed is False


def test_a_dataset_keeps_its_row_groups_when_nothing_is_said(
    web: Any, pages: Any, refresh_config: Build, without_ray: None
) -> None:
    refresh(refresh_config(pictures(web, pages, "a")))
    more = refresh_config(pictures(web, pages, "a", "b"), publish={"rows_per_row_group": None})
    refresh(more)
    assert Dataset(more.to).record.rows_per_row_group == 4
    new = refresh_config(pictures(web, pages, "a"), to=f"{more.to}-new", publish={"rows_per_row_group": None})
    refresh(new)
    assert Dataset(new.to).record.rows_per_row_group == 1024


def test_links_refused_before_any_request_make_a_version_too(
    web: Any, refresh_config: Build, without_ray: None
) -> None:
    config = refresh_config([("nonsense", "a caption"), ("/a", "")])
    result = refresh(config)
    assert (result.version, result.samples, result.requests) == (1, 0, 0)
    assert result.rejected == {"invalid_url": 1, "empty_caption": 1}
    assert Dataset(config.to).row_groups.num_rows == 0
    assert refresh(config).changed is False
