"""The plan of a refresh: which pairs are due, cut into parts and batches that no execution order can change."""

import hashlib
import io
import json

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from coca.storage import Store
from pipelines.config import PublishConfig, RefreshConfig
from pipelines.judge import JUDGED

# `part` is null for pairs that are refused before any request.
PLAN = pa.schema([*JUDGED, pa.field("batch", pa.int32(), nullable=False), pa.field("part", pa.int32())])


def refresh_id(judged: pa.Table, config: RefreshConfig, tokenizer_fingerprint: str, parent: int | None) -> str:
    """The name of a refresh: the same links, settings and parent version give the same one, in any row order.

    A refresh that was killed and is started again finds by it what it had done.
    """
    settings = config.model_dump(mode="json", exclude={"to": True, "tokenizer": True, "links": True})
    # How many fetch at once changes nothing that is stored: a retry may use fewer workers.
    for name in ("workers", "concurrency_per_worker", "max_bytes_in_flight", "decode_threads"):
        del settings["fetch"][name]
    digest = hashlib.blake2b(digest_size=8)
    digest.update(json.dumps([settings, tokenizer_fingerprint, parent], sort_keys=True).encode())
    ids = judged["sample_id"].combine_chunks()
    for key in ids.take(pc.array_sort_indices(ids)).to_pylist():
        digest.update(bytes.fromhex(key))
    return digest.hexdigest()


def make_plan(due: pa.Table, config: PublishConfig) -> pa.Table:
    """Cut due pairs (``JUDGED``, one row per key) into parts.

    The urls stand in the order of their lowest ``sample_id``, the pairs of one url together, and parts and batches
    are consecutive stretches of that. So earlier batches hold the lower ids, and "of equal pictures the lowest id
    wins" can be decided batch by batch.
    """
    refused = due.filter(pc.is_valid(due["reason"])).sort_by("sample_id")
    fetched = due.filter(pc.is_null(due["reason"])).sort_by("sample_id")
    # Codes are handed out in order of first appearance: the rank of the url by its lowest id.
    rank = fetched["url"].combine_chunks().dictionary_encode().indices
    fetched = fetched.append_column("rank", rank).sort_by([("rank", "ascending"), ("sample_id", "ascending")])
    first_place = _first_places(fetched["rank"].combine_chunks())
    part = pc.divide(first_place, config.links_per_part).cast(pa.int32())
    batch = pc.divide(part, max(1, config.links_per_batch // config.links_per_part))
    fetched = fetched.drop_columns("rank").append_column("batch", batch).append_column("part", part)
    nothing = pa.nulls(refused.num_rows, pa.int32())
    refused = refused.append_column("batch", pc.fill_null(nothing, 0)).append_column("part", nothing)
    return pa.concat_tables([fetched.cast(PLAN), refused.cast(PLAN)])


def _first_places(rank: pa.Array) -> pa.Array:
    """For each row the place of the first row with the same rank; ``rank`` ascends from 0 without gaps."""
    counts = pc.value_counts(rank).field("counts")
    starts = pc.subtract(pc.cumulative_sum(counts), counts)
    return starts.take(rank)


def load_or_write_plan(store: Store, path: str, plan: pa.Table) -> pa.Table:
    """The plan staged at ``path``; the given one is staged where there is none yet.

    A restart goes by the first plan: what is due changes with the clock.
    """
    buffer = io.BytesIO()
    pq.write_table(plan, buffer, compression="zstd")
    if store.write_once(path, buffer.getvalue()):
        return plan
    return pq.read_table(io.BytesIO(store.read(path)), schema=PLAN)
