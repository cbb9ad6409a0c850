"""One shard of the links table held against its part of the ledger: which pairs are due, where the others stand."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from coca.contract import Reason, State
from coca.withdrawn import Withdrawn
from pipelines.caption_counts import too_frequent
from pipelines.config import RecheckConfig
from pipelines.funnel import count_reasons
from pipelines.intake import INTAKE, Intake
from pipelines.ledger import EVENTS, TEXT_RULES, Ledger, Reopened, due_mask, latest_events
from pipelines.staging import Staging

# One row per pair that is new, due or asked again.
DUE = pa.schema(
    [
        *INTAKE,
        # Rows of the links table that stand for it, where its verdict is open; `standing_rows` where it is stored and
        # counts already as what it is.
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("standing_rows", pa.int64(), nullable=False),
        pa.field("failures", pa.int32(), nullable=False),
        # Its bytes lie in samples already; those of another caption of its url.
        pa.field("stored", pa.bool_(), nullable=False),
        pa.field("url_stored", pa.bool_(), nullable=False),
        # Why it is not selected there.
        pa.field("standing_reason", pa.string()),
        # Of its latest event: the next one is later, whatever the clock says.
        pa.field("known_at", EVENTS.field("event_at").type),
        pa.field("etag", pa.string()),
        pa.field("last_modified", pa.string()),
        pa.field("source_sha256", pa.string()),
    ]
)

_REFUSED_UNASKED = TEXT_RULES | {Reason.INVALID_URL, Reason.EMPTY_CAPTION}


@dataclass(frozen=True)
class JoinSettings:
    """What every shard's join needs beside its rows."""

    now: datetime
    seed: int
    chunk_urls: int
    """Most urls of a file of due pairs."""
    rechecks_per_shard: int
    recheck: RecheckConfig
    reopened: Reopened = field(default_factory=dict)
    """Reasons of the ledger that looser settings have made void."""
    frequent_captions: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.uint64))
    withdrawn: Withdrawn | None = None
    imported_at: Sequence[datetime] = ()
    """Of an import, when each piece of its source was written. What failed is due where that was after its next check:
    the same shards again are nothing new. What an owner has opted out of is not taken from there."""


@dataclass(frozen=True)
class DueShard:
    """What is due in a shard: its files, and how the rows of the links table that are not due stand."""

    shard: int
    chunks: list[list[int]]
    """(urls to ask, rows of the links table) of each due file."""
    counts: dict[str, int]
    """Reason ("" for a selected sample) -> rows of the links table."""


def join_shard(
    shard: int, *, intake: Intake, ledger: Ledger, staging: Staging, settings: JoinSettings
) -> dict[str, Any]:
    """Write the due pairs of a shard to staging, once.

    Returns:
        ``DueShard`` as a dict.
    """
    summary_path = staging.due_summary_path(shard)
    if staging.dataset.exists(summary_path):
        return dict(json.loads(staging.dataset.read(summary_path)))
    latest = latest_events(ledger.read(intake.buckets(shard)))
    due, counts = find_due(intake.read_shard(shard), latest, settings)
    chunks = _write_chunks(staging, shard, due, settings)
    summary = vars(DueShard(shard, chunks, counts))
    staging.dataset.write(summary_path, json.dumps(summary).encode())
    return dict(summary)


def find_due(links: pa.Table, latest: pa.Table, settings: JoinSettings) -> tuple[pa.Table, dict[str, int]]:
    """The anti-join.

    Args:
        links: ``INTAKE`` of whole urls.
        latest: ``ledger.latest_events`` of the same buckets.

    Returns:
        ``DUE``, and the counts of :class:`DueShard`.
    """
    marked = _mark_withdrawn(_mark_frequent(links, settings.frequent_captions), settings.withdrawn)
    if settings.imported_at:
        marked = _mark_opted_out(marked, latest)
    known_ids = latest["sample_id"].combine_chunks()
    refused_before = pc.is_in(latest["reason"], value_set=pa.array(sorted(_REFUSED_UNASKED), pa.string()))
    pairs, repeated = _one_row_per_pair(marked, known_ids.filter(pc.invert(refused_before).combine_chunks()))
    place = pc.index_in(pairs["sample_id"], value_set=known_ids)
    known = pc.is_valid(place)
    events = latest.take(place.combine_chunks())
    # A text rule that is looser now opens a pair again only where the pair passes today's rules.
    due_by_event = pc.and_(due_mask(events, _now(pairs, settings), settings.reopened), pc.is_null(pairs["reason"]))
    chosen = _rechecks(latest, settings)
    asked_again = pc.is_in(pairs["sample_id"], value_set=chosen["sample_id"].combine_chunks())
    due = pc.or_(pc.or_(pc.invert(known), pc.fill_null(due_by_event, False)), asked_again)
    # What is stored stays what it is, whatever an answer says now.
    stands = pc.or_(pc.invert(due), pc.fill_null(events["stored"], False))
    counts = count_reasons(_standing_reasons(events.filter(stands), settings.withdrawn), pairs["rows"].filter(stands))
    if repeated:
        counts[Reason.DUPLICATE_PAIR.value] = counts.get(Reason.DUPLICATE_PAIR.value, 0) + repeated
    from_table = _due_rows(pairs.filter(due), events.filter(due))
    unseen = pc.invert(pc.is_in(chosen["sample_id"], value_set=pairs["sample_id"].combine_chunks()))
    rows = pa.concat_tables([from_table, _recheck_rows(chosen.filter(unseen))])
    urls = latest["url"].filter(latest["stored"]).combine_chunks()
    url_stored = pc.is_in(rows["url"], value_set=urls)
    return rows.set_column(DUE.get_field_index("url_stored"), DUE.field("url_stored"), url_stored), counts


def _now(pairs: pa.Table, settings: JoinSettings) -> datetime | pa.ChunkedArray:
    """When the source says what it says of each pair."""
    if not settings.imported_at:
        return settings.now
    return pa.chunked_array([pa.array(settings.imported_at, EVENTS.field("event_at").type)]).take(pairs["piece"])


def _mark_frequent(links: pa.Table, frequent: np.ndarray) -> pa.Table:
    return _mark(links, pa.array(too_frequent(links["caption"], frequent)), Reason.CAPTION_TOO_FREQUENT)


def _mark_withdrawn(links: pa.Table, withdrawn: Withdrawn | None) -> pa.Table:
    """A withdrawn url is not asked under any caption, nor a pair that was withdrawn by its id."""
    if withdrawn is None:
        return links
    return _mark(links, pa.array(withdrawn.refuses(links["url"], links["sample_id"])), Reason.WITHDRAWN)


def _mark_opted_out(links: pa.Table, latest: pa.Table) -> pa.Table:
    opted_out = latest.filter(pc.equal(latest["state"], State.OPTED_OUT.value))
    return _mark(links, pc.is_in(links["url"], value_set=opted_out["url"].combine_chunks()), Reason.OPTED_OUT)


def _mark(links: pa.Table, chosen: pa.Array, reason: Reason) -> pa.Table:
    chosen = pc.and_(pc.is_null(links["reason"]), chosen)
    reasons = pc.if_else(chosen, reason.value, links["reason"])
    return links.set_column(links.schema.get_field_index("reason"), "reason", reasons)


def _one_row_per_pair(links: pa.Table, asked_ids: pa.Array) -> tuple[pa.Table, int]:
    """The first row of each pair with its number of ``rows``, and how many rows repeat a pair.

    Rows refused before any request may share a key, and each counts under its reason; but for pairs that the ledger
    has asked for (``asked_ids``), under looser rules then.
    """
    if links.num_rows == 0:
        return links.append_column("rows", pa.array([], pa.int64())), 0
    order = pa.array(np.arange(links.num_rows))
    groups = pa.table({"key": links["sample_id"], "place": order}).group_by("key", use_threads=False)
    counted = groups.aggregate([("place", "min"), ("place", "count")])
    pairs = links.take(counted["place_min"].combine_chunks())
    once = pc.or_(pc.is_null(pairs["reason"]), pc.is_in(pairs["sample_id"], value_set=asked_ids))
    extra = pc.subtract(counted["place_count"], 1)
    repeated = pc.sum(pc.if_else(once, extra, 0)).as_py()
    return pairs.append_column("rows", pc.if_else(once, 1, counted["place_count"])), repeated


def _rechecks(latest: pa.Table, settings: JoinSettings) -> pa.Table:
    """Stored pairs whose last answer is the oldest, or whose failure is due: ``rechecks_per_shard`` urls at most."""
    if settings.rechecks_per_shard == 0:
        return latest.slice(0, 0)
    before = settings.now - timedelta(seconds=settings.recheck.stored_after_s)
    old = pc.less_equal(latest["event_at"], pa.scalar(before, latest.schema.field("event_at").type))
    answered = pc.is_in(latest["state"], value_set=pa.array([State.OK.value, State.CHANGED.value]))
    failed = due_mask(latest, settings.now, {})
    rows = latest.filter(pc.and_(latest["stored"], pc.or_(pc.and_(answered, old), failed)))
    if settings.withdrawn is not None:
        rows = rows.filter(pa.array(~settings.withdrawn.mask(rows["sample_id"])))
    oldest = rows.group_by("url").aggregate([("event_at", "min")])
    oldest = oldest.sort_by([("event_at_min", "ascending"), ("url", "ascending")])
    urls = oldest["url"].slice(0, settings.rechecks_per_shard).combine_chunks()
    return rows.filter(pc.is_in(rows["url"], value_set=urls))


def _standing_reasons(events: pa.Table, withdrawn: Withdrawn | None) -> pa.ChunkedArray:
    """Why pairs with a standing verdict are no selected samples; null where they are."""
    reasons = events["reason"]
    if withdrawn is None:
        return reasons
    gone = pc.and_(pa.array(withdrawn.mask(events["sample_id"])), pc.not_equal(events["state"], State.OPTED_OUT.value))
    return pc.if_else(gone, Reason.WITHDRAWN.value, reasons)


def _due_rows(pairs: pa.Table, events: pa.Table) -> pa.Table:
    """Pairs of the links table; ``events`` are theirs, null where they are new."""
    stored = pc.fill_null(events["stored"], False)
    known = {
        "rows": pc.if_else(stored, 0, pairs["rows"]),
        "standing_rows": pc.if_else(stored, pairs["rows"], 0),
        "failures": pc.fill_null(events["failures"], 0),
        "stored": stored,
        "url_stored": stored,
        "standing_reason": pc.if_else(stored, events["reason"], None),
        "known_at": events["event_at"],
        **{name: pc.if_else(stored, events[name], None) for name in ("etag", "last_modified", "source_sha256")},
    }
    columns = {name: known.get(name, pairs[name] if name in pairs.column_names else None) for name in DUE.names}
    # What is stored has been judged when it was admitted.
    columns["reason"] = pc.if_else(stored, None, pairs["reason"])
    return pa.table(columns).cast(DUE)


def _recheck_rows(chosen: pa.Table) -> pa.Table:
    """Stored pairs that are not in the links table."""
    count = chosen.num_rows
    given = {
        "reason": pa.nulls(count, pa.string()),
        **{name: pa.array(np.zeros(count, dtype=np.int64)) for name in ("rows", "standing_rows")},
        "url_stored": pa.array(np.ones(count, dtype=bool)),
        "standing_reason": chosen["reason"],
        "known_at": chosen["event_at"],
    }
    columns = {}
    for column in DUE:
        known = given.get(column.name)
        if known is None and column.name in chosen.column_names:
            known = chosen[column.name]
        columns[column.name] = pa.nulls(count, column.type) if known is None else known
    return pa.table(columns).cast(DUE)


def _write_chunks(staging: Staging, shard: int, due: pa.Table, settings: JoinSettings) -> list[list[int]]:
    """Due rows in a shuffled order of urls, the pairs of a url together, cut into files of whole urls."""
    if due.num_rows == 0:
        return []
    due, urls = shuffle_urls(due, settings.seed)
    count = math.ceil((int(urls[-1]) + 1) / settings.chunk_urls)
    starts = np.searchsorted(urls, np.arange(count) * settings.chunk_urls)
    ends = [*starts[1:], due.num_rows]
    chunks = []
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        chunk = due.slice(start, end - start)
        staging.write_table(staging.due_path(shard, number), chunk)
        asked = chunk["url"].filter(pc.is_null(chunk["reason"]))
        chunks.append([pc.count_distinct(asked).as_py(), pc.sum(chunk["rows"]).as_py()])
    return chunks


def shuffle_urls(rows: pa.Table, seed: int) -> tuple[pa.Table, np.ndarray]:
    """Rows with their urls in an order that only the seed decides, and the number of each row's url in it."""
    codes = rows["url"].combine_chunks().dictionary_encode()
    # Sorted first: codes follow the order of appearance, which is that of the links table.
    names = codes.dictionary.take(pc.array_sort_indices(codes.dictionary))
    rank = np.empty(len(names), dtype=np.int64)
    rank[np.random.Generator(np.random.PCG64(seed)).permutation(len(names))] = np.arange(len(names))
    urls = rank[pc.index_in(rows["url"].combine_chunks(), value_set=names).to_numpy()]
    ids = pc.array_sort_indices(rows["sample_id"].combine_chunks()).to_numpy()
    by_id = np.empty(rows.num_rows, dtype=np.int64)
    by_id[ids] = np.arange(rows.num_rows)
    order = np.lexsort((by_id, urls))
    return rows.take(pa.array(order)), urls[order]
