"""Recording and replaying: the same batches again, or a refusal that says what to record."""

from pathlib import Path
from typing import Any

import pytest
import torch

from coca.errors import BadInput
from coca.feed import Batch
from coca.mock_feed import MockFeed
from coca.recorded_feed import RecordedFeed, Recorder
from coca.storage import Store
from coca.train_config import AugmentConfig, FeedConfig, ResolutionPhase, TrainConfig


def record(config: TrainConfig, folder: str, *, start: int, count: int, world: int = 1) -> list[Batch]:
    """Batches as rank 0 has seen and recorded them, each with other pictures."""
    source = Recorder(Numbered(config, rank=0, world_size=world), folder, rank=0, world_size=world)
    batches = source.batches(start)
    seen = [next(batches) for _ in range(count)]
    batches.close()
    source.close()
    return seen


class Numbered(MockFeed):
    def batch(self, number: int) -> Batch:
        batch = super().batch(number)
        return Batch(**{**vars(batch), "pixels_BHWC": (batch.pixels_BHWC + number).to(torch.uint8)})


def replay(config: TrainConfig, folder: str, world: int = 1) -> RecordedFeed:
    return RecordedFeed(folder, config, FeedConfig(prefetch_batches=2), rank=0, world_size=world)


def assert_same(one: Batch, other: Batch) -> None:
    for name, value in vars(one).items():
        replayed = vars(other)[name]
        assert torch.equal(value, replayed) if isinstance(value, torch.Tensor) else value == replayed, name


@pytest.mark.parametrize("patch_dropout", [0.0, 0.5])
def test_what_was_recorded_comes_again_in_a_loop(tmp_path: Path, tiny_train: TrainConfig, patch_dropout: float) -> None:
    config = tiny_train.model_copy(update={"augment": AugmentConfig(patch_dropout=patch_dropout), "steps": 20})
    recorded = record(config, str(tmp_path), start=2, count=3)
    assert (recorded[0].kept_patches_BK is None) == (patch_dropout == 0)
    assert not torch.equal(recorded[0].pixels_BHWC, recorded[1].pixels_BHWC)
    batches = replay(config, str(tmp_path)).batches(2)
    for number in range(7):
        assert_same(recorded[number % 3], next(batches))
    batches.close()
    assert_same(recorded[1], replay(config, str(tmp_path)).batch(0))  # 0 is -2 + 2, so 1 of 3


def test_it_is_recorded_on_s3(s3: str, tiny_train: TrainConfig) -> None:
    folder = f"{s3}/recorded"
    recorded = record(tiny_train, folder, start=0, count=2)
    assert_same(recorded[1], replay(tiny_train, folder).batch(1))


def test_what_is_not_there_is_refused(tmp_path: Path, tiny_train: TrainConfig) -> None:
    with pytest.raises(BadInput, match=r"holds no batches of rank 0 of 1 workers. Record some with feed.record="):
        replay(tiny_train, str(tmp_path / "nothing"))
    record(tiny_train, str(tmp_path), start=0, count=1, world=2)
    with pytest.raises(BadInput, match=r"no batches of rank 0 of 4 workers. It was recorded with 2 workers: use as"):
        replay(tiny_train, str(tmp_path), world=4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 16}, r"has pictures \(8, 16, 16, 3\), step 1 of this run \(16, 16, 16, 3\). Record the"),
        ({"lanes": 2}, r"has lanes 4, step 1 of this run 2"),
        ({"augment": AugmentConfig(patch_dropout=0.5)}, r"has kept patches None, step 1 of this run \(8, 2\)"),
        ({"context_length": 11}, r"has captions at most as long as 12, step 1 of this run 11"),
        ({"vocab_size": 100}, r"has token ids below 3\d\d, step 1 of this run 100"),
    ],
)
def test_batches_of_another_config_are_refused(
    tmp_path: Path, tiny_train: TrainConfig, changed: dict[str, Any], message: str
) -> None:
    record(tiny_train, str(tmp_path), start=0, count=1)
    text = {key: changed[key] for key in ("context_length", "vocab_size") if key in changed}
    model = tiny_train.model.model_copy(update={"text": tiny_train.model.text.model_copy(update=text)})
    rest = {key: value for key, value in changed.items() if key not in text}
    with pytest.raises(BadInput, match=message):
        replay(tiny_train.model_copy(update={"model": model, **rest}), str(tmp_path)).batch(0)


def test_a_later_phase_that_was_not_recorded_is_refused_at_its_step(tmp_path: Path, tiny_train: TrainConfig) -> None:
    record(tiny_train, str(tmp_path), start=0, count=2)
    config = tiny_train.model_copy(update={"resolutions": (ResolutionPhase(from_step=2, image_size=32),)})
    batches = replay(config, str(tmp_path)).batches(0)
    next(batches)
    next(batches)
    with pytest.raises(BadInput, match=r"batch-000000000.safetensors has pictures .*, step 3 of this run"):
        next(batches)


@pytest.mark.parametrize("damage", [b"", b"no batch", b"\xff" * 100])
def test_damaged_files_are_named(tmp_path: Path, tiny_train: TrainConfig, damage: bytes) -> None:
    record(tiny_train, str(tmp_path), start=0, count=1)
    Store(str(tmp_path)).write("rank-0-of-1/batch-000000000.safetensors", damage)
    with pytest.raises(BadInput, match=r"rank-0-of-1/batch-000000000.safetensors is no recorded batch"):
        replay(tiny_train, str(tmp_path)).batch(0)


def test_a_cut_file_is_named(tmp_path: Path, tiny_train: TrainConfig) -> None:
    record(tiny_train, str(tmp_path), start=0, count=1)
    path = tmp_path / "rank-0-of-1/batch-000000000.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(BadInput, match=r"is no recorded batch"):
        replay(tiny_train, str(tmp_path)).batch(0)
