"""Where the rows of metrics.jsonl go besides: TensorBoard, MLflow, Weights & Biases, Ray's dashboard.

A run that is continued goes on in the same place of each tracker. Steps that are done again after a restart replace
their old values in TensorBoard, and are left out where a tracker has them already. No tracker holds a step or ends a
run: each is fed by a thread of its own, and one that is away misses rows.

| tracker     | where                                                                   | needs                 |
| ----------- | ----------------------------------------------------------------------- | --------------------- |
| tensorboard | ``tensorboard/`` in the run folder                                      | tensorboardX          |
| mlflow      | MLFLOW_TRACKING_URI, experiment MLFLOW_EXPERIMENT_NAME (default `coca`) | mlflow-skinny, mlflow |
| wandb       | project WANDB_PROJECT (default `coca`)                                  | wandb                 |
"""

import importlib.util
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from coca.errors import BadInput
from coca.run_folder import RunFolder
from jobs.config import TrainRunConfig
from jobs.tracker_clients import Row, Tracker, make_tracker, scalars

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
_WAITING_ROWS = 1000  # of one tracker
_CLOSING_S = 20.0  # for what waits when training ends


def check_trackers(names: Sequence[str]) -> None:
    """Raises BadInput unless the packages of these trackers are installed here."""
    for name in names:
        module, package = _PACKAGES[name]
        if importlib.util.find_spec(module) is None:
            raise BadInput(
                f"trackers: {name} needs {module}, which is not installed here",
                f"pip install {package}, on every node that may run worker 0",
            )


@contextmanager
def open_trackers(config: TrainRunConfig) -> Iterator[Callable[[Row], None]]:
    """A function that takes each row of metrics.jsonl: to the config's trackers, and to Ray's dashboard within Ray.

    It never waits for a tracker and never raises for one: what is wrong with it is said once on stderr. At the end what
    still waits gets a while, never so long that the worker would count as hanging.

    Raises:
        BadInput: as `check_trackers`.
    """
    check_trackers(config.trackers)
    run = RunFolder(config.out)
    lines = [TrackerLine(name, partial(make_tracker, name, run, config)) for name in config.trackers]
    gauges = ray_gauges(config.out)

    def log(row: Row) -> None:
        gauges(row)
        for line in lines:
            line.put(row)

    failed = True
    try:
        yield log
        failed = False
    finally:
        for line in lines:
            line.end(failed)
        until = time.monotonic() + min(_CLOSING_S, config.workers.hang_timeout_s / 2)
        for line in lines:
            line.join(until - time.monotonic())


class TrackerLine:
    """Rows on their way to one tracker, which a thread makes and feeds.

    A row that the tracker did not take is lost, and the next one tried; while one is tried the newest wait.
    """

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self._name, self._make = name, make
        self._tracker: Tracker | None = None
        self._rows: deque[Row] = deque()
        self._failed: bool | None = None  # how the attempt ended, once it has
        self._changed = threading.Condition()
        self._said: set[str] = set()
        self._thread = threading.Thread(target=self._feed, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def put(self, row: Row) -> None:
        with self._changed:
            if len(self._rows) >= _WAITING_ROWS:
                self._rows.popleft()
                self._say("is slow", f"more than {_WAITING_ROWS:,} rows wait: the oldest are left out")
            self._rows.append(row)
            self._changed.notify()

    def end(self, failed: bool) -> None:
        """No row comes any more: the tracker is closed after those that wait."""
        with self._changed:
            self._failed = failed
            self._changed.notify()

    def join(self, timeout_s: float) -> None:
        self._thread.join(max(timeout_s, 0.0))
        if self._thread.is_alive():
            self._say("does not answer", f"ending without it, {len(self._rows)} rows wait")

    def _feed(self) -> None:
        self._try("could not be started", self._started)
        while (row := self._next()) is not None:
            self._try("did not take a row", partial(self._log, row))
        if self._tracker is not None:
            self._try("could not be closed", partial(self._tracker.close, bool(self._failed)))

    def _next(self) -> Row | None:
        """The oldest row that waits; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._rows or self._failed is not None)
            return self._rows.popleft() if self._rows else None

    def _log(self, row: Row) -> None:
        self._started().log(row)

    def _started(self) -> Tracker:
        if self._tracker is None:
            self._tracker = self._make()
        return self._tracker

    def _try(self, otherwise: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # whatever a tracker's client raises, training goes on
            self._say(otherwise, f"{type(error).__name__}: {error}")

    def _say(self, what: str, why: str) -> None:
        if what not in self._said:
            self._said.add(what)
            print(f"{self._name} {what}: {why}", file=sys.stderr, flush=True)


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
