"""The anti-join of a shard: what is new, due or asked again, and where every other row stands."""

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from coca.contract import Reason, State, sample_id
from coca.withdrawn import WITHDRAWN, Withdrawn
from pipelines.config import RecheckConfig
from pipelines.intake import INTAKE
from pipelines.join import DUE, JoinSettings, find_due, shuffle_urls
from pipelines.judge import caption_hashes
from pipelines.ledger import EVENTS, latest_events

NOW = datetime(2026, 1, 1, tzinfo=UTC)
NOTHING_KNOWN = latest_events(EVENTS.empty_table())


def settings(**changes: Any) -> JoinSettings:
    values: dict[str, Any] = {"now": NOW, "seed": 0, "chunk_urls": 10, "rechecks_per_shard": 0}
    return JoinSettings(**{**values, "recheck": RecheckConfig(stored_after_s=3600), **changes})


def links(*rows: tuple[str, str, Reason | None]) -> pa.Table:
    records = [
        {"sample_id": sample_id(u, c), "url": u, "caption": c, "reason": r, "piece": 0, "place": place}
        for place, (u, c, r) in enumerate(rows)
    ]
    return pa.Table.from_pylist(records, schema=INTAKE)


def known(*rows: tuple[str, str, State, dict[str, Any]]) -> pa.Table:
    records = [
        {"sample_id": sample_id(u, c), "url": u, "caption": c, "state": state, "event_at": NOW, **more}
        for u, c, state, more in rows
    ]
    return latest_events(pa.Table.from_pylist(records, schema=EVENTS))


def test_new_pairs_are_due_once() -> None:
    table = links(("http://a/1", "x y", None), ("http://a/1", "x y", None), ("http://a/1", "z", None))
    due, counts = find_due(table, NOTHING_KNOWN, settings())
    assert due.schema == DUE
    assert sorted(zip(due["caption"].to_pylist(), due["rows"].to_pylist(), strict=True)) == [("x y", 1), ("z", 1)]
    assert counts == {"duplicate_pair": 1}
    assert due["stored"].to_pylist() == [False, False]


def test_refused_rows_that_share_a_key_count_each() -> None:
    empty = ("http://a/1", "", Reason.EMPTY_CAPTION)
    due, counts = find_due(links(empty, empty, empty), NOTHING_KNOWN, settings())
    assert due["rows"].to_pylist() == [3]
    assert counts == {}


def test_standing_verdicts_are_counted_and_not_due() -> None:
    latest = known(
        ("http://a/1", "a", State.OK, {"stored": True}),
        ("http://a/2", "a", State.OK, {"stored": True, "reason": Reason.DUPLICATE_IMAGE}),
        ("http://a/3", "a", State.DEAD, {"reason": Reason.NOT_FOUND, "next_check_at": NOW + timedelta(days=1)}),
        ("http://a/4", "a", State.DEAD, {"stored": True, "next_check_at": NOW + timedelta(days=1)}),
    )
    table = links(*((f"http://a/{n}", "a", None) for n in range(1, 5)))
    due, counts = find_due(table, latest, settings())
    assert due.num_rows == 0
    # A link that died keeps its sample.
    assert counts == {"": 2, "duplicate_image": 1, "not_found": 1}


def test_a_failure_is_due_when_its_time_has_come() -> None:
    latest = known(
        ("http://a/1", "a", State.TRANSIENT, {"reason": Reason.TIMEOUT, "next_check_at": NOW - timedelta(seconds=1)}),
        ("http://a/2", "a", State.TRANSIENT, {"reason": Reason.TIMEOUT, "next_check_at": NOW + timedelta(seconds=1)}),
    )
    due, counts = find_due(links(("http://a/1", "a", None), ("http://a/2", "a", None)), latest, settings())
    assert (due["url"].to_pylist(), due["failures"].to_pylist()) == (["http://a/1"], [1])
    assert counts == {"timeout": 1}


def test_a_looser_text_rule_opens_a_pair_again_and_a_tighter_one_closes_none() -> None:
    latest = known(
        ("http://a/1", "a", State.REJECTED, {"reason": Reason.CAPTION_TOO_SHORT}),
        ("http://a/2", "b", State.OK, {"stored": True}),
    )
    refused_now = ("http://a/2", "b", Reason.CAPTION_TOO_SHORT)
    text = settings(reopened={"": frozenset({Reason.CAPTION_TOO_SHORT})})
    due, counts = find_due(links(("http://a/1", "a", None), refused_now), latest, text)
    assert due["url"].to_pylist() == ["http://a/1"]
    assert counts == {"": 1}
    still_short = links(("http://a/1", "a", Reason.CAPTION_TOO_SHORT))
    assert find_due(still_short, latest, text)[1] == {"caption_too_short": 1}


def test_reopened_reasons_are_due() -> None:
    latest = known(("http://a/1", "a", State.BLOCKED, {"reason": Reason.FORBIDDEN_ADDRESS}))
    table = links(("http://a/1", "a", None))
    assert find_due(table, latest, settings())[0].num_rows == 0
    reopened = settings(reopened={"": frozenset({Reason.FORBIDDEN_ADDRESS})})
    assert find_due(table, latest, reopened)[0].num_rows == 1


def test_the_stored_links_with_the_oldest_answers_are_asked_again() -> None:
    def stored(hours: int, **more: Any) -> dict[str, Any]:
        answer = {"etag": f'"{hours}"', "source_sha256": "f" * 64, "event_at": NOW - timedelta(hours=hours)}
        return {"stored": True, **answer, **more}

    latest = known(
        ("http://a/1", "a", State.OK, stored(5)),
        ("http://a/2", "a", State.OK, stored(9)),
        ("http://a/2", "b", State.OK, stored(4, reason=Reason.NEAR_DUPLICATE)),
        ("http://a/3", "a", State.OK, stored(0)),  # answered just now
        ("http://a/4", "a", State.CHANGED, stored(7)),
        ("http://a/5", "a", State.OK, {**stored(99), "stored": False}),
    )
    due, counts = find_due(links(("http://a/2", "a", None)), latest, settings(rechecks_per_shard=2))
    rows = {(row["url"], row["caption"]): row for row in due.to_pylist()}
    assert rows.keys() == {("http://a/2", "a"), ("http://a/2", "b"), ("http://a/4", "a")}
    assert all(row["stored"] and row["etag"] and row["source_sha256"] for row in rows.values())
    assert [(rows["http://a/2", c]["rows"], rows["http://a/2", c]["standing_rows"]) for c in "ab"] == [(0, 1), (0, 0)]
    assert rows["http://a/2", "b"]["standing_reason"] == Reason.NEAR_DUPLICATE
    assert counts == {"": 1}
    assert find_due(links(), latest, settings())[0].num_rows == 0


def test_a_stored_link_whose_failure_is_due_is_asked_again_too() -> None:
    due_at, later = NOW - timedelta(seconds=1), NOW + timedelta(days=1)
    latest = known(
        ("http://a/1", "a", State.TRANSIENT, {"stored": True, "next_check_at": due_at}),
        ("http://a/2", "a", State.DEAD, {"stored": True, "next_check_at": later}),
    )
    due, _ = find_due(links(), latest, settings(rechecks_per_shard=5))
    assert due["url"].to_pylist() == ["http://a/1"]


def test_repeats_of_a_pair_that_stands_are_repeats_also_where_rules_refuse_it_now() -> None:
    latest = known(("http://a/1", "a", State.OK, {"stored": True}))
    row = ("http://a/1", "a", Reason.CAPTION_TOO_SHORT)
    assert find_due(links(row, row, row), latest, settings())[1] == {"": 1, "duplicate_pair": 2}


def test_rows_without_a_caption_count_each_also_when_they_stand() -> None:
    latest = known(("http://a/1", "", State.REJECTED, {"reason": Reason.EMPTY_CAPTION}))
    row = ("http://a/1", "", Reason.EMPTY_CAPTION)
    assert find_due(links(row, row), latest, settings())[1] == {"empty_caption": 2}


def test_an_import_takes_no_caption_of_a_url_that_has_opted_out() -> None:
    latest = known(("http://a/1", "a", State.OPTED_OUT, {"reason": Reason.OPTED_OUT}))
    table = links(("http://a/1", "another", None), ("http://a/2", "a", None))
    due, _ = find_due(table, latest, settings(imported_at=[NOW]))
    reasons = dict(zip(due["url"].to_pylist(), due["reason"].to_pylist(), strict=True))
    assert reasons == {"http://a/1": Reason.OPTED_OUT, "http://a/2": None}
    assert find_due(table, latest, settings())[0]["reason"].to_pylist() == [None, None]


def test_what_failed_in_a_shard_is_due_again_for_a_later_one_only() -> None:
    checks = {"reason": Reason.TIMEOUT, "next_check_at": NOW + timedelta(hours=6)}
    latest = known(("http://a/1", "a", State.TRANSIENT, checks), ("http://a/2", "a", State.TRANSIENT, checks))
    table = links(("http://a/1", "a", None), ("http://a/2", "a", None))
    table = table.set_column(INTAKE.get_field_index("piece"), INTAKE.field("piece"), pa.array([0, 1], pa.int32()))
    written = [NOW + timedelta(hours=5), NOW + timedelta(hours=7)]
    due, _ = find_due(table, latest, settings(now=NOW + timedelta(days=9), imported_at=written))
    assert due["url"].to_pylist() == ["http://a/2"]


def test_a_new_caption_knows_that_its_url_is_stored() -> None:
    latest = known(("http://a/1", "a", State.OK, {"stored": True}))
    due, _ = find_due(links(("http://a/1", "b", None), ("http://a/2", "b", None)), latest, settings())
    assert dict(zip(due["url"].to_pylist(), due["url_stored"].to_pylist(), strict=True)) == {
        "http://a/1": True,
        "http://a/2": False,
    }


def withdrawn(url: str | None, key: str | None) -> Withdrawn:
    row = {"url": url, "sample_id": key, "reason": "opted_out", "withdrawn_at": NOW}
    return Withdrawn(pa.Table.from_pylist([row], schema=WITHDRAWN))


def test_a_withdrawn_url_is_not_asked_and_its_stored_pair_is_no_sample() -> None:
    key = sample_id("http://a/1", "a")
    latest = known(("http://a/1", "a", State.OK, {"stored": True, "event_at": NOW - timedelta(days=9)}))
    table = links(("http://a/1", "a", None), ("http://a/1", "another caption", None), ("http://a/2", "a", None))
    gone = settings(withdrawn=withdrawn("http://a/1", key), rechecks_per_shard=5)
    due, counts = find_due(table, latest, gone)
    assert {(row["caption"], row["reason"]) for row in due.to_pylist()} == {
        ("another caption", "withdrawn"),
        ("a", None),
    }
    assert counts == {"withdrawn": 1}


def test_a_pair_withdrawn_by_its_id_is_not_asked_before_it_was_ever_stored() -> None:
    gone = settings(withdrawn=withdrawn(None, sample_id("http://a/1", "a")))
    due, _ = find_due(links(("http://a/1", "a", None), ("http://a/1", "b", None)), NOTHING_KNOWN, gone)
    assert dict(zip(due["caption"].to_pylist(), due["reason"].to_pylist(), strict=True)) == {
        "a": "withdrawn",
        "b": None,
    }


def test_captions_that_are_too_frequent_are_refused() -> None:
    table = links(("http://a/1", "stock", None), ("http://a/2", "rare", None))
    frequent = np.sort(caption_hashes(pa.chunked_array([["stock"]])))
    due, _ = find_due(table, NOTHING_KNOWN, settings(frequent_captions=frequent))
    assert dict(zip(due["url"].to_pylist(), due["reason"].to_pylist(), strict=True)) == {
        "http://a/1": Reason.CAPTION_TOO_FREQUENT,
        "http://a/2": None,
    }


@pytest.mark.parametrize("seed", [0, 7])
def test_the_shuffle_of_urls_does_not_know_the_order_of_the_rows(seed: int) -> None:
    rows = [(f"http://a/{n % 20}", f"caption {n}", None) for n in range(60)]
    table, numbers = shuffle_urls(links(*rows), seed)
    again, _ = shuffle_urls(links(*rows[::-1]), seed)
    assert again["sample_id"].equals(table["sample_id"])
    assert numbers.tolist() == sorted(numbers) == [n for n in range(20) for _ in range(3)]
    assert table["url"].to_pylist() != sorted(table["url"].to_pylist())
    other, _ = shuffle_urls(links(*rows), seed + 1)
    assert other["url"].to_pylist() != table["url"].to_pylist()
