"""Batches: the same samples for any number of ranks and from any position."""

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from coca.config import Preprocessing
from coca.dataset import Dataset
from coca.errors import BadInput, RunFailed
from coca.feed import Batch, Feed, _prefetch, batch_digest, normalize, pad_tokens
from coca.train_config import AugmentConfig, TrainConfig

MakeDataset = Callable[..., Dataset]


def make_feed(dataset: Dataset, config: TrainConfig, rank: int = 0, world: int = 1) -> Feed:
    return Feed(dataset, config, rank=rank, world_size=world)


def test_ranks_together_see_the_batch_of_one_process(make_dataset: MakeDataset, tiny_train: TrainConfig) -> None:
    dataset = make_dataset(files=(10, 10, 10, 10))
    whole = make_feed(dataset, tiny_train)
    for number in (0, 5, 11):
        one = whole.batch(number)
        for world in (2, 4):
            shares = [make_feed(dataset, tiny_train, rank, world).batch(number) for rank in range(world)]
            lanes: list[list[np.ndarray]] = [[] for _ in range(4)]
            digests = [0] * 4
            for rank, share in enumerate(shares):
                for index, lane in enumerate(range(rank, 4, world)):
                    lanes[lane] = list(share.pixels_BHWC.numpy()[index * 2 : index * 2 + 2])
                    digests[lane] = share.lane_digests[index]
            assert np.array_equal(np.stack([p for lane in lanes for p in lane]), one.pixels_BHWC.numpy())
            assert batch_digest(digests) == batch_digest(one.lane_digests)


def test_entering_late_gives_what_going_through_gives(make_dataset: MakeDataset, tiny_train: TrainConfig) -> None:
    dataset = make_dataset()
    through, late = make_feed(dataset, tiny_train).batches(0), make_feed(dataset, tiny_train).batches(7)
    for _ in range(7):
        next(through)
    for _ in range(4):
        a, b = next(through), next(late)
        assert torch.equal(a.pixels_BHWC, b.pixels_BHWC)
        assert torch.equal(a.tokens_BT, b.tokens_BT)
        assert a.lane_digests == b.lane_digests
    through.close()
    late.close()


def test_unselected_samples_never_appear(make_dataset: MakeDataset, tiny_train: TrainConfig) -> None:
    left_out = (0, 3, 4, 5, 6, 7, 29)
    dataset = make_dataset(unselected=left_out)
    feed = make_feed(dataset, tiny_train)
    tokenizer = dataset.tokenizer
    seen = set()
    for number in range(12):
        seen |= {tokenizer.decode(row) for row in feed.batch(number).tokens_BT.tolist()}
    assert {int(caption.split()[-1]) for caption in seen} == set(range(30)) - set(left_out)


def test_a_sample_that_does_not_decode_is_named(make_dataset: MakeDataset, tiny_train: TrainConfig) -> None:
    dataset = make_dataset()
    feed = make_feed(dataset, tiny_train)
    group = feed._row_group(0)
    broken = group.set_column(1, "image", [[b"not an image"] * group.num_rows])
    feed._row_groups[0] = broken
    with pytest.raises(RunFailed, match=r"sample 0{31}[0-3] of .* does not decode: not_an_image"):
        for number in range(6):
            feed.batch(number)


def test_an_error_in_the_thread_reaches_the_caller(make_dataset: MakeDataset, tiny_train: TrainConfig) -> None:
    dataset = make_dataset()
    dataset.store.delete("samples/part-00001.parquet")
    batches = make_feed(dataset, tiny_train).batches(0)
    with pytest.raises(BadInput, match=r"samples/part-00001.parquet is missing"):
        for _ in range(12):
            _: Batch = next(batches)


def test_closing_ends_a_thread_whose_error_nobody_takes() -> None:
    """As at the last step of a run, when a sample past its end does not decode."""
    failed = threading.Event()

    def broken() -> Iterator[Batch]:
        yield from [Batch(torch.zeros(1), torch.zeros(1), [])] * 3
        failed.set()
        raise RunFailed("does not decode")

    batches = _prefetch(broken(), depth=2)
    next(batches)
    assert failed.wait(10)
    closing = threading.Thread(target=batches.close, daemon=True)
    closing.start()
    closing.join(10)
    assert not closing.is_alive()


def test_views_change_from_pass_to_pass_and_with_nothing_else(
    make_dataset: MakeDataset, tiny_train: TrainConfig
) -> None:
    config = tiny_train.model_copy(update={"augment": AugmentConfig(min_crop_area=0.3)})
    dataset = make_dataset(files=(8,), rows_per_row_group=2)  # one pass is one batch
    one, other = make_feed(dataset, config), make_feed(dataset, config, rank=1, world=2)
    assert torch.equal(one.batch(0).pixels_BHWC, one.batch(0).pixels_BHWC)
    assert torch.equal(other.batch(0).pixels_BHWC, one.batch(0).pixels_BHWC.view(4, 2, 16, 16, 3)[1::2].flatten(0, 1))

    def by_caption(number: int) -> dict[tuple[int, ...], torch.Tensor]:
        batch = one.batch(number)
        return dict(zip(map(tuple, batch.tokens_BT.tolist()), batch.pixels_BHWC, strict=True))

    first, second = by_caption(0), by_caption(1)
    assert first.keys() == second.keys()
    assert not all(torch.equal(first[caption], second[caption]) for caption in first)


def test_tokens_are_padded_to_the_longest_and_cut_with_their_end() -> None:
    padded = pad_tokens([[1, 5, 2], [1, 5, 6, 7, 8, 2]], context_length=4, pad_id=0, end_id=2)
    assert padded.tolist() == [[1, 5, 2, 0], [1, 5, 6, 2]]


def test_normalize_golden() -> None:
    pixels = torch.tensor([[[[0, 255, 51]]]], dtype=torch.uint8)
    images = normalize(pixels, Preprocessing(image_size=1, mean=(0.5, 0.5, 0.2), std=(0.5, 0.25, 0.1)))
    assert images.shape == (1, 3, 1, 1)
    torch.testing.assert_close(images.flatten(), torch.tensor([-1.0, 2.0, 0.0]), atol=1e-6, rtol=0)


def test_patches_are_dropped_by_sample_and_not_by_rank(make_dataset: MakeDataset, tiny_train: TrainConfig) -> None:
    dataset = make_dataset()
    assert make_feed(dataset, tiny_train).batch(3).kept_patches_BK is None
    config = tiny_train.model_copy(update={"augment": AugmentConfig(patch_dropout=0.5)})
    one = make_feed(dataset, config).batch(3).kept_patches_BK
    assert one is not None
    assert one.shape == (8, 2)  # of 4 patches
    shares = [make_feed(dataset, config, rank, 2).batch(3).kept_patches_BK for rank in range(2)]
    assert shares[0] is not None
    assert shares[1] is not None
    by_lane = torch.stack([shares[0].view(2, 2, 2), shares[1].view(2, 2, 2)], dim=1)  # rank r has lanes r and r + 2
    assert torch.equal(by_lane.view(8, 2), one)
    assert len({tuple(row) for row in one.tolist()}) > 1
