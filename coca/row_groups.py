"""The row groups that a feed works on: read ahead in threads, held while they are in use, each read once."""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pyarrow as pa

from coca.dataset import Dataset
from coca.disk_cache import DiskCache
from coca.parquet_ranges import ParquetRanges
from coca.train_config import FeedConfig

_READ_THREADS = 8


class RowGroups:
    """Rows of one dataset by row group, as `Dataset.read_row_group` gives them. Safe in several threads.

    Args:
        columns: of the samples table.
        capacity: row groups held at once, those expected included. The least recently used goes first; one that is
            expected and has not been used yet stays as long as there is another.
        feed: where to keep on disk what S3 gave (``cache_dir``, ``cache_gib``).
    """

    def __init__(self, dataset: Dataset, columns: Sequence[str], *, capacity: int, feed: FeedConfig) -> None:
        """
        Raises:
            BadInput: the cache folder cannot be used.
        """
        cache = None
        if feed.cache_dir is not None and dataset.store.is_s3:
            cache = DiskCache(feed.cache_dir, int(feed.cache_gib * 2**30))
        self._dataset = _RangedDataset(dataset, ParquetRanges(dataset.store, cache))
        self._columns, self._capacity = tuple(columns), capacity
        self._used: OrderedDict[int, Future[pa.Table]] = OrderedDict()
        self._expected: OrderedDict[int, Future[pa.Table]] = OrderedDict()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="read")

    def get(self, index: int) -> pa.Table:
        """Selected rows of row group ``index``: the columns and ``tokens``.

        Raises:
            BadInput: the dataset is damaged.
            RunFailed: its store does not answer.
        """
        with self._lock:
            future = self._used.get(index)
            # One that is expected but not begun is read here, before those ahead of it.
            mine = future is None and ((future := self._expected.pop(index, None)) is None or future.cancel())
            if mine:
                future = Future()
            assert future is not None
            self._used[index] = future
            self._used.move_to_end(index)
            self._make_room()
        if mine:
            self._read_into(future, index)
        try:
            return future.result()
        except BaseException:
            with self._lock:
                if self._used.get(index) is future:
                    del self._used[index]  # asked for again, it is read again
            raise

    def expect(self, indices: Iterable[int]) -> None:
        """Begins to read what is not there, in the order given, after what was expected before."""
        with self._lock:
            for index in indices:
                if index not in self._used and index not in self._expected:
                    self._expected[index] = self._pool.submit(self._read, index)
            self._make_room()

    def close(self) -> None:
        """Waits for the reads under way; those not begun are dropped."""
        self._pool.shutdown(cancel_futures=True)

    def _make_room(self) -> None:
        while len(self._used) + len(self._expected) > self._capacity and len(self._used) > 1:
            self._used.popitem(last=False)
        while len(self._expected) > self._capacity:
            self._expected.popitem(last=False)[1].cancel()

    def _read(self, index: int) -> pa.Table:
        return self._dataset.read_row_group(index, self._columns)

    def _read_into(self, future: "Future[pa.Table]", index: int) -> None:
        try:
            future.set_result(self._read(index))
        except BaseException as error:  # raised to everyone who waits for it
            future.set_exception(error)


class _RangedDataset(Dataset):
    """A dataset whose row groups are read with one request for each of the two tables."""

    def __init__(self, dataset: Dataset, ranges: ParquetRanges) -> None:
        _ = dataset.row_groups  # read once, for both
        self.__dict__.update(vars(dataset))
        self._ranges = ranges

    def _read_rows(self, path: str, row_group: int, columns: list[str]) -> pa.Table:
        return self._ranges.read(path, row_group, columns)
