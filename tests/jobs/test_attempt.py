"""What ended an attempt, out of Ray Train's wrappings; and on a real Ray Train, that it ends at once."""

import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coca.errors import BadInput, RunFailed
from jobs import attempt as attempts
from jobs import train_worker
from jobs.attempt import Attempt, NoRoom, WorkersLost, explain, sweep_killed
from jobs.cluster import ClusterInfo
from jobs.config import DataConfig, TrainRunConfig, WorkersConfig
from jobs.elastic import cluster_room
from jobs.stop_signal import StopSignal, run_digest


def config(**workers: Any) -> TrainRunConfig:
    return TrainRunConfig(
        data=(DataConfig(uri="unused"),), out="unused", workers=WorkersConfig(cpus=0.5, use_gpu=False, **workers)
    )


def test_our_own_errors_come_through_whatever_the_other_ranks_say() -> None:
    from ray.train import WorkerGroupError  # type: ignore[attr-defined]

    full = RunFailed("no space is left")
    group = WorkerGroupError("...", {0: RuntimeError("Connection closed by peer"), 3: full})
    assert explain(group) is full
    wrong = BadInput("a field differs", "Give the old")
    assert explain(WorkerGroupError("...", {0: full, 1: wrong})) is wrong


def test_a_death_counts_before_what_it_did_to_the_others() -> None:
    from ray.exceptions import ActorDiedError
    from ray.train import WorkerGroupError  # type: ignore[attr-defined]
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    dead = WorkerHealthCheckFailedError("A worker health check failed.", failure=ActorDiedError())
    lost = explain(WorkerGroupError("...", {0: RuntimeError("Connection closed by peer"), 1: dead}))
    assert isinstance(lost, WorkersLost)
    assert lost.died
    assert lost.cause.startswith("a worker died (The actor died unexpectedly")


def test_an_error_in_the_code_is_told_as_it_is() -> None:
    from ray.train import WorkerGroupError  # type: ignore[attr-defined]

    lost = explain(WorkerGroupError("...", {0: KeyError("x")}))
    assert isinstance(lost, WorkersLost)
    assert (lost.cause, lost.died) == ("KeyError: 'x'", False)


def test_a_cluster_that_is_full_is_no_failure() -> None:
    from ray.train import ControllerError  # type: ignore[attr-defined]
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    assert isinstance(explain(ControllerError(WorkerGroupStartupTimeoutError(4))), NoRoom)


def test_what_a_killed_driver_has_left_of_this_run_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten: list[str] = []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(attempts, "forget_signals", forgotten.append)
    ours, others = tmp_path / f"coca-train-{run_digest('a')}-x", tmp_path / f"coca-train-{run_digest('b')}-x"
    for folder in (ours, others):
        folder.mkdir()
        (folder / "marker").touch()
    sweep_killed("a")
    assert (ours.exists(), others.exists(), forgotten) == (False, True, ["a"])


@pytest.mark.parametrize("error", [None, ValueError("no")])
def test_the_signal_is_kept_until_the_attempt_has_ended(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    may_end, forgotten = threading.Event(), threading.Event()

    class Trainer:
        def fit(self) -> SimpleNamespace:
            may_end.wait(10)
            if error is not None:
                raise error
            return SimpleNamespace(return_value={"steps": 1})

    monkeypatch.setattr(Attempt, "_trainer", lambda self, folder: Trainer())
    monkeypatch.setattr(StopSignal, "forget", lambda self: forgotten.set())
    attempt = Attempt(config(), None, 1)  # type: ignore[arg-type]
    attempt.start()
    assert not attempt.join(0.05)
    assert not forgotten.is_set()
    may_end.set()
    assert attempt.join(10)
    assert forgotten.is_set()


def fail_at_rank_1() -> Callable[[dict[str, Any]], dict[str, Any]]:
    def worker(values: dict[str, Any]) -> dict[str, Any]:
        import torch
        import torch.distributed as dist

        from coca.errors import RunFailed

        dist.all_reduce(torch.ones(1))
        if dist.get_rank() == 1:
            failed = RunFailed("no space is left")
            failed.repeat_helps = False
            raise failed
        dist.all_reduce(torch.ones(1))  # which the other never joins
        return {}

    return worker


@pytest.mark.ray
def test_one_rank_that_cannot_go_on_ends_the_others(ray_cluster: ClusterInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_worker, "train_worker", fail_at_rank_1())
    attempt = Attempt(config(count=2), None, 2)  # type: ignore[arg-type]
    attempt.start()
    assert attempt.join(60)
    with pytest.raises(RunFailed, match="no space is left") as raised:
        attempt.result()
    assert not raised.value.repeat_helps  # what a worker says of it comes through
    assert list(Path(tempfile.gettempdir()).glob(f"coca-train-{run_digest('unused')}-*")) == []
    ends_at = time.monotonic() + 10
    while cluster_room({"CPU": 0.5}) < 8 and time.monotonic() < ends_at:
        time.sleep(0.1)
    assert cluster_room({"CPU": 0.5}) == 8  # all of it is free again
    assert cluster_room({"CPU": 0.5, "GPU": 1.0}) == 0


def hang_at_step_3() -> Callable[[dict[str, Any]], dict[str, Any]]:
    def worker(values: dict[str, Any]) -> dict[str, Any]:
        import threading

        from coca.watchdog import Watchdog

        with Watchdog(1.0, "worker 0") as watchdog:
            for step in range(1, 10):
                if step == 3:
                    threading.Event().wait()
                watchdog.beat()
        return {}

    return worker


@pytest.mark.soak
@pytest.mark.ray
def test_a_worker_that_hangs_counts_as_died(ray_cluster: ClusterInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_worker, "train_worker", hang_at_step_3())
    attempt = Attempt(config(count=1), None, 1)  # type: ignore[arg-type]
    attempt.start()
    assert attempt.join(120)
    with pytest.raises(WorkersLost, match="a worker died") as lost:
        attempt.result()
    assert lost.value.died
