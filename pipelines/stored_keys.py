"""Sources of selection: the stored rows of a version, read in narrow columns."""

from dataclasses import dataclass
from functools import lru_cache

import pyarrow as pa
import pyarrow.compute as pc

from coca.contract import ANNOTATIONS, SAMPLES
from coca.dataset import Dataset
from coca.storage import Store
from coca.withdrawn import Withdrawn, read_withdrawn
from pipelines.tables import read_data_files


@dataclass(frozen=True)
class StoredPart:
    """A samples file of a version with its annotations. Paths are relative to their tables."""

    samples_path: str
    annotations_path: str
    rows: int


@dataclass(frozen=True)
class StoredKeys:
    """The rows of a part that are not withdrawn, as ``selection.CANDIDATES``."""

    store: Store
    part: StoredPart
    columns: tuple[str, ...]
    """As ``selection.candidate_columns`` names them."""
    withdrawn_files: tuple[str, ...]
    """The withdrawn list to apply, as ``coca.withdrawn.list_withdrawn`` names it."""
    standing: bool
    """Whether the rows only count and win, by their ``selected``; else they are to be judged."""

    @property
    def rows(self) -> int:
        return self.part.rows

    def read(self) -> pa.Table:
        noted = [name for name in ("language", "scores") if name in self.columns]
        samples = read_data_files(
            self.store, "samples", [self.part.samples_path], [name for name in self.columns if name in SAMPLES.names]
        )
        notes = read_data_files(
            self.store, "annotations", [self.part.annotations_path], [*noted, *(["selected"] if self.standing else [])]
        )
        for name in noted:
            samples = samples.append_column(ANNOTATIONS.field(name), notes[name])
        if self.standing:
            samples = samples.append_column("standing", notes["selected"])
        gone = withdrawn_list(self.store, self.withdrawn_files).mask(samples["sample_id"])
        return samples.filter(pc.invert(pa.array(gone)))


def stored_parts(dataset: Dataset) -> list[StoredPart]:
    """The parts of a version, in the order of its row-group index."""
    index = dataset.recorded_row_groups
    grouped = index.group_by(["samples_path", "annotations_path"], use_threads=False).aggregate([("rows", "sum")])
    return [
        StoredPart(row["samples_path"], row["annotations_path"], row["rows_sum"])
        for row in grouped.sort_by("samples_path").to_pylist()
    ]


@lru_cache(maxsize=4)
def _withdrawn_list(uri: str, files: tuple[str, ...]) -> Withdrawn:
    return read_withdrawn(Store(uri), files)


def withdrawn_list(store: Store, files: tuple[str, ...]) -> Withdrawn:
    """Read once in a process: the files of the list never change."""
    return _withdrawn_list(store.uri, files)
