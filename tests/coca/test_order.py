"""The order of the data: every sample once a pass, the same whoever asks."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coca.errors import BadInput
from coca.order import Order, check_world_size


def make_order(sizes: list[int], lanes: int, batch_size: int, window: int = 2, seed: int = 0) -> Order:
    return Order(np.array(sizes, dtype=np.int64), lanes=lanes, batch_size=batch_size, window=window, seed=seed)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=4, max_size=30).filter(lambda s: sum(n > 0 for n in s) >= 4),
    window=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_each_pass_of_a_lane_holds_each_of_its_samples_once(sizes: list[int], window: int, seed: int) -> None:
    order = make_order(sizes, lanes=4, batch_size=4, window=window, seed=seed)
    seen: Counter[tuple[int, int]] = Counter()
    for lane in order.lanes:
        for number in range(2):
            refs = lane.slice(number * lane.samples_per_pass, lane.samples_per_pass)
            assert {ref.lane_pass for ref in refs} == {number}
            seen.update((ref.row_group, ref.row) for ref in refs)
    assert seen == {(group, row): 2 for group, size in enumerate(sizes) for row in range(size)}


def test_any_position_is_entered_directly() -> None:
    whole = make_order([5, 3, 8, 2, 7, 4], lanes=2, batch_size=6).lanes[1].slice(0, 60)
    for start in (0, 1, 13, 29, 47):
        fresh = make_order([5, 3, 8, 2, 7, 4], lanes=2, batch_size=6).lanes[1]
        assert fresh.slice(start, 7) == whole[start : start + 7]


def test_golden_order() -> None:
    """Changes to the order break the resume of every run: this test says so."""
    refs = make_order([3, 2, 3, 2], lanes=2, batch_size=4, seed=7).lanes[0].slice(0, 7)
    assert [tuple(ref) for ref in refs] == GOLDEN


GOLDEN = [(0, 2, 0), (2, 1, 0), (0, 1, 0), (2, 2, 0), (2, 0, 0), (0, 0, 0), (0, 0, 1)]


def test_passes_and_seeds_differ() -> None:
    lane = make_order([8] * 6, lanes=1, batch_size=1).lanes[0]
    first, second = lane.slice(0, 48), lane.slice(48, 48)
    assert [r[:2] for r in first] != [r[:2] for r in second]
    assert make_order([8] * 6, lanes=1, batch_size=1, seed=1).lanes[0].slice(0, 48) != first


def test_shuffling_stays_within_the_window() -> None:
    lane = make_order([4] * 12, lanes=1, batch_size=1, window=3).lanes[0]
    for window in range(4):
        assert len({ref.row_group for ref in lane.slice(window * 12, 12)}) == 3


def test_ranks_share_the_lanes() -> None:
    order = make_order([4] * 12, lanes=12, batch_size=24)
    for world in (1, 2, 3, 4, 6, 12):
        owned = [lane for rank in range(world) for lane in order.lanes_of(rank, world)]
        assert sorted(owned) == list(range(12))


def test_a_world_size_that_does_not_divide_is_refused_with_those_that_do() -> None:
    with pytest.raises(BadInput, match=r"5 workers do not divide lanes = 12. Use 1, 2, 3, 4, 6 or 12 workers"):
        check_world_size(12, 5)


def test_empty_row_groups_are_passed_over() -> None:
    order = make_order([0, 4, 0, 4], lanes=2, batch_size=2)
    assert {ref.row_group for lane in order.lanes for ref in lane.slice(0, 4)} == {1, 3}


def test_too_many_lanes_are_refused() -> None:
    with pytest.raises(
        BadInput, match=r"2 row groups with selected samples, too few for lanes = 3. Set train.lanes=1,"
    ):
        make_order([4, 0, 4], lanes=3, batch_size=3)
    with pytest.raises(BadInput, match=r"too few for lanes = 12. Set train.lanes=4,"):
        make_order([4] * 5, lanes=12, batch_size=24)


def test_a_billion_samples_are_entered_anywhere() -> None:
    order = make_order([1000] * 1_000_000, lanes=64, batch_size=64)
    assert len(order.lanes[17].slice(123_456_789_012, 4)) == 4
