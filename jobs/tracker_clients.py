"""What a row is to each tracker: TensorBoard's event files, a run of MLflow, a run of Weights & Biases."""

import hashlib
import math
import os
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any, Protocol

from coca.run_folder import RunFolder
from coca.typed_config import flatten
from jobs.config import TrainRunConfig

Row = dict[str, Any]
_S3_INTERVAL_S = 10.0
_MLFLOW_PARAMS = 100  # that one request takes


class Tracker(Protocol):
    """Takes rows until it is closed; may wait for its server, and raises what its client raises."""

    def log(self, row: Row) -> None: ...

    def close(self, failed: bool) -> None:
        """
        Args:
            failed: an error ended the attempt. Otherwise it was stopped, or has had the run's last step.
        """


def make_tracker(name: str, run: RunFolder, config: TrainRunConfig) -> Tracker:
    """A tracker by its name, for rank 0."""
    if name == "tensorboard":
        return TensorBoard(run)
    makers: dict[str, type[MLflow | WandB]] = {"mlflow": MLflow, "wandb": WandB}
    return makers[name](run, config)


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

    def close(self, failed: bool) -> None:
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
        held = self._client.get_run(self._id).data
        self._logged, self._steps = int(held.metrics.get("step", -1)), config.train.steps
        if not held.params:
            values = [Param(name, str(value)[:500]) for name, value in flatten(config.model_dump(mode="json")).items()]
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

    def close(self, failed: bool) -> None:
        stopped = "FINISHED" if self._logged >= self._steps else "KILLED"
        self._client.set_terminated(self._id, "FAILED" if failed else stopped)

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
        self._steps = config.train.steps

    def log(self, row: Row) -> None:
        if row["step"] > self._logged:
            self._run.log(scalars(row), step=row["step"])
            self._logged = row["step"]

    def close(self, failed: bool) -> None:
        # Whatever is not 0 shows the run as one that did not finish.
        self._run.finish(exit_code=int(failed or self._logged < self._steps))


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
