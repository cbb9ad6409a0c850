"""The batches of one refresh: fetch, select, write and commit each, then publish."""

import time
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc

from coca.code_version import code_version
from coca.contract import CONTRACT_VERSION, ROW_GROUPS, TokenizerStamp, VersionRecord
from coca.progress import Progress
from coca.tokenizer import Tokenizer
from pipelines.config import RefreshConfig
from pipelines.funnel import Funnel
from pipelines.ledger import latest_events
from pipelines.parts import OUTCOMES, run_parts
from pipelines.publish import BatchManifest, commit_batch, ledger_events, publish_version, write_batch
from pipelines.selection import duplicate_images, winning_urls
from pipelines.staging import Staging
from pipelines.standing import EVENT_COLUMNS, Standing
from pipelines.tables import SCHEMAS, create_tables, drop_foreign_files

# SHA-256 of an empty list of withdrawals.
_NOTHING_WITHDRAWN = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


class RefreshRun:
    """What grows from batch to batch; a restart builds it up again from what is staged."""

    def __init__(self, config: RefreshConfig, staging: Staging, tokenizer: Tokenizer, standing: Standing) -> None:
        self._config, self._staging, self._tokenizer, self._standing = config, staging, tokenizer, standing
        self.latest = standing.latest
        self.unselected = set(standing.unselected)
        self.requests = self.bytes = 0
        """Of the whole refresh, also before a restart."""
        self.fetched_links = self.fetched_bytes = 0
        """Of this process."""
        self.fetch_seconds = 0.0
        self._row_groups = [standing.row_groups]
        self._files = {name: set(files) for name, files in standing.files.items()}
        self._verdicts: Counter[str] = Counter()

    def run(self, plan: pa.Table) -> None:
        """Fetch and commit every batch of a plan (``plan.PLAN``)."""
        store = self._staging.dataset
        create_tables(store)
        for name in SCHEMAS:
            drop_foreign_files(store, name, self._standing.delta_version(name), self._staging.refresh_id)
        to_fetch = plan.num_rows - plan["part"].null_count
        with Progress("fetch", total=to_fetch, unit="links") as progress:
            for batch in range(pc.max(plan["batch"]).as_py() + 1):
                self._run_batch(batch, plan.filter(pc.equal(plan["batch"], batch)), progress)

    def publish(self, funnel: Funnel) -> VersionRecord:
        """Write the version record over the committed batches."""
        store, parent, tokenizer = self._staging.dataset, self._standing.version, self._tokenizer
        path = f"tokenizers/{tokenizer.fingerprint}.json"
        store.write_once(path, tokenizer.to_json().encode())
        draft = {
            "version": (parent or 0) + 1,
            "parent": parent,
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "contract_version": CONTRACT_VERSION,
            "code_version": code_version(),
            "refresh_id": self._staging.refresh_id,
            "rows_per_row_group": self._config.publish.row_group_rows,
            "tokenizer": TokenizerStamp(fingerprint=tokenizer.fingerprint, path=path, vocab_size=tokenizer.vocab_size),
            "withdrawn_sha256": _NOTHING_WITHDRAWN,
            "funnel": {**funnel.model_dump(), "requests": self.requests, "bytes": self.bytes},
            "config": self._config.model_dump(mode="json"),
        }
        return publish_version(store, draft, pa.concat_tables(self._row_groups), self._files)

    def _run_batch(self, batch: int, plan: pa.Table, progress: Progress) -> None:
        staging = replace(self._staging, batch=batch)
        self._fetch(staging, plan, progress)
        parts = plan["part"].drop_null().unique().to_pylist()
        outcomes = {part: staging.read_table(staging.outcome_path(part), OUTCOMES) for part in parts}
        everything = pa.concat_tables([*outcomes.values(), _refused_outcomes(plan)])
        duplicates = self._select(everything)
        manifest = write_batch(staging, outcomes, everything, duplicates, self._config.publish.row_group_rows)
        commit_batch(staging, manifest)
        self._take_in(everything, duplicates, manifest)

    def _fetch(self, staging: Staging, plan: pa.Table, progress: Progress) -> None:
        """Run the parts of a batch that are not staged yet."""
        done = staging.parts_done()
        waiting = []
        for part in plan["part"].drop_null().unique().to_pylist():
            table = plan.filter(pc.equal(plan["part"], part))
            if part in done:
                progress.advance(table.num_rows)
            else:
                waiting.append(table)
        if not waiting:
            return
        started_s = time.monotonic()
        for report in run_parts(waiting, self._config, staging, self._tokenizer):
            self.fetched_links += report.links
            self.fetched_bytes += report.bytes
            self._verdicts += report.verdicts
            progress.advance(report.links, note=_describe(self._verdicts))
        self.fetch_seconds += time.monotonic() - started_s

    def _select(self, outcomes: pa.Table) -> set[str]:
        admitted = outcomes.filter(pc.is_null(outcomes["reason"]))
        winners = winning_urls(self.latest, self.unselected, admitted["source_sha256"])
        return duplicate_images(admitted, winners)

    def _take_in(self, outcomes: pa.Table, duplicates: set[str], manifest: BatchManifest) -> None:
        events = ledger_events(outcomes, self._staging.refresh_id).select(EVENT_COLUMNS)
        self.latest = latest_events(pa.concat_tables([self.latest, events.cast(self.latest.schema)]))
        self.unselected |= duplicates
        self.requests += pc.sum(outcomes["requests"]).as_py()
        self.bytes += pc.sum(outcomes["bytes"]).as_py()
        self._row_groups.append(pa.Table.from_pylist(manifest.row_groups, schema=ROW_GROUPS))
        for name, files in manifest.files.items():
            self._files[name] |= {file.path for file in files}


def _refused_outcomes(plan: pa.Table) -> pa.Table:
    """``OUTCOMES`` of the pairs of a plan that are refused before any request."""
    refused = plan.filter(pc.is_null(plan["part"]))
    now = datetime.now(UTC)
    known = {
        **{name: refused[name] for name in ("sample_id", "url", "caption", "reason")},
        "event_at": pa.array([now] * refused.num_rows, OUTCOMES.field("event_at").type),
        **{name: pa.array([0] * refused.num_rows) for name in ("attempts", "requests", "bytes")},
    }
    columns = {f.name: known.get(f.name, pa.nulls(refused.num_rows, f.type)) for f in OUTCOMES}
    return pa.table(columns).cast(OUTCOMES)


def _describe(verdicts: Counter[str]) -> str:
    """The commonest verdicts, for the line of progress."""
    named = ((reason or "ok", count) for reason, count in verdicts.most_common(4))
    return " ".join(f"{name} {count:,}" for name, count in named)
