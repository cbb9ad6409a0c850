"""The Ray Data job of a refresh: actors fetch, prepare and write parts; only keys and counts travel."""

import asyncio
import contextlib
import json
import pickle
import threading
import traceback
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from coca.contract import Reason
from coca.errors import BadInput, RunFailed
from coca.tokenizer import Tokenizer
from coca.withdrawn import Withdrawn
from pipelines.admission import Admission
from pipelines.config import RefreshConfig
from pipelines.fetch import Fetched, Validators, create_fetcher
from pipelines.import_shards import Shard, import_reason, read_shard, restore_source
from pipelines.lease import list_epochs
from pipelines.metrics import FetchMetrics
from pipelines.open_links import OpenLinks
from pipelines.outcomes import OUTCOMES
from pipelines.part_files import Taken, write_part
from pipelines.plan import read_part
from pipelines.rate_leases import LeaseClient, start_rate_leases
from pipelines.ray_data import quiet_ray_data
from pipelines.staging import Staging
from pipelines.worker_plan import plan_workers

# Parts of a worker that may wait for their last slow hosts while it fetches the next.
PARTS_AT_ONCE = 16


@dataclass(frozen=True)
class PartDone:
    """What a written part reports to the driver."""

    batch: int
    part: int
    urls: int
    requests: int
    bytes: int
    verdicts: Counter[str]
    """Pairs by reason; the key of admitted ones is empty."""


@dataclass(frozen=True)
class FetchJob:
    """What every fetching actor gets."""

    config: RefreshConfig
    staging: Staging
    tokenizer: Tokenizer
    withdrawn: Withdrawn
    leases: LeaseClient | None = None
    lease_epoch: int | None = None
    """Of the refresh: once another has the dataset, a worker that is left over from this one writes nothing."""
    shards: tuple[Shard, ...] = ()
    """Of an import: where the bytes lie. No host is asked then."""


class FetchPart:
    """The actor: one event loop with keep-alive connections, in which several parts may be under way."""

    def __init__(self, job: FetchJob) -> None:
        self._job = job
        self._metrics = FetchMetrics()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fetch", daemon=True)
        self._thread.start()
        self._resources = contextlib.AsyncExitStack()
        # With the first part, so that a failure is one of a part.
        self._opened: asyncio.Task[None] | None = None

    def __call__(self, keys: dict[str, Any]) -> dict[str, Any]:
        """One part, fetched and written: ``{"batch", "part"}`` to the fields of ``PartDone``.

        A failure travels as a row, too (``failure``): of an exception Ray would hand on the text alone.
        """
        try:
            return {**self._run(self._do_part(int(keys["batch"]), int(keys["part"]))), "failure": b""}
        except Exception as error:
            return {**keys, "urls": 0, "requests": 0, "bytes": 0, "verdicts": "{}", "failure": _pack(error)}

    def close(self) -> None:
        if self._loop.is_running():
            self._run(self._resources.aclose())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __del__(self) -> None:
        # Ray Data drops its reference when the stage ends.
        self.close()

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _open(self) -> None:
        config = self._job.config
        self._writing = asyncio.Lock()
        self._open_links = OpenLinks(config.publish.links_per_part)
        self._admission = await self._resources.enter_async_context(Admission(config, self._job.withdrawn))
        limits = config.image.limits
        fetcher: Any = create_fetcher(
            config.fetch, limits.max_bytes, self._admission.prepare, self._job.leases, limits.min_bytes
        )
        self._fetcher: Any = await self._resources.enter_async_context(fetcher)

    async def _do_part(self, batch: int, part: int) -> dict[str, Any]:
        if self._opened is None:
            self._opened = asyncio.create_task(self._open())
        await self._opened
        staging = self._job.staging
        if part in await asyncio.to_thread(staging.parts_done, batch):  # a retry of Ray's own
            outcomes = await asyncio.to_thread(staging.read_table, staging.outcome_path(batch, part), OUTCOMES)
        else:
            plan = await asyncio.to_thread(read_part, staging, batch, part)
            with Taken(self._job.config.recheck) as taken:
                plan = self._refuse_withdrawn(plan, taken)
                with self._metrics.time("import" if self._job.shards else "fetch"):
                    await (self._import_part(plan, taken) if self._job.shards else self._fetch_part(plan, taken))
                async with self._writing:  # one file at a time is held in memory
                    config, tokenizer = self._job.config, self._job.tokenizer
                    outcomes = await asyncio.to_thread(
                        write_part, staging, batch, part, taken, config, tokenizer, self._check_lease
                    )
        return vars(_report(batch, part, outcomes)) | {"verdicts": json.dumps(_verdicts(outcomes))}

    def _refuse_withdrawn(self, plan: pa.Table, taken: Taken) -> pa.Table:
        """Leave out what was withdrawn after the plan was made, before a restart."""
        gone = pa.array(self._job.withdrawn.refuses(plan["url"], plan["sample_id"]))
        gone = pc.and_(gone, pc.invert(plan["stored"]))
        refused = plan.filter(gone)
        reason = pa.array([Reason.WITHDRAWN.value] * refused.num_rows, pa.string())
        taken.refuse(refused.set_column(plan.schema.get_field_index("reason"), "reason", reason))
        return plan.filter(pc.invert(gone))

    def _check_lease(self) -> None:
        epoch = self._job.lease_epoch
        newest = max(list_epochs(self._job.staging.dataset), default=0)
        if epoch is not None and newest > epoch:
            raise RunFailed(f"the lease of this refresh (epoch {epoch}) was taken over by epoch {newest}")

    async def _fetch_part(self, plan: pa.Table, taken: Taken) -> None:
        pairs_of: dict[str, list[dict[str, Any]]] = {}
        for pair in plan.to_pylist():
            pairs_of.setdefault(pair["url"], []).append(pair)

        async def fetch_url(url: str, pairs: list[dict[str, Any]]) -> None:
            try:
                await fetch_pairs(url, pairs)
            finally:
                self._open_links.leave()

        async def fetch_pairs(url: str, pairs: list[dict[str, Any]]) -> None:
            fetched = await self._fetcher.fetch(url, validators=_validators(pairs), leased=pairs[0]["leased"])
            reason = taken.add(pairs, fetched)
            self._metrics.count(reason, fetched.requests, fetched.bytes)

        await self._open_links.enter(len(pairs_of))
        try:
            async with asyncio.TaskGroup() as group:
                for url, pairs in pairs_of.items():
                    group.create_task(fetch_url(url, pairs))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None  # the first ended the others

    async def _import_part(self, plan: pa.Table, taken: Taken) -> None:
        """A part's pairs lie in one shard, in its order.

        Raises:
            RunFailed: the shard is not what it was when the import was planned.
        """
        pairs = {pair["place"]: pair for pair in plan.to_pylist()}
        if not pairs:
            return
        shard = self._job.shards[plan["piece"][0].as_py()]
        rows = enumerate(read_shard(shard, max_body_bytes=self._job.config.image.limits.max_bytes))
        while pairs and (found := await asyncio.to_thread(next, rows, None)) is not None:
            place, row = found
            pair = pairs.pop(place, None)
            if pair is None:
                continue
            if " ".join((row.caption or "").split()) != pair["caption"]:
                raise _changed(shard)
            reason, prepared = import_reason(row), None
            if reason is None:
                assert row.body is not None
                prepared = self._admission.judge(restore_source(row, await self._admission.prepare(row.body)))
            taken.add([pair], Fetched(reason=reason, result=prepared), fetched_at=row.imported_at)
        if pairs:
            raise _changed(shard)


def _changed(shard: Shard) -> RunFailed:
    return RunFailed(f"{shard.uri} has changed since this import began: leave it alone, and run the same command again")


def _pack(error: Exception) -> bytes:
    known = isinstance(error, BadInput | RunFailed)
    told = error if known else RunFailed(f"a fetching worker failed: {type(error).__name__}: {error}")
    return pickle.dumps((told, "".join(traceback.format_exception(error))))


def read_report(row: dict[str, Any]) -> PartDone:
    """What ``FetchPart`` returned.

    Raises:
        BadInput, RunFailed: what it failed of.
    """
    failure = row["failure"]
    if failure:
        error, told = pickle.loads(failure)  # noqa: S301 - from our own worker
        error.add_note(f"in the worker:\n{told}")
        raise error
    values = {key: value for key, value in row.items() if key != "failure"}
    return PartDone(**{**values, "verdicts": Counter(json.loads(row["verdicts"]))})


def _validators(pairs: list[dict[str, Any]]) -> Validators | None:
    """Of a url all of whose pairs hold the same bytes: they are wanted only if they changed."""
    if not all(pair["stored"] for pair in pairs) or len({pair["source_sha256"] for pair in pairs}) > 1:
        return None
    return Validators(etag=pairs[0]["etag"], last_modified=pairs[0]["last_modified"])


def _report(batch: int, part: int, outcomes: pa.Table) -> PartDone:
    requests, size = (sum(outcomes[name].to_pylist()) for name in ("requests", "bytes"))
    urls = len(set(outcomes["url"].to_pylist()))
    return PartDone(batch, part, urls, requests, size, _verdicts(outcomes))


def _verdicts(outcomes: pa.Table) -> Counter[str]:
    return Counter(reason or "" for reason in outcomes["reason"].to_pylist())


def run_parts(parts: list[tuple[int, int]], job: FetchJob) -> Generator[PartDone]:
    """Fetch and write parts, given as (batch, part); reports come as parts are done, in any order.

    Ray has been initialised by the caller. No actor outlives the iteration.
    """
    fetch = job.config.fetch
    workers, cpus_each = plan_workers(fetch, len(parts), ray.cluster_resources().get("CPU", 0.0))
    keys = [{"batch": batch, "part": part} for batch, part in parts]
    if workers > 1:  # one alone keeps every domain's limits by itself
        limits = fetch.connections_per_domain, fetch.requests_per_second_per_domain
        job = replace(job, leases=start_rate_leases(*limits, fetch.lease_s, fetch.timeout_s))
    fetch_part: Any = FetchPart  # Ray's types know classes with __call__ for batches only
    with quiet_ray_data():
        dataset = ray.data.from_items(keys, override_num_blocks=len(keys)).map(
            fetch_part,
            fn_constructor_kwargs={"job": job},
            compute=ray.data.ActorPoolStrategy(
                size=workers,
                max_tasks_in_flight_per_actor=PARTS_AT_ONCE,
                max_concurrent_calls_per_actor=PARTS_AT_ONCE,
                enable_true_multi_threading=True,
            ),
            num_cpus=cpus_each,
        )
        for report in dataset.iter_rows():
            yield read_report(report)
