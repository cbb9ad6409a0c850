"""Which source of batches a configuration gets."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from coca.dataset import Dataset
from coca.decode import Decoder, make_decoder
from coca.errors import BadInput
from coca.feed import BatchSource, Feed
from coca.feeds import open_feed
from coca.mixture import Mixture, Source
from coca.mock_feed import MockFeed
from coca.train_config import FeedConfig, TrainConfig
from coca.typed_config import build_config

Open = Callable[..., BatchSource]


@pytest.fixture
def open_one(make_dataset: Callable[..., Dataset], tiny_train: TrainConfig) -> Open:
    """``open_one(decoders, **feed)``: a source for the only rank of a run; decoders that are made are put in a list."""
    mixture = Mixture([Source(make_dataset())])

    def make(decoders: list[Decoder], **settings: Any) -> BatchSource:
        feed = FeedConfig(decode="threads", decode_workers=1, **settings)

        def decoder() -> Decoder:
            decoders.append(make_decoder(feed, tiny_train.augment, tiny_train.seed))
            return decoders[-1]

        return open_feed(mixture, tiny_train, feed, rank=0, world_size=1, make_decoder=decoder)

    return make


def test_what_a_run_saw_is_replayed_without_a_decoder(open_one: Open, tmp_path: Path) -> None:
    decoders: list[Decoder] = []
    first = open_one(decoders, record=str(tmp_path / "batches"))
    batches = first.batches(0)
    seen = [next(batches) for _ in range(3)]
    batches.close()
    first.close()
    assert len(decoders) == 1
    again = open_one(decoders, source="recorded", recording=str(tmp_path / "batches")).batches(0)
    for batch in [*seen, seen[0]]:
        replayed = next(again)
        assert torch.equal(replayed.pixels_BHWC, batch.pixels_BHWC)
        assert replayed.sample_ids == batch.sample_ids
    again.close()
    assert len(decoders) == 1


def test_each_source_by_its_name(open_one: Open) -> None:
    decoders: list[Decoder] = []
    feed = open_one(decoders)
    assert isinstance(feed, Feed)
    feed.close()
    assert isinstance(open_one([], source="mock"), MockFeed)


def test_settings_that_do_not_go_together_are_refused() -> None:
    def feed(**values: str) -> FeedConfig:
        return build_config(FeedConfig, values)

    with pytest.raises(BadInput, match=r"to replay batches give both"):
        feed(source="recorded")
    with pytest.raises(BadInput, match=r"to replay batches give both"):
        feed(recording="/x")
    with pytest.raises(BadInput, match=r"record and recording are both given"):
        feed(source="recorded", recording="/x", record="/y")
