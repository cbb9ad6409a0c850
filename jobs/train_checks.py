"""What `coca train` refuses before it starts a worker: settings that would do nothing, a cluster without room."""

import math
from collections.abc import Mapping
from typing import Any

import yaml

from coca.errors import BadInput
from coca.run_folder import RunFolder
from coca.train_config import TrainConfig
from jobs.config import TrainRunConfig, WorkersConfig
from jobs.elastic import world_sizes

MEASURES = ("loss", "contrastive_loss", "captioning_loss", "grad_norm", "temperature")
_DIRECTIONS = ("image_to_text", "text_to_image")
HELD_OUT_MEASURES = (
    "held_out_caption_loss",
    *(f"held_out_{direction}_recall_at_{k}" for direction in _DIRECTIONS for k in (1, 5)),
)


def check_measures(config: TrainRunConfig) -> None:
    """Raises BadInput for settings of evaluations and of the best checkpoint that would do nothing."""
    train = config.train
    if train.evaluate_every and config.held_out is None:
        raise BadInput(
            f"train.evaluate_every = {train.evaluate_every} without a set to evaluate on",
            "Give --held-out FILE, or leave train.evaluate_every at 0",
        )
    best = train.keep_best
    if best is None:
        return
    if best not in MEASURES + HELD_OUT_MEASURES:
        raise BadInput(
            f"train.keep_best = {best} is no measure of metrics.jsonl",
            f"Give one of {', '.join(MEASURES + HELD_OUT_MEASURES)}",
        )
    if best in HELD_OUT_MEASURES:
        _check_held_out(config, best)
    elif not _meets(train.log_every, train) and not _meets(train.evaluate_every, train):
        raise BadInput(
            f"train.keep_best = {best}: no checkpoint (checkpoint_every = {train.checkpoint_every}) falls on a step "
            f"that is logged (log_every = {train.log_every}) in {train.steps} steps",
            "Let log_every divide checkpoint_every",
        )


def _check_held_out(config: TrainRunConfig, best: str) -> None:
    train = config.train
    if config.held_out is None:
        raise BadInput(f"train.keep_best = {best} without a held-out set", "Give --held-out FILE, or another measure")
    if not _meets(train.evaluate_every, train):
        raise BadInput(
            f"train.keep_best = {best}: no checkpoint (checkpoint_every = {train.checkpoint_every}) falls on an "
            f"evaluation (evaluate_every = {train.evaluate_every}) in {train.steps} steps",
            "Let evaluate_every divide checkpoint_every",
        )


def _meets(every: int, train: TrainConfig) -> bool:
    return every > 0 and math.lcm(every, train.checkpoint_every) <= train.steps


def check_source(config: TrainRunConfig, run: RunFolder) -> None:
    """Raises BadInput where a run on real samples would go on with made-up or recorded ones, or the other way."""
    begun = _begun(run, "feed").get("source", "dataset")
    if run.exists and begun != config.feed.source:
        raise BadInput(
            f"{run.uri} was started with feed.source = {begun}, now it is {config.feed.source}",
            "Give the old value to go on, or another --out: what is trained on other batches is another model",
        )


def check_cluster(config: TrainRunConfig, run: RunFolder, resources: Mapping[str, float]) -> WorkersConfig:
    """The workers' settings with ``use_gpu`` decided: GPUs wherever the cluster has any, or the run began on them.

    A cluster that has lost some of its GPUs so waits or is refused, and no run goes on a hundred times slower.

    Args:
        resources: what ``ray.cluster_resources()`` gives.

    Raises:
        BadInput: the cluster has no room for the least number of workers.
    """
    workers = config.workers
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    least = workers.least or workers.count
    wanted = least * workers.cpus
    if wanted > cpus:
        raise BadInput(
            f"{least} workers of {workers.cpus:g} CPUs need {wanted:g}, the cluster has {cpus:g}",
            "Use fewer --workers or a lower workers.cpus",
        )
    use_gpu = workers.use_gpu
    if use_gpu is None:
        use_gpu = gpus > 0 or _began_on_gpus(run)
    if use_gpu and least > gpus:
        raise BadInput(
            f"{least} workers need a GPU each, the cluster has {gpus:g}",
            "Use fewer --workers, wait for more GPUs, or set workers.use_gpu=false",
        )
    _check_decoders(config, cpus)
    return workers.model_copy(update={"use_gpu": use_gpu})


def _check_decoders(config: TrainRunConfig, cpus: float) -> None:
    """Ray tasks that decode need a CPU that no worker holds, or nothing ever comes."""
    if config.feed.decode != "ray" or config.feed.source != "dataset":
        return
    each = config.workers.cpus
    most = max(size for size in world_sizes(config.workers, config.train) if size * each <= cpus)
    if cpus - most * each < 1:
        raise BadInput(
            f"feed.decode = ray needs a CPU beside the workers: {most} workers of {each:g} CPUs leave "
            f"{cpus - most * each:g} of {cpus:g}",
            "Use fewer --workers or a lower workers.cpus, or --decode-on threads",
        )


def _began_on_gpus(run: RunFolder) -> bool:
    return _begun(run, "workers").get("use_gpu") is True


def _begun(run: RunFolder, section: str) -> dict[str, Any]:
    """A section of the config that the run was last started with; empty where there is none."""
    try:
        values = yaml.safe_load(run.store.read("config.yaml"))
    except (FileNotFoundError, yaml.YAMLError):
        return {}
    found = values.get(section) if isinstance(values, dict) else None
    return found if isinstance(found, dict) else {}
