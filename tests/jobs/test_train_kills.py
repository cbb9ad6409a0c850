"""SIGKILL to the driver, a worker, during a save: the run has the numbers of one that was never disturbed."""

import itertools
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from coca.dataset import Dataset
from coca.run_folder import RunFolder
from coca.storage import Store
from coca.train_config import FeedConfig, TrainConfig
from jobs.cluster import ClusterInfo
from jobs.config import DataConfig, TrainRunConfig, WorkersConfig
from tests.coca.rank_processes import run_phases
from tests.jobs.train_killing import (
    TrainChaos,
    TrainCommand,
    Workers,
    assert_nothing_is_left,
    numbers,
    shared_memory,
    weights,
)

STEPS, KILLS, TRIES = 40, 20, 3
LEAST = Counter(save=5, driver=5, worker=5)
ROUNDS = [
    ["worker", "save", "driver", "worker"],
    ["save", "driver", "save"],
    ["driver", "worker", "save", "driver"],
    ["worker", "worker", "driver"],
    ["driver", "driver", "save"],
    ["save", "worker", "driver"],
]


@pytest.fixture
def straight(tmp_path: Path, make_dataset: Callable[..., Dataset], tiny_train: TrainConfig) -> TrainRunConfig:
    """The config of a run, and beside its folder, in ``straight/2``, one on two ranks that nobody disturbed."""
    train = tiny_train.model_copy(update={"steps": STEPS, "checkpoint_every": 3, "log_every": 1, "batch_size": 96})
    dataset = make_dataset()
    run_phases(
        "tests.coca.train_ranks",
        [("to_the_end", 2)],
        train.model_dump_json(),
        dataset.store.uri,
        str(tmp_path / "straight"),
    )
    return TrainRunConfig(
        data=(DataConfig(uri=dataset.store.uri),),
        out=str(tmp_path / "run"),
        train=train,
        workers=WorkersConfig(count=2, cpus=0.5),
        feed=FeedConfig(decode="processes", decode_workers=1),
    )


def disturb(config: TrainRunConfig, folder: Path, cluster: ClusterInfo, targets: list[str], seed: int) -> TrainChaos:
    before = shared_memory()
    command = TrainCommand(config, folder, RAY_ADDRESS=cluster.address)
    chaos = TrainChaos(command, Workers(cluster.address), random.Random(seed), STEPS)
    result = chaos.run(targets)
    assert result["steps"] == STEPS
    assert_nothing_is_left(command.run, chaos, before)
    undisturbed = RunFolder(folder / "straight/2")
    assert [row["step"] for row in command.run.read_metrics()] == list(range(1, STEPS + 1)), command.log()
    assert numbers(command.run) == numbers(undisturbed)
    expected, found = weights(undisturbed), weights(command.run)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    return chaos


@pytest.mark.ray
def test_a_run_that_was_killed_and_stopped_has_the_numbers_of_one_that_was_not(
    ray_cluster: ClusterInfo, tmp_path: Path, straight: TrainRunConfig
) -> None:
    kills: Counter[str] = Counter()
    for number in range(TRIES):  # where a run was faster than we are with our kills, another one
        config = straight.model_copy(update={"out": str(tmp_path / f"run-{number}")})
        kills += disturb(config, tmp_path, ray_cluster, ["save", "stop", "driver"], seed=number).kills
        if kills >= Counter(["save", "stop", "driver"]):
            break
    assert kills >= Counter(["save", "stop", "driver"])


@pytest.mark.soak
@pytest.mark.ray
@pytest.mark.timeout(3000)
def test_twenty_kills(
    ray_cluster: ClusterInfo, tmp_path: Path, straight: TrainRunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    kills: Counter[str] = Counter()
    for number, targets in enumerate(itertools.islice(itertools.cycle(ROUNDS), 2 * len(ROUNDS))):
        config = straight.model_copy(update={"out": str(tmp_path / f"run-{number}")})
        chaos = disturb(config, tmp_path, ray_cluster, targets, seed=number)
        kills += chaos.kills
        with capsys.disabled():
            print(f"\nround {number}: {dict(chaos.kills)}", end=" ")
        if kills.total() >= KILLS and kills >= LEAST:
            break
    assert kills.total() >= KILLS
    assert kills >= LEAST


@pytest.mark.soak
@pytest.mark.ray
@pytest.mark.timeout(3000)
def test_a_run_and_its_dataset_on_s3(
    ray_cluster: ClusterInfo, tmp_path: Path, straight: TrainRunConfig, s3: str
) -> None:
    there, dataset = Store(f"{s3}/dataset"), Path(straight.data[0].uri)
    for file in [path for path in dataset.rglob("*") if path.is_file()]:
        there.write(str(file.relative_to(dataset)), file.read_bytes())
    config = straight.model_copy(update={"data": (DataConfig(uri=there.uri),), "out": f"{s3}/run"})
    chaos = disturb(config, tmp_path, ray_cluster, ["save", "driver", "worker", "stop", "driver"], seed=1)
    assert chaos.kills >= Counter(save=1, driver=1, worker=1, stop=1)
