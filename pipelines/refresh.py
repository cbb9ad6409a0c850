"""One refresh of a dataset: read links, judge, fetch what is due, publish a version. Idempotent and resumable."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc

from coca.contract import Reason, VersionRecord
from coca.errors import BadInput
from coca.storage import Store, open_file
from coca.tokenizer import Tokenizer
from pipelines.config import RefreshConfig
from pipelines.funnel import Funnel, count_verdicts
from pipelines.judge import JUDGED, judge_links
from pipelines.ledger import standing_mask
from pipelines.links import read_links
from pipelines.plan import load_or_write_plan, make_plan, refresh_id
from pipelines.run import RefreshRun
from pipelines.staging import Staging
from pipelines.standing import Standing, read_standing

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
    seconds: float
    """Of this call."""
    links_per_s: float
    """Links that this call fetched, per second of fetching."""
    bytes_per_s: float
    """Body bytes that this call received, per second of fetching."""


def refresh(config: RefreshConfig, *, start_ray: Callable[[], object] | None = None) -> RefreshResult:
    """Bring a dataset up to date with a table of links.

    After a kill the same call goes on from the first missing step; after success it finds nothing due, asks nobody
    and changes nothing.

    Args:
        start_ray: called before the first fetch, where there is any; without it Ray is initialised already.

    Raises:
        BadInput: the links, the tokenizer or the settings cannot be used with this dataset.
        RunFailed: another refresh came in between.
    """
    started_s = time.monotonic()
    if not config.to:
        raise BadInput("no dataset is given", "Name one with --to DATASET")
    store = Store(config.to)
    store.check_folder("--to")
    judged = judge_links(read_links(config.links), config.judge)
    standing = read_standing(store)
    tokenizer = _choose_tokenizer(config, standing)
    config = _settle_layout(config, standing)
    due = _due_pairs(judged, config, standing)
    if due.num_rows == 0 and standing.record is not None:
        # What a refresh left that was killed between its record and its sweeping.
        store.delete(f"staging/{standing.record.refresh_id}")
        funnel = count_verdicts(judged, standing.latest, standing.unselected)
        return _result(store, standing.record, funnel, None, started_s)
    staging = Staging(store, refresh_id(judged, config, tokenizer.fingerprint, standing.version))
    plan = load_or_write_plan(store, staging.plan_path, make_plan(due, config.publish))
    if start_ray is not None and plan["part"].null_count < plan.num_rows:
        start_ray()
    run = RefreshRun(config, staging, tokenizer, standing)
    run.run(plan)
    funnel = count_verdicts(judged, run.latest, run.unselected)
    record = run.publish(funnel)
    store.delete("staging")
    return _result(store, record, funnel, run, started_s)


def _due_pairs(judged: pa.Table, config: RefreshConfig, standing: Standing) -> pa.Table:
    """One row for each pair without a standing verdict."""
    repeated = pc.fill_null(pc.equal(judged["reason"], Reason.DUPLICATE_PAIR.value), False)
    first = judged.filter(pc.invert(repeated))
    standing_rows = standing_mask(
        first["sample_id"], standing.latest, datetime.now(UTC), blocked_stand=not _opens_networks(config, standing)
    )
    due = first.filter(pc.invert(standing_rows))
    if due.num_rows == 0:
        return due
    # Pairs that are refused before any request may share a key and are one event in the ledger.
    once = due.group_by("sample_id", use_threads=False).aggregate([(name, "first") for name in JUDGED.names[1:]])
    return once.rename_columns(JUDGED.names).cast(JUDGED)


def _opens_networks(config: RefreshConfig, standing: Standing) -> bool:
    """Whether a network is allowed that was not when the dataset was last refreshed: what it blocked is due again."""
    before = standing.record.config["fetch"]["allow_networks"] if standing.record else []
    return not set(config.model_dump(mode="json")["fetch"]["allow_networks"]) <= set(before)


def _choose_tokenizer(config: RefreshConfig, standing: Standing) -> Tokenizer:
    if config.tokenizer is None:
        if standing.tokenizer is None:
            raise BadInput(
                f"{config.to} is new and has no tokenizer yet",
                "Train one with `coca tokenizer train --from LINKS --out FILE` and name it with --tokenizer FILE",
            )
        return standing.tokenizer
    tokenizer = _read_tokenizer(config.tokenizer)
    if standing.tokenizer is not None and tokenizer.fingerprint != standing.tokenizer.fingerprint:
        raise BadInput(
            f"{config.tokenizer} has fingerprint {tokenizer.fingerprint}, but {config.to} was written by the tokenizer "
            f"{standing.tokenizer.fingerprint}",
            "Leave --tokenizer out to use the dataset's own, or refresh into a new dataset",
        )
    return tokenizer


def _read_tokenizer(uri: str) -> Tokenizer:
    store, name = open_file(uri)
    try:
        text = store.read(name).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the tokenizer {uri}: {error}", "Train one with `coca tokenizer train`") from None
    return Tokenizer.from_json(text, source=uri)


def _settle_layout(config: RefreshConfig, standing: Standing) -> RefreshConfig:
    """The config with the dataset's own rows per row group."""
    wanted = config.publish.rows_per_row_group
    fixed = standing.record.rows_per_row_group if standing.record else wanted or NEW_ROWS_PER_ROW_GROUP
    if wanted not in (None, fixed):
        raise BadInput(
            f"publish.rows_per_row_group = {wanted}, but {config.to} has {fixed} for good",
            "Leave it out, or refresh into a new dataset",
        )
    publish = config.publish.model_copy(update={"rows_per_row_group": fixed})
    return config.model_copy(update={"publish": publish})


def _result(
    store: Store, record: VersionRecord, funnel: Funnel, run: RefreshRun | None, started_s: float
) -> RefreshResult:
    fetch_seconds = run.fetch_seconds if run else 0.0
    return RefreshResult(
        dataset=store.uri,
        version=record.version,
        changed=run is not None,
        **funnel.model_dump(),
        version_samples=record.selected,
        requests=run.requests if run else 0,
        bytes=run.bytes if run else 0,
        seconds=round(time.monotonic() - started_s, 3),
        links_per_s=round(run.fetched_links / fetch_seconds, 1) if run and fetch_seconds else 0.0,
        bytes_per_s=round(run.fetched_bytes / fetch_seconds, 1) if run and fetch_seconds else 0.0,
    )
