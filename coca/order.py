"""The order of the data: a pure function of (row groups of a dataset version, lanes, seed).

Row groups are dealt to L lanes in turn. A lane is an endless stream: at each pass it permutes its own row groups anew
and shuffles samples within a window of a few of them. Global batch k is the next B/L samples of every lane; rank r owns
the lanes with l mod world = r. The position is one integer, batches consumed.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from coca.errors import BadInput

IntArray = npt.NDArray[np.int64]


class SampleRef(NamedTuple):
    """Where a sample lies and which pass over its lane asks for it; `row` counts selected rows only."""

    row_group: int
    row: int
    lane_pass: int


class Lane:
    """One endless stream of samples; any position is entered by arithmetic on the row-group sizes of its pass."""

    def __init__(self, number: int, row_groups: IntArray, sizes: IntArray, *, seed: int, window: int) -> None:
        """
        Args:
            row_groups: (G,) indices of the row groups the lane owns.
            sizes: (G,) selected samples in each.
            window: row groups within which samples are shuffled.
        """
        self.number, self._row_groups, self._sizes = number, row_groups, sizes
        self._seed, self._window = seed, window
        self.samples_per_pass = int(sizes.sum())
        self._pass_layout = lru_cache(maxsize=2)(self._compute_pass_layout)
        self._window_order = lru_cache(maxsize=4)(self._compute_window_order)

    def slice(self, start: int, count: int) -> list[SampleRef]:
        """Samples ``start`` to ``start + count`` of the stream."""
        return [self._at(position) for position in range(start, start + count)]

    def _at(self, position: int) -> SampleRef:
        lane_pass, offset = divmod(position, self.samples_per_pass)
        row_groups, ends, window_ends = self._pass_layout(lane_pass)
        window = int(np.searchsorted(window_ends, offset, side="right"))
        window_start = int(window_ends[window - 1]) if window else 0
        shuffled = window_start + int(self._window_order(lane_pass, window)[offset - window_start])
        group = int(np.searchsorted(ends, shuffled, side="right"))
        group_start = int(ends[group - 1]) if group else 0
        return SampleRef(int(row_groups[group]), shuffled - group_start, lane_pass)

    def _compute_pass_layout(self, lane_pass: int) -> tuple[IntArray, IntArray, IntArray]:
        permutation = self._random(lane_pass, 0).permutation(len(self._row_groups))
        ends = np.cumsum(self._sizes[permutation])
        last_of_window = np.append(np.arange(self._window - 1, len(ends) - 1, self._window), len(ends) - 1)
        return self._row_groups[permutation], ends, ends[last_of_window]

    def _compute_window_order(self, lane_pass: int, window: int) -> IntArray:
        window_ends = self._pass_layout(lane_pass)[2]
        start = int(window_ends[window - 1]) if window else 0
        return self._random(lane_pass, window + 1).permutation(int(window_ends[window]) - start)

    def _random(self, lane_pass: int, stream: int) -> np.random.Generator:
        return np.random.Generator(
            np.random.Philox(np.random.SeedSequence([self._seed, self.number, lane_pass, stream]))
        )


class Order:
    """The lanes of a run and what each global batch takes from them."""

    def __init__(self, selected: IntArray, *, lanes: int, batch_size: int, window: int, seed: int) -> None:
        """
        Args:
            selected: selected samples in each row group, in the order of the samples files.

        Raises:
            BadInput: lanes does not divide batch_size, or a lane would be empty.
        """
        if batch_size % lanes:
            raise BadInput(f"lanes = {lanes} does not divide batch_size = {batch_size}", f"Use {_divisors(batch_size)}")
        filled = np.flatnonzero(selected)
        if len(filled) < lanes:
            raise BadInput(
                f"the dataset has {len(filled)} row groups with selected samples, too few for lanes = {lanes}",
                f"{_fewer_lanes(len(filled), batch_size)} smaller row groups (publish.rows_per_row_group)",
            )
        self.per_lane = batch_size // lanes
        self.lanes = [
            Lane(number, filled[number::lanes], selected[filled[number::lanes]], seed=seed, window=window)
            for number in range(lanes)
        ]

    def lane_batch(self, lane: int, batch: int) -> list[SampleRef]:
        """What global batch ``batch`` takes from a lane."""
        return self.lanes[lane].slice(batch * self.per_lane, self.per_lane)

    def lanes_of(self, rank: int, world_size: int) -> list[int]:
        """The lanes a rank owns: no other rank reads their bytes.

        Raises:
            BadInput: the world size does not divide the lanes.
        """
        check_world_size(len(self.lanes), world_size)
        return list(range(rank, len(self.lanes), world_size))


def check_world_size(lanes: int, world_size: int) -> None:
    """Raises BadInput, naming the sizes that work, unless ``world_size`` divides ``lanes``."""
    if lanes % world_size:
        raise BadInput(f"{world_size} workers do not divide lanes = {lanes}", f"Use {_divisors(lanes)} workers")


def _fewer_lanes(most: int, batch_size: int) -> str:
    fitting = max((lanes for lanes in range(1, most + 1) if batch_size % lanes == 0), default=0)
    return f"Set train.lanes={fitting}, or write" if fitting else "Write"


def _divisors(number: int) -> str:
    found = [str(d) for d in range(1, number + 1) if number % d == 0]
    return " or ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)
