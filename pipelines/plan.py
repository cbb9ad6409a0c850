"""The plan of a refresh: which pairs are due, cut into batches and parts that no execution order can change."""

import hashlib
import heapq
import io
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from pipelines.config import PublishConfig, RefreshConfig
from pipelines.domains import registered_domain
from pipelines.intake import Intake
from pipelines.join import DUE, JoinSettings, join_shard, shuffle_urls
from pipelines.ledger import Ledger
from pipelines.list_digests import digest_lists
from pipelines.staging import Staging
from pipelines.tasks import StartRay, run_tasks

# `leased`: other parts that are fetched at the same time may hold links of the url's registered domain.
PLAN = pa.schema([*DUE, pa.field("leased", pa.bool_(), nullable=False)])

# A domain with more links than this share of a part is dealt to several parts.
_LARGEST_SHARE = 0.5
# A domain with so few links of a batch is not leased, though the next batches, which overlap in time, may have some as
# well: of the links of a batch a worker has one in thousands under way.
_TOO_FEW_TO_LEASE = 2


class PlannedBatch(BaseModel):
    """A stretch of due files."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: list[str]
    """Tables of due pairs, relative to the dataset."""
    urls: int
    """To ask: where a budget cuts, fewer than the files hold."""
    rows: int
    """Rows of the links table that stand for the pairs of these files."""


class Plan(BaseModel):
    """Written once: a restart goes by the first plan, for what is due changes with the clock."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batches: list[PlannedBatch]
    links: int
    """Rows of the links table."""
    standing: dict[str, int]
    """Reason ("" for a selected sample) -> rows whose verdict stands."""
    waiting: int
    """Rows in no batch: left for a later refresh by the budget."""


def refresh_id(
    intake: Intake, config: RefreshConfig, tokenizer_fingerprint: str, parent: int | None, pieces: str = ""
) -> str:
    """The name of a refresh: the same links, settings and parent version give the same one, in any row order.

    A refresh that was killed and is started again finds by it what it had done.
    """
    settings = config.model_dump(mode="json", exclude={"to": True, "tokenizer": True, "links": {"uri"}})
    # How many fetch at once changes nothing that is stored: a retry may use fewer workers.
    for name in ("workers", "concurrency_per_worker", "max_bytes_in_flight", "decode_processes"):
        settings["fetch"].pop(name, None)
    del settings["publish"]["lease_s"]
    settings["lists"] = digest_lists(config)
    known = [intake.content, intake.rows, intake.shards, settings, tokenizer_fingerprint, parent, pieces]
    return hashlib.blake2b(json.dumps(known, sort_keys=True).encode(), digest_size=8).hexdigest()


def load_plan(staging: Staging) -> Plan | None:
    if not staging.dataset.exists(staging.plan_path):
        return None
    return Plan.model_validate_json(staging.dataset.read(staging.plan_path))


def make_plan(
    staging: Staging,
    intake: Intake,
    ledger: Ledger,
    settings: JoinSettings,
    max_links: int | None,
    *,
    start_ray: StartRay | None = None,
) -> Plan:
    """Join every shard with the ledger, and put what is due into batches of whole due files."""
    task = partial(join_shard, intake=intake, ledger=ledger, staging=staging, settings=settings)
    shards = run_tasks(task, list(range(intake.shards)), start_ray=start_ray)
    standing: dict[str, int] = {}
    for shard in shards:
        for reason, rows in shard["counts"].items():
            standing[reason] = standing.get(reason, 0) + rows
    files = [
        DueFile(staging.due_path(shard["shard"], number), urls, rows)
        for shard in shards
        for number, (urls, rows) in enumerate(shard["chunks"])
    ]
    batches, waiting = pack(files, settings.chunk_urls, math.inf if max_links is None else max_links)
    due = sum(file.rows for file in files)
    assert sum(standing.values()) + due == intake.rows, "a link was lost or counted twice"
    return Plan(batches=batches, links=intake.rows, standing=standing, waiting=waiting)


def write_plan(staging: Staging, plan: Plan) -> Plan:
    """The plan that is staged: this one, unless another came first."""
    if staging.dataset.write_once(staging.plan_path, plan.model_dump_json().encode()):
        return plan
    staged = load_plan(staging)
    assert staged is not None
    return staged


class DueFile(NamedTuple):
    """Some due pairs."""

    path: str
    urls: int
    """To ask."""
    rows: int
    """Of the links table."""


def pack(files: Iterable[DueFile], batch_urls: int, max_links: float) -> tuple[list[PlannedBatch], int]:
    """Consecutive files in batches of about ``batch_urls``, up to the budget; and the rows beyond it."""
    batches: list[PlannedBatch] = []
    names: list[str] = []
    urls = rows = waiting = 0
    left = max_links

    def close() -> None:
        nonlocal names, urls, rows
        if names:
            batches.append(PlannedBatch(files=names, urls=urls, rows=rows))
        names, urls, rows = [], 0, 0

    for file in files:
        if left <= 0 and file.urls:
            waiting += file.rows
            continue
        if max(urls + file.urls, rows + file.rows) > batch_urls:
            close()
        taken = int(min(file.urls, left))
        names, urls, rows, left = [*names, file.path], urls + taken, rows + file.rows, left - taken
    close()
    return batches, waiting


@dataclass(frozen=True)
class BatchParts:
    """A batch cut into parts: row groups of one file, pairs refused before any request in a last one."""

    batch: int
    urls: list[int]
    """Urls of each part."""
    refused: int
    """Pairs refused before any request."""
    waiting: int
    """Rows of the links table beyond the budget."""


Deal = Callable[[pa.Table, int, PublishConfig], tuple[list[pa.Table], pa.Table, int]]


def cut_batch(
    staging: Staging, number: int, batch: PlannedBatch, config: PublishConfig, deal: "Deal | None" = None
) -> BatchParts:
    """Write the parts of a batch to staging, once.

    Args:
        deal: how pairs come into parts, ``deal_parts`` by default.
    """
    path = staging.batch_path(number)
    if not staging.dataset.exists(path):
        due = pa.concat_tables([staging.read_table(file, DUE) for file in batch.files])
        parts, refused, waiting = (deal or deal_parts)(due, batch.urls, config)
        _write_parts(staging, path, parts, refused, waiting)
    with staging.dataset.open(path) as source:
        notes = json.loads(pq.ParquetFile(source).schema_arrow.metadata[b"parts"])
    return BatchParts(number, **notes)


def read_part(staging: Staging, batch: int, part: int) -> pa.Table:
    """``PLAN`` of one part; the one after the last holds the refused pairs."""
    with staging.dataset.open(staging.batch_path(batch)) as source:
        return pq.ParquetFile(source).read_row_group(part).replace_schema_metadata(None)


def deal_parts(due: pa.Table, most_urls: int, config: PublishConfig) -> tuple[list[pa.Table], pa.Table, int]:
    """Deal the urls of a batch to parts.

    A small domain lies in one part; a larger one is dealt to as few parts as keep it at half of each. Links of all but
    the smallest are marked ``leased``: workers share the limits of their domains.

    Returns:
        Parts (``PLAN``), the refused pairs, and the rows of the links table beyond ``most_urls``.
    """
    refused = with_leased(due.filter(pc.is_valid(due["reason"])), None)
    asked = due.filter(pc.is_null(due["reason"]))
    if asked.num_rows == 0:
        return [], refused, 0
    asked, url_numbers = shuffle_urls(asked, config.seed)
    kept = int(np.searchsorted(url_numbers, most_urls))
    waiting = pc.sum(asked["rows"].slice(kept)).as_py() or 0
    asked, url_numbers = asked.slice(0, kept), url_numbers[:kept]
    starts = np.flatnonzero(np.diff(url_numbers, prepend=-1))
    urls = asked["url"].take(pa.array(starts)).to_pylist()
    part_of_url, leased_url, count = _deal_urls([_domain(url) for url in urls], config.links_per_part)
    part_of_row = part_of_url[url_numbers]
    asked = with_leased(asked, leased_url[url_numbers])
    order = np.argsort(part_of_row, kind="stable")
    ends = np.cumsum(np.bincount(part_of_row, minlength=count))
    asked = asked.take(pa.array(order))
    parts = [asked.slice(start, end - start) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    return parts, refused, int(waiting)


def _deal_urls(domains: list[str], links_per_part: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Part of each url, whether its domain is leased, and the number of parts: the emptiest part takes the next."""
    names, codes, counts = np.unique(np.array(domains), return_inverse=True, return_counts=True)
    parts = math.ceil(len(domains) / links_per_part)
    pieces = np.minimum(np.ceil(counts / (links_per_part * _LARGEST_SHARE)).astype(int), parts)
    by_domain = np.argsort(codes, kind="stable")
    ends = np.cumsum(counts)
    part_of_url = np.empty(len(domains), dtype=np.int64)
    emptiest = [(0, part) for part in range(parts)]
    # The largest first: the small ones then even out what is left.
    for code in sorted(range(len(names)), key=lambda code: (-counts[code], code)):
        members = by_domain[ends[code] - counts[code] : ends[code]]
        taken = [heapq.heappop(emptiest) for _ in range(pieces[code])]
        for piece, (filled, part) in enumerate(taken):
            share = members[piece :: pieces[code]]
            part_of_url[share] = part
            heapq.heappush(emptiest, (filled + len(share), part))
    return part_of_url, (counts > _TOO_FEW_TO_LEASE)[codes], parts


def _domain(url: str) -> str:
    return registered_domain(urlsplit(url).hostname or "")


def with_leased(rows: pa.Table, leased: np.ndarray | None) -> pa.Table:
    """``PLAN`` of due pairs; without ``leased`` none is."""
    values = np.zeros(rows.num_rows, dtype=bool) if leased is None else leased
    return rows.append_column("leased", pa.array(values)).cast(PLAN)


def _write_parts(staging: Staging, path: str, parts: list[pa.Table], refused: pa.Table, waiting: int) -> None:
    urls = [pc.count_distinct(part["url"]).as_py() for part in parts]
    notes = {"urls": urls, "refused": refused.num_rows, "waiting": waiting}
    buffer = io.BytesIO()
    schema = PLAN.with_metadata({"parts": json.dumps(notes)})
    with pq.ParquetWriter(buffer, schema, compression="zstd") as writer:
        for table in [*parts, refused]:
            writer.write_table(table.replace_schema_metadata(schema.metadata), row_group_size=max(1, table.num_rows))
    staging.dataset.write(path, buffer.getvalue())
