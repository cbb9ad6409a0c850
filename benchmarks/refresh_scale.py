"""Cost per link of a refresh's bookkeeping, without bytes: intake, anti-join, planning, commits, up to 1e9 links.

A refresh of N links is cut into 256 shards at most, and each shard is joined with its part of the ledger by itself. So
the cost of 1e9 links is 256 times that of a shard with 3.9 million. This measures shards of growing size on the real
code, one after the other, the dealing of batches to parts, and commits to tables of up to 1e5 files:

    python benchmarks/refresh_scale.py
    python benchmarks/refresh_scale.py --shard-rows 10000 100000 --files 1000 --json
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from coca.storage import Store
from pipelines.config import PublishConfig, RecheckConfig, RefreshConfig
from pipelines.intake import INTAKE, LinksTable, take_in
from pipelines.join import JoinSettings, find_due
from pipelines.ledger import EVENTS, latest_events
from pipelines.links_config import LinksConfig
from pipelines.plan import deal_parts
from pipelines.tables import DataFile, commit_files, create_tables, open_table, table_files

BILLION_SHARD = 1_000_000_000 // 256
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def make_links(rows: int, seed: int) -> pa.Table:
    """Judged pairs, as the intake leaves them: urls of 60 characters on hosts of a skewed distribution."""
    random = np.random.default_rng(seed)
    hosts = (random.pareto(1.1, rows) * 10).astype(np.int64) % 1_000_000
    keys = random.integers(0, 2**63, (rows, 2), dtype=np.int64)
    ids = keys.tobytes().hex()
    table = {
        "sample_id": [ids[32 * row : 32 * row + 32] for row in range(rows)],
        "url": [
            f"https://images{host}.example.com/{key:016x}/picture.jpg"
            for host, (key, _) in zip(hosts, keys, strict=True)
        ],
        "caption": [f"a caption of some words about thing {key % 9973}" for key, _ in keys],
    }
    columns = {f.name: table.get(f.name, pa.nulls(rows, f.type)) for f in INTAKE}
    columns["piece"] = np.zeros(rows, dtype=np.int32)
    columns["place"] = np.arange(rows, dtype=np.int64)
    return pa.table(columns).cast(INTAKE)


def make_events(links: pa.Table) -> pa.Table:
    """Their ledger: nine of ten stored, the others dead."""
    rows = links.num_rows
    ok = np.arange(rows) % 10 != 0
    known = {
        **{name: links[name] for name in ("sample_id", "url", "caption")},
        "state": pa.array(np.where(ok, "ok", "dead")),
        "stored": pa.array(ok),
        "refresh_id": pa.array(np.full(rows, "r0")),
        "event_at": pa.array([NOW], EVENTS.field("event_at").type).take(pa.array(np.zeros(rows, dtype=np.int64))),
    }
    return pa.table({f.name: known.get(f.name, pa.nulls(rows, f.type)) for f in EVENTS}).cast(EVENTS)


def measure_join(rows: int, new_share: float) -> dict[str, object]:
    """The anti-join of a shard: its ledger has ``rows`` pairs, of the table's as many ``new_share`` are new."""
    links = make_links(rows, seed=rows)
    known = links.slice(int(rows * new_share))
    latest_input = make_events(known)
    settings = JoinSettings(NOW, 0, 131_072, 0, RecheckConfig())
    started_s = time.perf_counter()
    latest = latest_events(latest_input)
    due, counts = find_due(links, latest, settings)
    seconds = time.perf_counter() - started_s
    assert due.num_rows + sum(counts.values()) == rows
    return {
        "step": "anti-join",
        "size": rows,
        "us_per_link": round(seconds / rows * 1e6, 2),
        "seconds": round(seconds, 2),
    }


def measure_intake(folder: Path, rows: int) -> dict[str, object]:
    """Reading, judging and spilling a Parquet table."""
    links = make_links(rows, seed=1).select(["url", "caption"])
    path = folder / f"links-{rows}.parquet"
    pq.write_table(links, path, row_group_size=100_000)
    config = RefreshConfig(links=LinksConfig(uri=str(path)))
    started_s = time.perf_counter()
    intake = take_in(Store(folder / f"intake-{rows}"), LinksTable.open(config.links), config)
    seconds = time.perf_counter() - started_s
    assert intake.rows == rows
    return {"step": "intake", "size": rows, "us_per_link": round(seconds / rows * 1e6, 2), "seconds": round(seconds, 2)}


def measure_planning(rows: int) -> dict[str, object]:
    """Dealing a batch of new links to parts by domain."""
    settings = JoinSettings(NOW, 0, rows, 0, RecheckConfig())
    empty = latest_events(EVENTS.empty_table())
    due, _ = find_due(make_links(rows, seed=2), empty, settings)
    started_s = time.perf_counter()
    parts, _, _ = deal_parts(due, rows, PublishConfig())
    seconds = time.perf_counter() - started_s
    assert sum(part.num_rows for part in parts) == rows
    return {
        "step": "planning",
        "size": rows,
        "us_per_link": round(seconds / rows * 1e6, 2),
        "seconds": round(seconds, 2),
    }


def measure_commits(
    folder: Path, sizes: list[int], files_per_commit: int, links_per_file: int
) -> Iterator[dict[str, object]]:
    """Commits of one batch to a samples table that already has so many files; files of one byte stand for samples."""
    store = Store(folder / "commits")
    create_tables(store)
    made = 0
    for batch, size in enumerate(sizes):
        _add_files(store, made, size - made, 2 * batch)
        files = _lay_files(store, size, files_per_commit)
        started_s = time.perf_counter()
        commit_files(store, "samples", files, "benchmark", 2 * batch + 1)
        seconds = time.perf_counter() - started_s
        made = size + files_per_commit
        assert len(table_files(open_table(store, "samples"))) == made
        links = files_per_commit * links_per_file
        yield {
            "step": "commit",
            "size": size,
            "us_per_link": round(seconds / links * 1e6, 2),
            "seconds": round(seconds, 2),
        }


def _add_files(store: Store, first: int, count: int, batch: int) -> None:
    if count > 0:
        commit_files(store, "samples", _lay_files(store, first, count), "benchmark", batch)


def _lay_files(store: Store, first: int, count: int) -> list[DataFile]:
    folder = Path(store.path("samples"))
    files = [DataFile(path=f"f{number:08d}.parquet", size=1, rows=2000) for number in range(first, first + count)]
    for file in files:
        (folder / file.path).write_bytes(b"x")
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shard-rows", type=int, nargs="+", default=[15_625, 62_500, 250_000, 1_000_000, BILLION_SHARD]
    )
    parser.add_argument("--files", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []

    def show(row: dict[str, object]) -> None:
        row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        rows.append(row)
        print(
            json.dumps(row) if options.json else "  ".join(f"{key} {value}" for key, value in row.items()), flush=True
        )

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for size in (100_000, 400_000):
            show(measure_intake(folder, size))
        for size in (16_384, 131_072):
            show(measure_planning(size))
        for row in measure_commits(folder, options.files, files_per_commit=64, links_per_file=2048):
            show(row)
        for size in options.shard_rows:
            show(measure_join(size, new_share=0.1))


if __name__ == "__main__":
    main()
