"""`coca train` on a real Ray Train: workers start, the run is written, the same command goes on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from coca.checkpoint import load_checkpoint
from coca.dataset import Dataset
from coca.errors import BadInput
from coca.run_folder import RunFolder
from coca.train import train
from coca.train_config import TrainConfig
from jobs.cluster import ClusterInfo
from jobs.config import TrainRunConfig, WorkersConfig
from jobs.train import open_dataset, run_training

MakeDataset = Callable[..., Dataset]


@pytest.mark.ray
def test_two_workers_train_and_a_second_call_finds_it_done(
    ray_cluster: ClusterInfo, tmp_path: Path, make_dataset: MakeDataset, tiny_train: TrainConfig
) -> None:
    dataset = make_dataset()
    config = TrainRunConfig(
        data=dataset.store.uri, out=str(tmp_path / "run"), workers=WorkersConfig(count=2, cpus=0.5), train=tiny_train
    )
    result = run_training(config)
    assert (result["steps"], result["workers"], result["resumed_from"]) == (6, 2, None)
    assert [row["step"] for row in RunFolder(tmp_path / "run").read_metrics()] == [1, 2, 3, 4, 5, 6]
    checkpoint = load_checkpoint(result["run"])
    assert checkpoint.step == 6
    assert checkpoint.provenance["dataset_version"] == 1
    assert "seed: 0" in (tmp_path / "run/config.yaml").read_text()

    again = run_training(config)
    assert (again["steps"], again["resumed_from"]) == (6, 6)
    assert again["final_loss"] == result["final_loss"]
    with pytest.raises(BadInput, match="holds a run already"):
        run_training(config, must_be_new=True)


@pytest.mark.ray
def test_what_cannot_work_is_refused_before_a_worker_starts(
    ray_cluster: ClusterInfo, tmp_path: Path, make_dataset: MakeDataset, tiny_train: TrainConfig
) -> None:
    dataset = make_dataset()

    def config(**workers: object) -> TrainRunConfig:
        out = str(tmp_path / "never")
        return TrainRunConfig(
            data=dataset.store.uri, out=out, train=tiny_train, workers=WorkersConfig.model_validate(workers)
        )

    with pytest.raises(BadInput, match=r"3 workers do not divide lanes = 4. Use 1, 2 or 4 workers"):
        run_training(config(count=3))
    with pytest.raises(BadInput, match="4 workers of 2 CPUs need 8, the cluster has 4"):
        run_training(config(count=4, cpus=2))
    with pytest.raises(BadInput, match=r"2 workers need a GPU each, the cluster has 0. Use fewer --workers, or set"):
        run_training(config(count=2, use_gpu=True))
    with pytest.raises(BadInput, match="a run folder cannot lie on S3 yet"):
        run_training(config(count=1).model_copy(update={"out": "s3://bucket/run"}))
    assert not (tmp_path / "never").exists()


class RayAsked(Exception):
    """Raised where Ray would start."""


def no_ray() -> None:
    raise RayAsked


@pytest.fixture
def begun(tmp_path: Path, make_dataset: MakeDataset, tiny_train: TrainConfig) -> TrainRunConfig:
    """A run that was stopped after four of its six steps."""
    dataset, run = make_dataset(), RunFolder(tmp_path / "run")
    steps = iter([False, False, False, True])
    device = torch.device("cpu")
    train(tiny_train, dataset, run, device=device, report=lambda row: None, should_stop=lambda: next(steps))
    return TrainRunConfig(data=dataset.store.uri, out=str(run.path), train=tiny_train)


def publish_again(dataset: Dataset) -> None:
    """The same rows as version 2."""
    root = Path(dataset.store.root)
    record = json.loads((root / "versions/1.json").read_text())
    (root / "versions/2.json").write_text(json.dumps(record | {"version": 2, "parent": 1}))


def test_a_run_goes_on_with_its_own_version_after_a_refresh(begun: TrainRunConfig) -> None:
    publish_again(Dataset(begun.data))
    with pytest.raises(RayAsked):
        run_training(begun, start_ray=no_ray)
    with pytest.raises(BadInput, match=r"started with data.version = 1, now it is 2"):
        run_training(begun.model_copy(update={"version": 2}), start_ray=no_ray)
    assert open_dataset(begun.data, None, None).record.version == 2


def test_what_stops_a_resumed_run_is_seen_before_ray_starts(begun: TrainRunConfig) -> None:
    other_seed = begun.train.model_copy(update={"seed": 5})
    with pytest.raises(BadInput, match=r"started with seed = 0, now it is 5"):
        run_training(begun.model_copy(update={"train": other_seed}), start_ray=no_ray)
    weights = Path(begun.out) / "checkpoints/step_000000004/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(BadInput, match=r"does not match its SHA-256 .* Remove .*step_000000004 to go on from"):
        run_training(begun, start_ray=no_ray)
    shutil.rmtree(weights.parent)
    with pytest.raises(RayAsked):
        run_training(begun, start_ray=no_ray)


@pytest.mark.ray
def test_a_run_without_checkpoint_takes_the_config_it_is_started_with(
    ray_cluster: ClusterInfo, tmp_path: Path, make_dataset: MakeDataset, tiny_train: TrainConfig
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("train:\n  steps: 99\n")  # killed before its first checkpoint
    config = TrainRunConfig(data=make_dataset().store.uri, out=str(tmp_path / "run"), train=tiny_train)
    run_training(config.model_copy(update={"train": tiny_train.model_copy(update={"steps": 1})}))
    assert "steps: 1\n" in (tmp_path / "run/config.yaml").read_text()
