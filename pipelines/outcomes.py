"""What a part leaves behind: one row per pair with its verdict, its keys for selection and its tokens, no bytes."""

from collections import Counter
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pyarrow.compute as pc

from coca.contract import ANNOTATIONS, LINKS, SAMPLES, Reason, State
from pipelines.funnel import count_reasons
from pipelines.ledger import state_of

_TIME = LINKS.field("event_at").type
# What selection and people ask of a stored picture.
IMAGE_KEYS = ("format", "width", "height", "original_width", "original_height", "phash")

OUTCOMES = pa.schema(
    [
        *(LINKS.field(name) for name in ("sample_id", "url", "caption", "state", "reason", "status", "attempts")),
        *(LINKS.field(name) for name in ("etag", "last_modified", "source_sha256", "event_at", "next_check_at")),
        LINKS.field("stored"),
        # Its bytes came in this refresh; `stored` is also true of what lay there before.
        pa.field("admitted", pa.bool_(), nullable=False),
        # When the bytes came; for an import, when they had come.
        SAMPLES.field("fetched_at"),
        # Rows of the links table that stand for the pair, as in `join.DUE`.
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("standing_rows", pa.int64(), nullable=False),
        pa.field("standing_reason", pa.string()),
        # Bytes of the url are stored, be it under another caption.
        pa.field("url_stored", pa.bool_(), nullable=False),
        # What the url cost, on its first pair only: sums over pairs count each url once.
        pa.field("requests", pa.int32(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        *(SAMPLES.field(name).with_nullable(True) for name in IMAGE_KEYS),
        ANNOTATIONS.field("language"),
        pa.field("tokens", pa.list_(pa.int32())),
    ]
)


def admitted_rows(outcomes: pa.Table) -> pa.Table:
    """The rows of a part's samples file, in its order."""
    return outcomes.filter(outcomes["admitted"]).sort_by("sample_id")


def refused_outcomes(refused: pa.Table) -> pa.Table:
    """``OUTCOMES`` of pairs (``plan.PLAN``) that are refused before any request."""
    count = refused.num_rows
    states = [state_of(Reason(reason)).value for reason in refused["reason"].to_pylist()]
    at = event_times(datetime.now(UTC), refused["known_at"])
    carried = ("sample_id", "url", "caption", "reason", "language", "rows", "standing_rows", "standing_reason")
    known = {
        **{name: refused[name] for name in (*carried, "url_stored")},
        "state": pa.array(states, pa.string()),
        **dict.fromkeys(("event_at", "fetched_at"), at),
        **{name: pa.array([0] * count, pa.int64()) for name in ("attempts", "requests", "bytes")},
        **{name: pa.array([False] * count) for name in ("stored", "admitted")},
    }
    columns = {f.name: known.get(f.name, pa.nulls(count, f.type)) for f in OUTCOMES}
    return pa.table(columns).cast(OUTCOMES)


def event_times(now: datetime, known_at: pa.ChunkedArray) -> pa.ChunkedArray:
    """``now``, or just after the latest event of each pair where a clock has gone back."""
    kind = LINKS.field("event_at").type
    this = pa.scalar(now, kind)
    after = pc.fill_null(pc.add(known_at.cast(kind), pa.scalar(timedelta(microseconds=1))), this)
    return pc.if_else(pc.greater(after, this), after, this)


def verdict_counts(outcomes: pa.Table) -> dict[str, int]:
    """Reason ("" for what is stored and not passed over) -> rows of the links table.

    A stored pair counts as what it is since before; one that has opted out leaves that.
    """
    opted_out = pc.equal(outcomes["state"], State.OPTED_OUT.value)
    moved = pc.if_else(opted_out, outcomes["standing_rows"], 0)
    counts = Counter(count_reasons(outcomes["reason"], pc.add(outcomes["rows"], moved)))
    counts.subtract(count_reasons(outcomes["standing_reason"], moved))
    return {reason: rows for reason, rows in counts.items() if rows}
