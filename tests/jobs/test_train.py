"""`coca train` on a real Ray Train: workers start, the run is written, the same command goes on."""

from collections.abc import Callable
from pathlib import Path

import pytest

from coca.checkpoint import load_checkpoint
from coca.config import TrainConfig
from coca.dataset import Dataset
from coca.errors import BadInput
from coca.run_folder import RunFolder
from jobs.cluster import ClusterInfo
from jobs.config import TrainRunConfig, WorkersConfig
from jobs.train import run_training

MakeDataset = Callable[..., Dataset]
pytestmark = pytest.mark.ray


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
    with pytest.raises(BadInput, match="a run folder cannot lie on S3 yet"):
        run_training(config(count=1).model_copy(update={"out": "s3://bucket/run"}))
    assert not (tmp_path / "never").exists()
