"""The rows that a rank's lanes ask of one dataset, each row group read once a pass, without what is withdrawn."""

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from coca.dataset import Dataset
from coca.errors import BadInput
from coca.order import Lane, SampleRef
from coca.row_groups import RowGroups
from coca.train_config import FeedConfig
from coca.withdrawn import Withdrawn


class Row(NamedTuple):
    """One sample as it is stored, and the pass over its lane that asks for it."""

    sample_id: str
    encoded: bytes
    tokens: npt.NDArray[np.int32]
    lane_pass: int


class LaneRows:
    """Holds the row groups of the windows that its lanes are in, and has the next ones read ahead."""

    def __init__(
        self,
        dataset: Dataset,
        later: Withdrawn | None,
        lanes: Sequence[Lane],
        *,
        window: int,
        per_lane: int,
        feed: FeedConfig,
    ) -> None:
        """
        Args:
            dataset: as the order of the run sees it.
            later: what has been withdrawn since.
            lanes: of this rank and dataset.
            window: row groups within which a lane shuffles.
            per_lane: samples that a batch takes from a lane.
        """
        self._uri, self._later, self._lanes, self._per_lane = dataset.store.uri, later, tuple(lanes), per_lane
        self._vocab_size = dataset.tokenizer.vocab_size
        self._ahead, self._most = feed.read_ahead, window + feed.read_ahead
        # Those in use are held here, as the order says and for no longer: none is read twice because others came.
        self._held: dict[int, _Group] = {}
        capacity = self._most * len(self._lanes)
        self._row_groups = RowGroups(dataset, ("sample_id", "image"), capacity=capacity, feed=feed)

    def enter(self, batch: int) -> None:
        """Lets go of row groups that no batch from ``batch`` on needs soon, and begins to read those that it does."""
        coming = [lane.row_groups_for(batch * self._per_lane, self._per_lane, self._ahead) for lane in self._lanes]
        needed = {group for own in coming for groups in own for group in groups}
        self._held = {group: rows for group, rows in self._held.items() if group in needed}
        for groups in zip(*coming, strict=True):  # of all lanes those that they are in, then the next ones
            missing = [[group for group in own if group not in self._held] for own in groups]
            self._row_groups.expect(group for own in missing for group in own[: self._most])

    def take(self, lane: Lane, batch: int) -> list[Row]:
        """What global batch ``batch`` takes from a lane.

        Raises:
            BadInput: the dataset is damaged, or everything in the lane has been withdrawn.
        """
        start = batch * self._per_lane
        refs = lane.slice(start, self._per_lane)
        return [self._row(lane, position, ref) for position, ref in enumerate(refs, start)]

    def close(self) -> None:
        """Ends the reading ahead."""
        self._row_groups.close()

    def _row(self, lane: Lane, position: int, ref: SampleRef) -> Row:
        group = self._group(ref.row_group)
        row = group.shown_from(ref.row)
        if row is None:
            group, row = self._stand_in(lane, position, ref)
        return group.row(row, ref.lane_pass)

    def _stand_in(self, lane: Lane, position: int, ref: SampleRef) -> tuple["_Group", int]:
        """The next row of the lane after a row group of which everything has been withdrawn."""
        stream = lane.row_groups_from(position)
        for index in stream:
            if index == ref.row_group:
                break
        for index in islice(stream, 2 * lane.row_group_count):
            group = self._group(index)
            if (row := group.shown_from(0)) is not None:
                return group, row
        raise BadInput(
            f"everything that lane {lane.number} reads of {self._uri} has been withdrawn since the run began",
            "Start a new run with another --out",
        )

    def _group(self, index: int) -> "_Group":
        if index not in self._held:
            table = self._row_groups.get(index)
            self._check_tokens(index, table["tokens"])
            self._held[index] = _Group(table, self._later)
        return self._held[index]

    def _check_tokens(self, index: int, tokens: pa.ChunkedArray) -> None:
        """An id that the model has no embedding for ends a CUDA process without a word of where it came from."""
        range_ = pc.min_max(pc.list_flatten(tokens))
        least, most = range_["min"].as_py(), range_["max"].as_py()
        if least is not None and (least < 0 or most >= self._vocab_size):
            raise BadInput(
                f"{self._uri}: row group {index} has tokens {least} to {most}, its tokenizer {self._vocab_size}",
                "The dataset is damaged: `coca data verify` names every fault",
            )


class _Group:
    """The rows of one row group."""

    def __init__(self, table: pa.Table, later: Withdrawn | None) -> None:
        # Taken from the columns' memory: a scalar of Arrow's for each value costs as much as reading it.
        self._sample_ids = table["sample_id"].to_pylist()
        self._images, self._image_ends = _binary_memory(table["image"])
        self._tokens, self._token_ends = _list_memory(table["tokens"])
        hidden = None if later is None else later.mask(table["sample_id"])
        self._shown = None if hidden is None or not hidden.any() else np.flatnonzero(~hidden)

    def shown_from(self, row: int) -> int | None:
        """``row``, or where it is withdrawn the next that is not, after the last one the first; None if all are."""
        if self._shown is None:
            return row
        if not len(self._shown):
            return None
        return int(self._shown[np.searchsorted(self._shown, row) % len(self._shown)])

    def row(self, row: int, lane_pass: int) -> Row:
        image = self._images[self._image_ends[row] : self._image_ends[row + 1]]
        tokens = self._tokens[self._token_ends[row] : self._token_ends[row + 1]]
        return Row(self._sample_ids[row], bytes(image), tokens, lane_pass)


def _binary_memory(column: pa.ChunkedArray) -> tuple[memoryview, list[int]]:
    """The bytes of all rows end to end, and where each begins and the last one ends."""
    array = _one_chunk(column.cast(pa.large_binary()))  # several chunks may be more than offsets of 32 bits reach
    _, ends, data = array.buffers()
    return memoryview(data or b""), np.frombuffer(ends, np.int64)[array.offset :][: len(array) + 1].tolist()


def _list_memory(column: pa.ChunkedArray) -> tuple[npt.NDArray[np.int32], list[int]]:
    """The values of all rows end to end, and where each row of them begins and the last one ends."""
    array = _one_chunk(column)
    return array.values.to_numpy(), array.offsets.tolist()


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # which copies always
