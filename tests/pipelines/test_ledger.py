"""What reasons mean for a link, which event counts, and what is due."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from coca.contract import LINKS, Reason, State
from coca.storage import Store
from pipelines.config import RecheckConfig
from pipelines.ledger import EVENTS, Ledger, due_mask, latest_events, next_check, state_of
from pipelines.publish import write_events

NOW = datetime(2026, 1, 1, tzinfo=UTC)
RECHECK = RecheckConfig(transient_after_s=60, dead_after_s=600, max_after_s=10_000)


def events(*rows: tuple[str, State, int, int | None]) -> pa.Table:
    """(sample_id, state, minutes after NOW of the event, and of the next check)."""

    def at(minutes: int | None) -> Any:
        return None if minutes is None else NOW + timedelta(minutes=minutes)

    records = [
        {
            "sample_id": key,
            "url": "",
            "caption": "",
            "state": state.value,
            "event_at": at(event),
            "next_check_at": at(check),
        }
        for key, state, event, check in rows
    ]
    return pa.Table.from_pylist(records, schema=EVENTS)


def test_every_reason_has_its_state() -> None:
    states = {state: {reason for reason in Reason if state_of(reason) is state} for state in State}
    assert state_of(None) is State.OK
    assert states[State.OK] == states[State.CHANGED] == set()
    assert states[State.DEAD] == {Reason.NOT_FOUND}
    assert states[State.OPTED_OUT] == {Reason.OPTED_OUT, Reason.TDM_RESERVED, Reason.ROBOTS_DISALLOWED}
    assert states[State.BLOCKED] == {Reason.FORBIDDEN_ADDRESS, Reason.BLOCKED_URL, Reason.BLOCKED_IMAGE}
    assert states[State.TRANSIENT] == {
        Reason.DNS_FAILURE,
        Reason.CONNECT_ERROR,
        Reason.TIMEOUT,
        Reason.TOO_SLOW,
        Reason.HOST_UNAVAILABLE,
        Reason.SERVER_ERROR,
        Reason.RATE_LIMITED,
        Reason.BODY_INCOMPLETE,
    }
    assert len(states[State.REJECTED]) == len(Reason) - 15


@pytest.mark.parametrize(
    ("state", "failures", "retry_after_s", "wait_s"),
    [
        (State.OK, 0, None, None),
        (State.REJECTED, 3, 90, None),
        (State.OPTED_OUT, 0, None, None),
        (State.TRANSIENT, 0, None, 60),
        (State.TRANSIENT, 0, 30, 60),
        (State.TRANSIENT, 0, 90, 90),
        (State.TRANSIENT, 1, None, 120),
        (State.TRANSIENT, 4, None, 960),
        (State.TRANSIENT, 500, None, 10_000),
        (State.TRANSIENT, 500, 20_000, 20_000),
        (State.TRANSIENT, 0, 1e18, 366 * 86400),
        (State.DEAD, 0, None, 600),
        (State.DEAD, 2, None, 2400),
    ],
)
def test_a_failure_that_may_pass_is_checked_ever_later(
    state: State, failures: int, retry_after_s: float | None, wait_s: float | None
) -> None:
    expected = None if wait_s is None else NOW + timedelta(seconds=wait_s)
    assert next_check(state, NOW, failures, RECHECK, retry_after_s) == expected


def test_the_longest_wait_never_shortens_the_first() -> None:
    recheck = RecheckConfig(dead_after_s=500, max_after_s=1)
    assert next_check(State.DEAD, NOW, 3, recheck, None) == NOW + timedelta(seconds=500)


def test_the_latest_event_counts_and_failures_in_a_row_are_counted() -> None:
    table = events(
        ("b", State.OK, 5, None),
        ("a", State.TRANSIENT, 1, 9),
        ("a", State.TRANSIENT, 3, 9),
        ("a", State.OK, 4, None),
        ("b", State.DEAD, 4, 0),
        ("c", State.TRANSIENT, 4, 5),
        ("d", State.TRANSIENT, 1, 2),
        ("d", State.OK, 2, None),
        ("d", State.DEAD, 3, 4),
        ("d", State.TRANSIENT, 5, 6),
    )
    latest = latest_events(table).to_pylist()
    assert [(row["sample_id"], row["state"], row["failures"]) for row in latest] == [
        ("a", "ok", 0),
        ("b", "ok", 0),
        ("c", "transient", 1),
        ("d", "transient", 2),
    ]
    assert latest_events(table.slice(0, 0)).num_rows == 0
    assert latest_events(table.slice(0, 0)).schema.names == latest_events(table).schema.names


def test_events_of_contract_1_are_stored_where_they_are_ok() -> None:
    latest = latest_events(events(("a", State.OK, 0, None), ("b", State.DEAD, 0, 1)))
    assert latest["stored"].to_pylist() == [True, False]


@pytest.mark.parametrize(
    ("state", "check", "due"),
    [
        (State.OK, None, False),
        (State.DEAD, None, True),  # as contract 1 left them
        (State.TRANSIENT, 1, False),
        (State.TRANSIENT, 0, True),
        (State.TRANSIENT, -1, True),
        (State.DEAD, -1, True),
        (State.OPTED_OUT, None, False),
    ],
)
def test_what_is_due(state: State, check: int | None, due: bool) -> None:
    assert due_mask(latest_events(events(("a", state, -5, check))), NOW, {}).to_pylist() == [due]


def test_reasons_that_looser_settings_made_void_are_due_unless_the_pair_is_stored() -> None:
    latest = latest_events(events(*((key, State.REJECTED, 0, None) for key in "abcde")))
    small, long = Reason.IMAGE_TOO_SMALL.value, Reason.ASPECT_RATIO.value
    columns = {
        "reason": pa.array([small, long, small, small, small], pa.string()),
        "stored": pa.array([False, False, True, False, False]),
        "refresh_id": pa.array(["first", "first", "first", "second", "forgotten"]),
    }
    for name, column in columns.items():
        latest = latest.set_column(latest.schema.get_field_index(name), name, column)
    void = frozenset({Reason.IMAGE_TOO_SMALL})
    reopened = {"first": void, "second": frozenset[Reason](), "": void}
    assert due_mask(latest, NOW, reopened).to_pylist() == [True, False, False, False, True]
    assert not any(due_mask(latest, NOW, {}).to_pylist())


def test_a_ledger_reads_the_buckets_that_are_asked(tmp_path: Path) -> None:
    store = Store(tmp_path)
    rows = [
        {
            "sample_id": f"{n:032x}",
            "url": f"http://a/{n}",
            "caption": "c",
            "state": "ok",
            "attempts": 1,
            "event_at": NOW,
        }
        for n in range(50)
    ]
    files = write_events(store, pa.Table.from_pylist(rows, schema=LINKS), "refresh", "refresh-b0")
    ledger = Ledger.of_files(store, [file.path for file in files])
    some = sorted(ledger.paths)[:3]
    assert ledger.read(some).num_rows == sum(file.rows for file in files if file.bucket in some)
    assert ledger.read(sorted(ledger.paths)).num_rows == 50
    assert ledger.read(["zz"]).schema.names == EVENTS.names
