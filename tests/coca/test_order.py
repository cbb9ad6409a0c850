"""The order of the data: every sample once a pass, the same whoever asks."""

import random
import time
import tracemalloc
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coca.errors import BadInput
from coca.order import IntArray, Order, SampleRef, check_world_size, deal_lanes


def make_order(sizes: list[int], lanes: int, batch_size: int, window: int = 2, seed: int = 0) -> Order:
    return Order([np.array(sizes, dtype=np.int64)], lanes=lanes, batch_size=batch_size, window=window, seed=seed)


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


def one_by_one(order: Order, lane: int, position: int, window: int) -> SampleRef:
    """Sample ``position`` of a lane as it was computed when a run could first be resumed: sample by sample."""
    each = order.lanes[lane]
    lane_pass, offset = divmod(position, each.samples_per_pass)
    permutation = each._random(lane_pass, 0).permutation(len(each._row_groups))
    row_groups, ends = each._row_groups[permutation], np.cumsum(each._sizes[permutation])
    starts = [0, *(int(ends[last]) for last in range(window - 1, len(ends) - 1, window)), int(ends[-1])]
    number = int(np.searchsorted(starts, offset, side="right")) - 1
    shuffled = each._random(lane_pass, number + 1).permutation(starts[number + 1] - starts[number])
    place = starts[number] + int(shuffled[offset - starts[number]])
    group = int(np.searchsorted(ends, place, side="right"))
    return SampleRef(int(row_groups[group]), place - (int(ends[group - 1]) if group else 0), lane_pass)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=20),
    window=st.integers(1, 5),
    start=st.integers(0, 200),
    count=st.integers(0, 60),
)
def test_a_slice_is_its_samples_one_by_one(sizes: list[int], window: int, start: int, count: int) -> None:
    order = make_order(sizes, lanes=2, batch_size=2, window=window)
    for lane in range(2):
        wanted = [one_by_one(order, lane, position, window) for position in range(start, start + count)]
        assert order.lanes[lane].slice(start, count) == wanted


def uneven_billion() -> IntArray:
    sizes = np.random.default_rng(0).integers(0, 2001, 1_000_000)
    sizes[0] += 1_000_000_000 - sizes.sum()
    return sizes


@pytest.mark.parametrize("sizes", [np.full(1_000_000, 1000), uneven_billion()], ids=["even", "uneven"])
@pytest.mark.parametrize("lanes", [1, 12, 96])
def test_a_billion_samples_are_entered_anywhere_in_little_time_and_memory(sizes: IntArray, lanes: int) -> None:
    """Every lane of a batch, as one worker enters them; `pytest -rP` prints the time."""
    assert sizes.sum() == 1_000_000_000
    chance, seconds, entered = random.Random(lanes), [], {}
    for _ in range(3):
        batch = chance.randrange(10**11)
        order = Order([sizes], lanes=lanes, batch_size=768, window=4, seed=0)
        started = time.perf_counter()
        entered[batch] = [order.lane_batch(lane, batch) for lane in range(lanes)]
        seconds.append(time.perf_counter() - started)
    print(f"{lanes} lanes entered in {1000 * min(seconds):.1f} to {1000 * max(seconds):.1f} ms")
    tracemalloc.start()
    try:
        order = Order([sizes], lanes=lanes, batch_size=768, window=4, seed=0)
        for batch, wanted in entered.items():
            assert [order.lane_batch(lane, batch) for lane in range(lanes)] == wanted
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    print(f"{peak / 1e6:.0f} MB, the order itself counted")
    assert peak < 100e6
    for refs in wanted:
        assert len(refs) == 768 // lanes
        assert all(ref.row < sizes[ref.row_group] for ref in refs)


def test_row_groups_come_before_their_samples() -> None:
    lane = make_order([4, 5, 6, 7, 8], lanes=1, batch_size=1).lanes[0]
    for start in range(0, 70, 3):
        wanted, following = lane.row_groups_for(start, 9, 2)
        assert {ref.row_group for ref in lane.slice(start, 9)} <= set(wanted)
        coming = list(dict.fromkeys(islice(lane.row_groups_from(start), 12)))
        assert wanted + following == coming[: len(wanted) + len(following)]
    counts = [tuple(map(len, lane.row_groups_for(0, 1, ahead))) for ahead in range(4)]
    assert counts == [(2, 0), (2, 1), (2, 2), (2, 3)]  # one window, and those
    # Without end, pass after pass.
    assert Counter(islice(lane.row_groups_from(0), 15)) == dict.fromkeys(range(5), 3)


def test_lanes_are_dealt_by_weight() -> None:
    assert deal_lanes(12, [1]) == [12]
    assert deal_lanes(12, [1, 1, 1]) == [4, 4, 4]
    assert deal_lanes(12, [3, 1]) == [9, 3]
    assert deal_lanes(10, [2, 1]) == [7, 3]  # 6.67 and 3.33
    assert deal_lanes(4, [1, 1, 1]) == [2, 1, 1]  # ties go to the first
    assert deal_lanes(4, [1000, 1, 1]) == [2, 1, 1]  # none is without
    assert deal_lanes(12, [0.5, 1000, 0.5]) == [1, 10, 1]
    with pytest.raises(BadInput, match=r"lanes = 2 are too few for 3 datasets. Set train.lanes to 3 or more"):
        deal_lanes(2, [1, 1, 1])


@settings(max_examples=100, deadline=None)
@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12), lanes=st.integers(12, 60))
def test_dealt_lanes_are_all_and_near_their_share(weights: list[float], lanes: int) -> None:
    dealt = deal_lanes(lanes, weights)
    assert sum(dealt) == lanes
    assert min(dealt) >= 1
    quotas = [lanes * weight / sum(weights) for weight in weights]
    raised = sum(max(0.0, 1 - quota) for quota in quotas)
    for own, quota in zip(dealt, quotas, strict=True):
        assert quota - 1 - raised - 1e-9 < own < max(1, quota) + 1


def test_several_datasets_each_sample_once_a_pass_and_the_same_for_any_world() -> None:
    sizes = [[3, 0, 5, 2, 4, 6, 1, 2, 3], [7, 2, 2, 5], [1, 1, 1]]
    counts = [np.array(each, dtype=np.int64) for each in sizes]
    weights = [6, 3, 2]

    def order_of() -> Order:
        return Order(counts, weights, lanes=12, batch_size=24, window=2, seed=3)

    order = order_of()
    assert [lane.source for lane in order.lanes] == [0] * 7 + [1] * 3 + [2] * 2
    seen: Counter[tuple[int, int, int]] = Counter()
    for lane in order.lanes:
        for number in range(3):
            refs = lane.slice(number * lane.samples_per_pass, lane.samples_per_pass)
            seen.update((lane.source, ref.row_group, ref.row) for ref in refs)
    every = ((s, g, row) for s, each in enumerate(sizes) for g, size in enumerate(each) for row in range(size))
    assert seen == dict.fromkeys(every, 3)
    whole = [[order.lane_batch(lane, batch) for lane in range(12)] for batch in range(9)]
    for world in (1, 2, 3, 4, 6, 12):
        for batch, wanted in enumerate(whole):
            ranks = [(order_of(), rank) for rank in range(world)]
            got = {n: each.lane_batch(n, batch) for each, rank in ranks for n in each.lanes_of(rank, world)}
            assert [got[lane] for lane in range(12)] == wanted
        for source in range(3):
            shares = [sum(order.lanes[n].source == source for n in order.lanes_of(r, world)) for r in range(world)]
            assert max(shares) - min(shares) <= 1


def test_a_dataset_too_small_for_its_lanes_is_named() -> None:
    with pytest.raises(BadInput, match=r"dataset 2 has 1 row groups .*, too few for its 2 of lanes = 4. Lower its"):
        Order([np.full(9, 4), np.array([4, 0])], [1, 1], lanes=4, batch_size=4, window=2, seed=0)
