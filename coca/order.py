"""The order of the data: a pure function of (row groups of the dataset versions, weights, lanes, seed).

The L lanes are dealt to the datasets by weight, and the row groups of a dataset to its lanes in turn. A lane is an
endless stream: at each pass it permutes its own row groups anew and shuffles samples within a window of a few of them.
Global batch k is the next B/L samples of every lane; rank r owns the lanes with l mod world = r. The position is one
integer, batches consumed.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice, repeat
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


class Window(NamedTuple):
    """The row groups among which a stretch of a lane is shuffled."""

    lane_pass: int
    number: int  # within its pass
    start: int  # position in the lane of its first sample
    row_groups: IntArray  # in the order of the pass
    ends: IntArray  # samples of the window up to and with each row group

    @property
    def end(self) -> int:
        """Position in the lane after its last sample."""
        return self.start + int(self.ends[-1])


class Lane:
    """One endless stream of samples; any position is entered by arithmetic on the row-group sizes of its pass."""

    def __init__(
        self, number: int, row_groups: IntArray, sizes: IntArray, *, seed: int, window: int, source: int = 0
    ) -> None:
        """
        Args:
            row_groups: (G,) indices of the row groups the lane owns.
            sizes: (G,) selected samples in each, none of them 0.
            window: row groups within which samples are shuffled.
            source: the dataset that the row groups are of.
        """
        self.number, self.source = number, source
        self._row_groups, self._sizes = row_groups, sizes
        self._seed, self._window = seed, window
        self.samples_per_pass = int(sizes.sum())
        self._pass_layout = lru_cache(maxsize=2)(self._compute_pass_layout)
        self._window_order = lru_cache(maxsize=4)(self._compute_window_order)

    @property
    def row_group_count(self) -> int:
        """Row groups that the lane owns."""
        return len(self._row_groups)

    def slice(self, start: int, count: int) -> list[SampleRef]:
        """Samples ``start`` to ``start + count`` of the stream."""
        refs: list[SampleRef] = []
        while len(refs) < count:
            position = start + len(refs)
            window = self.window_at(position)
            first = position - window.start
            order = self._window_order(window.lane_pass, window.number, int(window.ends[-1]))
            places = order[first : first + count - len(refs)]
            groups = np.searchsorted(window.ends, places, side="right")
            rows = places - np.concatenate([[0], window.ends])[groups]
            found = zip(window.row_groups[groups].tolist(), rows.tolist(), repeat(window.lane_pass))
            refs.extend(map(SampleRef._make, found))
        return refs

    def window_at(self, position: int) -> Window:
        """The window that sample ``position`` of the stream lies in."""
        lane_pass, offset = divmod(position, self.samples_per_pass)
        permutation, ends = self._pass_layout(lane_pass)
        number = int(np.searchsorted(ends, offset, side="right")) // self._window
        inside = slice(number * self._window, (number + 1) * self._window)
        before = int(ends[inside.start - 1]) if number else 0
        start = lane_pass * self.samples_per_pass + before
        return Window(lane_pass, number, start, self._row_groups[permutation[inside]], ends[inside] - before)

    def row_groups_from(self, position: int) -> Iterator[int]:
        """Row groups as the stream comes to them, without end, from the window of sample ``position`` on."""
        while True:
            window = self.window_at(position)
            yield from window.row_groups.tolist()
            position = window.end

    def row_groups_for(self, start: int, count: int, ahead: int) -> tuple[list[int], list[int]]:
        """The row groups of the windows that samples ``start`` to ``start + count`` lie in; and of the next ``ahead``
        those that are none of these."""
        opened, position = 0, start
        while position < start + count:
            window = self.window_at(position)
            opened, position = opened + len(window.row_groups), window.end
        groups = list(islice(self.row_groups_from(start), opened + ahead))
        now = dict.fromkeys(groups[:opened])
        return list(now), [group for group in dict.fromkeys(groups) if group not in now]

    def _compute_pass_layout(self, lane_pass: int) -> tuple[IntArray, IntArray]:
        permutation = self._random(lane_pass, 0).permutation(len(self._row_groups))
        return permutation, np.cumsum(self._sizes[permutation])

    def _compute_window_order(self, lane_pass: int, window: int, samples: int) -> IntArray:
        return self._random(lane_pass, window + 1).permutation(samples)

    def _random(self, lane_pass: int, stream: int) -> np.random.Generator:
        return np.random.Generator(
            np.random.Philox(np.random.SeedSequence([self._seed, self.number, lane_pass, stream]))
        )


class Order:
    """The lanes of a run and what each global batch takes from them."""

    def __init__(
        self,
        selected: Sequence[IntArray],
        weights: Sequence[float] = (1.0,),
        *,
        lanes: int,
        batch_size: int,
        window: int,
        seed: int,
    ) -> None:
        """
        Args:
            selected: of each dataset, the selected samples in each row group, in the order of the samples files.
            weights: of the datasets.

        Raises:
            BadInput: lanes does not divide batch_size, or a lane would be empty.
        """
        if batch_size % lanes:
            raise BadInput(f"lanes = {lanes} does not divide batch_size = {batch_size}", f"Use {_divisors(batch_size)}")
        self.per_lane = batch_size // lanes
        self.lanes: list[Lane] = []
        for source, (counts, own) in enumerate(zip(selected, deal_lanes(lanes, weights), strict=True)):
            filled = np.flatnonzero(counts)
            if len(filled) < own:
                raise _too_few(len(filled), own, lanes, batch_size, source if len(weights) > 1 else None)
            for turn in range(own):
                groups = filled[turn::own]
                number = len(self.lanes)
                self.lanes.append(Lane(number, groups, counts[groups], seed=seed, window=window, source=source))

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


def deal_lanes(lanes: int, weights: Sequence[float]) -> list[int]:
    """Lanes of each dataset, in proportion to its weight by largest remainder, but at least one.

    The lanes of a dataset follow each other, so that ranks, which take every world-th, have equal shares of it, give or
    take one lane.

    Raises:
        BadInput: there are fewer lanes than datasets.
    """
    if lanes < len(weights):
        raise BadInput(
            f"lanes = {lanes} are too few for {len(weights)} datasets", f"Set train.lanes to {len(weights)} or more"
        )
    quotas = [lanes * weight / sum(weights) for weight in weights]
    dealt = [max(1, int(quota)) for quota in quotas]
    while sum(dealt) != lanes:
        step = 1 if sum(dealt) < lanes else -1
        # Who has least of what it should have gets one more; who has most above it, and more than one, gives one.
        open_to = [each for each, own in enumerate(dealt) if step > 0 or own > 1]
        chosen = max(open_to, key=lambda each: (step * (quotas[each] - dealt[each]), -each))
        dealt[chosen] += step
    return dealt


def check_world_size(lanes: int, world_size: int) -> None:
    """Raises BadInput, naming the sizes that work, unless ``world_size`` divides ``lanes``."""
    if lanes % world_size:
        raise BadInput(f"{world_size} workers do not divide lanes = {lanes}", f"Use {_divisors(lanes)} workers")


def _too_few(filled: int, own: int, lanes: int, batch_size: int, source: int | None) -> BadInput:
    if source is None:
        return BadInput(
            f"the dataset has {filled} row groups with selected samples, too few for lanes = {lanes}",
            f"{_fewer_lanes(filled, batch_size)} smaller row groups (publish.rows_per_row_group)",
        )
    return BadInput(
        f"dataset {source + 1} has {filled} row groups with selected samples, too few for its {own} of lanes = {lanes}",
        "Lower its weight or train.lanes, or write smaller row groups (publish.rows_per_row_group)",
    )


def _fewer_lanes(most: int, batch_size: int) -> str:
    fitting = max((lanes for lanes in range(1, most + 1) if batch_size % lanes == 0), default=0)
    return f"Set train.lanes={fitting}, or write" if fitting else "Write"


def _divisors(number: int) -> str:
    found = [str(d) for d in range(1, number + 1) if number % d == 0]
    return " or ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)
