"""Rows of lanes: as they are stored, each row group read once a pass whatever the other lanes do."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from coca.dataset import Dataset
from coca.lane_rows import LaneRows
from coca.mixture import Mixture, Source
from coca.order import Order
from coca.train_config import FeedConfig, TrainConfig

MakeDataset = Callable[..., Dataset]


def open_rows(dataset: Dataset, config: TrainConfig, lanes: slice, read_ahead: int) -> tuple[Order, LaneRows]:
    order = Mixture([Source(dataset)]).order(config)
    rows = LaneRows(
        dataset,
        None,
        order.lanes[lanes],
        window=config.shuffle_window,
        per_lane=order.per_lane,
        feed=FeedConfig(read_ahead=read_ahead),
    )
    return order, rows


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each row group has been read."""
    counted: Counter[int] = Counter()
    original = Dataset.read_row_group

    def counting(self: Dataset, index: int, *args: Any, **kwargs: Any) -> pa.Table:
        counted[index] += 1
        return original(self, index, *args, **kwargs)

    monkeypatch.setattr(Dataset, "read_row_group", counting)
    return counted


def test_rows_are_those_of_the_order(make_dataset: MakeDataset, tiny_train: TrainConfig) -> None:
    dataset = make_dataset(unselected=(1, 6))
    order, rows = open_rows(dataset, tiny_train, slice(None), 2)
    for batch in range(5):
        rows.enter(batch)
        for number, lane in enumerate(order.lanes):
            for row, ref in zip(rows.take(lane, batch), order.lane_batch(number, batch), strict=True):
                stored = dataset.read_row_group(ref.row_group).slice(ref.row, 1).to_pylist()[0]
                assert (row.sample_id, row.encoded, row.lane_pass) == (
                    stored["sample_id"],
                    stored["image"],
                    ref.lane_pass,
                )
                assert row.tokens.tolist() == stored["tokens"]
    rows.close()


@pytest.mark.parametrize("read_ahead", [0, 1, 5])
def test_each_row_group_is_read_once_a_pass_and_no_earlier_than_asked(
    make_dataset: MakeDataset, tiny_train: TrainConfig, read: Counter[int], read_ahead: int
) -> None:
    dataset = make_dataset(files=(48, 48, 48, 48))
    for rank in range(2):
        order, rows = open_rows(dataset, tiny_train, slice(rank, None, 2), read_ahead)
        for batch in range(12):  # three windows of two row groups in each lane, of six
            rows.enter(batch)
            for lane in order.lanes[rank::2]:
                rows.take(lane, batch)
        rows.close()  # drops what it has not begun to read
    assert max(read.values()) == 1
    assert 4 * 6 <= sum(read.values()) <= 4 * (6 + read_ahead)


def test_lanes_that_are_in_another_window_push_no_row_group_out(
    make_dataset: MakeDataset, tiny_train: TrainConfig, read: Counter[int]
) -> None:
    """Row groups of many sizes, and one sample at a time: some lie untouched for long while others come and go."""
    left_out = tuple(np.random.default_rng(0).permutation(192)[:96].tolist())
    config = tiny_train.model_copy(update={"batch_size": 4, "shuffle_window": 3})
    dataset = make_dataset(files=(192,), rows_per_row_group=6, unselected=left_out)
    order, rows = open_rows(dataset, config, slice(None), 1)
    for batch in range(min(lane.samples_per_pass for lane in order.lanes) - 8):  # none reads ahead of its next pass
        rows.enter(batch)
        for lane in order.lanes:
            rows.take(lane, batch)
    rows.close()
    assert max(read.values()) == 1
    assert sum(read.values()) > 20
