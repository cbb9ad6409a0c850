"""How many workers a run has, and what comes after each of its attempts: the driver's loop.

The world size is the largest that the config allows and the cluster has room for. A lost worker or node, a node that is
being drained and room for more workers each end an attempt, the last two after a checkpoint; the next one goes on from
the newest checkpoint. The order of the data does not depend on the world size (`coca.order`), so nothing else changes.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from coca.errors import BadInput, RunFailed
from coca.order import check_world_size
from coca.train_config import TrainConfig
from jobs.attempt import Attempt, NoRoom, WorkersLost, resources_per_worker
from jobs.config import TrainRunConfig, WorkersConfig
from jobs.control_plane import ControlPlane, asking_autoscaler, say
from jobs.stop_signal import Interrupts

POLL_S = 0.2
DRAIN_CHECK_S = 5.0
GROWTH_CHECK_S = float(os.environ.get("COCA_GROWTH_CHECK_S", "30"))
ROOM_TIMEOUT_S = float(os.environ.get("COCA_ROOM_TIMEOUT_S", "1800"))
MAX_GROWTH_CHECK_S = 3600.0
SETTLE_S = 5.0  # until what an ended attempt held is free again

ASKED, DRAIN, GROW = "asked", "drain", "grow"


def world_sizes(workers: WorkersConfig, train: TrainConfig) -> list[int]:
    """The numbers of workers that a run may have, ascending: one where it is fixed.

    Raises:
        BadInput: there is none; names what would do.
    """
    least, most = workers.least or workers.count, workers.count
    if least > most:
        raise BadInput(f"workers.least = {least} is above workers.count = {most}", f"Give --workers {most}:{least}")
    if least == most:
        check_world_size(train.lanes, most)
    sizes = [size for size in range(least, most + 1) if train.lanes % size == 0]
    if not sizes:
        every = [size for size in range(1, train.lanes + 1) if train.lanes % size == 0]
        raise BadInput(
            f"no number of workers from {least} to {most} divides lanes = {train.lanes}",
            f"Let --workers hold one of {', '.join(map(str, every))}",
        )
    shard = train.parallel.shard_workers
    if shard is None or train.parallel.kind != "fsdp":
        return sizes
    sharded = [size for size in sizes if size % shard == 0]
    if not sharded:
        raise BadInput(
            f"parallel.shard_workers = {shard} divides none of the possible numbers of workers: {sizes}",
            "Give a multiple of it, or another shard_workers",
        )
    return sharded


def cluster_room(wanted: Mapping[str, float], ours: Mapping[str, int] | None = None) -> int:
    """Workers of ``wanted`` resources each that the cluster has room for now, ``ours`` (node -> number) included.

    Nodes that are dead or being drained count for nothing.
    """
    from ray._private import state  # the public calls know neither drains nor what is free on one node

    free = state.available_resources_per_node()
    leaving = draining_nodes()
    return sum(_fitting(free.get(node, {}), wanted) + (ours or {}).get(node, 0) for node in alive_nodes() - leaving)


def alive_nodes() -> set[str]:
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def draining_nodes() -> set[str]:
    """Nodes with a notice: of preemption, or because the autoscaler takes them away."""
    from ray._private.state import state

    return set(state.get_draining_nodes())


def _fitting(free: Mapping[str, float], wanted: Mapping[str, float]) -> int:
    return min(int((free.get(name, 0.0) + 1e-6) / amount) for name, amount in wanted.items())


class Driver:
    """Starts attempts until the run has all its steps, is asked to stop, or cannot go on."""

    def __init__(
        self,
        config: TrainRunConfig,
        start: Callable[[int], Attempt],
        latest_step: Callable[[], int | None],
        interrupts: Interrupts,
        held: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            start: starts an attempt with so many workers.
            latest_step: of the newest checkpoint.
            held: raises RunFailed once the run folder is no longer ours.
        """
        self._config, self._start, self._latest_step, self._interrupts = config, start, latest_step, interrupts
        self._held, self._control_plane = held, ControlPlane()
        self._sizes = world_sizes(config.workers, config.train)
        self._wanted = resources_per_worker(config)
        self._size: int | None = None
        self._waits_since: float | None = None
        self._growth_check_s = GROWTH_CHECK_S
        self._grows_at = 0.0  # when room for more workers is looked for next
        self._target: int | None = None  # of a growth under way
        self._failures = Failures(config.workers.max_failures)

    def run(self) -> dict[str, Any]:
        """What `coca.train.train` returned last, with ``workers``, ``stopped`` (the signal's name, or None) and
        ``lost`` (what kept a stop from its checkpoint, or None).

        Raises:
            BadInput, RunFailed: what a worker raised; or workers died too often; or there was no room for too long.
        """
        if len(self._sizes) == 1:
            return self._run()
        with asking_autoscaler(self._wanted, self._sizes[-1]):
            return self._run()

    def _run(self) -> dict[str, Any]:
        while True:
            self._held()
            size = self._choose()
            if size is None:
                return self._stopped_between()
            self._tell(size)
            attempt = self._start(size)
            try:
                result = self._follow(attempt)
            except NoRoom:
                self._wait_for_room()
            except WorkersLost as lost:
                if self._interrupts.name is not None:
                    say(f"{lost.cause}, before the checkpoint of the stop")
                    return self._stopped_between(lost.cause)
                self._failures.count(lost, self._latest_step())
            else:
                if result is None:
                    return self._stopped_between()
                if result["steps"] >= self._config.train.steps or self._interrupts.name is not None:
                    return {**result, "workers": size, "stopped": self._stopped(result["steps"]), "lost": None}

    def _follow(self, attempt: Attempt) -> dict[str, Any] | None:
        """What the attempt returned; None where it was given up because it had not begun when a stop was asked for."""
        reason, told, looked_at = None, False, time.monotonic()
        nodes: Counter[str] | None = None  # of the workers, once all have begun
        while not attempt.join(POLL_S):
            self._check_held(attempt)
            if self._interrupts.name is not None and reason != ASKED:
                reason = ASKED
                say(f"{self._interrupts.name}: ending after this step, with a checkpoint")
                if nodes is None and self._control_plane.ask(attempt.stop_signal.workers) == {}:
                    self._tell_to_stop(attempt)
                    return None
            elif reason is None and time.monotonic() - looked_at > min(DRAIN_CHECK_S, GROWTH_CHECK_S):
                looked_at = time.monotonic()
                nodes = nodes or self._all_begun(attempt)
                reason = self._change(attempt.world_size, nodes) if nodes else None
            if reason is not None and not told:
                told = self._tell_to_stop(attempt)
        return attempt.result()

    def _check_held(self, attempt: Attempt) -> None:
        try:
            self._held()
        except RunFailed:
            self._tell_to_stop(attempt)
            raise

    def _tell_to_stop(self, attempt: Attempt) -> bool:
        def ask() -> bool:
            attempt.stop_signal.ask()
            return True

        return self._control_plane.ask(ask) or False

    def _all_begun(self, attempt: Attempt) -> Counter[str] | None:
        """The workers' nodes; None while some have not begun."""
        workers = self._control_plane.ask(attempt.stop_signal.workers) or {}
        if len(workers) < attempt.world_size:
            return None
        self._waits_since = None
        if self._target is not None:
            grown = attempt.world_size >= self._target
            self._growth_check_s = GROWTH_CHECK_S if grown else min(2 * self._growth_check_s, MAX_GROWTH_CHECK_S)
            self._target = None
        self._grows_at = time.monotonic() + self._growth_check_s
        return Counter(node for node, _ in workers.values())

    def _change(self, size: int, nodes: Counter[str]) -> str | None:
        """Why a running attempt should end."""
        if leaving := (self._control_plane.ask(draining_nodes) or set()) & nodes.keys():
            say(f"node {min(leaving)[:8]} is being drained: a checkpoint, then on without it")
            return DRAIN
        if size < self._sizes[-1] and time.monotonic() >= self._grows_at:
            self._grows_at = time.monotonic() + self._growth_check_s
            room = self._control_plane.ask(lambda: cluster_room(self._wanted, nodes)) or 0
            if self._largest(room) > size:
                self._target = self._largest(room)
                say(f"the cluster has room for {room} workers: a checkpoint, then on with more")
                return GROW
        return None

    def _choose(self) -> int | None:
        """The size of the next attempt; None where a stop was asked for while there was no room."""
        if len(self._sizes) == 1:
            return None if self._interrupts.name else self._sizes[0]  # Ray itself waits until there is room
        settled_at = time.monotonic() + (SETTLE_S if self._size else 0.0)
        while self._interrupts.name is None:
            self._held()
            room = self._control_plane.ask(lambda: cluster_room(self._wanted)) or 0
            # Ray may not yet have freed what the ended attempt held.
            if room >= (self._target or self._size or 0) or time.monotonic() > settled_at:
                if size := self._largest(room):
                    return size
                self._wait_for_room()
            time.sleep(POLL_S)
        return None

    def _largest(self, room: int) -> int:
        return max((size for size in self._sizes if size <= room), default=0)

    def _wait_for_room(self) -> None:
        now = time.monotonic()
        if self._waits_since is None:
            self._waits_since = now
            say(f"the cluster has no room for {self._sizes[0]} workers: waiting")
        if now - self._waits_since > ROOM_TIMEOUT_S:
            raise RunFailed(
                f"the cluster had no room for {self._sizes[0]} workers of {self._wanted} for {ROOM_TIMEOUT_S:.0f} s"
            )

    def _tell(self, size: int) -> None:
        if self._size not in (None, size):
            say(f"{size} workers from here on, {self._size} before")
        self._size = size

    def _stopped(self, steps: int) -> str | None:
        return self._interrupts.name if steps < self._config.train.steps else None

    def _stopped_between(self, lost: str | None = None) -> dict[str, Any]:
        step, stopped = self._latest_step() or 0, self._interrupts.name
        return {"steps": step, "final_loss": None, "workers": self._size, "stopped": stopped, "lost": lost}


class Failures:
    """Counts lost attempts: those in a row without a new checkpoint between them."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._count, self._step = 0, -1
        self._said: str | None = None

    def count(self, lost: WorkersLost, step: int | None) -> None:
        """
        Args:
            step: of the newest checkpoint.

        Raises:
            RunFailed: one too many; or a worker has said the same again without a checkpoint between, as an error in
                the code does.
        """
        if (step or 0) > self._step:
            self._count, self._step, self._said = 0, step or 0, None
        self._count += 1
        repeated = not lost.died and lost.cause == self._said
        if self._count > self._most or repeated:
            failed = RunFailed(f"{lost.cause}; {self._count} times in a row without a new checkpoint")
            failed.repeat_helps = not repeated
            raise failed
        self._said = lost.cause
        say(f"{lost.cause}; going on from {f'step {step}' if step else 'the start'}")
