"""What is known about one url: found by its bucket, told whole, also where the answer is no."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from coca.contract import link_bucket
from coca.dataset import Dataset
from pipelines import explain as module
from pipelines.explain import Explanation, explain
from tests.seeing_fixtures import STARTED, caption, key, publish_world, stored_row, url, withdraw


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return publish_world(tmp_path_factory.mktemp("explain") / "world")


def look_up(uri: str, text: str) -> Explanation:
    return explain(Dataset(uri), text)


def test_a_selected_sample_is_told_with_its_place(uri: str) -> None:
    found = look_up(uri, "HTTP://One.Example:80/p1.png#top")
    assert (found.canonical, found.bucket) == (url(1), link_bucket(url(1)))
    assert (found.allowed, found.nearest, found.withdrawals) == (None, None, [])
    assert [(event["state"], event["status"]) for event in found.events] == [("ok", 200)]
    (pair,) = found.pairs
    row = pair["row"]
    assert (pair["sample_id"], pair["state"], pair["due"]) == (key(1), "ok", "never")
    assert (row["file"], row["row_group"], row["row"]) == ("aaaa-b00000-p00000.parquet", 0, 1)
    assert (row["selected"], row["reason"], row["winner"], row["withdrawn"]) == (True, None, None, False)
    assert (row["tokens"], row["language"], row["scores"]) == (3, "en", {"clip": pytest.approx(0.1)})
    assert row["source_sha256"] == stored_row(1)["source_sha256"]


def test_a_duplicate_names_the_selected_row_of_the_same_bytes(uri: str) -> None:
    row = look_up(uri, url(5)).pairs[0]["row"]
    assert (row["selected"], row["reason"]) == (False, "duplicate_image")
    assert row["winner"] == {"sample_id": key(2), "url": url(2), "caption": caption(2), "distance": 0}


def test_a_near_duplicate_names_the_nearest_selected_row(uri: str) -> None:
    row = look_up(uri, url(7)).pairs[0]["row"]
    assert row["winner"] == {"sample_id": key(6), "url": url(6), "caption": caption(6), "distance": 1}
    assert look_up(uri, url(8)).pairs[0]["row"]["winner"] is None  # out for its score: in nobody's favour


def test_every_event_is_told_in_the_order_of_time_and_when_it_is_due(uri: str) -> None:
    found = look_up(uri, "http://two.example/slow")
    assert [event["refresh_id"] for event in found.events] == ["aaaa", "bbbb"]
    assert found.events[0]["event_at"] == STARTED
    (pair,) = found.pairs
    assert (pair["state"], pair["reason"], pair["row"]) == ("transient", "timeout", None)
    assert pair["due"] == datetime(2999, 1, 1, tzinfo=UTC).isoformat()
    assert explain(Dataset(uri, 1), "http://two.example/slow").pairs[0]["due"] == "now"


def test_a_withdrawn_row_is_said_to_be_withdrawn_and_not_shown(tmp_path: Path) -> None:
    uri = publish_world(tmp_path / "world")
    withdraw(uri, 2)
    found = look_up(uri, url(2))
    row = found.pairs[0]["row"]
    assert row == {"file": "aaaa-b00000-p00000.parquet", "row_group": 0, "row": 2, "withdrawn": True}
    assert [(entry["url"], entry["reason"]) for entry in found.withdrawals] == [(url(2), "takedown")]
    # The same bytes under another url: the entry names their digest, and the copy's winner is gone.
    copy = look_up(uri, url(5))
    assert len(copy.withdrawals) == 1
    assert copy.pairs[0]["row"]["winner"] is None


def test_a_text_that_is_no_url_has_its_event_too(uri: str) -> None:
    found = look_up(uri, " javascript:alert(1) ")
    assert (found.canonical, found.allowed) == (None, False)
    assert [event["reason"] for event in found.events] == ["invalid_url"]
    assert look_up(uri, "nothing at all").nearest is None
    assert look_up(uri, "http://[broken/").events == []


def test_an_unknown_url_gets_the_nearest_of_its_host(uri: str) -> None:
    found = look_up(uri, "https://two.example/p5.pmg")
    assert (found.events, found.pairs) == ([], [])
    assert found.nearest == url(5)
    assert look_up(uri, "http://four.example/p5.png").nearest is None


def test_in_a_large_ledger_only_the_bucket_is_searched_for_a_near_url(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SCANNED_EVENTS", 0)
    assert look_up(uri, "http://two.example/p5.pmg").nearest is None  # another bucket than that of any known url


@pytest.mark.parametrize(
    ("address", "allowed", "told"),
    [
        ("http://example.com/a", None, "checked at the moment of connecting"),
        ("http://example.com:8080/a", False, "port 8080 is none of the web's"),
        ("http://8.8.8.8/a", True, "8.8.8.8 port 80 may be reached"),
        ("http://10.0.0.1/a", False, "10.0.0.1 port 80 must not be reached"),
        ("http://127.1/a", False, "127.0.0.1 port 80 must not"),
        ("http://0x7f000001/a", False, "127.0.0.1 port 80 must not"),
        ("http://2130706433/a", False, "127.0.0.1 port 80 must not"),
        ("http://[::ffff:10.0.0.1]/a", False, "must not be reached"),
        ("http://face.beef/a", None, "its host is a name"),
        ("ftp://example.com/a", False, "refused as invalid_url"),
        ("http://user:password@example.com/", False, "refused as invalid_url"),
    ],
)
def test_the_address_is_judged_without_a_request(uri: str, address: str, allowed: bool | None, told: str) -> None:
    found = look_up(uri, address)
    assert found.allowed is allowed
    assert told in found.address
