"""Trackers: TensorBoard's files read back, the others against stand-ins for their clients; a restart everywhere."""

import math
import struct
import sys
from collections import defaultdict
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from coca.run_folder import RunFolder
from coca.storage import Store
from coca.train_config import TrainConfig
from jobs.config import DataConfig, TrainRunConfig
from jobs.tracker_clients import make_tracker, scalars

BEGAN = 1_800_000_000.0


def row(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "batch_digest": "0" * 16,
        "loss": 1 / step,
        "grad_norm": math.inf if step == 2 else 1.5,
        "flop_utilisation_spec": None,
        "held_out_caption_loss": 2.0,
        "lost_s": {"down": 4.0},
        "time": BEGAN + step,
    }


def run_config(folder: str | Path) -> TrainRunConfig:
    return TrainRunConfig(data=(DataConfig(uri="data/mine"),), out=str(folder), train=TrainConfig(steps=6))


def track(name: str, folder: str | Path, steps: range, *, failed: bool = False) -> None:
    """One attempt that logs ``steps``, of six."""
    tracker = make_tracker(name, RunFolder(folder), run_config(folder))
    for step in steps:
        tracker.log(row(step))
    tracker.close(failed)


def test_the_numbers_of_a_row() -> None:
    assert scalars(row(2)) == {"loss": 0.5, "held_out_caption_loss": 2.0, "lost_s/down": 4.0}


def read_events(store: Store) -> list[list[Any]]:
    """The events of each file in tensorboard/, by the TFRecord framing: length, checksum, bytes, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    files = []
    for name in store.list("tensorboard"):
        data, events = store.read(f"tensorboard/{name}"), []
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
        files.append(events)
    return files


def as_tensorboard_shows(files: list[list[Any]], tag: str) -> list[tuple[int, float, float]]:
    """(step, value, wall time) of a tag; a session that starts at a step purges what stands at it and after."""
    shown: list[tuple[int, float, float]] = []
    for events in sorted(files, key=lambda events: events[0].wall_time):
        for event in events:
            if event.HasField("session_log"):
                shown = [each for each in shown if each[0] < event.step]
            values = [value.simple_value for value in event.summary.value if value.tag == tag]
            shown += [(event.step, value, event.wall_time) for value in values]
    return shown


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_tensorboard_shows_each_step_once_over_a_restart(
    where: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue("s3") + "/run" if where == "s3" else tmp_path / "run"
    track("tensorboard", folder, range(1, 5))
    track("tensorboard", folder, range(3, 7))
    files = read_events(Store(folder))
    assert len(files) == 2
    expected = [(step, pytest.approx(1 / step), BEGAN + step) for step in range(1, 7)]
    assert as_tensorboard_shows(files, "train/loss") == expected
    assert [step for step, *_ in as_tensorboard_shows(files, "train/grad_norm")] == [1, 3, 4, 5, 6]
    assert len(as_tensorboard_shows(files, "held_out/caption_loss")) == 6
    assert len(as_tensorboard_shows(files, "lost_s/down")) == 6


def test_an_attempt_that_logs_nothing_writes_no_event(tmp_path: Path) -> None:
    track("tensorboard", tmp_path / "run", range(0))
    assert Store(tmp_path / "run").list("tensorboard") == []


def module(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    vars(made).update(content)
    monkeypatch.setitem(sys.modules, name, made)


class MlflowServer:
    """What an MLflow server holds, behind the calls of MlflowClient that are used (checked against mlflow 3.17)."""

    def __init__(self) -> None:
        self.experiments: dict[str, SimpleNamespace] = {}
        self.runs: dict[str, SimpleNamespace] = {}

    def get_experiment_by_name(self, name: str) -> SimpleNamespace | None:
        return self.experiments.get(name)

    def create_experiment(self, name: str) -> str:
        self.experiments[name] = SimpleNamespace(experiment_id=f"e{len(self.experiments)}")
        return str(self.experiments[name].experiment_id)

    def create_run(self, experiment_id: str, run_name: str, tags: dict[str, str]) -> SimpleNamespace:
        info = SimpleNamespace(run_id=f"r{len(self.runs)}", name=run_name, experiment=experiment_id, tags=tags)
        data = SimpleNamespace(metrics={}, params={}, history=defaultdict(list))
        self.runs[info.run_id] = SimpleNamespace(info=info, data=data)
        return self.runs[info.run_id]

    def get_run(self, run_id: str) -> SimpleNamespace:
        return self.runs[run_id]

    def set_terminated(self, run_id: str, status: str) -> None:
        self.runs[run_id].info.status = status

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        data = self.runs[run_id].data
        assert len(params) <= 100
        data.params.update(params)
        for name, value, time_ms, step in metrics:
            data.history[name].append((step, value, time_ms))
            data.metrics[name] = value


def test_mlflow_goes_on_in_the_same_run_and_repeats_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = MlflowServer()
    module(monkeypatch, "mlflow", MlflowClient=lambda: server)
    module(monkeypatch, "mlflow.entities", Metric=lambda *values: values, Param=lambda *values: values)
    track("mlflow", tmp_path / "first", range(1, 5), failed=True)
    assert server.runs["r0"].info.status == "FAILED"
    track("mlflow", tmp_path / "first", range(3, 6))
    assert server.runs["r0"].info.status == "KILLED"  # stopped
    track("mlflow", tmp_path / "first", range(5, 7))
    track("mlflow", tmp_path / "first", range(0))  # nothing was left to do
    track("mlflow", tmp_path / "second", range(1, 2))
    first, second = server.runs.values()
    assert first.data.history["loss"] == [(step, 1 / step, int(BEGAN + step) * 1000) for step in range(1, 7)]
    assert [step for step, *_ in first.data.history["grad_norm"]] == [1, 3, 4, 5, 6]
    assert first.data.params["train.batch_size"] == "96"
    assert (first.info.status, first.info.name, second.info.name) == ("FINISHED", "first", "second")
    assert list(server.experiments) == ["coca"]


def test_wandb_goes_on_in_the_same_run_and_repeats_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: dict[str, SimpleNamespace] = {}

    def init(**options: Any) -> SimpleNamespace:
        assert options["resume"] == "allow"
        run = runs.setdefault(options["id"], SimpleNamespace(rows=[], exits=[], options=options))
        run.step = run.rows[-1][1] + 1 if run.rows else 0  # as wandb 0.31 counts
        run.log = lambda values, step: run.rows.append((values, step))
        run.finish = lambda exit_code: run.exits.append(exit_code)
        return run

    module(monkeypatch, "wandb", init=init)
    track("wandb", tmp_path / "run", range(1, 5))
    track("wandb", tmp_path / "run", range(3, 7))
    track("wandb", tmp_path / "run", range(0), failed=True)
    (run,) = runs.values()
    assert [step for _, step in run.rows] == [1, 2, 3, 4, 5, 6]
    assert run.rows[0][0] == scalars(row(1))
    assert run.exits == [1, 0, 1]
    assert (run.options["name"], run.options["config"]["train"]["batch_size"]) == ("run", 96)
