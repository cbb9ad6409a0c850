"""Taking in a table of links: every row judged, and spilled by its url's hash into shards that fit one process."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from coca.contract import link_bucket
from coca.errors import BadInput
from coca.storage import Store
from pipelines.caption_counts import spill_caption_keys
from pipelines.config import RefreshConfig
from pipelines.judge import JUDGED, Rules, judge_pairs, load_rules
from pipelines.links import LinksPiece, list_pieces, read_piece
from pipelines.links_config import LinksConfig
from pipelines.list_digests import digest_lists
from pipelines.staging import read_table, write_table
from pipelines.tasks import StartRay, run_tasks

BUCKETS = 256
# A guess at the rows of what does not tell them: bytes of a line of text, and rows where not even the size is known.
_LINE_BYTES = 128
_ROWS_UNKNOWN = 1_000_000
_SPILL_ROWS = 500_000

# `place` counts the rows of a piece.
INTAKE = pa.schema([*JUDGED, pa.field("piece", pa.int32()), pa.field("place", pa.int64())])


@dataclass(frozen=True)
class Intake:
    """A links table as it lies in staging: ``shards`` stretches of the ledger's buckets."""

    store: Store
    folder: str
    shards: int
    pieces: int
    rows: int
    content: str
    """Of the pairs and how often each occurs, whatever their order."""

    def read_shard(self, shard: int) -> pa.Table:
        """``INTAKE`` of one shard, in the order of the links table."""
        return read_spilled(self.store, f"{self.folder}/s{shard:03d}", INTAKE)

    def buckets(self, shard: int) -> list[str]:
        """The ledger's partitions that hold the pairs of a shard."""
        size = BUCKETS // self.shards
        return [f"{bucket:02x}" for bucket in range(shard * size, (shard + 1) * size)]


class PairSource(Protocol):
    """Where pairs come from. Travels to Ray workers."""

    @property
    def pieces(self) -> Sequence[Any]:
        """What one task reads at a time; what decides about its rows is in its ``repr``."""
        ...

    def rows(self, piece: Any) -> int | None:
        """Of a piece, about; None where nothing is known beforehand."""
        ...

    def read(self, piece: Any) -> Iterator[pa.Table]:
        """Tables of ``url``, ``caption``, ``extra``, all string."""
        ...


@dataclass(frozen=True)
class LinksTable:
    """The pairs of a table of links."""

    config: LinksConfig
    pieces: Sequence[LinksPiece]

    @classmethod
    def open(cls, config: LinksConfig) -> "LinksTable":
        """Raises BadInput where there is nothing to read."""
        return cls(config, list_pieces(config))

    def rows(self, piece: LinksPiece) -> int | None:
        return piece.size // _LINE_BYTES if piece.rows is None and piece.size is not None else piece.rows

    def read(self, piece: LinksPiece) -> Iterator[pa.Table]:
        return read_piece(piece, self.config)


def take_in(
    store: Store,
    source: PairSource,
    config: RefreshConfig,
    *,
    ledger_rows: int = 0,
    start_ray: StartRay | None = None,
) -> Intake:
    """Judge every row of a source, piece by piece; pieces that are done already are passed over.

    Args:
        ledger_rows: of the ledger that the shards will be joined with: neither side of a join may be too large.

    Raises:
        BadInput: the rows cannot be read, or there is not one.
    """
    pieces = source.pieces
    shards = _shard_count(source, ledger_rows, config.publish.links_per_batch)
    folder = f"staging/intake-{_intake_id(source, config, shards)}"
    # A language that refuses nothing is told later, of what is stored.
    told = config.judge.identify_language and bool(config.judge.languages)
    rules = load_rules(config.judge.model_copy(update={"identify_language": told}))
    task = partial(_take_in_piece, source=source, store=store, folder=folder, shards=shards, rules=rules)
    summaries = run_tasks(task, list(enumerate(pieces)), start_ray=start_ray)
    rows = sum(summary["rows"] for summary in summaries)
    if rows == 0:
        raise BadInput(f"the links table {config.links.uri} has no rows", "Give one with at least one pair")
    return Intake(store, folder, shards, len(pieces), rows, _combine(summary["content"] for summary in summaries))


def _intake_id(source: PairSource, config: RefreshConfig, shards: int) -> str:
    settings = [config.links.model_dump(mode="json"), config.judge.model_dump(mode="json"), digest_lists(config)]
    text = json.dumps([repr(source.pieces), settings, shards], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _shard_count(source: PairSource, ledger_rows: int, rows_at_once: int) -> int:
    known = [source.rows(piece) for piece in source.pieces]
    rows = max(ledger_rows, sum(_ROWS_UNKNOWN if count is None else count for count in known))
    shards = 1
    while shards < BUCKETS and shards * rows_at_once < rows:
        shards *= 2
    return shards


def _take_in_piece(
    numbered: tuple[int, Any], *, source: PairSource, store: Store, folder: str, shards: int, rules: Rules
) -> dict[str, Any]:
    number, piece = numbered
    summary_path = f"{folder}/piece-{number:05d}.json"
    if store.exists(summary_path):
        return dict(json.loads(store.read(summary_path)))
    rows, content, spills = 0, [0, 0], 0
    waiting: list[pa.Table] = []

    def spill() -> None:
        nonlocal spills, waiting
        table = pa.concat_tables(waiting)
        name = f"p{number:05d}-{spills:04d}.parquet"
        _spill(store, folder, name, table, shards)
        if rules.config.max_caption_count is not None:
            spill_caption_keys(store, f"{folder}/captions", name, table, shards)
        spills, waiting = spills + 1, []

    for links in source.read(piece):
        judged = judge_pairs(links, rules)
        content = [int(part) for part in _add(content, judged["sample_id"])]
        places = pa.array(np.arange(rows, rows + judged.num_rows, dtype=np.int64))
        numbers = pa.array(np.full(judged.num_rows, number, dtype=np.int32))
        waiting.append(judged.append_column("piece", numbers).append_column("place", places).cast(INTAKE))
        rows += judged.num_rows
        if sum(table.num_rows for table in waiting) >= _SPILL_ROWS:
            spill()
    if waiting:
        spill()
    summary = {"rows": rows, "content": content}
    store.write(summary_path, json.dumps(summary).encode())
    return summary


def _spill(store: Store, folder: str, name: str, table: pa.Table, shards: int) -> None:
    size = BUCKETS // shards
    shard = np.array([int(link_bucket(url), 16) // size for url in table["url"].to_pylist()], dtype=np.int32)
    order = np.argsort(shard, kind="stable")
    ends = np.cumsum(np.bincount(shard, minlength=shards))
    table = table.take(pa.array(order))
    for number, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        if end > start:
            write_table(store, f"{folder}/s{number:03d}/{name}", table.slice(start, end - start))


def read_spilled(store: Store, folder: str, schema: pa.Schema) -> pa.Table:
    """All files of a folder, in the order of their names."""
    tables = [read_table(store, f"{folder}/{name}", schema) for name in store.list(folder)]
    return pa.concat_tables([schema.empty_table(), *tables]).combine_chunks()


def _add(content: list[int], sample_ids: pa.ChunkedArray) -> np.ndarray:
    """A sum does not know the order of what it adds, and counts what occurs twice."""
    raw = np.frombuffer(bytes.fromhex("".join(sample_ids.to_pylist())), dtype="<u8").reshape(-1, 2)
    return np.array(content, dtype=np.uint64) + raw.sum(axis=0, dtype=np.uint64)


def _combine(contents: Iterable[list[int]]) -> str:
    total = np.zeros(2, dtype=np.uint64)
    for content in contents:
        total += np.array(content, dtype=np.uint64)
    return total.astype("<u8").tobytes().hex()
