"""What a part leaves behind: one row per pair with its verdict, its keys for selection and its tokens, no bytes."""

from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc

from coca.contract import ANNOTATIONS, LINKS, SAMPLES, Reason
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
        # Rows of the links table that stand for the pair.
        pa.field("rows", pa.int64(), nullable=False),
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
    count, now = refused.num_rows, datetime.now(UTC)
    states = [state_of(Reason(reason)).value for reason in refused["reason"].to_pylist()]
    known = {
        **{name: refused[name] for name in ("sample_id", "url", "caption", "reason", "language", "rows")},
        "state": pa.array(states, pa.string()),
        "event_at": pa.array([now] * count, _TIME),
        **{name: pa.array([0] * count, pa.int64()) for name in ("attempts", "requests", "bytes")},
        **{name: pa.array([False] * count) for name in ("stored", "admitted")},
    }
    columns = {f.name: known.get(f.name, pa.nulls(count, f.type)) for f in OUTCOMES}
    return pa.table(columns).cast(OUTCOMES)


def verdict_counts(outcomes: pa.Table) -> dict[str, int]:
    """Reason ("" for what is stored and not passed over) -> rows of the links table."""
    grouped = pa.table({"reason": pc.fill_null(outcomes["reason"], ""), "rows": outcomes["rows"]})
    counted = grouped.group_by("reason").aggregate([("rows", "sum")])
    return {row["reason"]: row["rows_sum"] for row in counted.to_pylist() if row["rows_sum"]}
