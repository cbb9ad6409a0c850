"""Made-up batches: in the shapes that the feed's have, and the same for any number of ranks."""

import pytest
import torch

from coca.errors import BadInput
from coca.feed import Batch
from coca.mock_feed import MockFeed
from coca.train_config import AugmentConfig, ResolutionPhase, TrainConfig


def test_shapes_are_those_of_the_run(tiny_train: TrainConfig) -> None:
    config = tiny_train.model_copy(
        update={
            "augment": AugmentConfig(patch_dropout=0.5, unmasked_fraction=1 / 3),
            "resolutions": (ResolutionPhase(from_step=2, image_size=32),),
        }
    )
    batches = MockFeed(config, rank=1, world_size=2).batches(0)
    seen = [next(batches) for _ in range(6)]
    assert [batch.pixels_BHWC.shape for batch in seen] == [(4, side, side, 3) for side in (16, 16, 32, 32, 32, 32)]
    kept = [None if batch.kept_patches_BK is None else tuple(batch.kept_patches_BK.shape) for batch in seen]
    assert kept == [(4, 2), (4, 2), (4, 8), (4, 8), None, None]
    for batch in seen:
        assert batch.pixels_BHWC.dtype == torch.uint8
        assert batch.tokens_BT.shape == (4, 12)
        assert batch.tokens_BT.dtype == torch.int64
        assert len(batch.lane_digests) == 2
        assert len(set(batch.sample_ids)) == 4
    patches = seen[0].kept_patches_BK
    assert patches is not None
    assert (patches.diff(dim=1) > 0).all()
    assert patches.max() < 4


def test_captions_are_captions(tiny_train: TrainConfig) -> None:
    tokens_BT = MockFeed(tiny_train, rank=0, world_size=1, tokens=7).batch(0).tokens_BT
    text = tiny_train.model.text
    assert tokens_BT.shape == (8, 7)
    assert (tokens_BT[:, 0] == text.begin_id).all()
    assert (tokens_BT[:, -1] == text.end_id).all()
    inside = tokens_BT[:, 1:-1]
    assert not torch.isin(inside, torch.tensor([text.pad_id, text.begin_id, text.end_id])).any()
    assert 0 <= inside.min() <= inside.max() < text.vocab_size


def test_ranks_together_have_the_batch_of_one(tiny_train: TrainConfig) -> None:
    def pictures(batch: Batch) -> set[bytes]:
        return {picture.numpy().tobytes() for picture in batch.pixels_BHWC}

    one = MockFeed(tiny_train, rank=0, world_size=1).batch(0)
    shares = [MockFeed(tiny_train, rank=rank, world_size=4).batch(3) for rank in range(4)]
    assert set().union(*map(pictures, shares)) == pictures(one)
    assert [share.lane_digests[0] for share in shares] == one.lane_digests
    assert [key for share in shares for key in share.sample_ids] == one.sample_ids


def test_it_is_made_once(tiny_train: TrainConfig) -> None:
    feed = MockFeed(tiny_train, rank=0, world_size=1)
    assert feed.batch(5).pixels_BHWC.data_ptr() == feed.batch(9).pixels_BHWC.data_ptr()


def test_what_does_not_fit_is_refused(tiny_train: TrainConfig) -> None:
    with pytest.raises(BadInput, match=r"captions of 13 tokens. Give 2 to model.text.context_length = 12"):
        MockFeed(tiny_train, rank=0, world_size=1, tokens=13)
    with pytest.raises(BadInput, match=r"3 workers do not divide lanes = 4"):
        MockFeed(tiny_train, rank=0, world_size=3)
