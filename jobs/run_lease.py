"""One command at a time on a run folder: two would remove each other's checkpoints."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from coca.errors import BadInput, RunFailed
from coca.storage import Store
from jobs.control_plane import say
from pipelines.lease import Lease, acquire_lease, check_conditional_writes, list_epochs, read_lease

TTL_S = 60.0
PATIENCE_S = 150.0  # a driver outlives its Ray, killed with the process that had started it, by a minute
_LOOK_S, _S3_LOOK_S = 2.0, 20.0


@contextlib.contextmanager
def hold_run(store: Store) -> Iterator[Callable[[], None]]:
    """Hold a run folder for a block; gives a check that costs nothing and raises RunFailed once it was taken over.

    The same command takes over at once from one that was killed on this machine, and after a minute from one on a
    machine that was lost. A storage that is away for a while loses nothing by itself.

    Raises:
        BadInput: somebody else holds it, is alive, and does not end while we wait.
    """
    lease = _acquire(store)
    try:
        with _watching(store, lease) as taken_by:

            def check() -> None:
                if taken_by:
                    raise TakenOver(f"{store.uri} was taken over by {taken_by[0]}: this command stops here")

            yield check
    finally:
        lease.release()


def _acquire(store: Store) -> Lease:
    check_conditional_writes(store)
    ends_at = time.monotonic() + PATIENCE_S
    told = False
    while True:
        try:
            return acquire_lease(store, "coca train", TTL_S)
        except BadInput as held:
            if time.monotonic() > ends_at:
                raise
            if not told:
                say(f"waiting up to {PATIENCE_S:.0f} s: {held.cause}")
            told = True


class TakenOver(RunFailed):
    """Another command works on the run: this one must leave it alone."""

    repeat_helps = False


@contextlib.contextmanager
def _watching(store: Store, lease: Lease) -> Iterator[list[str]]:
    """A list that holds the taker's name once there is one."""
    taken_by: list[str] = []
    ended = threading.Event()

    def look() -> None:
        while not taken_by and not ended.wait(_S3_LOOK_S if store.is_s3 else _LOOK_S):
            with contextlib.suppress(Exception):  # a storage that is away for a while is asked again
                highest = max(list_epochs(store), default=0)
                if highest > lease.epoch:
                    taken_by.append(str(read_lease(store, highest) or "another command"))

    thread = threading.Thread(target=look, name="run-lease", daemon=True)
    thread.start()
    try:
        yield taken_by
    finally:
        ended.set()
