"""Decoding in processes beside the trainer: no share of its interpreter, and a crash of the decoder costs no run.

Processes are reached by sockets and memory without a name, so that the system takes all of it back with the last
process that holds it, also after SIGKILL.
"""

import contextlib
import json
import mmap
import os
import queue
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from coca.decode import Decoder, DecodingBatch, Picture, Undecodable, View
from coca.decode_worker import LARGEST_MESSAGE, READY, Request, fit
from coca.errors import RunFailed
from coca.reused_memory import ReusedMemory
from coca.shared_memory import SharedMemory

_LARGEST_CHUNK = 8
# One that is decoded and one that waits, so that a process never waits for its parent.
_SLOTS = 2
# A process killed from outside is replaced; what kills each of them, whatever it is given, ends the run.
_DEATHS_IN_A_ROW, _DEATHS_OVER_ONE = 8, 2
_CHUNK_TIMEOUT_S = 120.0
_FIRST_MEMORY_BYTES = 2**20
# Their arrays are small, and a pool of threads in each would only be in the trainer's way.
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class ProcessDecoder(Decoder):
    """Processes that only decode. One thread hands them parts of batches and collects the pixels."""

    def __init__(self, view: View, workers: int) -> None:
        self._view, self._count, self._memory = view, workers, ReusedMemory(SharedMemory)
        self._new: queue.SimpleQueue[DecodingBatch] = queue.SimpleQueue()
        self._waiting: deque[_Chunk] = deque()
        self._closed, self._lock = False, threading.Lock()
        self._ending: BaseException = CancelledError()
        """What is told to those who wait, or come, once this has ended."""
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._workers: list[_Worker] = []
        self._deaths = 0
        for _ in range(workers):
            self._start_worker()
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self._thread.start()

    def submit(self, pictures: Sequence[Picture], size: int) -> "Future[np.ndarray]":
        batch = DecodingBatch(pictures, size, self._memory)
        with self._lock:
            if self._closed:
                batch.fail(self._ending)
            elif pictures:
                self._new.put(batch)
                self._wake.send(b"!")
        return batch.future

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._thread.is_alive():
                with contextlib.suppress(OSError):  # it may be ending by itself
                    self._wake.send(b"!")
        self._thread.join()

    @property
    def process_ids(self) -> list[int]:
        """Of the processes that decode now."""
        return [worker.process.pid for worker in list(self._workers)]

    # What follows runs in the thread alone.

    def _run(self) -> None:
        try:
            while not self._closed:
                for key, _ in self._selector.select(timeout=1.0):
                    if key.data is None:
                        self._take_jobs()
                    else:
                        self._hear(key.data)
                self._end_stuck()
                self._hand_out()
        except BaseException as error:  # raised to everyone who waits for pixels
            self._ending = error
        finally:
            self._end()

    def _take_jobs(self) -> None:
        self._woken.recv(4096)
        while not self._new.empty():
            self._waiting.extend(_chunks(self._new.get(), self._count))

    def _hand_out(self) -> None:
        for busy in range(_SLOTS):  # one for each, before any has its second
            for worker in self._workers:
                while self._waiting and self._waiting[0].batch.future.done():
                    self._waiting.popleft()  # another part of its batch has failed
                if self._waiting and worker.ready and len(worker.chunks) == busy:
                    worker.send(self._waiting.popleft())

    def _hear(self, worker: "_Worker") -> None:
        message = worker.receive()
        if not message:
            self._bury(worker)
        elif message == READY:
            worker.ready = True
        else:
            self._deaths = 0
            worker.finish(json.loads(message))

    def _end_stuck(self) -> None:
        """A decoder that never returns counts as one that has ended over its pictures."""
        for worker in self._workers:
            if worker.chunks and time.monotonic() - worker.begun_s > _CHUNK_TIMEOUT_S:
                worker.process.kill()

    def _bury(self, worker: "_Worker") -> None:
        self._workers.remove(worker)
        self._selector.unregister(worker.connection)
        worker.end()
        code, self._deaths = worker.process.returncode, self._deaths + 1
        how = f"signal {-code}" if code < 0 else f"code {code}"
        again = list(worker.chunks)
        if again:
            again[:1] = again[0].suspects(how)
        self._waiting.extendleft(reversed(again))
        if (not worker.ready and code != -signal.SIGKILL) or self._deaths > _DEATHS_IN_A_ROW:
            raise RunFailed(f"decoder processes end by {how} without decoding anything; their output says why")
        self._start_worker()

    def _start_worker(self) -> None:
        worker = _Worker(self._view)
        self._workers.append(worker)
        self._selector.register(worker.connection, selectors.EVENT_READ, worker)

    def _end(self) -> None:
        with self._lock:
            self._closed = True
        unfinished = [chunk.batch for worker in self._workers for chunk in worker.chunks]
        unfinished += [chunk.batch for chunk in self._waiting]
        while not self._new.empty():
            unfinished.append(self._new.get())
        for worker in self._workers:
            worker.end(at_once=True)
        self._workers.clear()
        self._selector.close()
        self._wake.close()
        self._woken.close()
        for batch in unfinished:
            batch.fail(self._ending)


@dataclass
class _Chunk:
    """Pictures of a batch that one process decodes in one go."""

    batch: DecodingBatch
    start: int
    stop: int
    deaths: int = 0
    """Processes that have ended over it."""

    @property
    def pictures(self) -> Sequence[Picture]:
        return self.batch.pictures[self.start : self.stop]

    def suspects(self, how: str) -> "list[_Chunk]":
        """One by one, so that a picture that kills its process is found; none of them where this was it."""
        if self.stop - self.start == 1 and self.deaths + 1 >= _DEATHS_OVER_ONE:
            sample_id = self.pictures[0].sample_id
            self.batch.fail(RunFailed(f"sample {sample_id} has ended {_DEATHS_OVER_ONE} decoder processes, by {how}"))
            return []
        singles = range(self.start, self.stop)
        deaths = self.deaths + (self.stop - self.start == 1)
        return [_Chunk(self.batch, index, index + 1, deaths) for index in singles]


def _chunks(batch: DecodingBatch, workers: int) -> list[_Chunk]:
    """Small enough that all workers have something to do until the end of the batch."""
    count, pictures = max(1, min(_LARGEST_CHUNK, len(batch.pictures) // (2 * workers))), len(batch.pictures)
    return [_Chunk(batch, start, min(start + count, pictures)) for start in range(0, pictures, count)]


class _Worker:
    """One process, its socket, and memory that both map: where pictures are sent in, and batches to draw them into.

    A chunk is held until its process has answered or ended, and with it the batch: its memory is not used for another
    while somebody may still write there.
    """

    def __init__(self, view: View) -> None:
        self.connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        descriptors = [os.memfd_create("coca-decode") for _ in range(_SLOTS)]
        try:
            for descriptor in descriptors:
                os.ftruncate(descriptor, _FIRST_MEMORY_BYTES)
            self._slots = [mmap.mmap(descriptor, _FIRST_MEMORY_BYTES) for descriptor in descriptors]
            passed = [theirs.fileno(), *descriptors]
            fields = json.dumps({"augment": view.augment.model_dump(), "seed": view.seed})
            # -P and PYTHONPATH: the same modules as here, and none of the current folder.
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "coca.decode_worker", *map(str, passed), fields],
                pass_fds=passed,
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **_ONE_THREAD},
            )
        finally:
            theirs.close()
            for descriptor in descriptors:
                os.close(descriptor)
        self._free = list(range(_SLOTS))
        self._mapped: dict[int, weakref.ref[SharedMemory]] = {}
        """Memories of batches that the process has, by number."""
        self.ready = False
        self.chunks: deque[_Chunk] = deque()
        """Given to the process, the first the one that it decodes."""
        self.begun_s = 0.0
        """When it began with that."""

    def send(self, chunk: _Chunk) -> None:
        if not self.chunks:
            self.begun_s = time.monotonic()
        self.chunks.append(chunk)
        slot, pictures, memory = self._free.pop(), chunk.pictures, chunk.batch.memory
        assert isinstance(memory, SharedMemory)
        self._write_encoded(slot, pictures)
        new = [] if memory.number in self._mapped else [memory.descriptor]
        forget = [number for number, mapped in self._mapped.items() if mapped() is None]
        for number in forget:
            del self._mapped[number]
        self._mapped[memory.number] = weakref.ref(memory)
        told = [(len(each.encoded), each.sample_id, each.lane_pass) for each in pictures]
        asked = Request(slot, told, chunk.batch.size, memory.number, chunk.start, forget)
        with contextlib.suppress(ConnectionError):  # it has ended, which we are about to hear
            socket.send_fds(self.connection, [json.dumps(asked).encode()], new)

    def _write_encoded(self, slot: int, pictures: Sequence[Picture]) -> None:
        memory, start = self._slots[slot], 0
        fit(memory, sum(len(each.encoded) for each in pictures))
        for each in pictures:
            memory[start : start + len(each.encoded)] = each.encoded
            start += len(each.encoded)

    def receive(self) -> bytes:
        """Empty where the process has ended."""
        try:
            return self.connection.recv(LARGEST_MESSAGE)
        except ConnectionError:
            return b""

    def finish(self, answer: dict[str, Any]) -> None:
        chunk, slot = self.chunks.popleft(), answer["slot"]
        if answer["error"] is not None:
            chunk.batch.fail(Undecodable(answer["error"]))
        else:
            chunk.batch.finish(chunk.stop - chunk.start)
        self._free.append(slot)
        self.begun_s = time.monotonic()

    def end(self, *, at_once: bool = False) -> None:
        """With its exit code; one whose socket has closed is given a moment to say it."""
        try:
            self.process.wait(0 if at_once else _CHUNK_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.connection.close()
        for memory in self._slots:
            memory.close()
