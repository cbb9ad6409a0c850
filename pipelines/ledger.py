"""The crawl ledger: what each reason means for a link, where links stand, and which are due."""

from datetime import datetime, timedelta

import pyarrow as pa
import pyarrow.compute as pc

from coca.contract import Reason, State

_STATES = {
    Reason.NOT_FOUND: State.DEAD,
    Reason.OPTED_OUT: State.OPTED_OUT,
    Reason.FORBIDDEN_ADDRESS: State.BLOCKED,
    Reason.DNS_FAILURE: State.TRANSIENT,
    Reason.CONNECT_ERROR: State.TRANSIENT,
    Reason.TIMEOUT: State.TRANSIENT,
    Reason.SERVER_ERROR: State.TRANSIENT,
    Reason.RATE_LIMITED: State.TRANSIENT,
    Reason.BODY_INCOMPLETE: State.TRANSIENT,
}


def state_of(reason: Reason | None) -> State:
    """Where a link stands after a verdict; ``None`` is an admitted pair."""
    return State.OK if reason is None else _STATES.get(reason, State.REJECTED)


def next_check(
    state: State, event_at: datetime, recheck_after_s: float, retry_after_s: float | None
) -> datetime | None:
    """When a link is due again: only where its failure may pass, and not before the server asked."""
    if state is not State.TRANSIENT:
        return None
    return event_at + timedelta(seconds=max(recheck_after_s, retry_after_s or 0.0))


def latest_events(events: pa.Table) -> pa.Table:
    """Of each ``sample_id`` the event with the latest ``event_at``; the rows come sorted by ``sample_id``."""
    ordered = events.sort_by([("sample_id", "ascending"), ("event_at", "ascending")])
    if ordered.num_rows == 0:
        return ordered
    ids = ordered["sample_id"].combine_chunks()
    is_last = pc.not_equal(ids.slice(1), ids.slice(0, len(ids) - 1)).to_pylist()
    return ordered.filter(pa.array([*is_last, True]))


def standing_mask(
    sample_ids: pa.ChunkedArray, latest: pa.Table, now: datetime, *, blocked_stand: bool = True
) -> pa.ChunkedArray:
    """Which pairs have a verdict that stands: a final one, or one whose next check lies ahead.

    ``blocked_stand=False`` where more addresses are allowed than before: pairs blocked for theirs are due.
    """
    waits = pc.or_kleene(
        pc.not_equal(latest["state"], State.TRANSIENT.value),
        pc.greater(latest["next_check_at"], pa.scalar(now, latest.schema.field("next_check_at").type)),
    )
    if not blocked_stand:
        waits = pc.and_(waits, pc.not_equal(latest["state"], State.BLOCKED.value))
    standing = latest["sample_id"].filter(waits)
    return pc.is_in(sample_ids, value_set=standing.combine_chunks())
