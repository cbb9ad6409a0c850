"""Where an unfinished refresh keeps its state inside the dataset, so that the same command goes on from there."""

import io
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from coca.storage import Store


@dataclass(frozen=True)
class Staging:
    """Names of one batch of one refresh. They follow from (refresh id, batch, part) alone."""

    dataset: Store
    refresh_id: str
    batch: int = 0

    @property
    def folder(self) -> str:
        return f"staging/{self.refresh_id}"

    @property
    def plan_path(self) -> str:
        return f"{self.folder}/plan.parquet"

    @property
    def manifest_path(self) -> str:
        return f"{self.folder}/b{self.batch:05d}.manifest.json"

    @property
    def data_prefix(self) -> str:
        """How the names of this batch's data files begin, in every table."""
        return f"{self.refresh_id}-b{self.batch:05d}"

    def data_name(self, part: int) -> str:
        return f"{self.data_prefix}-p{part:05d}.parquet"

    def samples_path(self, part: int) -> str:
        return f"samples/{self.data_name(part)}"

    def annotations_path(self, part: int) -> str:
        return f"annotations/{self.data_name(part)}"

    def outcome_path(self, part: int) -> str:
        return f"{self.folder}/b{self.batch:05d}/p{part:05d}.parquet"

    def parts_done(self) -> set[int]:
        names = self.dataset.list(f"{self.folder}/b{self.batch:05d}")
        return {int(name[1:-8]) for name in names if name.startswith("p") and name.endswith(".parquet")}

    def write_table(self, path: str, table: pa.Table) -> None:
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        self.dataset.write(path, buffer.getvalue())

    def read_table(self, path: str, schema: pa.Schema) -> pa.Table:
        return pq.read_table(io.BytesIO(self.dataset.read(path)), schema=schema)
