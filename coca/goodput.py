"""Goodput: the share of a run's wall-clock time that went into new steps, and what took the rest.

A run may be killed at any moment, so its account lies in one file of the run folder, ``goodput.json``, which is
replaced as a whole, every second on a disk and, beside the training, every 10 s on S3. It holds the totals of all
attempts, so the next attempt reads one file and goes on. What happened after the last writing of an attempt that was
killed counts as down: goodput is never told too high. No account that is damaged or cannot be written ends a run.

| cause           | time                                                                                      |
| --------------- | ----------------------------------------------------------------------------------------- |
| `new_steps`     | steps that no attempt had ended before                                                    |
| `starting`      | from the command, or the attempt's first line, until training begins                      |
| `restoring`     | reading and verifying a checkpoint                                                        |
| `replayed`      | steps that an earlier attempt had ended, done again after its checkpoint                  |
| `checkpoint`    | the loop held by saving                                                                   |
| `evaluation`    | the held-out set                                                                          |
| `data`          | the loop waiting for a batch                                                              |
| `down`          | between attempts: the end of one noticed, the next one brought up                         |

Time after a run has reached its last step does not count, should it ever be given more steps.
"""

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from coca.errors import BadInput
from coca.storage import Store

FILE = "goodput.json"
NEW = "new_steps"
STARTING, RESTORING, REPLAYED, CHECKPOINT = "starting", "restoring", "replayed", "checkpoint"
EVALUATION, DATA, DOWN = "evaluation", "data", "down"
LOSSES = (STARTING, RESTORING, REPLAYED, CHECKPOINT, EVALUATION, DATA, DOWN)
_INTERVAL_S, _S3_INTERVAL_S = 1.0, 10.0
_CLOSING_S = 20.0  # that the last writing to S3 may take

Clock = Callable[[], float]


def read_goodput(store: Store) -> dict[str, Any] | None:
    """The account of a run, None where it has none.

    ``wall_s``, ``goodput`` (share of it), ``seconds`` (cause -> seconds), ``furthest_step``, and ``attempts``: for each
    ``time`` (unix seconds), ``from_step``, ``to_step`` and ``workers``.

    Raises:
        BadInput: the file is damaged.
    """
    try:
        account: dict[str, Any] = json.loads(store.read(FILE))
        _check(account)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        raise BadInput(f"{store.uri}/{FILE} is damaged", "Remove it: the account begins anew") from None
    wall_s = sum(account["seconds"].values())
    return account | {"wall_s": wall_s, "goodput": account["seconds"][NEW] / wall_s if wall_s else 0.0}


def _check(account: Any) -> None:
    """Raises ValueError, TypeError or KeyError for what is no whole account."""
    numbers = [account["began"], account["until"], account["furthest_step"]]
    numbers += [account["seconds"][cause] for cause in (NEW, *LOSSES)]
    if not all(isinstance(number, int | float) for number in numbers):
        raise ValueError("a number is none")
    if not isinstance(account["attempts"], list) or account["phase"] not in (None, *LOSSES):
        raise ValueError("attempts or phase are none")


def note_launch(store: Store, clock: Clock = time.time) -> None:
    """Told by the command before it starts workers: what comes until their attempt begins is ``starting``."""
    try:
        account = _go_on(store, clock())
        store.write(FILE, _bytes(account | {"phase": STARTING}))
    except OSError as error:
        _say(f"the start of the workers is not on the account: {error}")


class Goodput:
    """The account of the attempt under way; rank 0 alone keeps one."""

    def __init__(self, store: Store, workers: int, clock: Clock = time.time) -> None:
        self._store, self._clock = store, clock
        self._account = _go_on(store, clock())
        self._before = self._account["furthest_step"]
        self._mark = self._written = self._account["until"]
        self._lost_s = 0.0  # since the mark
        self._interval_s = _S3_INTERVAL_S if store.is_s3 else _INTERVAL_S
        self._aside = _Aside(store) if store.is_s3 else None
        self._account["attempts"].append({"time": self._mark, "from_step": None, "to_step": None, "workers": workers})
        self._flush(DOWN)

    def lose(self, cause: str, seconds: float) -> None:
        """Count seconds that have just passed under ``cause``, one of ``LOSSES``."""
        if cause not in LOSSES:
            raise ValueError(f"{cause!r} is no cause of a loss: {', '.join(LOSSES)}")
        self._account["seconds"][cause] += seconds
        self._lost_s += seconds

    def begin(self, position: int) -> None:
        """Training goes on from ``position`` steps; what no cause took since the attempt began was ``starting``."""
        self._settle(STARTING)
        self._account["attempts"][-1] |= {"from_step": position, "to_step": position}
        self._flush(DOWN)

    def step(self, step: int) -> None:
        """``step`` steps are done; what no cause took since the last call went into the newest one."""
        self._settle(REPLAYED if step <= self._before else NEW)
        self._account["attempts"][-1]["to_step"] = step
        self._account["furthest_step"] = max(step, self._account["furthest_step"])
        if self._mark - self._written >= self._interval_s:
            self._flush(DOWN)

    def close(self, *, finished: bool) -> None:
        """The attempt ends; with ``finished`` the run has reached its last step.

        What no cause took since that step went into the last checkpoint; else it is ``down``: it may be a hang.
        """
        self._settle(CHECKPOINT if finished else DOWN)
        self._flush(None if finished else DOWN)
        if self._aside is not None:
            self._aside.join(_CLOSING_S)

    @property
    def wall_s(self) -> float:
        """Seconds since the run began."""
        return float(sum(self._account["seconds"].values()))

    def row(self) -> dict[str, Any]:
        """For metrics.jsonl: ``goodput`` so far and ``lost_s``, cause -> seconds."""
        seconds = self._account["seconds"]
        wall_s = self.wall_s
        lost_s = {cause: round(seconds[cause], 3) for cause in LOSSES if seconds[cause]}
        return {"goodput": seconds[NEW] / wall_s if wall_s else 0.0, "lost_s": lost_s}

    def _settle(self, cause: str) -> None:
        """What has passed since the mark and was not lost to another cause counts under ``cause``."""
        now = self._clock()
        # Not below 0: clocks are set back now and then.
        self._account["seconds"][cause] += max(now - self._mark - self._lost_s, 0.0)
        self._mark, self._lost_s = now, 0.0

    def _flush(self, phase: str | None) -> None:
        self._account |= {"until": self._mark, "phase": phase}
        if self._aside is not None:
            self._aside.put(_bytes(self._account))
        else:
            # A storage that is away for a while ends no run here: the account is written again later.
            with contextlib.suppress(OSError):
                self._store.write(FILE, _bytes(self._account))
        self._written = self._mark


class _Aside:
    """Writes the newest account in a thread: S3 may take minutes, and no step waits for it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._newest: bytes | None = None  # what is still to be written
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def put(self, data: bytes) -> None:
        with self._lock:
            self._newest = data
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="goodput", daemon=True)
                self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Wait until what was put is written, or was tried."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout_s)

    def _work(self) -> None:
        while (data := self._take()) is not None:
            with contextlib.suppress(Exception):  # a later one is written again
                self._store.write(FILE, data)

    def _take(self) -> bytes | None:
        with self._lock:
            data, self._newest = self._newest, None
            if data is None:
                self._thread = None
            return data


def _go_on(store: Store, now: float) -> dict[str, Any]:
    """The account with what has passed since its last writing, under what the run was in then."""
    try:
        account = read_goodput(store)
    except BadInput as damaged:
        _say(f"{damaged.cause}: the account begins anew")
        account = None
    if account is None:
        seconds = dict.fromkeys((NEW, *LOSSES), 0.0)
        return {"began": now, "until": now, "phase": None, "seconds": seconds, "furthest_step": 0, "attempts": []}
    account = {name: value for name, value in account.items() if name not in ("wall_s", "goodput")}
    if account["phase"] is not None:
        account["seconds"][account["phase"]] += max(now - account["until"], 0.0)
    return account | {"until": now}


def _bytes(account: dict[str, Any]) -> bytes:
    return json.dumps(account, indent=1).encode()


def _say(text: str) -> None:
    print(f"goodput: {text}", file=sys.stderr, flush=True)
