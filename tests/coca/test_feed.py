"""Batches: the same samples for any number of ranks and from any position."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from coca.config import Preprocessing, ViTConfig
from coca.dataset import Dataset
from coca.decode import make_decoder
from coca.errors import BadInput, RunFailed
from coca.feed import Batch, Feed, batch_digest, normalize, pad_tokens
from coca.mixture import Mixture, Source
from coca.row_groups import RowGroups
from coca.tokenizer import Tokenizer
from coca.train_config import AugmentConfig, FeedConfig, ResolutionPhase, TrainConfig

MakeDataset = Callable[..., Dataset]


def make_feed(data: Dataset | Mixture, config: TrainConfig, rank: int = 0, world: int = 1, **feed: int) -> Feed:
    mixture = data if isinstance(data, Mixture) else Mixture([Source(data)])
    settings = FeedConfig(decode="threads", decode_workers=2, **feed)
    decoder = make_decoder(settings, config.augment, config.seed)
    return Feed(mixture, config, settings, rank=rank, world_size=world, decoder=decoder)


@pytest.fixture
def make_mixture(tmp_path: Path, tokenizer: Tokenizer, publish_dataset: MakeDataset) -> Callable[..., Mixture]:
    """``make_mixture((files, weight), ...)`` publishes datasets of the samples 0, 1, ..."""

    def make(*sources: tuple[tuple[int, ...], float]) -> Mixture:
        return Mixture(
            [
                Source(publish_dataset(tmp_path / f"mixed{place}", tokenizer, files), weight)
                for place, (files, weight) in enumerate(sources)
            ]
        )

    return make


def same(one: Batch, other: Batch) -> bool:
    return (
        torch.equal(one.pixels_BHWC, other.pixels_BHWC)
        and torch.equal(one.tokens_BT, other.tokens_BT)
        and (one.lane_digests, one.sample_ids) == (other.lane_digests, other.sample_ids)
    )


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
        assert same(next(through), next(late))
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


def test_a_sample_that_does_not_decode_is_named(
    make_dataset: MakeDataset, tiny_train: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = RowGroups.get

    def broken(self: RowGroups, index: int) -> pa.Table:
        table = read(self, index)
        return table.set_column(1, "image", [[b"not an image"] * table.num_rows]) if index == 0 else table

    monkeypatch.setattr(RowGroups, "get", broken)
    feed = make_feed(make_dataset(), tiny_train)
    with pytest.raises(RunFailed, match=r"sample 0{31}[0-3] does not decode: not_an_image"):
        for number in range(6):
            feed.batch(number)


def test_a_token_that_the_tokenizer_does_not_have_is_told_with_its_row_group(
    make_dataset: MakeDataset, tiny_train: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = RowGroups.get

    def broken(self: RowGroups, index: int) -> pa.Table:
        table = read(self, index)
        place = table.schema.get_field_index("tokens")
        tokens = pa.array([[1, 4_000_000, 2]] * table.num_rows, table.schema.field(place).type)
        return table.set_column(place, "tokens", tokens) if index == 0 else table

    monkeypatch.setattr(RowGroups, "get", broken)
    feed = make_feed(make_dataset(), tiny_train)
    with pytest.raises(BadInput, match=r"row group 0 has tokens 1 to 4000000, its tokenizer \d+"):
        for number in range(6):
            feed.batch(number)


def test_an_error_in_the_thread_reaches_the_caller(make_dataset: MakeDataset, tiny_train: TrainConfig) -> None:
    dataset = make_dataset()
    dataset.store.delete("samples/part-00001.parquet")
    batches = make_feed(dataset, tiny_train).batches(0)
    with pytest.raises(BadInput, match=r"samples/part-00001.parquet is missing"):
        for _ in range(12):
            next(batches)


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


def test_pictures_and_patches_follow_the_step(make_dataset: MakeDataset, tiny_train: TrainConfig) -> None:
    config = TrainConfig(
        **dict(tiny_train)
        | {
            "augment": AugmentConfig(patch_dropout=0.5, unmasked_fraction=1 / 3),
            "resolutions": (ResolutionPhase(from_step=2, image_size=24), ResolutionPhase(from_step=3, image_size=32)),
        }
    )
    assert isinstance(config.model.vision, ViTConfig)
    feed = make_feed(make_dataset(), config)
    seen = [feed.batch(number) for number in range(6)]
    assert [batch.pixels_BHWC.shape for batch in seen] == [(8, side, side, 3) for side in (16, 16, 24, 32, 32, 32)]
    kept = [None if batch.kept_patches_BK is None else batch.kept_patches_BK.shape[1] for batch in seen]
    assert kept == [2, 2, 4, 8, None, None]  # of 4, 4, 9, 16


def test_any_world_size_sees_the_same_batches(make_mixture: Callable[..., Mixture], tiny_train: TrainConfig) -> None:
    config = tiny_train.model_copy(update={"lanes": 12, "batch_size": 24})
    mixture = make_mixture(((16, 14), 2), ((24,), 1))
    one = make_feed(mixture, config)
    whole = [one.batch(number) for number in range(8)]
    for world in (2, 3, 4, 6, 12):
        ranks = [make_feed(mixture, config, rank, world) for rank in range(world)]
        for number, wanted in enumerate(whole):
            shares = [rank.batch(number) for rank in ranks]
            by_rank = zip(*(share.lane_digests for share in shares), strict=True)
            assert [digest for lanes in by_rank for digest in lanes] == wanted.lane_digests
            assert sorted(key for share in shares for key in share.sample_ids) == sorted(wanted.sample_ids)
    with pytest.raises(BadInput, match=r"5 workers do not divide lanes = 12. Use 1, 2, 3, 4, 6 or 12 workers"):
        make_feed(mixture, config, 0, 5)


def test_datasets_have_their_shares_and_each_sample_comes_once_a_pass(
    make_mixture: Callable[..., Mixture], tiny_train: TrainConfig
) -> None:
    mixture = make_mixture(((12,), 3), ((12,), 1))  # three lanes of one row group, and one of three
    feed = make_feed(mixture, tiny_train)
    seen = [feed.batch(number).sample_ids for number in range(6)]
    first = [keys[:6] for keys in seen]
    assert Counter(key for keys in first for key in keys) == {f"{n:032x}": 3 for n in range(12)}
    second = [keys[6:] for keys in seen]
    assert Counter(key for keys in second for key in keys) == {f"{n:032x}": 1 for n in range(12)}
