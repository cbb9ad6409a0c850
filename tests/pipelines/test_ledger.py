"""What reasons mean for a link, which event counts, and what is due."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pytest

from coca.contract import LINKS, Reason, State
from pipelines.ledger import latest_events, next_check, standing_mask, state_of

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def events(*rows: tuple[str, State, int, int | None]) -> pa.Table:
    """(sample_id, state, minutes after NOW of the event, and of the next check)."""

    def at(minutes: int | None) -> Any:
        return None if minutes is None else NOW + timedelta(minutes=minutes)

    schema = pa.schema([LINKS.field(name) for name in ("sample_id", "state", "event_at", "next_check_at")])
    columns = [[key, state.value, at(event), at(check)] for key, state, event, check in rows]
    return pa.Table.from_pylist([dict(zip(schema.names, row, strict=True)) for row in columns], schema=schema)


def test_every_reason_has_its_state() -> None:
    states = {state: {reason for reason in Reason if state_of(reason) is state} for state in State}
    assert state_of(None) is State.OK
    assert states[State.OK] == set()
    assert states[State.DEAD] == {Reason.NOT_FOUND}
    assert states[State.OPTED_OUT] == {Reason.OPTED_OUT}
    assert states[State.BLOCKED] == {Reason.FORBIDDEN_ADDRESS}
    assert states[State.TRANSIENT] == {
        Reason.DNS_FAILURE,
        Reason.CONNECT_ERROR,
        Reason.TIMEOUT,
        Reason.SERVER_ERROR,
        Reason.RATE_LIMITED,
        Reason.BODY_INCOMPLETE,
    }
    assert len(states[State.REJECTED]) == len(Reason) - 9


def test_only_what_may_pass_is_checked_again_and_not_before_the_server_asked() -> None:
    assert next_check(State.DEAD, NOW, 60, None) is None
    assert next_check(State.TRANSIENT, NOW, 60, None) == NOW + timedelta(seconds=60)
    assert next_check(State.TRANSIENT, NOW, 60, 30) == NOW + timedelta(seconds=60)
    assert next_check(State.TRANSIENT, NOW, 60, 90) == NOW + timedelta(seconds=90)


def test_the_latest_event_counts() -> None:
    table = events(
        ("b", State.OK, 5, None), ("a", State.TRANSIENT, 1, 9), ("a", State.OK, 2, None), ("b", State.DEAD, 4, 0)
    )
    latest = latest_events(table).to_pylist()
    assert [(row["sample_id"], row["state"]) for row in latest] == [("a", "ok"), ("b", "ok")]
    assert latest_events(table.slice(0, 0)).num_rows == 0


@pytest.mark.parametrize(
    ("state", "check", "stands"),
    [
        (State.OK, None, True),
        (State.DEAD, None, True),
        (State.REJECTED, None, True),
        (State.OPTED_OUT, None, True),
        (State.BLOCKED, None, True),
        (State.TRANSIENT, 1, True),
        (State.TRANSIENT, 0, False),
        (State.TRANSIENT, -1, False),
        (State.TRANSIENT, None, False),
    ],
)
def test_what_stands_and_what_is_due(state: State, check: int | None, stands: bool) -> None:
    mask = standing_mask(pa.chunked_array([["new", "old"]]), events(("old", state, -9, check)), NOW)
    assert mask.to_pylist() == [False, stands]
