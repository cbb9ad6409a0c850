"""The Ray Data job of one batch: fetch and prepare each part in an actor, write it in a task, return keys only."""

import asyncio
import contextlib
import io
import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data

from coca.contract import SAMPLES
from coca.errors import BadInput, RunFailed
from coca.tokenizer import Tokenizer
from pipelines.config import RefreshConfig
from pipelines.fetch import Fetched, Fetcher
from pipelines.ledger import next_check, state_of
from pipelines.prepare import Prepared, StoredImage, prepare
from pipelines.staging import Staging

# A part travels as one Arrow block, whose binary column ends at 2 GiB.
MAX_PART_BYTES = 1 << 30

_TIME = pa.timestamp("us", tz="UTC")

# One row per pair: its verdict. What a part leaves in staging, without bytes.
OUTCOMES = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("url", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("status", pa.int32()),
        pa.field("attempts", pa.int32(), nullable=False),
        pa.field("etag", pa.string()),
        pa.field("last_modified", pa.string()),
        pa.field("source_sha256", pa.string()),
        pa.field("event_at", _TIME, nullable=False),
        pa.field("next_check_at", _TIME),
        # What the url cost, on its first pair only: sums over pairs count each url once.
        pa.field("requests", pa.int32(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("tokens", pa.list_(pa.int32())),
    ]
)

_IMAGE_FIELDS = [SAMPLES.field(field.name).with_nullable(True) for field in fields(StoredImage)]
_FETCHED = pa.schema([*(f for f in OUTCOMES if f.name != "tokens"), pa.field("part", pa.int32()), *_IMAGE_FIELDS])


@dataclass(frozen=True)
class PartDone:
    """What a written part reports to the driver."""

    part: int
    links: int
    requests: int
    bytes: int
    verdicts: Counter[str]
    """Pairs by reason; the key of admitted ones is empty."""


class FetchPart:
    """The actor: fetches the urls of a part with one keep-alive session, and prepares bodies as they arrive."""

    def __init__(self, config: RefreshConfig) -> None:
        self._config = config
        self._loop = asyncio.new_event_loop()
        self._fetcher: Fetcher[Prepared] = Fetcher(
            config.fetch, config.image.limits.max_bytes, lambda body: prepare(body, config.image)
        )
        self._loop.run_until_complete(self._fetcher.__aenter__())

    def __call__(self, part: pa.Table) -> pa.Table:
        """A part of the plan to ``_FETCHED``: one row per pair."""
        return self._loop.run_until_complete(self._fetch_part(part))

    def __del__(self) -> None:
        # Ray Data drops its reference when the stage ends.
        if not self._loop.is_closed():
            self._loop.run_until_complete(self._fetcher.__aexit__())
            self._loop.close()

    async def _fetch_part(self, part: pa.Table) -> pa.Table:
        pairs_of: dict[str, list[dict[str, Any]]] = {}
        for pair in part.to_pylist():
            pairs_of.setdefault(pair["url"], []).append(pair)
        held = _HeldBytes(MAX_PART_BYTES)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._fetch_url(url, pairs, held)) for url, pairs in pairs_of.items()]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None  # the first ended the others
        rows = [row for task in tasks for row in task.result()]
        return pa.Table.from_pylist(rows, schema=_FETCHED)

    async def _fetch_url(self, url: str, pairs: list[dict[str, Any]], held: "_HeldBytes") -> list[dict[str, Any]]:
        fetched = await self._fetcher.fetch(url)
        event_at = datetime.now(UTC)
        verdict = _verdict_columns(fetched, event_at, self._config.fetch.recheck_after_s)
        stored = fetched.result.stored if fetched.result else None
        if stored is not None:
            held.add(len(stored.image) * len(pairs))
        image = vars(stored) if stored else {}
        costs = [(fetched.requests, fetched.bytes)] + [(0, 0)] * (len(pairs) - 1)
        return [
            {
                **{name: pair[name] for name in ("sample_id", "url", "caption", "part")},
                **verdict,
                **image,
                "requests": requests,
                "bytes": size,
            }
            for pair, (requests, size) in zip(pairs, costs, strict=True)
        ]


class _HeldBytes:
    """Stops a part whose images would not fit one block."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0

    def add(self, amount: int) -> None:
        self._held += amount
        if self._held > self._limit:
            raise RunFailed(
                f"one part holds more than {self._limit >> 20:,} MiB of images: "
                "set publish.links_per_part lower, or store smaller images (image.resize, image.size)"
            )


def _verdict_columns(fetched: Fetched[Prepared], event_at: datetime, recheck_after_s: float) -> dict[str, Any]:
    reason = fetched.reason or (fetched.result.reason if fetched.result else None)
    return {
        "reason": reason.value if reason else None,
        "status": fetched.status,
        "attempts": fetched.requests,
        "etag": fetched.etag,
        "last_modified": fetched.last_modified,
        "source_sha256": fetched.result.source_sha256 if fetched.result else None,
        "event_at": event_at,
        "next_check_at": next_check(state_of(reason), event_at, recheck_after_s, fetched.retry_after_s),
    }


def write_part(part: pa.Table, *, staging: Staging, tokenizer: Tokenizer, rows_per_row_group: int) -> pa.Table:
    """The task: writes the samples file of a part, then its outcomes to staging (last: they mark the part done).

    Returns:
        One row of keys and counts.
    """
    number = part["part"][0].as_py()
    admitted = part.filter(pc.is_null(part["reason"])).sort_by("sample_id")
    if admitted.num_rows:
        samples = admitted.rename_columns(["fetched_at" if n == "event_at" else n for n in admitted.column_names])
        data = encode_samples(samples.select(SAMPLES.names).cast(SAMPLES), rows_per_row_group)
        staging.dataset.write(staging.samples_path(number), data)
    tokens = dict(
        zip(admitted["sample_id"].to_pylist(), tokenizer.encode(admitted["caption"].to_pylist()), strict=True)
    )
    by_row = pa.array([tokens.get(key) for key in part["sample_id"].to_pylist()], pa.list_(pa.int32()))
    outcomes = part.append_column("tokens", by_row).select(OUTCOMES.names).cast(OUTCOMES).sort_by("sample_id")
    staging.write_table(staging.outcome_path(number), outcomes)
    return _report(number, outcomes)


def encode_samples(samples: pa.Table, rows_per_row_group: int) -> bytes:
    """A samples file: image bytes as they are (they do not compress), everything else zstd."""
    others = [name for name in samples.column_names if name != "image"]
    buffer = io.BytesIO()
    pq.write_table(
        samples,
        buffer,
        row_group_size=rows_per_row_group,
        compression={**dict.fromkeys(others, "zstd"), "image": "none"},
        use_dictionary=others,
        write_statistics=others,
    )
    return buffer.getvalue()


def _report(number: int, outcomes: pa.Table) -> pa.Table:
    verdicts = Counter(reason or "" for reason in outcomes["reason"].to_pylist())
    return pa.table(
        {
            "part": pa.array([number], pa.int32()),
            "links": pa.array([outcomes.num_rows], pa.int64()),
            "requests": pa.array([pc.sum(outcomes["requests"]).as_py()], pa.int64()),
            "bytes": pa.array([pc.sum(outcomes["bytes"]).as_py()], pa.int64()),
            "verdicts": [json.dumps(verdicts)],
        }
    )


def run_parts(
    parts: list[pa.Table], config: RefreshConfig, staging: Staging, tokenizer: Tokenizer
) -> Iterator[PartDone]:
    """Fetch and write parts (tables of ``plan.PLAN``, one part each); reports come as parts are done, in any order.

    Ray has been initialised by the caller. No actor outlives the iteration.
    """
    write: Any = write_part  # Ray's type for functions leaves no room for keyword arguments
    workers, cpus_each = _plan_workers(config.fetch.workers, len(parts))
    # One table is one block is one part, whatever its size after the images are in it.
    with _one_block_per_part():
        dataset = (
            ray.data.from_arrow(parts)
            .map_batches(
                FetchPart,
                fn_constructor_kwargs={"config": config},
                batch_size=None,
                batch_format="pyarrow",
                zero_copy_batch=True,
                compute=ray.data.ActorPoolStrategy(size=workers),
                num_cpus=cpus_each,
            )
            .map_batches(
                write,
                fn_kwargs={
                    "staging": staging,
                    "tokenizer": tokenizer,
                    "rows_per_row_group": config.publish.row_group_rows,
                },
                batch_size=None,
                batch_format="pyarrow",
                zero_copy_batch=True,
            )
        )
        for report in dataset.iter_rows():
            verdicts = Counter(json.loads(report.pop("verdicts")))
            yield PartDone(**report, verdicts=verdicts)


def _plan_workers(wanted: int | None, parts: int) -> tuple[int, float]:
    """How many fetching actors, and CPUs for each, so that one whole CPU at least stays free for writing."""
    cpus = ray.cluster_resources().get("CPU", 0.0)
    workers = min(wanted or max(1, int(cpus // 2)), parts)
    free_cpus = cpus - 1
    if free_cpus < 0.5 * workers:
        raise BadInput(
            f"fetch.workers = {workers} leaves no CPU to write with: the Ray cluster has {cpus:g}",
            f"Set fetch.workers to {int(free_cpus / 0.5)} or fewer" if free_cpus >= 0.5 else "Give Ray 2 CPUs or more",
        )
    return workers, 1.0 if free_cpus >= workers else 0.5


@contextlib.contextmanager
def _one_block_per_part() -> Iterator[None]:
    """Ray Data without its splitting of large blocks, and without bars of its own beside ours."""
    context = ray.data.DataContext.get_current()
    before = context.target_max_block_size, context.enable_progress_bars
    context.target_max_block_size, context.enable_progress_bars = None, False
    # Neither the announcement of each execution nor the advice to turn its bars on.
    loggers = {"ray.data": logging.WARNING, "ray.data._internal.progress": logging.ERROR}
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name, level in loggers.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        context.target_max_block_size, context.enable_progress_bars = before
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
