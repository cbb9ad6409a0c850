"""Functions on several gloo processes, as the workers of a run call them."""

import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist

COLLECTIVE_TIMEOUT = timedelta(seconds=60)
ANSWER_TIMEOUT_S = 240


class Processes:
    """A few processes that stay, since each takes seconds to import torch. Functions and arguments are pickled."""

    def __init__(self, count: int = 4) -> None:
        self._folder, self._meetings = tempfile.TemporaryDirectory(), 0
        context = multiprocessing.get_context("forkserver")
        # Imported once, before the server forks.
        context.set_forkserver_preload(["coca.accumulate", "torch._dynamo"])
        self._ends: list[Connection] = []
        self._running = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._ends.append(ours)
            self._running.append(process)

    def run(self, world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``function(*arguments)`` gives on each rank of a process group of its own."""
        self._meetings += 1
        meeting = (Path(self._folder.name) / f"meeting-{self._meetings}").as_uri()
        for rank, end in enumerate(self._ends[:world]):
            end.send_bytes(pickle.dumps((function, arguments, meeting, rank, world)))
        answers = []
        for rank, end in enumerate(self._ends[:world]):
            assert end.poll(ANSWER_TIMEOUT_S), f"rank {rank} of {world} gives no answer"
            answers.append(pickle.loads(end.recv_bytes()))
        errors = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(answers) if error]
        assert not errors, "\n".join(errors)
        return [result for _, result in answers]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for end in self._ends:
            end.close()
        for process in self._running:
            process.join(10)
            process.kill()
            process.join()
        self._folder.cleanup()


def _serve(end: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            function, arguments, meeting, rank, world = pickle.loads(end.recv_bytes())
        except EOFError:
            return
        end.send_bytes(pickle.dumps(_answer(function, arguments, meeting, rank, world)))


def _answer(
    function: Callable[..., Any], arguments: tuple[Any, ...], meeting: str, rank: int, world: int
) -> tuple[str, Any]:
    try:
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=COLLECTIVE_TIMEOUT)
        return "", function(*arguments)
    except Exception:
        return traceback.format_exc(), None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
