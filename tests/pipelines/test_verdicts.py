"""From how a url's fetch ended to the verdict on each of its pairs, new and stored ones."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from coca.contract import Reason, State
from pipelines.config import RecheckConfig
from pipelines.fetch import Fetched
from pipelines.prepare import Prepared, StoredImage
from pipelines.verdicts import outcome_rows

NOW = datetime(2026, 1, 1, tzinfo=UTC)
RECHECK = RecheckConfig(transient_after_s=60, dead_after_s=600)
IMAGE = StoredImage(b"bytes", "jpeg", 4, 3, 40, 30, "s" * 64, 7)
ADMITTED = Prepared("a" * 64, stored=IMAGE)
OTHER = Prepared("b" * 64, stored=IMAGE)


def pair(caption: str = "a", **more: Any) -> dict[str, Any]:
    base = {"sample_id": caption * 32, "url": "http://a/", "caption": caption, "language": None, "rows": 1}
    base |= {"standing_rows": 0, "url_stored": False, "known_at": None}
    fresh = {"stored": False, "failures": 0, "standing_reason": None, "etag": None, "last_modified": None}
    return {**base, **fresh, "source_sha256": None, **more}


def stored(**more: Any) -> dict[str, Any]:
    return pair(stored=True, source_sha256="a" * 64, etag='"old"', last_modified="then", **more)


def one(pair_: dict[str, Any], fetched: Fetched[Prepared]) -> dict[str, Any]:
    return outcome_rows([pair_], fetched, NOW, RECHECK)[0]


def test_an_admitted_pair() -> None:
    row = one(pair(), Fetched(result=ADMITTED, status=200, requests=2, bytes=99, etag='"e"'))
    assert (row["state"], row["reason"], row["stored"], row["admitted"]) == (State.OK, None, True, True)
    assert (row["source_sha256"], row["etag"], row["status"], row["next_check_at"]) == ("a" * 64, '"e"', 200, None)
    assert (row["format"], row["width"], row["original_width"], row["phash"]) == ("jpeg", 4, 40, 7)


def test_a_url_costs_once_whatever_its_captions() -> None:
    rows = outcome_rows([pair("a"), pair("b")], Fetched(result=ADMITTED, requests=3, bytes=50), NOW, RECHECK)
    assert [(row["requests"], row["bytes"], row["attempts"]) for row in rows] == [(3, 50, 3), (0, 0, 3)]


@pytest.mark.parametrize(
    ("fetched", "state", "wait_s"),
    [
        (Fetched(reason=Reason.TIMEOUT), State.TRANSIENT, 240),
        (Fetched(reason=Reason.RATE_LIMITED, retry_after_s=900), State.TRANSIENT, 900),
        (Fetched(reason=Reason.NOT_FOUND, status=404), State.DEAD, 2400),
        (Fetched(reason=Reason.TDM_RESERVED), State.OPTED_OUT, None),
        (Fetched(result=Prepared("c" * 64, reason=Reason.IMAGE_TOO_SMALL)), State.REJECTED, None),
    ],
)
def test_a_refused_pair(fetched: Fetched[Prepared], state: State, wait_s: int | None) -> None:
    row = one(pair(failures=2), fetched)
    assert (row["state"], row["stored"], row["admitted"]) == (state, False, False)
    assert row["next_check_at"] == (None if wait_s is None else NOW + timedelta(seconds=wait_s))


@pytest.mark.parametrize(
    ("fetched", "state"),
    [
        (Fetched(not_modified=True, status=304), State.OK),
        (Fetched(result=ADMITTED, status=200), State.OK),
        (Fetched(result=OTHER, status=200), State.CHANGED),
        (Fetched(result=Prepared("b" * 64, reason=Reason.NOT_AN_IMAGE)), State.CHANGED),
        (Fetched(reason=Reason.BODY_TOO_LARGE), State.CHANGED),
        (Fetched(reason=Reason.NOT_FOUND, status=404), State.DEAD),
        (Fetched(reason=Reason.DNS_FAILURE), State.TRANSIENT),
    ],
)
def test_a_stored_pair_stays_what_it_was(fetched: Fetched[Prepared], state: State) -> None:
    row = one(stored(standing_reason="near_duplicate"), fetched)
    assert (row["state"], row["reason"]) == (state, "near_duplicate")
    assert (row["stored"], row["admitted"], row["source_sha256"]) == (True, False, "a" * 64)
    assert (row["etag"], row["last_modified"]) == ('"old"', "then")


def test_an_opt_out_of_a_stored_pair_is_its_verdict() -> None:
    row = one(stored(), Fetched(reason=Reason.OPTED_OUT, status=200))
    assert (row["state"], row["reason"], row["stored"]) == (State.OPTED_OUT, Reason.OPTED_OUT, True)


def test_an_event_is_later_than_the_last_one_whatever_the_clock_says() -> None:
    ahead = NOW + timedelta(days=1)
    row = one(pair(known_at=ahead), Fetched(result=ADMITTED))
    assert row["event_at"] == row["fetched_at"] == ahead + timedelta(microseconds=1)


def test_bytes_that_came_long_ago_keep_their_time_and_failures_are_due_by_it() -> None:
    then = NOW - timedelta(days=30)
    [row] = outcome_rows([pair()], Fetched(reason=Reason.TIMEOUT), NOW, RECHECK, fetched_at=then)
    assert (row["event_at"], row["fetched_at"]) == (NOW, then)
    assert row["next_check_at"] == then + timedelta(seconds=60)


def test_the_validators_of_other_bytes_are_not_kept() -> None:
    row = one(stored(), Fetched(result=OTHER, status=200, etag='"other"', last_modified="now"))
    assert (row["state"], row["etag"], row["last_modified"]) == (State.CHANGED, '"old"', "then")
    row = one(stored(), Fetched(result=ADMITTED, status=200, etag='"new"'))
    assert (row["state"], row["etag"]) == (State.OK, '"new"')


def test_a_new_caption_of_a_known_url_is_admitted_beside_the_stored_one() -> None:
    rows = outcome_rows([stored(), pair("b")], Fetched(result=ADMITTED, requests=1), NOW, RECHECK)
    assert [(row["admitted"], row["stored"], row["state"]) for row in rows] == [(False, True, "ok"), (True, True, "ok")]
