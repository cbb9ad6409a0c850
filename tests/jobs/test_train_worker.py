"""What the ranks of a run agree on, and which feed they get; the whole worker runs in tests/jobs/test_train.py."""

import itertools
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from coca.dataset import Dataset
from coca.mixture import Mixture, Source
from coca.mock_feed import MockFeed
from coca.train_config import FeedConfig, TrainConfig
from jobs import train_worker
from jobs.config import DataConfig, TrainRunConfig
from jobs.stop_signal import StopSignal
from jobs.train_worker import feed_of, hearing, on_all_ranks, open_held_out, reporting
from tests.coca.rank_processes import run_phases


def agree(folder: str) -> None:
    """Rank 0 hears at its third step, the other at its first."""
    from coca.distributed import rank

    steps = itertools.count(1)
    should_stop = on_all_ranks(lambda: next(steps) >= 3 if rank() == 0 else True, timeout_s=30)
    answers = [should_stop() for _ in range(4)]
    Path(folder, str(rank())).write_text(repr(answers))


def test_all_ranks_stop_at_the_step_at_which_rank_0_hears(tmp_path: Path) -> None:
    run_phases("tests.jobs.test_train_worker", [("agree", 2)], str(tmp_path))
    for rank in ("0", "1"):
        assert (tmp_path / rank).read_text() == "[False, False, True, True]"


def test_alone_a_worker_asks_nobody() -> None:
    heard = [False]
    should_stop = on_all_ranks(lambda: heard[0], timeout_s=1)
    assert not should_stop()
    heard[0] = True
    assert should_stop()


def test_rank_0_alone_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    listening: list[StopSignal] = []

    class Ear:
        def __init__(self, signal: StopSignal) -> None:
            listening.append(signal)

        def __enter__(self) -> "Ear":
            return self

        def __exit__(self, *_: object) -> None: ...

        def heard(self) -> bool:
            return True

    monkeypatch.setattr(train_worker, "Listener", Ear)
    monkeypatch.setattr("coca.distributed.rank", lambda: 3)
    with hearing(StopSignal("key")) as heard:
        assert (heard(), listening) == (False, [])
    monkeypatch.setattr("coca.distributed.rank", lambda: 0)
    with hearing(StopSignal("key")) as heard:
        assert (heard(), listening) == (True, [StopSignal("key")])


@pytest.fixture
def config(make_dataset: Callable[..., Dataset], tiny_train: TrainConfig) -> TrainRunConfig:
    return TrainRunConfig(data=(DataConfig(uri=make_dataset().store.uri),), out="unused", train=tiny_train)


def test_the_feed_is_the_one_of_the_config(config: TrainRunConfig) -> None:
    mixture = Mixture([Source(Dataset(config.data[0].uri))])
    with closing(feed_of(config, mixture)) as feed, closing(feed.batches(2)) as batches:
        batch = next(batches)
    assert batch.pixels_BHWC.shape == (8, 16, 16, 3)
    processes = config.model_copy(update={"feed": FeedConfig(decode="processes", decode_workers=1)})
    with closing(feed_of(processes, mixture)) as feed, closing(feed.batches(2)) as batches:
        assert next(batches).pixels_BHWC.equal(batch.pixels_BHWC)
    mock = config.model_copy(update={"feed": FeedConfig(source="mock")})
    assert isinstance(feed_of(mock, mixture), MockFeed)


def test_without_trackers_and_held_out_set_there_are_none(config: TrainRunConfig) -> None:
    assert open_held_out(config) is None
    with reporting(config) as report:
        report({"step": 1})
