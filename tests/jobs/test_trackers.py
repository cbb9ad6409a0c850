"""Feeding trackers: what is missing, fails or never answers holds no step and ends no run; Ray's gauges."""

import re
import sys
import threading
import time
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from coca.errors import BadInput
from jobs import trackers as trackers_module
from jobs.config import DataConfig, TrainRunConfig, WorkersConfig
from jobs.trackers import check_trackers, open_trackers, ray_gauges


def row(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1 / step, "lost_s": {"down": 4.0}}


def run_config(folder: str | Path, *trackers: Any, hang_timeout_s: float = 600.0) -> TrainRunConfig:
    workers = WorkersConfig(hang_timeout_s=hang_timeout_s)
    return TrainRunConfig(data=(DataConfig(uri="data/mine"),), out=str(folder), trackers=trackers, workers=workers)


def module(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    vars(made).update(content)
    monkeypatch.setitem(sys.modules, name, made)


@pytest.mark.parametrize(
    ("name", "missing", "package"),
    [
        ("tensorboard", "tensorboardX", "'coca[tracking]'"),
        ("mlflow", "mlflow", "mlflow-skinny"),
        ("wandb", "wandb", "wandb"),
    ],
)
def test_a_missing_package_is_told_with_what_to_install(
    name: str, missing: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(BadInput, match=rf"{name} needs {missing}, .*pip install {re.escape(package)}"):
        check_trackers([name])
    with pytest.raises(BadInput), open_trackers(run_config(tmp_path, name)):
        pass


class Recorder:
    """A tracker that keeps what it is given, and raises or waits where it is told to."""

    def __init__(self, before_log: Callable[[int], object] = lambda step: None) -> None:
        self.before_log = before_log
        self.steps: list[int] = []
        self.closed: list[bool] = []

    def log(self, row: dict[str, Any]) -> None:
        self.before_log(row["step"])
        self.steps.append(row["step"])

    def close(self, failed: bool) -> None:
        self.closed.append(failed)


def use(monkeypatch: pytest.MonkeyPatch, **makers: Callable[[], Any]) -> None:
    """Trackers by name, whose packages count as installed."""
    monkeypatch.setattr(trackers_module, "check_trackers", lambda names: None)
    monkeypatch.setattr(trackers_module, "make_tracker", lambda name, run, config: makers[name]())


def refuse(until: int) -> Callable[..., None]:
    """Raises as a client whose server is away, until it is called for the ``until``-th time."""
    calls: list[Any] = []

    def call(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) < until:
            raise ConnectionError("refused")

    return call


def wait_until(happened: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_tracker_that_fails_says_so_once_and_is_tried_with_the_next_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing, sound = Recorder(before_log=refuse(until=3)), Recorder()
    use(monkeypatch, wandb=lambda: failing, tensorboard=lambda: sound)
    with open_trackers(run_config(tmp_path / "run", "wandb", "tensorboard")) as report:
        for step in (1, 2, 3):
            report(row(step))
    assert (failing.steps, sound.steps) == ([3], [1, 2, 3])
    assert (failing.closed, sound.closed) == ([False], [False])
    assert capsys.readouterr().err == "wandb did not take a row: ConnectionError: refused\n"


def test_a_tracker_that_is_away_when_training_begins_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker, start = Recorder(), refuse(until=3)
    use(monkeypatch, mlflow=lambda: start() or tracker)
    with open_trackers(run_config(tmp_path / "run", "mlflow")) as report:
        for step in (1, 2, 3):
            report(row(step))
    assert (tracker.steps, tracker.closed) == ([2, 3], [False])
    assert capsys.readouterr().err.splitlines() == [
        "mlflow could not be started: ConnectionError: refused",
        "mlflow did not take a row: ConnectionError: refused",
    ]


def test_a_tracker_learns_whether_an_error_ended_the_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Recorder()
    use(monkeypatch, wandb=lambda: tracker)
    with pytest.raises(ZeroDivisionError), open_trackers(run_config(tmp_path, "wandb")) as report:
        report(row(1))
        raise ZeroDivisionError
    assert (tracker.steps, tracker.closed) == ([1], [True])


def test_a_tracker_that_never_answers_holds_neither_a_step_nor_the_end_nor_another_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, answer = threading.Event(), threading.Event()

    def wait(step: int) -> None:
        asked.set()
        answer.wait(60)

    stuck, sound = Recorder(before_log=wait), Recorder()
    use(monkeypatch, mlflow=lambda: stuck, tensorboard=lambda: sound)
    monkeypatch.setattr(trackers_module, "_WAITING_ROWS", 3)
    began = time.monotonic()
    with open_trackers(run_config(tmp_path / "run", "mlflow", "tensorboard", hang_timeout_s=0.5)) as report:
        for step in range(1, 7):
            report(row(step))
            wait_until(lambda step=step: asked.is_set() and sound.steps[-1:] == [step])
    assert time.monotonic() - began < 20
    assert capsys.readouterr().err.splitlines() == [
        "mlflow is slow: more than 3 rows wait: the oldest are left out",
        "mlflow does not answer: ending without it, 3 rows wait",
    ]
    answer.set()  # once it does, what waited is logged: the first, then the newest three
    wait_until(lambda: bool(stuck.closed))
    assert (stuck.steps, sound.steps) == ([1, 4, 5, 6], [1, 2, 3, 4, 5, 6])


def test_outside_ray_no_gauge_is_set_and_ray_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    ray_gauges("run")({"step": 1, "loss": 2.0})
    assert "ray" not in sys.modules
    module(monkeypatch, "ray", is_initialized=lambda: False)
    ray_gauges("run")({"step": 1, "loss": 2.0})


def test_within_ray_a_row_sets_its_gauges(monkeypatch: pytest.MonkeyPatch) -> None:
    gauges: dict[str, Any] = {}

    class Gauge:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            assert (bool(description), tag_keys) == (True, ("run",))
            self.values: list[Any] = []
            gauges[name] = self.values

        def set(self, value: float, tags: dict[str, str]) -> None:
            self.values.append((value, tags["run"]))

    module(monkeypatch, "ray", is_initialized=lambda: True)
    module(monkeypatch, "ray.util")
    module(monkeypatch, "ray.util.metrics", Gauge=Gauge)
    show = ray_gauges("runs/first")
    show(row(4) | {"samples_per_s": 100.0, "data_wait": 0.02, "goodput": 0.9})
    assert gauges == {
        "coca_train_step": [(4, "runs/first")],
        "coca_train_loss": [(0.25, "runs/first")],
        "coca_train_samples_per_s": [(100.0, "runs/first")],
        "coca_train_data_wait": [(0.02, "runs/first")],
        "coca_train_goodput": [(0.9, "runs/first")],
    }
