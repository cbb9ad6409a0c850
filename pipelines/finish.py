"""The end of a refresh: scores, selection, annotations, the ledger's mirror of it, withdrawals, the version record."""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from coca.code_version import code_version
from coca.contract import CONTRACT_VERSION, ROW_GROUPS, TokenizerStamp, VersionRecord
from coca.dataset import Dataset
from coca.withdrawn import append_withdrawn, read_withdrawn
from pipelines.annotations import AnnotationFile, reasons_of, with_scores, with_selection, write_annotations
from pipelines.contaminants import read_contaminants
from pipelines.funnel import Funnel, make_funnel
from pipelines.lease import Lease
from pipelines.outcomes import OUTCOMES, admitted_rows
from pipelines.parts import FetchJob
from pipelines.presets import preset
from pipelines.publish import publish_version, write_events
from pipelines.run import RefreshRun
from pipelines.scorer import SCORES, ScorerSpec, score_parts, scores_path
from pipelines.selection import UNSELECTED, candidate_columns, select_new
from pipelines.staging import Staging, read_table
from pipelines.standing import Standing
from pipelines.stored_keys import StoredKeys, stored_parts
from pipelines.tables import DataFile, commit_files
from pipelines.tasks import StartRay
from pipelines.withdraw import find_stored, unlisted

_WRITE_THREADS = 8


@dataclass(frozen=True)
class PartKeys:
    """The admitted rows of a part of this refresh, as ``selection.CANDIDATES``."""

    staging: Staging
    batch: int
    part: int
    rows: int
    score_folders: tuple[str, ...]
    columns: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of its samples file."""
        return self.staging.data_name(self.batch, self.part)

    def read(self) -> pa.Table:
        return self.read_rows().select(list(self.columns))

    def read_rows(self) -> pa.Table:
        """``OUTCOMES`` with ``scores``, in the order of the samples file."""
        rows = admitted_rows(self.staging.read_table(self.staging.outcome_path(self.batch, self.part), OUTCOMES))
        rows = rows.append_column(SCORES.field("scores"), pa.nulls(rows.num_rows, SCORES.field("scores").type))
        for folder in self.score_folders:
            rows = with_scores(rows, read_table(self.staging.dataset, scores_path(folder, self.name), SCORES))
        return rows


class SelectionManifest(BaseModel):
    """Everything that the end of a refresh commits; staged once all its files lie in place."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    annotations: list[DataFile]
    links: list[DataFile]
    row_groups: list[dict[str, Any]]
    moved: dict[str, int]
    """Reason -> samples of this refresh that are stored and not selected."""


def finish_refresh(
    run: RefreshRun,
    standing: Standing,
    lease: Lease,
    scorers: Sequence[ScorerSpec],
    kind: str,
    *,
    start_ray: StartRay | None,
) -> tuple[VersionRecord, Funnel, int]:
    """Select among what the batches have stored, commit that, and publish the version.

    Returns:
        The record, where the links table stands, and how many stored samples were withdrawn.
    """
    job, staging = run.job, run.job.staging
    folders = tuple(f"{staging.folder}/scores-{number}" for number in range(len(scorers)))
    parts = list(_new_parts(run, folders))
    for scorer, folder in zip(scorers, folders, strict=True):
        score_parts(staging.dataset, [part.name for part in parts], scorer, folder, start_ray)
    manifest = _stage_selection(job, parts, standing, start_ray)
    commit = (staging.refresh_id, len(run.plan.batches))
    for table, files in (("annotations", manifest.annotations), ("links", manifest.links)):
        if files:
            commit_files(staging.dataset, table, files, *commit, lease=lease)
    withdrawn = _withdraw_opted_out(run, lease)
    lost = sum(manifest.moved.values())
    counts: list[Counter[str]] = [Counter(batch.counts) for batch in run.manifests.values()]
    waiting = {"waiting": run.waiting}
    funnel = make_funnel(run.plan.links, run.plan.standing, *counts, {**manifest.moved, "": -lost}, waiting)
    return _publish(run, manifest, standing, lease, funnel, scorers, kind), funnel, withdrawn


def _new_parts(run: RefreshRun, score_folders: tuple[str, ...]) -> Iterator[PartKeys]:
    columns = tuple(candidate_columns(run.job.config.select))
    for batch, manifest in sorted(run.manifests.items()):
        rows = {file.path: file.rows for file in manifest.samples}
        for part in manifest.parts:
            name = run.job.staging.data_name(batch, part)
            if name in rows:
                yield PartKeys(run.job.staging, batch, part, rows[name], score_folders, columns)


def _stage_selection(
    job: FetchJob, parts: list[PartKeys], standing: Standing, start_ray: StartRay | None
) -> SelectionManifest:
    """Select, and write the annotations of the new parts and the ledger events of what is not selected."""
    staging = job.staging
    if staging.dataset.exists(staging.selection_path):
        return SelectionManifest.model_validate_json(staging.dataset.read(staging.selection_path))
    unselected = UNSELECTED.empty_table()
    if parts:
        select = job.config.select
        contaminants = read_contaminants(select.contaminants, select.max_hamming_contaminants)
        unselected = select_new(parts, _standing_keys(job, standing), select, contaminants, start_ray=start_ray)

    def annotate(place: int) -> tuple[AnnotationFile, pa.Table]:
        lost = unselected.filter(pc.equal(unselected["source"], place))
        return _annotate(parts[place], lost, job.config.publish.row_group_rows)

    with ThreadPoolExecutor(_WRITE_THREADS) as pool:
        written = list(pool.map(annotate, range(len(parts))))
    files = [file for file, _ in written]
    events = pa.concat_tables([OUTCOMES.empty_table(), *(lost for _, lost in written)])
    prefix = f"{staging.refresh_id}-selection"
    manifest = SelectionManifest(
        annotations=[each.file for each in files],
        links=write_events(staging.dataset, events, staging.refresh_id, prefix),
        row_groups=[row for each in files for row in each.row_groups()],
        moved=dict(Counter(events["reason"].to_pylist())),
    )
    staging.dataset.write(staging.selection_path, manifest.model_dump_json().encode())
    return manifest


def _standing_keys(job: FetchJob, standing: Standing) -> list[StoredKeys]:
    if standing.record is None:
        return []
    dataset = Dataset(job.staging.dataset.uri, standing.record.version)
    columns = tuple(candidate_columns(job.config.select))
    return [
        StoredKeys(dataset.store, part, columns, dataset.withdrawn_files, standing=True)
        for part in stored_parts(dataset)
    ]


def _annotate(part: PartKeys, lost: pa.Table, rows_per_row_group: int) -> tuple[AnnotationFile, pa.Table]:
    """The annotations file of a part, and the events (``OUTCOMES``) of its rows that are not selected."""
    rows = part.read_rows()
    reasons = reasons_of(rows["sample_id"], lost)
    empty = {"selected": pa.nulls(rows.num_rows, pa.bool_()), "reason": pa.nulls(rows.num_rows, pa.string())}
    notes = pa.table({**{name: rows[name] for name in ("sample_id", "tokens", "language")}, **empty})
    notes = with_selection(notes.append_column("scores", rows["scores"]), reasons)
    file = write_annotations(part.staging.dataset, part.name, notes, rows_per_row_group, samples_path=part.name)
    events = rows.select(OUTCOMES.names)
    # After the event of its storing, by the least that the ledger can tell. Nobody was asked again.
    later = pc.add(events["event_at"], timedelta(microseconds=1))
    for name, column in (("reason", reasons), ("event_at", later)):
        events = events.set_column(OUTCOMES.get_field_index(name), OUTCOMES.field(name), column)
    return file, events.filter(pc.is_valid(reasons))


def _standing_scorers(standing: Standing) -> list[str]:
    return list(standing.record.config.get("scorers", [])) if standing.record else []


def _withdraw_opted_out(run: RefreshRun, lease: Lease) -> int:
    """Put what its owners have opted out since on the withdrawn list, every stored copy of the pictures with it."""
    urls = sorted({url for manifest in run.manifests.values() for url in manifest.opted_out})
    if not urls:
        return 0
    store = run.job.staging.dataset
    rows = unlisted(find_stored(store, urls=urls), read_withdrawn(store))
    lease.check()
    append_withdrawn(store, rows, f"opted-out-{run.job.staging.refresh_id}")
    return rows.num_rows


def _publish(
    run: RefreshRun,
    manifest: SelectionManifest,
    standing: Standing,
    lease: Lease,
    funnel: Funnel,
    scorers: Sequence[ScorerSpec],
    kind: str,
) -> VersionRecord:
    job, store, parent = run.job, run.job.staging.dataset, standing.version
    tokenizer, config, settings = job.tokenizer, job.config, job.config.model_dump(mode="json")
    path = f"tokenizers/{tokenizer.fingerprint}.json"
    store.write_once(path, tokenizer.to_json().encode())
    files = {name: set(known) for name, known in standing.files.items()}
    for batch in run.manifests.values():
        files["samples"] |= {file.path for file in batch.samples}
        files["links"] |= {file.path for file in batch.links}
    files["annotations"] |= {file.path for file in manifest.annotations}
    files["links"] |= {file.path for file in manifest.links}
    draft = {
        "version": (parent or 0) + 1,
        "parent": parent,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "contract_version": CONTRACT_VERSION,
        "code_version": code_version(),
        "kind": kind,
        "refresh_id": job.staging.refresh_id,
        "rows_per_row_group": config.publish.row_group_rows,
        "tokenizer": TokenizerStamp(fingerprint=tokenizer.fingerprint, path=path, vocab_size=tokenizer.vocab_size),
        "withdrawn_sha256": read_withdrawn(store).digest,
        "funnel": {**funnel.model_dump(), "requests": run.spent.requests, "bytes": run.spent.bytes},
        "unapplied_rules": preset(config.preset).unapplied_rules(settings),
        "config": {**settings, "scorers": [scorer.source for scorer in scorers] or _standing_scorers(standing)},
    }
    groups = pa.Table.from_pylist(manifest.row_groups, schema=ROW_GROUPS)
    return publish_version(store, draft, pa.concat_tables([standing.row_groups, groups]), files, lease)
