"""What a dataset already holds when a refresh starts: its latest version, read once."""

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from coca.contract import LINKS, ROW_GROUPS, VersionRecord
from coca.dataset import Dataset, list_versions
from coca.storage import Store
from coca.tokenizer import Tokenizer
from pipelines.ledger import latest_events
from pipelines.tables import SCHEMAS, open_table, read_files, table_files

# What the driver keeps of a ledger event.
EVENT_COLUMNS = ["sample_id", "url", "state", "reason", "source_sha256", "event_at", "next_check_at"]


@dataclass(frozen=True)
class Standing:
    """The parent of a new version; all empty for a dataset without one."""

    record: VersionRecord | None
    tokenizer: Tokenizer | None
    latest: pa.Table
    """The latest event of every pair, ``EVENT_COLUMNS``."""
    unselected: frozenset[str]
    """Sample ids that are stored but not selected."""
    row_groups: pa.Table
    """``contract.ROW_GROUPS``."""
    files: dict[str, set[str]]
    """table -> its files."""

    @property
    def version(self) -> int | None:
        return self.record.version if self.record else None

    def delta_version(self, table: str) -> int:
        """The Delta version of a table that this version names; 0 is the empty table."""
        return int(getattr(self.record, table).delta_version) if self.record else 0


def read_standing(store: Store) -> Standing:
    if not list_versions(store):
        events = pa.schema([LINKS.field(name) for name in EVENT_COLUMNS]).empty_table()
        return Standing(None, None, events, frozenset(), ROW_GROUPS.empty_table(), {name: set() for name in SCHEMAS})
    dataset = Dataset(store.uri)
    record = dataset.record
    events = read_files(store, "links", record.links.delta_version, EVENT_COLUMNS)
    notes = read_files(store, "annotations", record.annotations.delta_version, ["sample_id", "selected"])
    files = {name: set(table_files(open_table(store, name, getattr(record, name).delta_version))) for name in SCHEMAS}
    return Standing(
        record=record,
        tokenizer=dataset.tokenizer,
        latest=latest_events(events),
        unselected=frozenset(notes["sample_id"].filter(pc.invert(notes["selected"])).to_pylist()),
        row_groups=dataset.row_groups,
        files=files,
    )
