"""The source of batches that a configuration asks for."""

from collections.abc import Callable

from coca.decode import Decoder
from coca.feed import BatchSource, Feed
from coca.mixture import Mixture
from coca.mock_feed import MockFeed
from coca.recorded_feed import RecordedFeed, Recorder
from coca.train_config import FeedConfig, TrainConfig


def open_feed(
    mixture: Mixture,
    config: TrainConfig,
    feed: FeedConfig,
    *,
    rank: int,
    world_size: int,
    make_decoder: Callable[[], Decoder],
) -> BatchSource:
    """What ``feed.source`` names, recording where ``feed.record`` says so.

    Args:
        config: fitted to the mixture's tokenizer.
        make_decoder: called only where pictures are decoded; the source closes what it gives.

    Raises:
        BadInput: the parts do not fit each other, or nothing has been recorded.
    """
    ranks = {"rank": rank, "world_size": world_size}
    if feed.recording is not None:
        return RecordedFeed(feed.recording, config, feed, **ranks)
    source: BatchSource
    if feed.source == "mock":
        source = MockFeed(config, **ranks)
    else:
        source = Feed(mixture, config, feed, **ranks, decoder=make_decoder())
    return source if feed.record is None else Recorder(source, feed.record, **ranks)
