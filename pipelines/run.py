"""The batches of one refresh: cut into parts, fetched, written and committed in order, within the budget."""

import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow.compute as pc

from coca.progress import Progress
from pipelines.config import BudgetConfig
from pipelines.lease import Lease
from pipelines.outcomes import OUTCOMES, refused_outcomes
from pipelines.parts import FetchJob, run_parts
from pipelines.plan import BatchParts, Deal, Plan, cut_batch, read_part
from pipelines.publish import BatchManifest, commit_batch, read_manifest, write_batch

# Parts of one Ray Data job: a job costs seconds to start, and the driver keeps the names of its parts.
PARTS_PER_JOB = 2048
# How much of a budget of minutes a kill may hide.
_NOTE_EVERY_S = 5.0


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
    earlier_seconds: float = 0.0
    """Of fetching before a restart, as far as they were noted."""
    verdicts: Counter[str] = field(default_factory=Counter)

    def exceeds(self, budget: BudgetConfig) -> bool:
        if budget.max_bytes is not None and self.bytes >= budget.max_bytes:
            return True
        seconds = self.earlier_seconds + self.fetch_seconds
        return budget.max_minutes is not None and seconds >= 60 * budget.max_minutes


class RefreshRun:
    """What grows from batch to batch; a restart builds it up again from what is staged."""

    def __init__(self, job: FetchJob, plan: Plan, lease: Lease | None, deal: Deal | None = None) -> None:
        self._deal = deal
        self.job, self.plan, self._lease = job, plan, lease
        self._staging, self._publish = job.staging, job.config.publish
        self.spent = Spent()
        self._noted_s = 0.0
        self.manifests: dict[int, BatchManifest] = {}
        """Batch number -> what was committed of it; a batch of which the budget left all is not there."""
        self.waiting = plan.waiting
        """Rows of the links table that the budget leaves for a later refresh."""

    def run(self) -> None:
        """Fetch and commit every batch of the plan that the budget allows.

        Once the budget has ended a refresh it stays ended: a restart publishes what there is.
        """
        urls = sum(batch.urls for batch in self.plan.batches)
        ended_before = self._staging.dataset.exists(self._staging.ended_path)
        self.spent.earlier_seconds = self._noted_seconds()
        with Progress("import" if self.job.shards else "fetch", total=urls, unit="links") as progress:
            for stretch in self._stretches():
                self._run_stretch(stretch, progress, fetch=not ended_before)
                if ended_before:
                    continue
                if self.spent.exceeds(self.job.config.budget):
                    self._staging.dataset.write(self._staging.ended_path, json.dumps(vars(self.spent)).encode())
                    break
        missing = set(range(len(self.plan.batches))) - self.manifests.keys()
        self.waiting += sum(self.plan.batches[number].rows for number in missing)

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

    def _run_stretch(self, stretch: list[BatchParts], progress: Progress, *, fetch: bool) -> None:
        todo = {cut.batch: self._open_parts(cut, progress) for cut in stretch}
        waiting = [(batch, part) for batch, parts in todo.items() for part in sorted(parts)] if fetch else []
        uncommitted = list(stretch)
        for batch, part in self._fetch(waiting, progress):
            todo[batch].discard(part)
            while len(uncommitted) > 1 and not todo[uncommitted[0].batch]:
                self._commit(uncommitted.pop(0))
        for cut in uncommitted:
            self._commit(cut)

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
            self.spent.bytes += pc.sum(outcomes["bytes"]).as_py()
            progress.advance(cut.urls[part])
        return set(range(len(cut.urls))) - done

    def _fetch(self, waiting: list[tuple[int, int]], progress: Progress) -> Iterator[tuple[int, int]]:
        """Run parts, and name each as it is done, until the budget ends it."""
        spent, budget = self.spent, self.job.config.budget
        started_s, before_s = time.monotonic(), self.spent.fetch_seconds
        if not waiting or spent.exceeds(budget):
            return
        reports = run_parts(waiting, self.job)
        try:
            for report in reports:
                spent.fetched_urls += report.urls
                spent.fetched_bytes += report.bytes
                spent.bytes += report.bytes
                spent.verdicts += report.verdicts
                spent.fetch_seconds = before_s + time.monotonic() - started_s
                self._note_seconds()
                progress.advance(report.urls, note=_describe(spent))
                yield report.batch, report.part
                if spent.exceeds(budget):
                    return
        finally:
            reports.close()

    def _noted_seconds(self) -> float:
        path = self._staging.seconds_path
        return float(self._staging.dataset.read(path)) if self._staging.dataset.exists(path) else 0.0

    def _note_seconds(self) -> None:
        """For a restart, where a budget of minutes asks for it; not with every part of many workers."""
        seconds = self.spent.earlier_seconds + self.spent.fetch_seconds
        if self.job.config.budget.max_minutes is not None and seconds - self._noted_s >= _NOTE_EVERY_S:
            self._staging.dataset.write(self._staging.seconds_path, f"{seconds:.3f}".encode())
            self._noted_s = seconds

    def _commit(self, cut: BatchParts) -> None:
        """Commit the parts of a batch that are done; the others are left for a later refresh."""
        staging = self._staging
        manifest = read_manifest(staging, cut.batch)
        if manifest is None:
            done = sorted(staging.parts_done(cut.batch))
            if cut.urls and not done:
                return
            refused = refused_outcomes(read_part(staging, cut.batch, len(cut.urls)))
            manifest = write_batch(staging, cut.batch, done, refused)
        commit_batch(staging, cut.batch, manifest, self._lease)
        self.manifests[cut.batch] = manifest
        self.spent.requests += manifest.requests
        left = (part for part in range(len(cut.urls)) if part not in manifest.parts)
        self.waiting += cut.waiting + sum(pc.sum(read_part(staging, cut.batch, part)["rows"]).as_py() for part in left)


def _describe(spent: Spent) -> str:
    """Rate of bytes and the commonest verdicts, for the line of progress."""
    named = ((reason or "ok", count) for reason, count in spent.verdicts.most_common(4))
    rate = spent.fetched_bytes / 1e6 / max(spent.fetch_seconds, 1e-3)
    return " ".join([f"{rate:,.1f} MB/s", *(f"{name} {count:,}" for name, count in named)])
