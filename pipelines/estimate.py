"""What a refresh would give, from a sample of its links: nothing is written to the dataset."""

import math
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from coca.progress import Progress
from coca.storage import Store
from pipelines.config import PublishConfig, RefreshConfig
from pipelines.funnel import count_reasons
from pipelines.intake import LinksTable, take_in
from pipelines.join import DUE
from pipelines.outcomes import OUTCOMES
from pipelines.parts import PARTS_AT_ONCE, FetchJob, FetchPart, read_report
from pipelines.plan import PlannedBatch, cut_batch
from pipelines.refresh import open_target, plan_refresh, settle_config
from pipelines.staging import Staging
from pipelines.standing import read_standing

# Standard normal quantile of a two-sided 95 % interval.
_Z = 1.96
_PART_URLS = 256


@dataclass(frozen=True)
class Estimate:
    """The yield of a refresh, extrapolated from the urls that were asked."""

    links: int
    others: dict[str, int]
    """Reason ("stored" for what is a sample already) -> rows that no request is needed for."""
    due_urls: int
    asked_urls: int
    """The sample: a random one, by the refresh's own shuffle."""
    admitted_share: float
    """Of the pairs asked; selection (duplicates and the like) comes after."""
    admitted_share_low: float
    admitted_share_high: float
    """The 95 % interval (Wilson's)."""
    reasons: dict[str, int]
    """Of the other pairs asked."""
    expected_samples: int
    expected_download_bytes: int
    expected_stored_bytes: int
    urls_per_s: float
    """Seen with one worker on this machine."""


def estimate(config: RefreshConfig, sample_urls: int) -> Estimate:
    """Ask ``sample_urls`` of the due urls, here and without Ray, and throw away what comes.

    Raises:
        BadInput: as a refresh would.
    """
    standing = read_standing(open_target(config))
    source = LinksTable.open(config.links)
    config, tokenizer = settle_config(config, standing)
    with tempfile.TemporaryDirectory(prefix="coca-estimate-") as folder:
        staging = Staging(Store(folder), "estimate")
        ledger_rows = sum(standing.files["links"].values())
        intake = take_in(staging.dataset, source, config, ledger_rows=ledger_rows)
        plan = plan_refresh(config, staging, intake, standing, None)
        others = Counter({reason or "stored": count for reason, count in plan.standing.items()})
        for batch in plan.batches:
            others.update(_refused(staging, batch))
        due_urls = sum(batch.urls for batch in plan.batches)
        publish = config.publish.model_copy(update={"links_per_part": _PART_URLS})
        job = FetchJob(config, staging, tokenizer, standing.withdrawn)
        started_s = time.monotonic()
        outcomes = _ask(job, plan.batches, min(sample_urls, due_urls), publish)
        seconds = time.monotonic() - started_s
        rows = [row for table in outcomes for row in table.to_pylist()]
        stored_bytes = sum(staging.dataset.size(f"samples/{name}") for name in staging.dataset.list("samples"))
    asked_urls = len({row["url"] for row in rows})
    new = [row for row in rows if row["rows"]]
    admitted = sum(row["admitted"] for row in new)
    low, high = wilson_interval(admitted, len(new))
    scale = due_urls / asked_urls if asked_urls else 0.0
    return Estimate(
        links=plan.links,
        others=dict(others.most_common()),
        due_urls=due_urls,
        asked_urls=asked_urls,
        admitted_share=admitted / len(new) if new else 0.0,
        admitted_share_low=low,
        admitted_share_high=high,
        reasons=dict(Counter(row["reason"] for row in new if not row["admitted"]).most_common()),
        expected_samples=round(admitted * scale),
        expected_download_bytes=round(sum(row["bytes"] for row in rows) * scale),
        expected_stored_bytes=round(stored_bytes * scale),
        urls_per_s=round(asked_urls / seconds, 1) if asked_urls else 0.0,
    )


def wilson_interval(hits: int, trials: int) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson 1927): sound also for few trials and shares near 0 and 1."""
    if trials == 0:
        return 0.0, 1.0
    share, z2 = hits / trials, _Z * _Z
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials * trials))
    return max(0.0, middle - half), min(1.0, middle + half)


def _refused(staging: Staging, batch: PlannedBatch) -> dict[str, int]:
    """Rows refused before any request, by reason."""
    due = pa.concat_tables([staging.read_table(file, DUE) for file in batch.files])
    refused = due.filter(pc.is_valid(due["reason"]))
    return count_reasons(refused["reason"], refused["rows"])


def _ask(job: FetchJob, batches: list[PlannedBatch], urls: int, publish: PublishConfig) -> list[pa.Table]:
    """Outcomes of the first ``urls`` of the plan, several parts under way."""
    keys = []
    for number, batch in enumerate(batches):
        taken = min(urls, batch.urls)
        cut = cut_batch(job.staging, number, batch.model_copy(update={"urls": taken}), publish)
        keys += [({"batch": number, "part": part}, size) for part, size in enumerate(cut.urls)]
        urls -= taken
        if urls <= 0:
            break
    worker = FetchPart(job)
    try:
        total = sum(size for _, size in keys)
        with Progress("ask a sample", total=total, unit="links") as progress, ThreadPoolExecutor(PARTS_AT_ONCE) as pool:

            def ask(key: tuple[dict[str, int], int]) -> pa.Table:
                read_report(worker(key[0]))
                progress.advance(key[1])
                return job.staging.read_table(job.staging.outcome_path(**key[0]), OUTCOMES)

            return list(pool.map(ask, keys))
    finally:
        worker.close()
