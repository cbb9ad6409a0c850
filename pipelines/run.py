"""The batches of one refresh: cut into parts, fetched, written and committed in order, within the budget."""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from coca.progress import Progress
from pipelines.config import BudgetConfig
from pipelines.lease import Lease
from pipelines.outcomes import OUTCOMES, refused_outcomes, verdict_counts
from pipelines.parts import FetchJob, run_parts
from pipelines.plan import BatchParts, Deal, Plan, cut_batch, read_part
from pipelines.publish import BatchManifest, commit_batch, read_manifest, write_batch

# Parts of one Ray Data job: a job costs seconds to start, and the driver keeps the names of its parts.
PARTS_PER_JOB = 2048


@dataclass
class Spent:
    """What a refresh has used of its budget."""

    requests: int = 0
    bytes: int = 0
    """Of the whole refresh, also before a restart."""
    fetched_urls: int = 0
    fetched_bytes: int = 0
    """Of this process."""
    fetch_seconds: float = 0.0
    verdicts: Counter[str] = field(default_factory=Counter)

    def exceeds(self, budget: BudgetConfig, seconds: float) -> bool:
        if budget.max_bytes is not None and self.bytes >= budget.max_bytes:
            return True
        return budget.max_minutes is not None and seconds >= 60 * budget.max_minutes


class RefreshRun:
    """What grows from batch to batch; a restart builds it up again from what is staged."""

    def __init__(self, job: FetchJob, plan: Plan, lease: Lease | None, deal: Deal | None = None) -> None:
        self._deal = deal
        self.job, self.plan, self._lease = job, plan, lease
        self._staging, self._publish = job.staging, job.config.publish
        self.spent = Spent()
        self.manifests: list[BatchManifest] = []
        """Of the batches committed so far, in order."""
        self.waiting = plan.waiting
        """Rows of the links table that the budget leaves for a later refresh."""

    def run(self) -> None:
        """Fetch and commit every batch of the plan that the budget allows."""
        urls = sum(batch.urls for batch in self.plan.batches)
        with Progress("import" if self.job.shards else "fetch", total=urls, unit="links") as progress:
            for stretch in self._stretches():
                if not self._run_stretch(stretch, progress):
                    break
        self.waiting += sum(batch.rows for batch in self.plan.batches[len(self.manifests) :])

    def _stretches(self) -> Iterator[list[BatchParts]]:
        """Batches, cut into parts, as many as one job takes."""
        stretch: list[BatchParts] = []
        for number, batch in enumerate(self.plan.batches):
            stretch.append(cut_batch(self._staging, number, batch, self._publish, self._deal))
            if sum(len(cut.urls) for cut in stretch) >= PARTS_PER_JOB:
                yield stretch
                stretch = []
        if stretch:
            yield stretch

    def _run_stretch(self, stretch: list[BatchParts], progress: Progress) -> bool:
        """False where the budget has ended the refresh."""
        todo = {cut.batch: self._open_parts(cut, progress) for cut in stretch}
        waiting = [(batch, part) for batch, parts in todo.items() for part in sorted(parts)]
        uncommitted = iter(stretch)
        cut = next(uncommitted)
        for batch, part in self._fetch(waiting, progress):
            todo[batch].discard(part)
            while not todo[cut.batch] and cut is not stretch[-1]:
                self._commit(cut, set())
                cut = next(uncommitted)
        for last in [cut, *uncommitted]:
            left = todo[last.batch]
            if left == set(range(len(last.urls))) and left:
                return False
            self._commit(last, left)
            if left:
                return False
        return not self.spent.exceeds(self.job.config.budget, self.spent.fetch_seconds)

    def _open_parts(self, cut: BatchParts, progress: Progress) -> set[int]:
        """Parts of a batch that are not staged yet; what is staged counts as spent."""
        manifest = read_manifest(self._staging, cut.batch)
        if manifest is not None:
            self.spent.bytes += manifest.bytes
            progress.advance(sum(cut.urls))
            return set()
        done = self._staging.parts_done(cut.batch)
        for part in done:
            outcomes = self._staging.read_table(self._staging.outcome_path(cut.batch, part), OUTCOMES)
            self.spent.bytes += sum(outcomes["bytes"].to_pylist())
            progress.advance(cut.urls[part])
        return set(range(len(cut.urls))) - done

    def _fetch(self, waiting: list[tuple[int, int]], progress: Progress) -> Iterator[tuple[int, int]]:
        """Run parts, and name each as it is done, until the budget ends it."""
        spent, budget = self.spent, self.job.config.budget
        started_s, before_s = time.monotonic(), self.spent.fetch_seconds
        if not waiting or spent.exceeds(budget, before_s):
            return
        reports = run_parts(waiting, self.job)
        try:
            for report in reports:
                spent.fetched_urls += report.urls
                spent.fetched_bytes += report.bytes
                spent.bytes += report.bytes
                spent.verdicts += report.verdicts
                spent.fetch_seconds = before_s + time.monotonic() - started_s
                progress.advance(report.urls, note=_describe(spent))
                yield report.batch, report.part
                if spent.exceeds(budget, spent.fetch_seconds):
                    return
        finally:
            reports.close()

    def _commit(self, cut: BatchParts, left: set[int]) -> None:
        """Commit a batch but for the parts that are left for a later refresh."""
        staging = self._staging
        parts = [part for part in range(len(cut.urls)) if part not in left]
        refused = refused_outcomes(read_part(staging, cut.batch, len(cut.urls)))
        counts = Counter(verdict_counts(refused))
        for part in parts:
            counts += verdict_counts(staging.read_table(staging.outcome_path(cut.batch, part), OUTCOMES))
        manifest = write_batch(staging, cut.batch, parts, refused, dict(counts))
        commit_batch(staging, cut.batch, manifest, self._lease)
        self.manifests.append(manifest)
        self.spent.requests += manifest.requests
        dropped = [read_part(staging, cut.batch, part) for part in range(len(cut.urls)) if part not in manifest.parts]
        self.waiting += cut.waiting + sum(sum(table["rows"].to_pylist()) for table in dropped)


def _describe(spent: Spent) -> str:
    """Rate of bytes and the commonest verdicts, for the line of progress."""
    named = ((reason or "ok", count) for reason, count in spent.verdicts.most_common(4))
    rate = spent.fetched_bytes / 1e6 / max(spent.fetch_seconds, 1e-3)
    return " ".join([f"{rate:,.1f} MB/s", *(f"{name} {count:,}" for name, count in named)])
