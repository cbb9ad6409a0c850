"""One refresh of a dataset: read links, judge, fetch what is due, publish a version. Idempotent and resumable."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from coca.contract import VersionRecord
from coca.errors import BadInput
from coca.storage import Store
from coca.tokenizer import Tokenizer
from pipelines.block_lists import load_blocked_hashes
from pipelines.caption_counts import KEYS, frequent_captions
from pipelines.config import RefreshConfig
from pipelines.finish import finish_refresh
from pipelines.funnel import Funnel, make_funnel
from pipelines.image_transform import transform_image
from pipelines.img2dataset_engine import import_download
from pipelines.import_plan import deal_by_shard, regroup_by_shard
from pipelines.import_shards import Shard
from pipelines.intake import Intake, LinksTable, PairSource, read_spilled, take_in
from pipelines.join import JoinSettings
from pipelines.lease import Lease, hold_lease
from pipelines.ledger import Ledger
from pipelines.migrate import migrate_tables
from pipelines.parts import FetchJob
from pipelines.plan import Plan, load_plan, make_plan, refresh_id, write_plan
from pipelines.reopen import reopened_by_refresh
from pipelines.run import RefreshRun
from pipelines.scorer import ScorerSpec
from pipelines.select_config import SelectConfig
from pipelines.staging import Staging, clear_staging
from pipelines.standing import Standing, read_standing
from pipelines.tables import SCHEMAS, create_tables, drop_foreign_files
from pipelines.tasks import StartRay, run_tasks

NEW_ROWS_PER_ROW_GROUP = 1024


@dataclass(frozen=True)
class RefreshResult:
    """What a refresh did, and where the links it was given stand."""

    dataset: str
    version: int
    changed: bool
    """Whether a version was published; otherwise nothing was due."""
    links: int
    samples: int
    """Links that are selected samples of the version."""
    rejected: dict[str, int]
    """Reason -> the other links: ``links == samples + sum(rejected.values())``."""
    version_samples: int
    """Selected samples of the version in all, from whatever links."""
    requests: int
    """HTTP requests of this refresh, also before a restart."""
    bytes: int
    """Body bytes received, likewise."""
    withdrawn: int
    """Stored samples whose owners have opted out since: they are in no version from now on."""
    seconds: float
    """Of this call."""
    links_per_s: float
    """Urls that this call fetched, per second of fetching."""
    bytes_per_s: float
    """Body bytes that this call received, per second of fetching."""


def refresh(
    config: RefreshConfig, *, scorers: Sequence[ScorerSpec] = (), start_ray: StartRay | None = None
) -> RefreshResult:
    """Bring a dataset up to date with a table of links.

    After a kill the same call goes on from the first missing step; after success it finds nothing due, asks nobody
    and changes nothing.

    Args:
        scorers: grade what is stored, before the selection.
        start_ray: called before the first job, where there is any; without it Ray is initialised already.

    Raises:
        BadInput: the links, the tokenizer or the settings cannot be used with this dataset, or another refresh of it
            is at work.
        RunFailed: the dataset was written by something else meanwhile.
    """
    store = open_target(config)
    source = LinksTable.open(config.links)
    return run_refresh(store, source, config, Kind("refresh"), scorers=scorers, start_ray=start_ray)


@dataclass(frozen=True)
class Kind:
    """What sets a refresh from links and an import apart."""

    name: str
    """As the version record has it."""
    shards: tuple[Shard, ...] = ()
    """Where an import's bytes lie."""


def run_refresh(
    store: Store,
    source: PairSource,
    config: RefreshConfig,
    kind: Kind,
    *,
    scorers: Sequence[ScorerSpec],
    start_ray: StartRay | None,
) -> RefreshResult:
    """Bring a dataset up to date with the pairs of a source."""
    started_s = time.monotonic()
    _check_scores(settle_config(config, read_standing(store))[0], scorers)
    _check_workers_needs(config)
    with hold_lease(store, f"coca data {kind.name}", config.publish.lease_s) as lease:
        standing = read_standing(store)
        config, tokenizer = settle_config(config, standing)
        _check_scores(config, scorers)
        ledger_rows = sum(standing.files["links"].values())
        intake = take_in(store, source, config, ledger_rows=ledger_rows, start_ray=start_ray)
        # Of an import the shards themselves count: its plan names places in them.
        pieces = repr(kind.shards) if kind.shards else ""
        staging = Staging(store, refresh_id(intake, config, tokenizer.fingerprint, standing.version, pieces))
        plan = load_plan(staging)
        if plan is None:
            plan = plan_refresh(config, staging, intake, standing, start_ray, shards=kind.shards)
            if kind.shards:
                plan = regroup_by_shard(staging, plan, config.publish.links_per_batch)
            plan = write_plan(staging, plan)
        if not plan.batches and standing.record is not None:
            lease.check()
            clear_staging(store)
            return _result(store, standing.record, make_funnel(plan.links, plan.standing), None, 0, started_s)
        _prepare_tables(staging, standing, lease)
        if start_ray is not None and any(batch.urls for batch in plan.batches):
            start_ray()
        job = FetchJob(config, staging, tokenizer, standing.withdrawn, lease_epoch=lease.epoch, shards=kind.shards)
        run = RefreshRun(job, plan, lease, deal_by_shard if kind.shards else None)
        run.run()
        record, funnel, withdrawn = finish_refresh(run, standing, lease, scorers, kind.name, start_ray=start_ray)
        lease.check()
        clear_staging(store)
        return _result(store, record, funnel, run, withdrawn, started_s)


def open_target(config: RefreshConfig) -> Store:
    """The dataset's store; raises BadInput where none is named or a file is in the way."""
    if not config.to:
        raise BadInput("no dataset is given", "Name one with --to DATASET")
    store = Store(config.to)
    store.check_folder("--to")
    if "%" in store.root:
        raise BadInput(
            f"--to {config.to} has a %, which the tables' library takes for an escape", "Name another folder"
        )
    return store


def plan_refresh(
    config: RefreshConfig,
    staging: Staging,
    intake: Intake,
    standing: Standing,
    start_ray: StartRay | None,
    *,
    shards: Sequence[Shard] = (),
) -> Plan:
    """What is due now; the plan itself is not staged yet. ``shards`` are those of an import."""
    rechecks = -(-config.recheck.max_stored // intake.shards)
    settings = JoinSettings(
        now=datetime.now(UTC),
        seed=config.publish.seed,
        chunk_urls=config.publish.links_per_batch,
        rechecks_per_shard=rechecks,
        recheck=config.recheck,
        reopened=reopened_by_refresh(config, Store(config.to), standing.record),
        frequent_captions=find_frequent_captions(intake, config.judge.max_caption_count, start_ray),
        withdrawn=standing.withdrawn,
        imported_at=[shard.written_at for shard in shards],
    )
    ledger = Ledger.of_files(Store(config.to), standing.files["links"])
    return make_plan(staging, intake, ledger, settings, config.budget.max_links, start_ray=start_ray)


def find_frequent_captions(intake: Intake, most: int | None, start_ray: StartRay | None) -> np.ndarray:
    """Hashes of the captions that more than ``most`` pairs of the links table have."""
    if most is None:
        return np.empty(0, dtype=np.uint64)
    task = partial(_frequent_of_shard, intake=intake, most=most)
    found = run_tasks(task, list(range(intake.shards)), start_ray=start_ray)
    return np.array(sorted(each for shard in found for each in shard), dtype=np.uint64)


def _frequent_of_shard(shard: int, *, intake: Intake, most: int) -> list[int]:
    keys = read_spilled(intake.store, f"{intake.folder}/captions/c{shard:03d}", KEYS)
    return [int(caption) for caption in frequent_captions(keys, most)]


def _prepare_tables(staging: Staging, standing: Standing, lease: Lease) -> None:
    """The tables as the parent version has them, but for what this refresh itself has added before a restart."""
    store = staging.dataset
    lease.check()
    for folder in (*SCHEMAS, "versions", "tokenizers"):
        store.sweep_unfinished(folder)
    create_tables(store)
    for name in SCHEMAS:
        drop_foreign_files(store, name, standing.delta_version(name), staging.refresh_id, lease=lease)
    migrate_tables(store, lease)  # last: going back to an older state takes the columns back, too


def settle_config(config: RefreshConfig, standing: Standing) -> tuple[RefreshConfig, Tokenizer]:
    """The config with the dataset's own rows per row group and rules of selection, and the tokenizer.

    A refresh that says nothing about selection goes on with what the dataset has, also after `coca data select`.

    Raises:
        BadInput: one of them cannot be used with this dataset.
    """
    wanted = config.publish.rows_per_row_group
    fixed = standing.record.rows_per_row_group if standing.record else wanted or NEW_ROWS_PER_ROW_GROUP
    if wanted not in (None, fixed):
        raise BadInput(
            f"publish.rows_per_row_group = {wanted}, but {config.to} has {fixed} for good",
            "Leave it out, or refresh into a new dataset",
        )
    settled: dict[str, Any] = {"publish": config.publish.model_copy(update={"rows_per_row_group": fixed})}
    if standing.record and "select" not in config.model_fields_set:
        settled["select"] = SelectConfig.model_validate(standing.record.config.get("select", {}))
    return config.model_copy(update=settled), _choose_tokenizer(config, standing)


def _check_workers_needs(config: RefreshConfig) -> None:
    """Raises BadInput here, before any request, for what every fetching worker would raise."""
    if config.judge.block_hashes:
        load_blocked_hashes(config.judge.block_hashes)
    if config.fetch.engine == "img2dataset":
        import_download()
    if config.image.transform is not None:
        transform_image(config.image.transform, Image.new("RGB", (32, 32)))


def _check_scores(config: RefreshConfig, scorers: Sequence[ScorerSpec]) -> None:
    if config.select.min_scores and not scorers:
        names = ", ".join(config.select.min_scores)
        raise BadInput(
            f"select.min_scores asks for {names}, but new samples would have no score",
            "Name the scorer with --scorer, or take the rule away with --set select.min_scores={}",
        )


def _choose_tokenizer(config: RefreshConfig, standing: Standing) -> Tokenizer:
    if config.tokenizer is None:
        if standing.tokenizer is None:
            raise BadInput(
                f"{config.to} is new and has no tokenizer yet",
                "Train one with `coca tokenizer train --from LINKS --out FILE` and name it with --tokenizer FILE",
            )
        return standing.tokenizer
    tokenizer = Tokenizer.load(config.tokenizer)
    if standing.tokenizer is not None and tokenizer.fingerprint != standing.tokenizer.fingerprint:
        raise BadInput(
            f"{config.tokenizer} has fingerprint {tokenizer.fingerprint}, but {config.to} was written by the tokenizer "
            f"{standing.tokenizer.fingerprint}",
            "Leave --tokenizer out to use the dataset's own, or change it with `coca data retokenize`",
        )
    return tokenizer


def _result(
    store: Store, record: VersionRecord, funnel: Funnel, run: RefreshRun | None, withdrawn: int, started_s: float
) -> RefreshResult:
    spent: Any = run.spent if run else None
    fetched = bool(run and run.spent.fetch_seconds)
    return RefreshResult(
        dataset=store.uri,
        version=record.version,
        changed=run is not None,
        **funnel.model_dump(),
        version_samples=record.selected,
        requests=spent.requests if run else 0,
        bytes=spent.bytes if run else 0,
        withdrawn=withdrawn,
        seconds=round(time.monotonic() - started_s, 3),
        links_per_s=round(spent.fetched_urls / spent.fetch_seconds, 1) if fetched else 0.0,
        bytes_per_s=round(spent.fetched_bytes / spent.fetch_seconds, 1) if fetched else 0.0,
    )
