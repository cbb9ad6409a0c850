"""What the crawl ledger of a version says as a whole: where every pair stands, and which hosts refuse why."""

from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from coca.contract import State
from coca.dataset import Dataset
from coca.progress import Progress
from coca.withdrawn import Withdrawn
from pipelines.domains import registered_domain
from pipelines.histogram import Reservoir
from pipelines.ledger import Ledger, latest_events
from pipelines.rows import hosts_of
from pipelines.tables import read_data_files

ADMITTED = "admitted"
NO_HOST = "(no host)"
_KEPT_HOSTS = 100_000
_EXAMPLES = 3
_COLUMNS = ["sample_id", "url", "caption", "state", "reason", "status", "event_at", "next_check_at", "stored"]


@dataclass
class LedgerSurvey:
    """Counts of pairs by their latest event."""

    events: int = 0
    """Of the buckets that were read."""
    pairs: int = 0
    buckets: int = 0
    of_buckets: int = 0
    """More than ``buckets`` where the ledger is too large to be read whole; a bucket is a fair sample of the urls."""
    verdicts: Counter[tuple[str, str | None]] = field(default_factory=Counter)
    """(state, reason) -> pairs."""
    hosts: dict[str, Counter[str]] = field(default_factory=dict)
    """Registered domain -> reason, or ``ADMITTED`` -> pairs."""
    hosts_dropped: bool = False
    """Whether small hosts were forgotten on the way, for memory."""
    due: int = 0
    """Pairs whose next check is past."""
    due_later: int = 0
    examples: dict[str, Reservoir] = field(default_factory=dict)
    """Reason -> a few pairs without stored bytes, none of them withdrawn: ``url``, ``caption``, ``status``."""

    def largest_hosts(self, number: int) -> list[tuple[str, Counter[str]]]:
        return sorted(self.hosts.items(), key=lambda item: (-item[1].total(), item[0]))[:number]


def survey_ledger(dataset: Dataset, *, max_events: int, seed: int) -> LedgerSurvey:
    """Read the ledger bucket by bucket; whole, or buckets drawn by ``seed`` until ``max_events`` are read."""
    files = Ledger.of_version(dataset).paths
    survey = LedgerSurvey(of_buckets=len(files))
    random, now = np.random.default_rng(seed), datetime.now(UTC)
    chosen = _draw_buckets(list(files), dataset.record.links.rows, max_events, random)
    with Progress("ledger", total=len(chosen), unit="buckets") as progress:
        for bucket in chosen:
            events = read_data_files(dataset.store, "links", files[bucket], _COLUMNS)
            survey.buckets += 1
            survey.events += events.num_rows
            latest = latest_events(events)
            _add_counts(survey, latest, now)
            _add_hosts(survey, latest)
            _add_examples(survey, latest, dataset.withdrawn, random)
            progress.advance()
    return survey


def _draw_buckets(buckets: list[str], rows: int, max_events: int, random: np.random.Generator) -> list[str]:
    wanted = len(buckets) if rows <= max_events else max(1, len(buckets) * max_events // rows)
    return [buckets[at] for at in sorted(random.permutation(len(buckets))[:wanted])]


def _add_counts(survey: LedgerSurvey, latest: pa.Table, now: datetime) -> None:
    survey.pairs += latest.num_rows
    for row in latest.group_by(["state", "reason"]).aggregate([([], "count_all")]).to_pylist():
        survey.verdicts[row["state"], row["reason"]] += row["count_all"]
    is_due = pc.less_equal(latest["next_check_at"], pa.scalar(now, latest.schema.field("next_check_at").type))
    survey.due += pc.sum(is_due).as_py() or 0
    survey.due_later += pc.sum(pc.invert(is_due)).as_py() or 0


def _add_examples(survey: LedgerSurvey, latest: pa.Table, withdrawn: Withdrawn, random: np.random.Generator) -> None:
    # Contract 1 does not say `stored`: there it is what the state says.
    stored = pc.coalesce(latest["stored"], pc.equal(latest["state"], State.OK.value))
    taken_down = pc.or_(
        pc.is_in(latest["url"], value_set=withdrawn.urls), pa.array(withdrawn.mask(latest["sample_id"]))
    )
    refused = latest.filter(pc.and_not(pc.and_not(latest["reason"].is_valid(), stored), taken_down))
    for reason in refused["reason"].unique().to_pylist():
        rows = refused.filter(pc.equal(refused["reason"], reason)).select(["url", "caption", "status"])
        survey.examples.setdefault(reason, Reservoir(_EXAMPLES)).add(rows, random)


def _add_hosts(survey: LedgerSurvey, latest: pa.Table) -> None:
    columns = {
        "host": pc.fill_null(hosts_of(latest["url"]), NO_HOST),
        "verdict": pc.fill_null(latest["reason"], ADMITTED),
    }
    for row in pa.table(columns).group_by(["host", "verdict"]).aggregate([([], "count_all")]).to_pylist():
        survey.hosts.setdefault(_domain(row["host"]), Counter())[row["verdict"]] += row["count_all"]
    if len(survey.hosts) > 2 * _KEPT_HOSTS:
        survey.hosts, survey.hosts_dropped = dict(survey.largest_hosts(_KEPT_HOSTS)), True


def _domain(host: str) -> str:
    return NO_HOST if host == NO_HOST else registered_domain(host.strip("[]"))
