"""The withdrawn list: what must be in no version, nor be stored again. It only grows; every reader applies it.

A row that names a file is a stored sample. A row without one is an url or a picture that is refused from then on.
"""

import hashlib
import io
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from coca.errors import BadInput
from coca.parquet_bytes import parse_parquet
from coca.storage import Store

FOLDER = "withdrawn"

WITHDRAWN = pa.schema(
    [
        pa.field("sample_id", pa.string()),
        pa.field("url", pa.string()),
        pa.field("source_sha256", pa.string()),
        pa.field("sha256", pa.string()),
        pa.field("samples_path", pa.string()),
        pa.field("row_group", pa.int32()),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("withdrawn_at", pa.timestamp("us", tz="UTC"), nullable=False),
    ]
)

_LOCATION = ["samples_path", "row_group"]


class Withdrawn:
    """The list as it stands in some of its files."""

    def __init__(self, table: pa.Table) -> None:
        """
        Args:
            table: ``WITHDRAWN``, in any order, repeats allowed.
        """
        self.table = table

    def __len__(self) -> int:
        return len(self.sample_ids)

    @cached_property
    def sample_ids(self) -> pa.Array:
        """Ids of stored samples, sorted, each once."""
        return self._sorted("sample_id")

    @cached_property
    def urls(self) -> pa.Array:
        """Canonical urls, sorted, each once."""
        return self._sorted("url")

    @cached_property
    def source_sha256(self) -> pa.Array:
        """Digests of fetched bytes, sorted, each once."""
        return self._sorted("source_sha256")

    @cached_property
    def stored_sha256(self) -> pa.Array:
        """Digests of stored bytes, sorted, each once."""
        return self._sorted("sha256")

    def refuses(self, urls: pa.ChunkedArray, sample_ids: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
        """Which pairs may not be stored, by their urls or their ids."""
        by_url = pc.is_in(urls, value_set=self.urls).to_numpy()
        return np.asarray(by_url | self.mask(sample_ids))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the sorted entries (id, url, picture), whatever the files they came in; of nothing, of ""."""
        parts = [pc.fill_null(self.table[name], "") for name in ("sample_id", "url", "source_sha256")]
        lines = pc.unique(pc.binary_join_element_wise(*parts, "\t"))
        digest = hashlib.sha256()
        for line in lines.sort().to_pylist():
            digest.update(f"{line}\n".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def mask(self, sample_ids: pa.ChunkedArray | pa.Array) -> npt.NDArray[np.bool_]:
        """Which of ``sample_ids`` are withdrawn, in time logarithmic in the length of the list."""
        known = self._keys
        if not len(known) or not len(sample_ids):
            return np.zeros(len(sample_ids), dtype=bool)
        wanted = _as_bytes(sample_ids)
        places = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        return np.asarray(known[places] == wanted)

    def places_in(self, row_groups: pa.Table) -> npt.NDArray[np.int64]:
        """Rows of a row-group index (``contract.ROW_GROUPS``) in which withdrawn samples lie, ascending."""
        located = self.table.select(_LOCATION).filter(pc.is_valid(self.table["samples_path"]))
        if not located.num_rows:
            return np.zeros(0, dtype=np.int64)
        numbered = row_groups.select(_LOCATION).append_column("place", pa.array(np.arange(row_groups.num_rows)))
        hit = numbered.join(located.group_by(_LOCATION).aggregate([]), keys=_LOCATION, join_type="left semi")
        return np.sort(hit["place"].to_numpy())

    @cached_property
    def _keys(self) -> npt.NDArray[np.bytes_]:
        return np.sort(_as_bytes(self.sample_ids))

    def _sorted(self, column: str) -> pa.Array:
        return pc.unique(self.table[column].drop_null()).sort()


def list_withdrawn(store: Store) -> tuple[str, ...]:
    """Names of the list's files. Their content never changes: names known are a list that stands still."""
    return tuple(name for name in store.list(FOLDER) if name.endswith(".parquet") and not name.startswith("."))


def read_withdrawn(store: Store, names: tuple[str, ...] | None = None) -> Withdrawn:
    """The whole list, or that of some of its files.

    Raises:
        BadInput: a file is missing or damaged. A list that cannot be read hides nothing, so nothing is read.
    """
    names = list_withdrawn(store) if names is None else names
    return Withdrawn(pa.concat_tables([WITHDRAWN.empty_table(), *(_read(store, f"{FOLDER}/{name}") for name in names)]))


def append_withdrawn(store: Store, rows: pa.Table, name: str) -> bool:
    """Add entries as the file ``withdrawn/<name>.parquet``, on disk before this returns.

    Args:
        rows: ``WITHDRAWN``.
        name: of this addition alone, such as a refresh id: the same name again adds nothing.

    Returns:
        False where the file was there already or ``rows`` is empty.
    """
    if not rows.num_rows:
        return False
    if "/" in name or name.startswith("."):
        raise ValueError(f"{name!r} is no file name")
    buffer = io.BytesIO()
    pq.write_table(rows.select(WITHDRAWN.names).cast(WITHDRAWN), buffer, compression="zstd")
    return store.write_once(f"{FOLDER}/{name}.parquet", buffer.getvalue())


def _read(store: Store, path: str) -> pa.Table:
    try:
        return parse_parquet(store.read(path), WITHDRAWN)
    except FileNotFoundError:
        problem = "is missing"
    except pa.ArrowException as error:
        problem = f"cannot be read: {error}"
    raise BadInput(f"{store.uri}/{path} {problem}", "Restore the file: it says what must not be shown")


def _as_bytes(sample_ids: pa.ChunkedArray | pa.Array) -> npt.NDArray[np.bytes_]:
    ids = sample_ids.combine_chunks() if isinstance(sample_ids, pa.ChunkedArray) else sample_ids
    lengths = pc.min_max(pc.binary_length(ids)).as_py()
    if not lengths["min"] or lengths["min"] != lengths["max"] or ids.null_count:
        return np.array([key.encode("utf-8", "surrogatepass") for key in ids.to_pylist()], dtype=np.bytes_)
    # Ids of one length, as all true ones are: the text as it lies in memory.
    _, offsets, text = ids.buffers()
    start = np.frombuffer(offsets, dtype=np.int32)[ids.offset]
    return np.frombuffer(text, dtype=f"S{lengths['max']}", count=len(ids), offset=start)
