"""Several raylets on this machine: a run gets smaller with a lost node, and larger with a new one."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coca.dataset import Dataset
from coca.train_config import TrainConfig
from jobs.cluster import set_environment
from jobs.config import DataConfig, TrainRunConfig, WorkersConfig
from tests.jobs.train_killing import TrainCommand, wait_until

STEPS = 400


@pytest.fixture
def nodes(environment: None) -> Iterator[Any]:
    """A head without CPUs for workers."""
    set_environment(local=True)
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_a_run_follows_the_nodes_that_are_there(
    nodes: Any, tmp_path: Path, make_dataset: Callable[..., Dataset], tiny_train: TrainConfig
) -> None:
    for _ in range(2):
        last = nodes.add_node(num_cpus=2)
    changes = {"lanes": 12, "batch_size": 96, "steps": STEPS, "checkpoint_every": 10}
    config = TrainRunConfig(
        data=(DataConfig(uri=make_dataset(files=(24, 24)).store.uri),),
        out=str(tmp_path / "run"),
        train=tiny_train.model_copy(update=changes),
        workers=WorkersConfig(least=1, count=4),
    )
    command = TrainCommand(config, tmp_path, RAY_ADDRESS=nodes.address, COCA_GROWTH_CHECK_S="2")
    process = command.start()
    assert wait_until(lambda: command.newest_step() >= 15, process)
    nodes.remove_node(last, allow_graceful=False)
    lost_at = command.newest_step()
    assert wait_until(lambda: "2 workers from here on, 4 before" in command.log(), process), command.log()
    assert wait_until(lambda: command.newest_step() >= lost_at + 15, process)
    nodes.add_node(num_cpus=2)
    result = command.finish(process)
    said = command.log()
    assert "a checkpoint, then on with more" in said
    assert "4 workers from here on, 2 before" in said
    assert (result["steps"], result["workers"], result["stopped"]) == (STEPS, 4, None)
    assert [row["step"] for row in command.run.read_metrics()] == list(range(1, STEPS + 1))
