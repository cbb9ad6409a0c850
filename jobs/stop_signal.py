"""How the driver tells the workers to stop, and how it is told itself.

The word goes through the key-value store of Ray's control plane: every node reaches it, it costs no request to the run
folder's storage, and no process that could die holds it.
"""

import hashlib
import os
import signal
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, Self

NAMESPACE = b"coca"
POLL_S = 0.2


@dataclass(frozen=True)
class StopSignal:
    """One attempt's signal, and which worker runs where. Travels to the workers by value."""

    key: str

    @classmethod
    def of_run(cls, uri: str) -> Self:
        """A new one for an attempt of the run in this folder."""
        return cls(f"train-{run_digest(uri)}/{uuid.uuid4().hex}")

    def ask(self) -> None:
        """Let the workers save a checkpoint after the step they are in, and end."""
        _store("_internal_kv_put", f"{self.key}/stop", b"1")

    def asked(self) -> bool:
        return bool(_store("_internal_kv_exists", f"{self.key}/stop"))

    def join(self, rank: int, node: str) -> None:
        """A worker says on which node it runs, before its first step."""
        _store("_internal_kv_put", f"{self.key}/worker/{rank}", f"{node} {os.getpid()}".encode())

    def workers(self) -> dict[int, tuple[str, int]]:
        """Rank -> (node, process) of the workers that have joined."""
        prefix = f"{self.key}/worker/"
        found: dict[int, tuple[str, int]] = {}
        for key in _store("_internal_kv_list", prefix):
            node, _, pid = (_store("_internal_kv_get", key) or b" 0").decode().partition(" ")
            found[int(key.decode().removeprefix(prefix))] = node, int(pid)
        return found

    def forget(self) -> None:
        _store("_internal_kv_del", self.key, del_by_prefix=True)


def forget_signals(uri: str) -> None:
    """Those of attempts of this run whose driver was killed. Only for who alone works on the run."""
    _store("_internal_kv_del", f"train-{run_digest(uri)}/", del_by_prefix=True)


def run_digest(uri: str) -> str:
    """Tells a run's traces outside its folder from those of others."""
    return hashlib.sha256(uri.encode()).hexdigest()[:16]


def _store(function: str, *arguments: Any, **options: Any) -> Any:
    from ray.experimental import internal_kv

    return getattr(internal_kv, function)(*arguments, namespace=NAMESPACE, **options)


class Listener:
    """Rank 0's ear: asks for the signal in a thread, so that no step waits for the control plane."""

    def __init__(self, signal_: StopSignal) -> None:
        self._signal = signal_
        self._heard, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._listen, name="stop-signal", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def heard(self) -> bool:
        return self._heard.is_set()

    def _listen(self) -> None:
        while not self._ended.wait(POLL_S):
            # A control plane that is away for a while is asked again.
            with suppress(Exception):
                if self._signal.asked():
                    self._heard.set()
                    return


class Interrupts:
    """SIGTERM and Ctrl-C, counted while ``catching`` lasts."""

    def __init__(self) -> None:
        self.name: str | None = None
        """Of the first that came, such as "SIGTERM"."""

    @contextmanager
    def catching(self) -> Iterator[None]:
        """The first is noted in ``name``; a second Ctrl-C is a KeyboardInterrupt. Python takes signals in its main
        thread only: elsewhere, in a trial of Ray Tune, nothing is caught."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = self.name or signal.Signals(number).name
