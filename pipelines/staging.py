"""Where an unfinished refresh keeps its state inside the dataset, so that the same command goes on from there."""

import io
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from coca.storage import Store


@dataclass(frozen=True)
class Staging:
    """Names of one refresh. They follow from (refresh id, batch, part) alone."""

    dataset: Store
    refresh_id: str

    @property
    def folder(self) -> str:
        return f"staging/{self.refresh_id}"

    @property
    def plan_path(self) -> str:
        return f"{self.folder}/plan.json"

    @property
    def ended_path(self) -> str:
        """There once a budget has ended the fetching."""
        return f"{self.folder}/ended.json"

    @property
    def seconds_path(self) -> str:
        """Seconds of fetching so far, where the budget asks for them."""
        return f"{self.folder}/seconds.txt"

    def due_path(self, shard: int, chunk: int) -> str:
        """Due pairs of one stretch of a shard."""
        return f"{self.folder}/due/s{shard:03d}-{chunk:04d}.parquet"

    def due_summary_path(self, shard: int) -> str:
        return f"{self.folder}/due/s{shard:03d}.json"

    def batch_path(self, batch: int) -> str:
        """The pairs of one batch, in parts."""
        return f"{self.folder}/b{batch:05d}.plan.parquet"

    def manifest_path(self, batch: int) -> str:
        return f"{self.folder}/b{batch:05d}.manifest.json"

    def outcome_folder(self, batch: int) -> str:
        return f"{self.folder}/b{batch:05d}"

    def outcome_path(self, batch: int, part: int) -> str:
        return f"{self.outcome_folder(batch)}/p{part:05d}.parquet"

    @property
    def selection_path(self) -> str:
        return f"{self.folder}/selection.json"

    def data_prefix(self, batch: int) -> str:
        """How the names of a batch's data files begin, in every table."""
        return f"{self.refresh_id}-b{batch:05d}"

    def data_name(self, batch: int, part: int) -> str:
        return f"{self.data_prefix(batch)}-p{part:05d}.parquet"

    def samples_path(self, batch: int, part: int) -> str:
        return f"samples/{self.data_name(batch, part)}"

    def parts_done(self, batch: int) -> set[int]:
        names = self.dataset.list(self.outcome_folder(batch))
        return {int(name[1:-8]) for name in names if name.startswith("p") and name.endswith(".parquet")}

    def write_table(self, path: str, table: pa.Table, rows_per_row_group: int | None = None) -> None:
        write_table(self.dataset, path, table, rows_per_row_group)

    def read_table(self, path: str, schema: pa.Schema) -> pa.Table:
        return read_table(self.dataset, path, schema)


def write_table(store: Store, path: str, table: pa.Table, rows_per_row_group: int | None = None) -> None:
    """A small table as one Parquet file, whole or not at all."""
    store.write(path, encode_table(table, rows_per_row_group))


def encode_table(table: pa.Table, rows_per_row_group: int | None = None) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=rows_per_row_group, compression="zstd")
    return buffer.getvalue()


def read_table(store: Store, path: str, schema: pa.Schema) -> pa.Table:
    with store.open(path) as source:
        return pq.read_table(source, schema=schema)


def clear_staging(store: Store) -> None:
    """Remove all of it, in an order that a kill may end anywhere: what says that something is done goes first."""
    for folder in store.list("staging"):
        for name in store.list(f"staging/{folder}"):
            if name.endswith(".json"):
                store.delete(f"staging/{folder}/{name}")
    store.delete("staging")
    store.sweep_unfinished("staging")
