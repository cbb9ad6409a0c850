"""Contract migrations: columns that came later, added to the tables of an older dataset. No data file is touched."""

import pyarrow as pa
from deltalake import DeltaTable, Schema

from coca.errors import BadInput
from coca.storage import Store
from pipelines.lease import Lease
from pipelines.tables import SCHEMAS, open_table


def migrate_tables(store: Store, lease: Lease | None = None) -> dict[str, list[str]]:
    """Add the columns of the contract that the tables lack; a table that has them all is left as it is.

    A refresh calls this before it commits, and after ``drop_foreign_files``: a table that is taken back has the columns
    it had. Every column that came later is nullable, and null in the rows that are there.

    Returns:
        table -> columns added.

    Raises:
        BadInput: a column has another type than the contract says, or cannot be added.
        RunFailed: ``lease`` is lost.
    """
    added = {}
    for name in SCHEMAS:
        missing = missing_columns(open_table(store, name), name)
        if missing:
            if lease is not None:
                lease.check()
            wanted = Schema.from_arrow(pa.schema(missing)).fields
            open_table(store, name).alter.add_columns(wanted)
            left = missing_columns(open_table(store, name), name)
            assert not left, f"{name} still lacks {left}"
            added[name] = [field.name for field in missing]
    return added


def missing_columns(table: DeltaTable, name: str) -> list[pa.Field]:
    """The fields of the contract that a Delta table lacks."""
    there = {field.name: field for field in table.schema().fields}
    wanted = Schema.from_arrow(SCHEMAS[name])
    for field in wanted.fields:
        found = there.get(field.name)
        if found is not None and found.type != field.type:
            raise BadInput(
                f"column {field.name} of {table.table_uri} is {found.type}, the contract says {field.type}",
                "This table was not written by coca: import its rows into a new dataset",
            )
    missing = [SCHEMAS[name].field(field.name) for field in wanted.fields if field.name not in there]
    required = [field.name for field in missing if not field.nullable]
    if required:
        raise BadInput(
            f"{table.table_uri} lacks {', '.join(required)}, which no contract was without",
            "This table was not written by coca: import its rows into a new dataset",
        )
    return missing
