"""One start of a run's workers through Ray Train, until they return, die or cannot be placed.

Ray's own restarts are not used (``max_failures=0``): they would also retry what no retry mends, and keep the number of
workers as it was. `jobs.elastic` decides what comes after an attempt.
"""

import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coca.errors import BadInput, RunFailed
from jobs.config import TrainRunConfig
from jobs.stop_signal import StopSignal, forget_signals, run_digest

if TYPE_CHECKING:
    from coca.mixture import Mixture

# Ray Train says no more than this by itself: what a user needs to know, the driver says.
_RAY_LOG_LEVEL = "CRITICAL"


class WorkersLost(Exception):
    """An attempt that a new one may mend: a process or node died, or a worker raised something of its own."""

    def __init__(self, cause: str, died: bool) -> None:
        super().__init__(cause)
        self.cause = cause
        self.died = died
        """A process ended, whatever its last words; False where it said itself what is wrong."""


class NoRoom(Exception):
    """The cluster could not place the workers in time."""


class Attempt:
    """Workers that train; made by the driver, which waits for them with `join`."""

    def __init__(self, config: TrainRunConfig, mixture: "Mixture", world_size: int) -> None:
        self.world_size = world_size
        self.stop_signal = StopSignal.of_run(config.out)
        self._config, self._mixture = config, mixture
        self._returned: dict[str, Any] | None = None
        self._error: BaseException | None = None
        # Not in the main thread: there Ray Train would take Ctrl-C for itself, and end without a checkpoint.
        self._thread = threading.Thread(target=self._run, name="attempt", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self, timeout_s: float) -> bool:
        """Whether the attempt has ended within ``timeout_s``."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def result(self) -> dict[str, Any]:
        """What rank 0's `coca.train.train` returned.

        Raises:
            BadInput, RunFailed: a worker raised it: no use in another attempt.
            WorkersLost, NoRoom: another attempt may do better.
        """
        if self._error is not None:
            raise explain(self._error) from None
        assert self._returned is not None, "the attempt has not ended"
        return self._returned

    def _run(self) -> None:
        try:
            prefix = _folder_prefix(self._config.out)
            with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder:
                self._returned = dict(self._trainer(folder).fit().return_value)
        except BaseException as error:  # raised by result(), in the main thread
            self._error = error
        finally:
            with suppress(Exception):  # `sweep_killed` makes up for it
                self.stop_signal.forget()

    def _trainer(self, folder: str) -> Any:
        # Read when the controller starts: how soon it sees that workers are up, done or dead (Ray's default is 2 s).
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        # Ours looks for drain notices, and its loop ends an attempt in order.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # What workers print comes through once, not twice.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
        import ray.train.torch

        from jobs.train_worker import train_worker

        train_api: Any = ray.train  # its published types are those of the older Train V1
        workers = self._config.workers
        return train_api.torch.TorchTrainer(
            train_worker,
            train_loop_config={
                "run": self._config.model_dump(mode="json"),
                "mixture": self._mixture,  # with its withdrawn list: all ranks leave out the same samples
                "stop_signal": self.stop_signal,
            },
            scaling_config=train_api.ScalingConfig(
                num_workers=self.world_size,
                use_gpu=bool(workers.use_gpu),
                resources_per_worker=resources_per_worker(self._config),
            ),
            # A collective that one worker never joins ends with an error for the others.
            torch_config=train_api.torch.TorchConfig(timeout_s=max(round(2 * workers.hang_timeout_s), 1)),
            run_config=train_api.RunConfig(
                name=f"attempt-{uuid.uuid4().hex[:8]}",
                storage_path=folder,  # Ray's checkpoints are not used: nothing but its marker lies there
                failure_config=train_api.FailureConfig(max_failures=0, controller_failure_limit=0),
                logging_config=train_api.LoggingConfig(log_level=_RAY_LOG_LEVEL),
            ),
        )


def sweep_killed(uri: str) -> None:
    """Remove what drivers that were killed have left of this run outside its folder. Only for who alone works on it."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_folder_prefix(uri)}*"):
        shutil.rmtree(folder, ignore_errors=True)
    with suppress(Exception):  # a few bytes in the control plane, which end with the cluster
        forget_signals(uri)


def _folder_prefix(uri: str) -> str:
    return f"coca-train-{run_digest(uri)}-"


def resources_per_worker(config: TrainRunConfig) -> dict[str, float]:
    return {"CPU": config.workers.cpus, **({"GPU": 1.0} if config.workers.use_gpu else {})}


def explain(error: BaseException) -> BaseException:
    """What `Attempt.result` raises for what Ray Train raised."""
    causes = list(_causes(error))
    for kind in (BadInput, RunFailed):
        for cause in causes:
            if isinstance(cause, kind):
                return cause
    names = {type(cause).__name__ for cause in causes}
    if names & {"WorkerGroupStartupTimeoutError", "InsufficientClusterResourcesError"}:
        return NoRoom(_first_line(causes[-1]))
    if not isinstance(error, Exception):
        return error
    # The others of a worker that died report no more than the broken connection.
    dead = [cause for cause in causes if type(cause).__name__ in _DEATHS]
    if dead:
        return WorkersLost(_death(dead[-1]), died=True)
    last = causes[-1]
    return WorkersLost(f"{type(last).__name__}: {_first_line(last)}", died=False)


_DEATHS = (
    "ActorDiedError",
    "ActorUnavailableError",
    "NodeDiedError",
    "OutOfMemoryError",
    "RayActorError",
    "WorkerCrashedError",
    "WorkerGroupStartupFailedError",
    "WorkerHealthCheckFailedError",
    "WorkerHealthCheckTimeoutError",
)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, then what lies beneath it in Ray Train's wrappings, outermost first."""
    waiting, seen = [error], set()
    while waiting:
        current = waiting.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        failures = getattr(current, "worker_failures", None) or {}  # rank -> error
        names = ("controller_failure", "health_check_failure", "cause", "__cause__")
        below = [*failures.values(), *(getattr(current, name, None) for name in names)]
        waiting += [each for each in below if isinstance(each, BaseException)]


def _death(error: BaseException) -> str:
    text = str(error)
    if "node" in text and ("died" in text or "dead" in text) and "worker process" not in text.lower():
        return "a node was lost"
    return f"a worker died ({_first_line(error)})"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
