"""`coca train` on Ray Train: the driver checks, starts the workers and shows progress; `coca.train` does the work."""

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from coca.checkpoint import checkpoint_path, read_fixed
from coca.dataset import Dataset, list_versions
from coca.errors import BadInput
from coca.progress import Progress, polling
from coca.run_folder import RunFolder
from coca.storage import Store
from coca.train_config import TrainConfig
from jobs.config import TrainRunConfig, WorkersConfig


def run_training(
    config: TrainRunConfig,
    *,
    must_be_new: bool = False,
    show_progress: bool = True,
    start_ray: Callable[[], object] | None = None,
) -> dict[str, Any]:
    """Train to ``config.train.steps``; an existing run goes on from its newest checkpoint.

    Args:
        start_ray: called once everything that can be checked without Ray is; by default Ray is connected already.

    Returns:
        What `coca.train.train` returns, with ``run``, ``workers`` and ``resumed_from`` (step or None).

    Raises:
        BadInput: before any worker starts, for whatever can be known then.
    """
    run = RunFolder(config.out)
    if must_be_new and run.exists:
        raise BadInput(f"{run.path} holds a run already", "Drop --must-be-new to go on with it, or give another --out")
    resumed_from = run.latest_step()
    saved = None if resumed_from is None else read_fixed(run.store, checkpoint_path(resumed_from))
    dataset = open_dataset(config.data, config.version, (saved or {}).get("data.version"))
    check_fit(config.train, config.workers, dataset)
    if saved is not None:
        _check_same_run(config.train, dataset, run, saved)
    if start_ray is not None:
        start_ray()
    _check_cluster(config.workers)
    # The version is part of what a run is: a refresh meanwhile must not change a resumed one.
    config = config.model_copy(
        update={"data": dataset.store.uri, "version": dataset.record.version, "out": str(run.path)}
    )
    run.start(config.to_yaml())
    with _follow(run, config.train.steps, resumed_from or 0, show_progress):
        result = _fit(config, dataset, run)
    return {"run": str(run.path), "workers": config.workers.count, "resumed_from": resumed_from, **result}


def open_dataset(uri: str, version: int | None, begun_with: int | None) -> Dataset:
    """The version that is asked for, else the one that the work to go on with began with, else the newest."""
    if version is None and begun_with in list_versions(Store(uri)):
        version = begun_with
    return Dataset(uri, version)


def check_fit(config: TrainConfig, workers: WorkersConfig, dataset: Dataset) -> None:
    """Raises BadInput for what every worker would raise: dataset, lanes and number of workers do not fit."""
    from coca.feed import Feed
    from coca.train import fit_to_dataset

    if dataset.record.selected == 0:
        raise BadInput(f"{dataset.store.uri} version {dataset.record.version} has no selected samples", "Refresh it")
    Feed(dataset, fit_to_dataset(config, dataset), rank=0, world_size=workers.count)


def _check_same_run(config: TrainConfig, dataset: Dataset, run: RunFolder, saved: dict[str, Any]) -> None:
    from coca.train import check_same_run, fit_to_dataset, fixed_fields

    check_same_run(saved, fixed_fields(fit_to_dataset(config, dataset), dataset), run)


def _check_cluster(workers: WorkersConfig) -> None:
    import ray

    there = ray.cluster_resources()
    cpus, gpus = there.get("CPU", 0), there.get("GPU", 0)
    wanted = workers.count * workers.cpus
    if wanted > cpus:
        raise BadInput(
            f"{workers.count} workers of {workers.cpus:g} CPUs need {wanted:g}, the cluster has {cpus:g}",
            "Use fewer --workers or a lower workers.cpus",
        )
    if workers.use_gpu and workers.count > gpus:
        raise BadInput(
            f"{workers.count} workers need a GPU each, the cluster has {gpus:g}",
            "Use fewer --workers, or set workers.use_gpu=false",
        )


def _fit(config: TrainRunConfig, dataset: Dataset, run: RunFolder) -> dict[str, Any]:
    # Read when the controller starts: how soon it sees that workers are up, done or dead (Ray's default is 2 s).
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    import ray

    # A drain notice has no reader here yet, and the watcher's start is logged as an error.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    import ray.train.torch

    train_api: Any = ray.train  # its published types are those of the older Train V1
    gpus = ray.cluster_resources().get("GPU", 0)
    use_gpu = config.workers.use_gpu if config.workers.use_gpu is not None else gpus >= config.workers.count
    trainer = train_api.torch.TorchTrainer(
        train_worker,
        # Named here: all ranks leave out the same samples, whatever is withdrawn while they start.
        train_loop_config={"run": config.model_dump(mode="json"), "withdrawn_files": dataset.withdrawn_files},
        scaling_config=train_api.ScalingConfig(
            num_workers=config.workers.count,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": config.workers.cpus, **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=train_api.RunConfig(
            # Ray resumes a run of the same name by itself; ours resumes from its own checkpoints.
            name=f"attempt-{uuid.uuid4().hex[:8]}",
            storage_path=str(run.path / "ray"),
            failure_config=train_api.FailureConfig(max_failures=config.workers.max_failures),
            logging_config=train_api.LoggingConfig(log_level="ERROR"),
        ),
    )
    return dict(trainer.fit().return_value)


def train_worker(values: dict[str, Any]) -> dict[str, Any]:
    """What each Ray Train worker runs; Ray has initialised torch.distributed."""
    import ray.train.torch
    import torch

    from coca.train import train

    config = TrainRunConfig.model_validate(values["run"])
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(config.workers.threads)
    dataset = Dataset(config.data, config.version, tuple(values["withdrawn_files"]))
    # Progress is read from metrics.jsonl: a report to Ray waits for every rank and the controller.
    return train(config.train, dataset, RunFolder(config.out), device=device, report=lambda row: None)


@contextmanager
def _follow(run: RunFolder, steps: int, start: int, show: bool) -> Iterator[None]:
    """Show progress from the run's metrics while the driver waits for the workers."""
    if not show:
        yield
        return
    with Progress("train", total=steps, unit="steps", start=start) as progress:

        def poll() -> None:
            rows = run.read_metrics()
            if rows and rows[-1]["step"] > progress.count:
                row = rows[-1]
                parts = f"contrastive {row['contrastive_loss']:.3f}, captioning {row['captioning_loss']:.3f}"
                progress.advance(row["step"] - progress.count, note=f"loss {row['loss']:.3f} ({parts})")

        with polling(poll, every_s=1.0):
            yield
