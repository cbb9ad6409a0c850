"""Withdrawing pictures: finding every stored copy, and adding it to the list that only grows."""

import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from coca.contract import Reason, canonical_url
from coca.dataset import Dataset
from coca.errors import BadInput, RunFailed
from coca.storage import Store
from coca.withdrawn import WITHDRAWN, Withdrawn, append_withdrawn, read_withdrawn
from pipelines.lease import hold_lease
from pipelines.tables import lying_files

_SCAN_THREADS = 8
_FOUND = ["sample_id", "url", "source_sha256", "sha256"]
_KEY = ["sample_id", "samples_path", "row_group"]


@dataclass(frozen=True)
class WithdrawResult:
    """What a withdrawal added to the list."""

    dataset: str
    samples: int
    """Stored samples that are now in no version."""
    pictures: int
    """Different pictures (fetched bytes) among them."""
    refused: int
    """Urls, digests and ids that nothing is stored of: they are refused from now on."""
    withdrawn: int
    """Samples on the list in all."""


def withdraw(
    uri: str,
    *,
    urls: Iterable[str] = (),
    source_sha256: Iterable[str] = (),
    sample_ids: Iterable[str] = (),
    reason: str,
) -> WithdrawResult:
    """Withdraw pictures from every version of a dataset, with every stored copy of them.

    Raises:
        BadInput: no dataset, nothing named, something that is no url or digest, or the dataset is being written.
    """
    store = Dataset(uri).store
    wanted = {
        "url": [_canonical(url) for url in urls],
        "source_sha256": [_hex(digest, 64, "a SHA-256") for digest in source_sha256],
        "sample_id": [_hex(key, 32, "a sample id") for key in sample_ids],
    }
    if not any(wanted.values()):
        raise BadInput("nothing to withdraw is named", "Name it with --url, --sha256, --sample-id or --from FILE")
    with hold_lease(store, "coca data withdraw") as lease:
        found = find_stored(
            store,
            urls=wanted["url"],
            source_sha256=wanted["source_sha256"],
            sample_ids=wanted["sample_id"],
            reason=reason,
        )
        before = read_withdrawn(store)
        new, refused = unlisted(found, before), _refusals(wanted, found, before, reason)
        lease.check()
        append_withdrawn(store, pa.concat_tables([new, refused]), unique_name("withdraw"))
        pictures = len(pc.unique(new["source_sha256"]))
        return WithdrawResult(store.uri, new.num_rows, pictures, refused.num_rows, len(read_withdrawn(store)))


def read_targets(file: Path) -> dict[str, list[str]]:
    """What a file names, one url, SHA-256 or sample id a line: the arguments of ``withdraw``.

    Raises:
        BadInput: the file cannot be read, or a line is none of them.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"cannot read {file}: {error}", "Give a text file with one url, SHA-256 or sample id a line"
        ) from None
    targets: dict[str, list[str]] = {"urls": [], "source_sha256": [], "sample_ids": []}
    for number, line in enumerate((line.strip() for line in lines), start=1):
        if not line or line.startswith("#"):
            continue
        kind = "urls" if "://" in line else {64: "source_sha256", 32: "sample_ids"}.get(len(line))
        if kind is None:
            raise BadInput(f"line {number} of {file} is no url, SHA-256 or sample id: {line!r}", "Mend the line")
        targets[kind].append(line)
    return targets


def find_stored(
    store: Store,
    *,
    urls: Iterable[str] | pa.Array = (),
    source_sha256: Iterable[str] | pa.Array = (),
    sample_ids: Iterable[str] | pa.Array = (),
    reason: str = Reason.OPTED_OUT.value,
) -> pa.Table:
    """Every stored copy of pictures, as rows for ``append_withdrawn``.

    All files that lie in samples/ are looked through, those of other versions and of a refresh that waits to go on as
    well: what is withdrawn may be in none of them. A copy is a row with the same fetched or the same stored bytes.
    Memory does not grow with the dataset.

    Args:
        urls: canonical.

    Returns:
        ``WITHDRAWN``, sorted by place.
    """
    paths = sorted(lying_files(store, "samples"))
    keys = {"url": urls, "source_sha256": source_sha256, "sample_id": sample_ids}
    found = _scan(store, paths, {name: _strings(values) for name, values in keys.items()})
    rows = 0
    while found.num_rows > rows:  # copies of copies
        rows = found.num_rows
        found = _scan(store, paths, {name: pc.unique(found[name]) for name in ("source_sha256", "sha256")})
    now = pa.scalar(datetime.now(UTC), WITHDRAWN.field("withdrawn_at").type)
    found = found.append_column("reason", pa.repeat(pa.scalar(reason), found.num_rows))
    return found.append_column("withdrawn_at", pa.repeat(now, found.num_rows)).select(WITHDRAWN.names).cast(WITHDRAWN)


def unlisted(found: pa.Table, withdrawn: Withdrawn) -> pa.Table:
    """The rows of ``find_stored`` that the list does not have yet, each place of a sample once."""
    new = found.join(withdrawn.table.select(_KEY), keys=_KEY, join_type="left anti").select(WITHDRAWN.names)
    return new.sort_by([(name, "ascending") for name in (*_KEY[1:], "sample_id")]).cast(WITHDRAWN)


def unique_name(command: str) -> str:
    """A name for one addition to the list; names sort by time."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{command}-{uuid.uuid4().hex[:8]}"


def _scan(store: Store, paths: list[str], wanted: dict[str, pa.Array]) -> pa.Table:
    """Rows of samples files of which a column has a wanted value: ``_FOUND`` and their place."""
    wanted = {name: values for name, values in wanted.items() if len(values)}
    schema = pa.schema([*(pa.field(name, pa.string()) for name in _FOUND), *map(WITHDRAWN.field, _KEY[1:])])
    if not wanted:
        return schema.empty_table()
    with ThreadPoolExecutor(_SCAN_THREADS) as pool:
        tables = [table for table in pool.map(partial(_scan_file, store, wanted), paths) if table is not None]
    return pa.concat_tables([schema.empty_table(), *(table.cast(schema) for table in tables)])


def _scan_file(store: Store, wanted: dict[str, pa.Array], path: str) -> pa.Table | None:
    try:
        with store.filesystem.open_input_file(store.path(f"samples/{path}")) as source:
            file = pq.ParquetFile(source)
            table = file.read(columns=list(wanted))
            mask = np.zeros(table.num_rows, dtype=bool)
            for name, values in wanted.items():
                mask |= pc.is_in(table[name], value_set=values).to_numpy()
            if not mask.any():
                return None
            rows = file.read(columns=_FOUND).filter(mask)
            ends = np.cumsum([file.metadata.row_group(n).num_rows for n in range(file.metadata.num_row_groups)])
    except (pa.ArrowInvalid, FileNotFoundError) as error:
        raise RunFailed(f"{store.uri}/samples/{path} cannot be read: {error}; see `coca data verify`") from None
    groups = np.searchsorted(ends, np.flatnonzero(mask), side="right")
    rows = rows.append_column("samples_path", pa.repeat(pa.scalar(path), rows.num_rows))
    return rows.append_column("row_group", pa.array(groups, pa.int32()))


def _refusals(wanted: dict[str, list[str]], found: pa.Table, before: Withdrawn, reason: str) -> pa.Table:
    """Entries for what nothing is stored of, so that a later refresh stores nothing either."""
    listed = {"url": before.urls, "source_sha256": before.source_sha256, "sample_id": before.sample_ids}
    now = datetime.now(UTC)
    rows = []
    for name, values in wanted.items():
        known = set(found[name].to_pylist()) | set(listed[name].filter(_is_in(listed[name], values)).to_pylist())
        unknown = [value for value in dict.fromkeys(values) if value not in known]
        rows += [{name: value, "reason": reason, "withdrawn_at": now} for value in unknown]
    return pa.Table.from_pylist(rows, schema=WITHDRAWN)


def _is_in(array: pa.Array, values: list[str]) -> pa.Array:
    return pc.is_in(array, value_set=pa.array(values, pa.string()))


def _strings(values: Iterable[str] | pa.Array) -> pa.Array:
    return values if isinstance(values, pa.Array) else pa.array(list(values), pa.string())


def _canonical(url: str) -> str:
    canonical = canonical_url(url)
    if canonical is None:
        raise BadInput(f"{url!r} is no http(s) url", "Write it as it stands in the table of links")
    return canonical


def _hex(text: str, digits: int, kind: str) -> str:
    lowered = text.strip().lower()
    if len(lowered) != digits or not set(lowered) <= set("0123456789abcdef"):
        raise BadInput(f"{text!r} is not {kind}", f"Give {digits} hex digits")
    return lowered
