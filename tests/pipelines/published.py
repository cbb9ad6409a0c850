"""A dataset with real Delta tables and no crawl: rows are written by the contract and published version by version."""

import hashlib
import io
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from coca.contract import (
    ANNOTATIONS,
    ROW_GROUPS,
    SAMPLES,
    TableVersion,
    TokenizerStamp,
    VersionRecord,
    link_bucket,
    row_groups_path,
    sample_id,
    version_path,
)
from coca.dataset import Dataset
from coca.storage import Store
from coca.tokenizer import Tokenizer
from coca.withdrawn import read_withdrawn
from pipelines.tables import (
    SCHEMAS,
    DataFile,
    commit_files,
    create_tables,
    drop_foreign_files,
    file_schema,
    file_sizes,
    open_table,
)

ROWS_PER_ROW_GROUP = 3
_START = datetime(2026, 1, 1, tzinfo=UTC)


class Pair:
    """One pair: ``picture`` names the bytes, so two pairs may share them; ``reason`` is why it is not selected."""

    def __init__(self, number: int, picture: int | None = None, reason: str | None = None, rejected: str | None = None):
        self.url, self.caption = f"http://example.com/{number}", f"a red picture number {number}"
        self.id = sample_id(self.url, self.caption)
        picture = number if picture is None else picture
        self.image = np.random.default_rng(picture).bytes(200 + picture)
        self.source = hashlib.sha256(f"fetched {picture}".encode()).hexdigest()
        self.reason, self.rejected = reason, rejected


class Published:
    """Writes versions of a dataset, as a refresh does but for the crawl."""

    def __init__(self, uri: str, tokenizer: Tokenizer) -> None:
        self.store, self.tokenizer = Store(uri), tokenizer
        self.versions = 0
        self._index = ROW_GROUPS.empty_table()

    @property
    def uri(self) -> str:
        return self.store.uri

    def refresh(self, *parts: Sequence[Pair], name: str | None = None, config: dict[str, Any] | None = None) -> Dataset:
        """Append a samples file for each part and the events of all pairs, and publish the next version."""
        name = name or f"refresh{self.versions + 1}"
        create_tables(self.store)
        for table in SCHEMAS:
            drop_foreign_files(self.store, table, self._delta_version(table), name)
        index = self.commit(parts, name)
        return self.publish(pa.concat_tables([self._parent_index(), index]), name, config=config)

    def commit(self, parts: Iterable[Sequence[Pair]], name: str) -> pa.Table:
        """The rows of a refresh in the tables, with no record; the index of its files."""
        files: dict[str, list[DataFile]] = {"samples": [], "annotations": [], "links": []}
        groups = []
        for number, pairs in enumerate(parts):
            stored = sorted((pair for pair in pairs if pair.rejected is None), key=lambda pair: pair.id)
            path = f"{name}-b00000-p{number:05d}.parquet"
            if stored:
                for table, rows in (("samples", self._samples(stored)), ("annotations", self._notes(stored))):
                    size = self._write(f"{table}/{path}", rows)
                    files[table].append(DataFile(path=path, size=size, rows=len(stored)))
                groups += _groups(path, [pair.reason is None for pair in stored])
        files["links"] = self._write_events([pair for pairs in parts for pair in pairs], name)
        for table, those in files.items():
            if those:
                commit_files(self.store, table, those, name, 0)
        return pa.Table.from_pylist(groups, schema=ROW_GROUPS)

    def publish(
        self, index: pa.Table, name: str, kind: str = "refresh", config: dict[str, Any] | None = None
    ) -> Dataset:
        version = self._latest() + 1
        index = index.sort_by([("samples_path", "ascending"), ("row_group", "ascending")])
        buffer = io.BytesIO()
        pq.write_table(index, buffer)
        self.store.write(row_groups_path(version), buffer.getvalue())
        stamp = f"tokenizers/{self.tokenizer.fingerprint}.json"
        self.store.write_once(stamp, self.tokenizer.to_json().encode())
        tables = {}
        for table in SCHEMAS:
            opened = open_table(self.store, table)
            sizes = file_sizes(opened)
            rows = sum(rows for _, rows in sizes.values())
            tables[table] = TableVersion(delta_version=opened.version(), files=len(sizes), rows=rows)
        record = VersionRecord(
            version=version,
            parent=version - 1 or None,
            created_at="2026-01-01T00:00:00+00:00",
            contract_version=2,
            code_version="test",
            kind=kind,
            refresh_id=name,
            **tables,
            selected=pc.sum(index["selected"]).as_py() or 0,
            rows_per_row_group=ROWS_PER_ROW_GROUP,
            row_groups_path=row_groups_path(version),
            row_groups_sha256=hashlib.sha256(buffer.getvalue()).hexdigest(),
            tokenizer=TokenizerStamp(
                fingerprint=self.tokenizer.fingerprint, path=stamp, vocab_size=self.tokenizer.vocab_size
            ),
            withdrawn_sha256=read_withdrawn(self.store).digest,
            funnel={},
            config=config or {"image": {"size": 64}},
        )
        assert self.store.write_once(version_path(version), record.model_dump_json().encode())
        self.versions = version
        return Dataset(self.uri, version)

    def read(self, table: str, path: str) -> pa.Table:
        return pq.read_table(io.BytesIO(self.store.read(f"{table}/{path}")))

    def write(self, table: str, path: str, rows: list[dict[str, Any]]) -> int:
        """A data file of a table, its rows by the contract; its bytes."""
        return self._write(f"{table}/{path}", pa.Table.from_pylist(rows, schema=file_schema(table)))

    def _latest(self) -> int:
        names = [name.removesuffix(".json") for name in self.store.list("versions") if name.endswith(".json")]
        return max(map(int, names), default=0)

    def _delta_version(self, table: str) -> int:
        return getattr(Dataset(self.uri).record, table).delta_version if self._latest() else 0

    def _parent_index(self) -> pa.Table:
        return Dataset(self.uri).recorded_row_groups if self._latest() else ROW_GROUPS.empty_table()

    def _samples(self, pairs: list[Pair]) -> pa.Table:
        rows = [
            {
                "sample_id": pair.id,
                "url": pair.url,
                "caption": pair.caption,
                "image": pair.image,
                "format": "png",
                **dict.fromkeys(("width", "height", "original_width", "original_height"), 64),
                "source_sha256": pair.source,
                "sha256": hashlib.sha256(pair.image).hexdigest(),
                "phash": 1,
                "fetched_at": _START,
                "extra": None,
            }
            for pair in pairs
        ]
        return pa.Table.from_pylist(rows, schema=SAMPLES)

    def _notes(self, pairs: list[Pair]) -> pa.Table:
        rows = [
            {
                "sample_id": pair.id,
                "tokens": self.tokenizer.encode([pair.caption])[0],
                "selected": pair.reason is None,
                "reason": pair.reason,
            }
            for pair in pairs
        ]
        return pa.Table.from_pylist(rows, schema=ANNOTATIONS)

    def _write_events(self, pairs: list[Pair], name: str) -> list[DataFile]:
        buckets: dict[str, list[dict[str, Any]]] = {}
        for pair in pairs:
            event = {
                "sample_id": pair.id,
                "url": pair.url,
                "caption": pair.caption,
                "state": "rejected" if pair.rejected else "ok",
                "reason": pair.rejected,
                "attempts": 1,
                "refresh_id": name,
                "event_at": _START + timedelta(days=self._latest()),
                "stored": pair.rejected is None,
            }
            buckets.setdefault(link_bucket(pair.url), []).append(event)
        files = []
        for bucket, events in buckets.items():
            path = f"bucket={bucket}/{name}-b00000.parquet"
            size = self._write(f"links/{path}", pa.Table.from_pylist(events, schema=file_schema("links")))
            files.append(DataFile(path=path, size=size, rows=len(events), bucket=bucket))
        return files

    def _write(self, path: str, rows: pa.Table) -> int:
        others = [name for name in rows.column_names if name != "image"]
        buffer = io.BytesIO()
        pq.write_table(
            rows,
            buffer,
            row_group_size=ROWS_PER_ROW_GROUP,
            compression={**dict.fromkeys(others, "zstd"), "image": "none"},
            use_dictionary=[name for name in others if name not in ("tokens", "scores")],
            write_statistics=[name for name in others if name not in ("tokens", "scores")],
        )
        self.store.write(path, buffer.getvalue())
        return len(buffer.getvalue())


def pairs(*numbers: int) -> list[Pair]:
    return [Pair(number) for number in numbers]


def everything(dataset: Dataset) -> list[dict[str, Any]]:
    """All rows that a version gives, with all their columns."""
    columns = tuple(SAMPLES.names)
    tables = (
        dataset.read_row_group(index, columns, only_selected=False) for index in range(dataset.row_groups.num_rows)
    )
    return [row for table in tables for row in table.to_pylist()]


def _groups(path: str, selected: list[bool]) -> list[dict[str, Any]]:
    starts = range(0, len(selected), ROWS_PER_ROW_GROUP)
    cut = [selected[start : start + ROWS_PER_ROW_GROUP] for start in starts]
    return [
        {"samples_path": path, "annotations_path": path, "row_group": n, "rows": len(rows), "selected": sum(rows)}
        for n, rows in enumerate(cut)
    ]
