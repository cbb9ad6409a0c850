"""One writer at a time: a lease with an expiry, and an epoch that rises with every holder.

``leases/<epoch>.json`` is created by a conditional write, so one of several wins. The holder renews its file; every
commit checks that no higher epoch is there. See docs/decisions/0022-lease-by-epoch-files.md.
"""

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from coca.errors import BadInput, RunFailed
from coca.s3 import StoreFailed
from coca.storage import Store

FOLDER = "leases"
_READ_ATTEMPTS = 4


class ProcessStamp(BaseModel):
    """A process, told apart from every other, also from a later one with its number."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str
    pid: int
    namespace: str | None
    """Boot and pid namespace: where they are the same, ``pid`` can be looked up. None outside Linux."""
    started: str | None
    """When it started, in clock ticks after boot."""

    @classmethod
    def own(cls) -> "ProcessStamp":
        return cls(host=socket.gethostname(), pid=os.getpid(), namespace=_namespace(), started=_started(os.getpid()))

    def is_dead(self) -> bool:
        """True only where that is certain: it ran here, and no process of that number and start does."""
        return self.namespace is not None and self.namespace == _namespace() and _started(self.pid) != self.started


class LeaseRecord(BaseModel):
    """The content of ``leases/<epoch>.json``. Times are seconds since 1970."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    holder: ProcessStamp
    command: str
    acquired_at: float
    expires_at: float
    released: bool = False

    def is_free(self) -> bool:
        return self.released or time.time() > self.expires_at or self.holder.is_dead()

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.acquired_at, UTC).isoformat(timespec="seconds")
        return f"`{self.command}` (process {self.holder.pid} on {self.holder.host}, since {since})"


class Lease:
    """The right to write to a dataset, while it is renewed and nobody has taken it over."""

    def __init__(self, store: Store, epoch: int, record: LeaseRecord, ttl_s: float) -> None:
        self.epoch = epoch
        self._store, self._record, self._ttl_s = store, record, ttl_s
        self._stop = threading.Event()
        self._renewal = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._renewal.start()

    def check(self) -> None:
        """To be called right before each commit.

        Raises:
            RunFailed: another process has taken the lease over, or it could not be renewed in time.
        """
        highest = max(list_epochs(self._store), default=0)
        if highest > self.epoch:
            taker = read_lease(self._store, highest)
            raise RunFailed(f"the lease on {self._store.uri} was taken over by {taker}; nothing more is committed here")
        if time.time() > self._record.expires_at:
            raise RunFailed(
                f"the lease on {self._store.uri} could not be renewed for {self._ttl_s:g} s; "
                "nothing more is committed here. Run the same command again"
            )

    def release(self) -> None:
        """End the renewal and let the next one in at once."""
        self._stop.set()
        self._renewal.join()
        # Where the store cannot be reached the lease expires by itself.
        with contextlib.suppress(Exception):
            self._write(released=True)

    def _renew(self) -> None:
        while not self._stop.wait(self._ttl_s / 3):
            # A store that cannot be reached now may answer next time; until then the old expiry stands.
            with contextlib.suppress(Exception):
                self._write(expires_at=time.time() + self._ttl_s)

    def _write(self, **changes: object) -> None:
        record = self._record.model_copy(update=changes)
        self._store.write(_path(self.epoch), record.model_dump_json(indent=1).encode())
        self._record = record


@contextlib.contextmanager
def hold_lease(store: Store, command: str, ttl_s: float = 60.0) -> Iterator[Lease]:
    """Hold the only lease on a dataset for a block; renewed by a thread every ``ttl_s / 3``.

    A lease whose process has died on this host is taken over at once, one that is not renewed when it expires.

    Args:
        command: what is done under it, for whoever waits: "coca data refresh".

    Raises:
        BadInput: somebody else holds it and is alive, or the store has no conditional writes.
    """
    lease = acquire_lease(store, command, ttl_s)
    try:
        yield lease
    finally:
        lease.release()


def acquire_lease(store: Store, command: str, ttl_s: float) -> Lease:
    """As ``hold_lease``; the caller releases it."""
    check_conditional_writes(store)
    while True:
        highest = max(list_epochs(store), default=0)
        if highest:
            _wait_until_free(store, highest)
        now = time.time()
        record = LeaseRecord(holder=ProcessStamp.own(), command=command, acquired_at=now, expires_at=now + ttl_s)
        epoch = highest + 1
        if not store.write_once(_path(epoch), record.model_dump_json(indent=1).encode()):
            continue
        # Who was slow between looking and writing may have taken an epoch that others have passed and swept.
        if max(list_epochs(store)) == epoch:
            break
    lease = Lease(store, epoch, record, ttl_s)
    sweep_leases(store, epoch)
    return lease


def check_conditional_writes(store: Store) -> None:
    """Raises BadInput where the store would overwrite a file that it was asked to create only."""
    probe = f"{FOLDER}/probe-{uuid.uuid4().hex}"
    try:
        honoured = store.write_once(probe, b"1") and not store.write_once(probe, b"2") and store.read(probe) == b"1"
    except StoreFailed:
        raise
    except OSError as error:
        raise BadInput(f"cannot write to {store.uri}: {error}", "Give a folder that can be written to") from None
    finally:
        with contextlib.suppress(OSError):
            store.delete(probe)
    if not honoured:
        raise BadInput(
            f"the store behind {store.uri} ignores conditional writes (If-None-Match), "
            "so two writers could not be kept apart",
            "Use a store that honours them, such as Amazon S3, or a local folder",
        )


def list_epochs(store: Store) -> list[int]:
    """Epochs with a file, ascending."""
    names = (name.removesuffix(".json") for name in store.list(FOLDER) if name.endswith(".json"))
    return sorted(int(name) for name in names if name.isdecimal())


def read_lease(store: Store, epoch: int) -> LeaseRecord | None:
    """None where a later holder has swept it away."""
    for attempt in range(_READ_ATTEMPTS):
        try:
            return LeaseRecord.model_validate_json(store.read(_path(epoch)))
        except FileNotFoundError:
            return None
        except ValidationError as error:
            # On S3 a read asks for the length first: a renewal in between may cut the end off.
            problem = str(error).splitlines()[0]
            time.sleep(0.05 * attempt)
    raise BadInput(
        f"{store.uri}/{_path(epoch)} is no lease: {problem}", "Delete the file if nobody writes to the dataset"
    )


def sweep_leases(store: Store, epoch: int) -> None:
    """Delete the files below ``epoch``, which is the holder's own."""
    for old in list_epochs(store):
        if old < epoch:
            store.delete(_path(old))


def _wait_until_free(store: Store, epoch: int) -> None:
    """Return once the lease is released, expired or dead; its own expiry bounds the wait."""
    first = read_lease(store, epoch)
    if first is None or first.is_free():
        return
    pause_s = min(1.0, max(0.01, (first.expires_at - time.time()) / 50))
    while True:
        time.sleep(pause_s)
        current = read_lease(store, epoch)
        if current is None or current.is_free():
            return
        if current.expires_at != first.expires_at:
            raise BadInput(
                f"{store.uri} is being written by {current}",
                f"Let it finish, or end that process: on {current.holder.host} its lease is then free at once, "
                "elsewhere when it expires",
            )


def _path(epoch: int) -> str:
    return f"{FOLDER}/{epoch}.json"


def _namespace() -> str | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When a process started; None where there is none, or only its entry is left after its end."""
    try:
        # The name, in brackets, may hold anything; the fields behind it are numbers and the state.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
