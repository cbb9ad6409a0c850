"""Where the rows of metrics.jsonl go besides: TensorBoard, MLflow, Weights & Biases, Ray's dashboard.

A run that is continued goes on in the same place of each tracker. Steps that are done again after a restart replace
their old values in TensorBoard, and are left out where a tracker has them already.

| tracker     | where                                                                   | needs                 |
| ----------- | ----------------------------------------------------------------------- | --------------------- |
| tensorboard | ``tensorboard/`` in the run folder                                      | tensorboardX          |
| mlflow      | MLFLOW_TRACKING_URI, experiment MLFLOW_EXPERIMENT_NAME (default `coca`) | mlflow-skinny, mlflow |
| wandb       | project WANDB_PROJECT (default `coca`)                                  | wandb                 |
"""

import contextlib
import hashlib
import importlib.util
import math
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from coca.errors import BadInput
from coca.run_folder import RunFolder
from jobs.config import TrainRunConfig

Row = dict[str, Any]
_GAUGES = {
    "loss": "Weighted loss of the newest logged step.",
    "samples_per_s": "Samples a second, all workers.",
    "data_wait": "Share of the time in which the loop waited for batches.",
    "goodput": "Share of the run's time that went into new steps.",
}
_PACKAGES = {
    "tensorboard": ("tensorboardX", "'coca[tracking]'"),
    "mlflow": ("mlflow", "mlflow-skinny"),
    "wandb": ("wandb", "wandb"),
}
_S3_INTERVAL_S = 10.0
_MLFLOW_PARAMS = 100  # that one request takes


class Tracker(Protocol):
    """Takes rows until it is closed."""

    def log(self, row: Row) -> None: ...

    def close(self) -> None: ...


def check_trackers(names: Sequence[str]) -> None:
    """Raises BadInput unless the packages of these trackers are installed here."""
    for name in names:
        module, package = _PACKAGES[name]
        if importlib.util.find_spec(module) is None:
            raise BadInput(
                f"trackers: {name} needs {module}, which is not installed here",
                f"pip install {package}, on every node that may run worker 0",
            )


def start_trackers(names: Sequence[str], run: RunFolder, config: TrainRunConfig) -> list[Tracker]:
    """Trackers by their names, for rank 0.

    Raises:
        BadInput: as ``check_trackers``.
    """
    check_trackers(names)
    makers: dict[str, Callable[[RunFolder, TrainRunConfig], Tracker]] = {
        "tensorboard": lambda run, config: TensorBoard(run),
        "mlflow": MLflow,
        "wandb": WandB,
    }
    return [makers[name](run, config) for name in names]


@contextmanager
def open_trackers(config: TrainRunConfig) -> Iterator[Callable[[Row], None]]:
    """A function that takes each row of metrics.jsonl: to the config's trackers, and to Ray's dashboard within Ray.

    A tracker that fails says so once on stderr and is tried again with the next row: it ends no run.
    """
    with contextlib.ExitStack() as stack:
        trackers = start_trackers(config.trackers, RunFolder(config.out), config)
        failed: set[str] = set()
        for name, tracker in zip(config.trackers, trackers, strict=True):
            stack.callback(_guarded, name, tracker.close, failed)
        gauges = ray_gauges(config.out)

        def log(row: Row) -> None:
            gauges(row)
            for name, tracker in zip(config.trackers, trackers, strict=True):
                _guarded(name, partial(tracker.log, row), failed)

        yield log


def _guarded(name: str, action: Callable[[], None], failed: set[str]) -> None:
    try:
        action()
    except Exception as error:  # whatever a tracker's client raises, training goes on
        if name not in failed:
            print(f"{name} did not take a row: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        failed.add(name)


def scalars(row: Row) -> dict[str, float]:
    """The finite numbers of a row, nested ones as ``lost_s/down``."""
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            found |= {f"{name}/{key}": number for key, number in scalars(value).items()}
        elif isinstance(value, int | float) and math.isfinite(value) and name not in ("step", "time"):
            found[name] = value
    return found


class TensorBoard:
    """Event files in the run folder, one for each attempt; on S3 they are written beside and copied."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._writer: Any = None
        self._local: tempfile.TemporaryDirectory[str] | None = None
        if run.store.is_s3:
            self._local = tempfile.TemporaryDirectory(prefix="coca-tensorboard-")
        self._folder = Path(self._local.name if self._local else run.store.path("tensorboard"))
        self._copied = time.monotonic()

    def log(self, row: Row) -> None:
        if self._writer is None:
            from tensorboardX import SummaryWriter

            # Tells TensorBoard to forget what an attempt before this one wrote of this step and later ones.
            self._writer = SummaryWriter(
                str(self._folder), purge_step=row["step"], flush_secs=10, filename_suffix=f".{uuid.uuid4().hex[:8]}"
            )
        for name, value in scalars(row).items():
            self._writer.add_scalar(_grouped(name), value, row["step"], walltime=row.get("time"))
        if time.monotonic() - self._copied > _S3_INTERVAL_S:
            self._copy()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._copy()
        if self._local is not None:
            self._local.cleanup()

    def _copy(self) -> None:
        if self._local is None or self._writer is None:
            return
        self._writer.flush()
        for path in self._folder.iterdir():
            self._run.store.write(f"tensorboard/{path.name}", path.read_bytes())
        self._copied = time.monotonic()


def _grouped(name: str) -> str:
    """TensorBoard folds what shares the part before a slash."""
    if "/" in name:
        return name
    if name.startswith("held_out_"):
        return f"held_out/{name.removeprefix('held_out_')}"
    return f"train/{name}"


class MLflow:
    """One MLflow run, whose id lies in the run folder."""

    def __init__(self, run: RunFolder, config: TrainRunConfig) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric = MlflowClient(), Metric
        self._id = _read_id(run, "mlflow") or self._create(run)
        self._client.set_terminated(self._id, "RUNNING")
        # "step" itself is logged, so that the newest value tells how far the tracker has come.
        self._logged = int(self._client.get_run(self._id).data.metrics.get("step", -1))
        if self._logged < 0:
            values = [Param(name, str(value)[:500]) for name, value in _flatten(config.model_dump(mode="json")).items()]
            for start in range(0, len(values), _MLFLOW_PARAMS):
                self._client.log_batch(self._id, params=values[start : start + _MLFLOW_PARAMS])

    def log(self, row: Row) -> None:
        if row["step"] <= self._logged:
            return
        now_ms = int(row.get("time", time.time()) * 1000)
        values = scalars(row) | {"step": float(row["step"])}
        self._client.log_batch(
            self._id, metrics=[self._metric(name, value, now_ms, row["step"]) for name, value in values.items()]
        )
        self._logged = row["step"]

    def close(self) -> None:
        self._client.set_terminated(self._id, "FINISHED")

    def _create(self, run: RunFolder) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "coca")
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        created = self._client.create_run(experiment_id, run_name=_name(run), tags={"coca.run": run.store.uri})
        return _keep_id(run, "mlflow", str(created.info.run_id))


class WandB:
    """One run of Weights & Biases, whose id lies in the run folder."""

    def __init__(self, run: RunFolder, config: TrainRunConfig) -> None:
        import wandb

        own = hashlib.sha256(f"{run.store.uri} {time.time_ns()}".encode()).hexdigest()[:16]
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "coca"),
            id=_read_id(run, "wandb") or _keep_id(run, "wandb", own),
            name=_name(run),
            resume="allow",
            config=config.model_dump(mode="json"),
        )
        self._logged = self._run.step - 1  # its next step is one after the newest it has

    def log(self, row: Row) -> None:
        if row["step"] > self._logged:
            self._run.log(scalars(row), step=row["step"])
            self._logged = row["step"]

    def close(self) -> None:
        self._run.finish()


def ray_gauges(run: str) -> Callable[[Row], None]:
    """A function that shows a row in Ray's metrics as ``ray_coca_train_<field>{run}``; outside Ray it does nothing."""
    ray = sys.modules.get("ray")
    # Ray that nobody imported is not initialised, and importing it takes seconds.
    if ray is None or not ray.is_initialized():
        return lambda row: None
    from ray.util.metrics import Gauge

    gauges = {name: Gauge(f"coca_train_{name}", told, tag_keys=("run",)) for name, told in _GAUGES.items()}
    step = Gauge("coca_train_step", "Steps done.", tag_keys=("run",))

    def show(row: Row) -> None:
        step.set(row["step"], tags={"run": run})
        for name, value in scalars(row).items():
            if name in gauges:
                gauges[name].set(value, tags={"run": run})

    return show


def _name(run: RunFolder) -> str:
    return run.store.uri.rstrip("/").rpartition("/")[2]


def _read_id(run: RunFolder, tracker: str) -> str | None:
    try:
        return run.store.read(f"trackers/{tracker}").decode().strip()
    except FileNotFoundError:
        return None


def _keep_id(run: RunFolder, tracker: str, own: str) -> str:
    run.store.write(f"trackers/{tracker}", own.encode())
    return own


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
