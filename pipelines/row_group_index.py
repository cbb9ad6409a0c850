"""The index of a version's row groups: what a reader plans from."""

import hashlib

import pyarrow as pa

from coca.contract import ROW_GROUPS, row_groups_path
from coca.storage import Store
from pipelines.staging import encode_table


def write_row_groups(store: Store, version: int, row_groups: pa.Table) -> tuple[str, str]:
    """Write the index of a version; never over another one, which a record may name.

    Args:
        row_groups: ``contract.ROW_GROUPS`` of the whole version, in any order.

    Returns:
        Its path and SHA-256.
    """
    index = row_groups.cast(ROW_GROUPS).sort_by([("samples_path", "ascending"), ("row_group", "ascending")])
    data = encode_table(index, max(1, index.num_rows))
    digest, path = hashlib.sha256(data).hexdigest(), row_groups_path(version)
    if not store.write_once(path, data):
        path = path.replace(".parquet", f".{digest[:16]}.parquet")
        store.write(path, data)
    return path, digest
