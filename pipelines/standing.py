"""What a dataset already holds when a refresh starts: its latest version, without its rows."""

from dataclasses import dataclass

import pyarrow as pa

from coca.contract import ROW_GROUPS, VersionRecord
from coca.dataset import Dataset, list_versions
from coca.storage import Store
from coca.tokenizer import Tokenizer
from coca.withdrawn import Withdrawn, read_withdrawn
from pipelines.tables import SCHEMAS, open_table, table_files


@dataclass(frozen=True)
class Standing:
    """The parent of a new version; all empty for a dataset without one."""

    record: VersionRecord | None
    tokenizer: Tokenizer | None
    withdrawn: Withdrawn
    row_groups: pa.Table
    """``contract.ROW_GROUPS`` as published: withdrawn rows are counted."""
    files: dict[str, dict[str, int]]
    """table -> its files and their rows."""

    @property
    def version(self) -> int | None:
        return self.record.version if self.record else None

    def delta_version(self, table: str) -> int:
        """The Delta version of a table that this version names; 0 is the empty table."""
        return int(getattr(self.record, table).delta_version) if self.record else 0


def read_standing(store: Store) -> Standing:
    withdrawn = read_withdrawn(store)
    if not list_versions(store):
        return Standing(None, None, withdrawn, ROW_GROUPS.empty_table(), {name: {} for name in SCHEMAS})
    dataset = Dataset(store.uri)
    record = dataset.record
    files = {name: table_files(open_table(store, name, getattr(record, name).delta_version)) for name in SCHEMAS}
    return Standing(record, dataset.tokenizer, withdrawn, dataset.recorded_row_groups, files)
