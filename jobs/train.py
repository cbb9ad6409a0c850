"""`coca train`, the driver: checks what can be known, starts the workers, shows progress, ends with a report."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coca.dataset import Dataset, list_versions
from coca.errors import BadInput, RunFailed
from coca.progress import Progress, polling
from coca.run_folder import RunFolder
from coca.storage import Store
from coca.train_config import TrainConfig
from jobs.attempt import Attempt, sweep_killed
from jobs.config import DataConfig, TrainRunConfig, WorkersConfig
from jobs.control_plane import say
from jobs.elastic import Driver, world_sizes
from jobs.run_lease import TakenOver, hold_run
from jobs.stop_signal import Interrupts
from jobs.train_checks import check_cluster, check_measures, check_source

if TYPE_CHECKING:
    from coca.mixture import Mixture
    from jobs.cluster import ClusterInfo

_POLL_S, _S3_POLL_S = 1.0, 10.0


def run_training(
    config: TrainRunConfig,
    *,
    must_be_new: bool = False,
    show_progress: bool = True,
    start_ray: Callable[[], object] | None = None,
) -> dict[str, Any]:
    """Train to ``config.train.steps``; an existing run goes on from its newest checkpoint.

    SIGTERM, Ctrl-C and a stopped Ray job end it after the step it is in, with a checkpoint; lost workers and nodes, and
    nodes that are being drained, do not end it (`jobs.elastic`).

    Args:
        start_ray: called once everything that can be checked without Ray is; by default Ray is connected already.

    Returns:
        What `coca.train.train` returns, with ``run``, ``workers`` (the last number of them), ``resumed_from`` (step or
        None), ``stopped`` (the signal that ended it early, or None), ``lost`` (what kept a stop from its checkpoint,
        so that steps since ``steps`` are lost, or None) and ``report`` (the page, or None).

    Raises:
        BadInput: before any worker starts, for whatever can be known then; another command works on the run.
        RunFailed: it cannot go on; says from which step the same command does, where repeating it can help.
    """
    run = RunFolder(config.out)
    mixture = check(config, run, must_be_new=must_be_new)
    if (finished := _finished(config, run)) is not None:
        say(f"{run.uri} has its {finished['steps']:,} steps already")
        return {"run": run.uri, "resumed_from": finished["steps"], **finished, "report": _report(run)}
    if start_ray is not None:
        start_ray()
    asked, config = config.workers.use_gpu, settle(config, mixture, run)
    if asked is None and show_progress:
        use_gpu = bool(config.workers.use_gpu)
        say(f"on {'GPUs' if use_gpu else 'CPUs'}: workers.use_gpu={str(not use_gpu).lower()} would choose otherwise")
    with hold_run(run.store) as held:
        resumed_from = run.latest_step()
        run.start(config.to_yaml())
        sweep_killed(run.uri)
        interrupts = Interrupts()
        with interrupts.catching(), _follow(run, config.train.steps, resumed_from or 0, show_progress):
            result = _train(config, mixture, run, interrupts, held)
        run.sweep_files()  # of workers that were killed
        return {"run": run.uri, "resumed_from": resumed_from, **result, "report": _report(run)}


def plan_training(
    config: TrainRunConfig, start_ray: Callable[[], "ClusterInfo"], *, must_be_new: bool = False
) -> dict[str, Any]:
    """What a run will take, after the checks that it would make (`jobs.train_plan.plan`).

    Raises:
        BadInput: as `run_training`.
    """
    from jobs.train_plan import plan

    run = RunFolder(config.out)
    mixture = check(config, run, must_be_new=must_be_new)
    return plan(config, mixture, start_ray(), resumed_from=run.latest_step())


def check(config: TrainRunConfig, run: RunFolder, *, must_be_new: bool = False) -> "Mixture":
    """Everything that can be known without Ray; gives the data.

    Raises:
        BadInput: something does not fit, or an existing run cannot go on so.
    """
    from coca.restore import read_fixed
    from coca.same_run import check_same_run, fit_to_tokenizer, fixed_fields
    from jobs.trackers import check_trackers

    if must_be_new and run.exists:
        raise BadInput(f"{run.uri} holds a run already", "Drop --must-be-new to go on with it, or give another --out")
    check_trackers(config.trackers)
    check_measures(config)
    check_source(config, run)
    saved = read_fixed(run)
    mixture = open_mixture(config.data, saved)
    check_fit(config.train, config.workers, mixture)
    check_same_run(saved, fixed_fields(fit_to_tokenizer(config.train, mixture.tokenizer), mixture), run)
    if mixture.withdrawn_since:
        say(f"{mixture.withdrawn_since:,} samples were withdrawn since the run began: others take their places")
    if config.held_out is not None:
        from coca.held_out import HeldOut

        HeldOut(config.held_out, config.held_out_pictures)
    return mixture


def open_mixture(data: tuple[DataConfig, ...], saved: Mapping[str, Any] | None) -> "Mixture":
    """The datasets of a run, in the versions and with the order that it began with, where it has begun (``saved``)."""
    from coca.mixture import Mixture, Source

    begun = saved or {}
    sources = [
        Source(open_dataset(each.uri, each.version, begun.get(f"data.{place}.version")), each.weight)
        for place, each in enumerate(data)
    ]
    mixture = Mixture(sources)
    return mixture if saved is None else mixture.as_begun(saved)


def open_dataset(uri: str, version: int | None, begun_with: int | None) -> Dataset:
    """The version that is asked for, else the one that the work to go on with began with, else the newest."""
    if version is None and begun_with in list_versions(Store(uri)):
        version = begun_with
    return Dataset(uri, version)


def check_fit(config: TrainConfig, workers: WorkersConfig, mixture: "Mixture") -> None:
    """Raises BadInput for what every worker would raise: datasets, lanes and number of workers do not fit."""
    for dataset, _ in mixture.sources:
        if dataset.record.selected == 0:
            raise BadInput(
                f"{dataset.store.uri} version {dataset.record.version} has no selected samples", "Refresh it"
            )
    world_sizes(workers, config)
    mixture.order(config)


def settle(config: TrainRunConfig, mixture: "Mixture", run: RunFolder) -> TrainRunConfig:
    """The config with what the cluster decides, the versions that were opened, and places that are the same for every
    worker.

    Raises:
        BadInput: the cluster has no room for the workers.
    """
    import ray

    data = [
        each.model_copy(update={"uri": dataset.store.uri, "version": dataset.record.version})
        for each, (dataset, _) in zip(config.data, mixture.sources, strict=True)
    ]
    feed = config.feed.model_copy(
        update={name: _absolute(getattr(config.feed, name)) for name in ("record", "recording", "cache_dir")}
    )
    return config.model_copy(
        update={
            # The version is part of what a run is: a refresh meanwhile must not change a resumed one.
            "data": tuple(data),
            "out": run.uri,
            "held_out": _absolute(config.held_out),
            "feed": feed,
            "workers": check_cluster(config, run, ray.cluster_resources()),
        }
    )


def _absolute(place: str | None) -> str | None:
    """Workers run in folders of their own."""
    return place if place is None or "://" in place else str(Path(place).absolute())


def _finished(config: TrainRunConfig, run: RunFolder) -> dict[str, Any] | None:
    """What workers would say of a run that is at its last step and whole: none need start for that."""
    from coca.checkpoint import checkpoint_path
    from coca.goodput import read_goodput
    from coca.restore import is_whole
    from coca.training_state import read_resume

    step = run.latest_step()
    if step != config.train.steps or not is_whole(run, step):
        return None
    account, row = {}, run.last_metrics() or {}
    with contextlib.suppress(BadInput):  # a damaged account is none
        account = read_goodput(run.store) or {}
    attempts = account.get("attempts") or [{}]
    checkpoint = checkpoint_path(step)
    return {
        "steps": step,
        "final_loss": row.get("loss"),
        "samples_per_s": None,
        "checkpoint": checkpoint,
        "skipped_steps": read_resume(run.store.child(checkpoint)).counters["skipped_steps"],
        "goodput": account.get("goodput"),
        "workers": attempts[-1].get("workers"),
        "stopped": None,
        "lost": None,
    }


def _train(
    config: TrainRunConfig, mixture: "Mixture", run: RunFolder, interrupts: Interrupts, held: Callable[[], None]
) -> dict[str, Any]:
    from coca.goodput import note_launch

    def start(world_size: int) -> Attempt:
        note_launch(run.store)
        attempt = Attempt(config, without_withdrawn(config, mixture), world_size)
        attempt.start()
        return attempt

    try:
        return Driver(config, start, run.latest_step, interrupts, held).run()
    except TakenOver:
        raise
    except RunFailed as failed:
        raise _explained(failed, run) from None


def without_withdrawn(config: TrainRunConfig, mixture: "Mixture") -> "Mixture":
    """The data in the order that the run began with, without what is withdrawn by now."""
    with contextlib.suppress(OSError):  # the list as it was, where the storage is away for a moment
        return open_mixture(config.data, mixture.identity())
    return mixture


def _explained(failed: RunFailed, run: RunFolder) -> RunFailed:
    """With the way on, where repeating helps; writes the report of what was done so far."""
    way_on = " The same command goes on from its newest checkpoint."
    with contextlib.suppress(OSError, BadInput):  # the storage may be what failed
        step = run.latest_step()
        way_on = f" The same command {f'goes on from step {step}' if step else 'starts it again'}."
        _report(run)
    return RunFailed(f"{str(failed).rstrip('.')}.{way_on if failed.repeat_helps else ''}")


def _report(run: RunFolder) -> str | None:
    try:
        from jobs.train_report import write_train_report

        return str(write_train_report(run))
    except ModuleNotFoundError as missing:
        say(f"no report.html: {missing.name} is not installed. pip install 'coca[report]'")
    except Exception as error:  # what was trained is there, whatever a page about it meets
        say(f"no report.html: {type(error).__name__}: {error}")
    return None


@contextmanager
def _follow(run: RunFolder, steps: int, start: int, show: bool) -> Iterator[None]:
    """Show progress from the run's metrics while the driver waits for the workers.

    The rate, and so the time left, counts from the first step that is seen: workers take a while to start.
    """
    if not show:
        yield
        return
    progress: Progress | None = None
    with ExitStack() as stack:

        def poll() -> None:
            nonlocal progress
            row = None
            with contextlib.suppress(OSError):  # read again next time
                row = run.last_metrics()
            if row is None or row["step"] <= (progress.count if progress else start):
                return
            if progress is None:
                progress = stack.enter_context(Progress("train", total=steps, unit="steps", start=row["step"]))
            progress.advance(row["step"] - progress.count, note=_note(row))

        with polling(poll, every_s=_S3_POLL_S if run.store.is_s3 else _POLL_S):
            yield


def _note(row: Mapping[str, Any]) -> str:
    losses = f"contrastive {row['contrastive_loss']:.3f}, captioning {row['captioning_loss']:.3f}"
    waiting = f", waiting for data {row['data_wait']:.0%}" if "data_wait" in row else ""
    return f"loss {row['loss']:.3f} ({losses}), {row['samples_per_s']:,.1f} samples/s{waiting}"
