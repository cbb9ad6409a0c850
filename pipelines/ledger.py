"""The crawl ledger: what each reason means for a link, where links stand, and which are due."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from coca.contract import LINKS, Reason, State
from coca.dataset import Dataset
from coca.storage import Store
from pipelines.config import RecheckConfig
from pipelines.tables import open_table, read_data_files, table_files

_STATES = {
    Reason.NOT_FOUND: State.DEAD,
    Reason.OPTED_OUT: State.OPTED_OUT,
    Reason.TDM_RESERVED: State.OPTED_OUT,
    Reason.ROBOTS_DISALLOWED: State.OPTED_OUT,
    Reason.FORBIDDEN_ADDRESS: State.BLOCKED,
    Reason.BLOCKED_URL: State.BLOCKED,
    Reason.BLOCKED_IMAGE: State.BLOCKED,
    Reason.DNS_FAILURE: State.TRANSIENT,
    Reason.CONNECT_ERROR: State.TRANSIENT,
    Reason.TIMEOUT: State.TRANSIENT,
    Reason.TOO_SLOW: State.TRANSIENT,
    Reason.HOST_UNAVAILABLE: State.TRANSIENT,
    Reason.SERVER_ERROR: State.TRANSIENT,
    Reason.RATE_LIMITED: State.TRANSIENT,
    Reason.BODY_INCOMPLETE: State.TRANSIENT,
}
_FAILURES = [State.TRANSIENT.value, State.DEAD.value]
# What a server may ask for at most: its word is a stranger's number.
_LONGEST_ASKED_S = 366 * 86400.0

# What these refused is asked for wherever a pair passes today's rules.
TEXT_RULES = frozenset(
    {
        Reason.CAPTION_TOO_SHORT,
        Reason.CAPTION_TOO_LONG,
        Reason.CAPTION_REPEATS,
        Reason.CAPTION_TOO_FREQUENT,
        Reason.CAPTION_BLOCKED_WORD,
        Reason.LANGUAGE,
        Reason.BLOCKED_URL,
    }
)

# What a join reads of an event.
EVENTS = pa.schema(
    [
        LINKS.field(name)
        for name in (
            *("sample_id", "url", "caption", "state", "reason", "etag", "last_modified"),
            *("source_sha256", "refresh_id", "event_at", "next_check_at", "stored"),
        )
    ]
)


def state_of(reason: Reason | None) -> State:
    """Where a link stands after a verdict; ``None`` is an admitted pair."""
    return State.OK if reason is None else _STATES.get(reason, State.REJECTED)


def next_check(
    state: State, event_at: datetime, failures: int, recheck: RecheckConfig, retry_after_s: float | None
) -> datetime | None:
    """When a link is due again: only where its failure may pass, ever later, and not before the server asked.

    Args:
        failures: such events in a row before this one.
    """
    first_s = {State.TRANSIENT: recheck.transient_after_s, State.DEAD: recheck.dead_after_s}.get(state)
    if first_s is None:
        return None
    wait_s = min(first_s * 2.0 ** min(failures, 30), max(first_s, recheck.max_after_s))
    return event_at + timedelta(seconds=max(wait_s, min(retry_after_s or 0.0, _LONGEST_ASKED_S)))


@dataclass(frozen=True)
class Ledger:
    """The links table of one version of a dataset, read by buckets. Travels to Ray workers."""

    store: Store
    paths: dict[str, list[str]]
    """bucket -> its files."""

    @classmethod
    def of_files(cls, store: Store, files: Iterable[str]) -> "Ledger":
        """Of the files of the links table."""
        paths: dict[str, list[str]] = {}
        for path in sorted(files):
            paths.setdefault(path.split("/")[0].removeprefix("bucket="), []).append(path)
        return cls(store, paths)

    @classmethod
    def of_version(cls, dataset: Dataset) -> "Ledger":
        """As a published version sees it."""
        table = open_table(dataset.store, "links", dataset.record.links.delta_version)
        return cls.of_files(dataset.store, table_files(table))

    def read(self, buckets: Iterable[str]) -> pa.Table:
        """``EVENTS`` of some buckets."""
        paths = [path for bucket in buckets for path in self.paths.get(bucket, [])]
        return read_data_files(self.store, "links", paths, EVENTS.names)


def latest_events(events: pa.Table) -> pa.Table:
    """Of each ``sample_id`` the event with the latest ``event_at``, sorted by ``sample_id``.

    Adds ``failures``: how many failures that may pass the pair has had in a row up to that event. What contract 1 did
    not write is filled in: ``stored``, and when a dead link is due again (at once).
    """
    ordered = events.sort_by([("sample_id", "ascending"), ("event_at", "ascending")])
    stored = pc.coalesce(ordered["stored"], pc.equal(ordered["state"], State.OK.value))
    is_dead = pc.equal(ordered["state"], State.DEAD.value)
    checks = pc.coalesce(ordered["next_check_at"], pc.if_else(is_dead, ordered["event_at"], None))
    for name, column in (("stored", stored), ("next_check_at", checks)):
        ordered = ordered.set_column(ordered.schema.get_field_index(name), EVENTS.field(name), column)
    if ordered.num_rows == 0:
        return ordered.append_column("failures", pa.array([], pa.int32()))
    failed = pc.is_in(ordered["state"], value_set=pa.array(_FAILURES)).to_numpy()
    ids = ordered["sample_id"].combine_chunks()
    differs = pc.not_equal(ids.slice(1), ids.slice(0, len(ids) - 1)).to_numpy(zero_copy_only=False)
    places, is_first = np.arange(len(ids)), np.append(True, differs)
    # The last place before each row's run of failures: of another state, or of another pair.
    before = np.maximum.accumulate(np.where(~failed, places, np.where(is_first, places - 1, -1)))
    ends = np.flatnonzero(np.append(differs, True))
    failures = (ends - before[ends]).astype(np.int32)
    return ordered.take(pa.array(ends)).append_column("failures", pa.array(failures))


Reopened = dict[str, frozenset[Reason]]
"""Refresh id -> reasons of its events that looser settings have made void; "" for refreshes that are not in it."""


def due_mask(latest: pa.Table, now: datetime | pa.ChunkedArray, reopened: Reopened) -> pa.ChunkedArray:
    """Which of the latest events no longer stand: their next check has come, or their reason is reopened.

    Args:
        now: for all, or for each.
    """
    checks = latest["next_check_at"]
    now = pa.scalar(now, checks.type) if isinstance(now, datetime) else now
    due = pc.fill_null(pc.less_equal(checks, now), False)
    known = pa.array(list(reopened), pa.string())
    refreshes = pc.if_else(pc.is_in(latest["refresh_id"], value_set=known), latest["refresh_id"], "")
    void = [f"{name} {reason.value}" for name, reasons in reopened.items() for reason in reasons]
    stamps = pc.binary_join_element_wise(refreshes, latest["reason"], " ")
    again = pc.fill_null(pc.is_in(stamps, value_set=pa.array(void, pa.string())), False)
    return pc.or_(due, pc.and_(again, pc.invert(latest["stored"])))
