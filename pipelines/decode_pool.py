"""Decoding in processes of their own: a crash, a bomb or a decoder that never returns costs one image."""

import asyncio
import hashlib
import mmap
import os
import signal
import socket
import subprocess
import sys
from types import TracebackType
from typing import Any, Self

from coca.contract import Reason
from coca.errors import RunFailed
from pipelines.decode_worker import LARGEST_ANSWER, READY, Handler, read_answer, write_body
from pipelines.image_config import ImageConfig
from pipelines.prepare import Prepared, prepare

_FIRST_MEMORY_BYTES = 2**20
# Where somebody else has killed the process over a body, such as a machine out of memory.
_TRIES = 2


class DecodePool:
    """Worker processes that prepare bodies, for the tasks of one event loop.

    Args:
        config: what is asked of images; its ``decode_*`` fields bound each worker.
        workers: processes; more bodies than that wait their turn.
        handler: what the workers run, a function that they can import.
    """

    def __init__(self, config: ImageConfig, workers: int, *, handler: Handler = prepare) -> None:
        self._config = config
        self._workers = workers
        self._handler = f"{handler.__module__}:{handler.__qualname__}"
        self._all: set[_Worker] = set()
        self._idle: asyncio.Queue[_Worker] = asyncio.Queue()
        self._waiting: set[asyncio.Task[Any]] = set()
        self._closing = False

    async def __aenter__(self) -> Self:
        for _ in range(self._workers):
            self._start_worker()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing = True
        for task in self._waiting:
            task.cancel()
        await asyncio.gather(*self._waiting, return_exceptions=True)
        for worker in self._all:
            worker.end()
        self._all.clear()

    async def prepare(self, body: bytes) -> Prepared:
        """What ``pipelines.prepare.prepare`` makes of a body; ``Reason.DECODER_CRASH`` where that ended a worker.

        A SIGKILL comes from outside: the body is tried once more.

        Raises:
            RunFailed: a worker ended before it could take its first body.
            asyncio.CancelledError: the pool was closed meanwhile.
        """
        task = asyncio.current_task()
        assert task is not None
        self._waiting.add(task)
        try:
            return await self._prepare(body)
        finally:
            self._waiting.discard(task)

    async def _prepare(self, body: bytes) -> Prepared:
        for _ in range(_TRIES):
            worker, prepared, killed = await self._idle.get(), None, False
            try:
                prepared = await worker.prepare(body)
                killed = prepared is None and worker.was_killed()
            finally:
                # One whose task was cancelled is still busy with this body.
                if prepared is None:
                    self._replace(worker)
            if prepared is not None:
                self._idle.put_nowait(worker)
                return prepared
            if not killed:
                break
        return Prepared(hashlib.sha256(body).hexdigest(), reason=Reason.DECODER_CRASH)

    def _start_worker(self) -> None:
        worker = _Worker(self._config, self._handler)
        self._all.add(worker)
        self._idle.put_nowait(worker)

    def _replace(self, worker: "_Worker") -> None:
        self._all.remove(worker)
        worker.end()
        if not self._closing:
            self._start_worker()


class _Worker:
    """One process, its socket, and the memory that both map."""

    def __init__(self, config: ImageConfig, handler: str) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        memory_fd = os.memfd_create("coca-decode")
        try:
            os.ftruncate(memory_fd, _FIRST_MEMORY_BYTES)
            self._memory = mmap.mmap(memory_fd, _FIRST_MEMORY_BYTES)
            # -P and PYTHONPATH: the same modules as here, and none of the current folder.
            command = [sys.executable, "-P", "-m", "pipelines.decode_worker"]
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(memory_fd), config.model_dump_json(), handler],
                pass_fds=(theirs.fileno(), memory_fd),
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **_ONE_THREAD},
            )
        finally:
            os.close(memory_fd)
            theirs.close()
        self._ready = False

    async def prepare(self, body: bytes) -> Prepared | None:
        """None where the process ended over this body."""
        loop = asyncio.get_running_loop()
        if not self._ready and not await self._await_ready(loop):
            return None
        try:
            await loop.sock_sendall(self._socket, write_body(self._memory, body))
            answer = await loop.sock_recv(self._socket, LARGEST_ANSWER)
        except ConnectionError:
            return None
        return read_answer(self._memory, answer) if answer else None

    def was_killed(self) -> bool:
        """Whether a process whose socket has closed ended by SIGKILL."""
        return self._process.wait() == -signal.SIGKILL

    async def _await_ready(self, loop: asyncio.AbstractEventLoop) -> bool:
        """False where it was killed before."""
        try:
            self._ready = await loop.sock_recv(self._socket, 1) == READY
        except ConnectionError:
            self._ready = False
        if not self._ready and not self.was_killed():
            code = self._process.returncode
            raise RunFailed(f"a decoder process ended with code {code} before its first image; its output says why")
        return self._ready

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._socket.close()
        self._memory.close()


# The arrays of a worker are small, and every thread's stack would count against its memory.
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
