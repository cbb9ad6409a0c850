"""Selecting anew: every stored pair is judged by other rules, without a request and without a byte of samples."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from coca.contract import CONTRACT_VERSION, Reason, VersionRecord, link_bucket
from coca.dataset import Dataset
from coca.errors import BadInput
from coca.progress import Progress
from coca.storage import Store
from pipelines.admitted import check_loosening
from pipelines.annotations import (
    AnnotationFile,
    changed_rows,
    reasons_of,
    replace_annotations,
    rewrite_name,
    rewrite_parts,
    row_groups_of,
    with_scores,
    with_selection,
    write_annotations,
)
from pipelines.contaminants import read_contaminants
from pipelines.funnel import make_funnel
from pipelines.history import publish_next
from pipelines.lease import Lease, hold_lease
from pipelines.migrate import migrate_tables
from pipelines.row_group_index import write_row_groups
from pipelines.scorer import ScorerSpec, read_scores, score_parts
from pipelines.select_config import SelectConfig
from pipelines.selection import IN_PROCESS_ROWS, candidate_columns, score_column, select_new
from pipelines.selection_events import CHANGED, write_verdicts
from pipelines.staging import encode_table
from pipelines.stored_keys import StoredKeys, StoredPart, stored_parts, withdrawn_list
from pipelines.tables import drop_foreign_files, read_data_files
from pipelines.tasks import StartRay


@dataclass(frozen=True)
class SelectResult:
    """What a selection changed."""

    dataset: str
    version: int
    changed: bool
    """Whether a version was published; otherwise the latest was selected by these settings already."""
    stored: int
    selected: int
    selected_before: int
    rejected: dict[str, int]
    """Reason -> stored pairs: ``stored == selected + sum(rejected.values())``."""
    verdicts_changed: int
    seconds: float


@dataclass(frozen=True)
class _Job:
    """One selection, as its tasks know it."""

    store: Store
    name: str
    config: SelectConfig
    withdrawn_files: tuple[str, ...]
    withdrawn_sha256: str
    scorers: tuple[str, ...]
    """What they are, as the version record names them."""
    rows_per_row_group: int
    samples_version: int

    @property
    def folder(self) -> str:
        return f"staging/{self.name}"

    @property
    def score_folders(self) -> tuple[str, ...]:
        """By what decides about scores alone: other thresholds after a kill find them again."""
        return tuple(f"staging/{rewrite_name('scores', self.samples_version, source)}" for source in self.scorers)


@dataclass(frozen=True)
class _ScoredKeys:
    """Stored rows with the scores that the scorers of this run have given."""

    keys: StoredKeys
    folders: tuple[str, ...]

    @property
    def rows(self) -> int:
        return self.keys.rows

    def read(self) -> pa.Table:
        rows = self.keys.read()
        for folder in self.folders if "scores" in rows.column_names else ():
            scores = read_scores(self.keys.store, folder, self.keys.part.samples_path)
            places = pc.index_in(rows["sample_id"], value_set=scores["sample_id"].combine_chunks())
            rows = with_scores(rows, scores.take(places))
        return rows


def select_dataset(
    uri: str,
    config: SelectConfig,
    *,
    scorers: Sequence[ScorerSpec] = (),
    start_ray: StartRay | None = None,
    in_process_rows: int = IN_PROCESS_ROWS,
) -> SelectResult:
    """Judge every stored pair of the latest version by ``config`` from scratch, and publish the next version.

    The annotations table is written anew; samples stay as they are. Withdrawn pairs neither win nor are selected. The
    ledger gets an event for each pair whose verdict changes. Killed, the same call goes on.

    Args:
        scorers: run over all stored pairs first; their scores become annotations.
        start_ray: called before the first Ray job: more rows than ``in_process_rows``, or a scorer.

    Raises:
        BadInput: no dataset, a rule looser than what was admitted, a score that no pair has, or the dataset is being
            written.
        RunFailed: the lease is lost, or something else writes here.
    """
    started_s = time.monotonic()
    store = Dataset(uri).store
    with hold_lease(store, "coca data select") as lease:
        dataset = Dataset(uri)
        record = dataset.record
        check_loosening(record, config)
        if not scorers and _stands(dataset, config):
            return _result(dataset, record, record.funnel["rejected"], 0, started_s)
        parts = stored_parts(dataset)
        job = _make_job(dataset, config, [scorer.source for scorer in scorers])
        for scorer, folder in zip(scorers, job.score_folders, strict=True):
            score_parts(store, [part.samples_path for part in parts], scorer, folder, start_ray)
        _stage_selection(job, parts, start_ray, in_process_rows)
        start_many = start_ray if record.samples.rows > in_process_rows else None
        done = rewrite_parts(partial(_rewrite_part, job), list(enumerate(parts)), start_ray=start_many)
        _check_scores(config, done)
        published = _publish(job, record, done, lease, start_many)
        for folder in (job.folder, *job.score_folders):
            store.delete(folder)
        verdicts = sum(each["changed"] for each in done)
        return _result(dataset, published, published.funnel["rejected"], verdicts, started_s)


def _make_job(dataset: Dataset, config: SelectConfig, sources: list[str]) -> _Job:
    record = dataset.record
    settings = config.model_dump(mode="json")
    return _Job(
        store=dataset.store,
        name=rewrite_name("select", record.version, settings, dataset.withdrawn.digest, sources),
        config=config,
        withdrawn_files=dataset.withdrawn_files,
        withdrawn_sha256=dataset.withdrawn.digest,
        scorers=tuple(sources),
        rows_per_row_group=record.rows_per_row_group,
        samples_version=record.samples.delta_version,
    )


def _publish(
    job: _Job, record: VersionRecord, done: list[dict[str, Any]], lease: Lease, start_ray: StartRay | None
) -> VersionRecord:
    """Commit the annotations, the ledger and, last, the version record."""
    store = job.store
    files = [AnnotationFile.model_validate(each["file"]) for each in done]
    for table in ("annotations", "links"):
        drop_foreign_files(store, table, getattr(record, table).delta_version, job.name, lease=lease)
    migrate_tables(store, lease)
    annotations = replace_annotations(store, files, job.name, lease)
    changed = [f"{job.folder}/changed/{place}.parquet" for place, each in enumerate(done) if each["changed"]]
    links = write_verdicts(store, record, changed, job.folder, job.name, lease, start_ray)
    funnel = make_funnel(record.samples.rows, *(each["counts"] for each in done))
    config = {**record.config, "select": job.config.model_dump(mode="json")}
    if job.scorers:
        config["scorers"] = sorted({*record.config.get("scorers", ()), *job.scorers})
    path, digest = write_row_groups(store, record.version + 1, row_groups_of(files))
    return publish_next(
        store,
        record,
        lease,
        kind="select",
        parent=record.version,
        contract_version=CONTRACT_VERSION,
        refresh_id=job.name,
        annotations=annotations,
        links=links,
        selected=funnel.samples,
        row_groups_path=path,
        row_groups_sha256=digest,
        withdrawn_sha256=job.withdrawn_sha256,
        funnel=funnel.model_dump(),
        config=config,
    )


def _stands(dataset: Dataset, config: SelectConfig) -> bool:
    """Whether the latest version was selected by these settings, and nothing has been withdrawn since."""
    record = dataset.record
    same = record.kind == "select" and record.config.get("select") == config.model_dump(mode="json")
    return same and record.withdrawn_sha256 == dataset.withdrawn.digest


def _stage_selection(job: _Job, parts: list[StoredPart], start_ray: StartRay | None, in_process_rows: int) -> None:
    """Leave the unselected pairs in staging, sorted by part."""
    config = job.config
    columns = tuple(candidate_columns(config))
    sources = [
        _ScoredKeys(StoredKeys(job.store, part, columns, job.withdrawn_files, standing=False), job.score_folders)
        for part in parts
    ]
    contaminants = read_contaminants(config.contaminants, config.max_hamming_contaminants)
    with Progress("select", total=sum(part.rows for part in parts), unit="pairs") as progress:
        lost = select_new(sources, [], config, contaminants, start_ray=start_ray, in_process_rows=in_process_rows)
        progress.advance(sum(part.rows for part in parts), note=f"{lost.num_rows:,} not selected")
    job.store.write(f"{job.folder}/unselected.parquet", encode_table(lost, 65_536))


def _rewrite_part(job: _Job, item: tuple[int, StoredPart]) -> dict[str, Any]:
    """Write the new annotations of a part, and the verdicts that change to staging."""
    place, part = item
    before = read_data_files(job.store, "annotations", [part.annotations_path])
    notes = before
    for folder in job.score_folders:
        notes = with_scores(notes, read_scores(job.store, folder, part.samples_path))
    gone = withdrawn_list(job.store, job.withdrawn_files).mask(notes["sample_id"])
    reason = reasons_of(notes["sample_id"], _unselected_of(job, place))
    reason = pc.if_else(pa.array(gone), Reason.WITHDRAWN.value, reason)
    after = with_selection(notes, reason)
    name = f"{part.samples_path.removesuffix('.parquet')}-{job.name}.parquet"
    written = write_annotations(job.store, name, after, job.rows_per_row_group, samples_path=part.samples_path)
    changed = changed_rows(before, after) & ~gone
    if changed.any():
        urls = read_data_files(job.store, "samples", [part.samples_path], ["url"])["url"].filter(pa.array(changed))
        rows = after.select(["sample_id", "reason"]).filter(pa.array(changed))
        buckets = pa.array([link_bucket(url) for url in urls.to_pylist()], pa.string())
        table = rows.append_column("bucket", buckets).select(CHANGED.names).cast(CHANGED)
        job.store.write(f"{job.folder}/changed/{place}.parquet", encode_table(table))
    counts = Counter(pc.fill_null(after["reason"], "").to_pylist())
    known = {name for name in job.config.min_scores if (score_column(after, name) == score_column(after, name)).any()}
    return {"file": written.model_dump(), "changed": int(changed.sum()), "counts": counts, "scores": sorted(known)}


def _unselected_of(job: _Job, place: int) -> pa.Table:
    path = job.store.path(f"{job.folder}/unselected.parquet")
    table = pads.dataset(path, format="parquet", filesystem=job.store.filesystem, partitioning=None)
    return table.to_table(columns=["sample_id", "reason"], filter=pads.field("source") == place)


def _check_scores(config: SelectConfig, done: list[dict[str, Any]]) -> None:
    known = {name for each in done for name in each["scores"]}
    missing = sorted(set(config.min_scores) - known)
    if missing and done:
        raise BadInput(
            f"select.min_scores asks for {missing[0]!r}, a score that no stored pair has",
            "Give the scorer that makes it with --scorer, or leave that threshold out",
        )


def _result(
    dataset: Dataset, record: VersionRecord, rejected: dict[str, int], verdicts: int, started_s: float
) -> SelectResult:
    return SelectResult(
        dataset=dataset.store.uri,
        version=record.version,
        changed=record.version != dataset.record.version,
        stored=record.samples.rows,
        selected=record.selected,
        selected_before=dataset.record.selected,
        rejected=rejected,
        verdicts_changed=verdicts,
        seconds=round(time.monotonic() - started_s, 3),
    )
