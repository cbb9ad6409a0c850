"""Decoding in Ray tasks, on whichever nodes have free CPUs: in order, with a bounded number of bytes under way.

Shapes: B pictures, H = W = size, C = 3 channels.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from coca.decode import Decoder, DecodingBatch, Picture, Undecodable, View
from coca.errors import RunFailed
from coca.reused_memory import ReusedMemory
from coca.train_config import AugmentConfig, FeedConfig

_LARGEST_CHUNK = 16
# Ray keeps a task for ever that no node has a free CPU for.
_PATIENCE_S = 600.0
_POLL_S = 0.1


class RayDecoder(Decoder):
    """Ray tasks that decode parts of batches. One thread starts them in order and collects them in order.

    The workers of a run share its cluster: each keeps the encoded bytes and pixels that it has under way below its part
    of ``feed.prefetch_mib``, and its tasks to its part of ``feed.decode_workers``, by default as many as the cluster
    has CPUs; one task is always allowed. Ray tries a task again whose worker has died.
    """

    def __init__(
        self,
        feed: FeedConfig,
        augment: AugmentConfig,
        seed: int,
        *,
        world_size: int = 1,
        patience_s: float = _PATIENCE_S,
    ) -> None:
        """
        Args:
            world_size: workers that each have such a decoder.
            patience_s: how long no task may end while some are under way, seconds.
        """
        import ray

        self._task = ray.remote(num_cpus=1, max_retries=5, scheduling_strategy="SPREAD")(_decode)
        self._view, self._memory = ray.put(View(augment, seed)), ReusedMemory()
        tasks = feed.decode_workers or _cluster_cpus()
        self._window = _Window(feed.prefetch_mib * 2**20 // world_size, max(1, tasks // world_size))
        self._patience_s, self._heard_s = patience_s, 0.0
        self._waiting: deque[_Chunk] = deque()
        self._under_way: deque[tuple[Any, _Chunk]] = deque()
        self._new: queue.SimpleQueue[DecodingBatch | None] = queue.SimpleQueue()
        self._closed, self._lock = False, threading.Lock()
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self._thread.start()

    def submit(self, pictures: Sequence[Picture], size: int) -> "Future[np.ndarray]":
        batch = DecodingBatch(pictures, size, self._memory)
        with self._lock:
            if self._closed:
                batch.fail(CancelledError())
            elif pictures:
                self._new.put(batch)
        return batch.future

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._new.put(None)
        self._thread.join()

    # What follows runs in the thread alone.

    def _run(self) -> None:
        ending: BaseException = CancelledError()
        try:
            while not self._closed:
                self._take_jobs()
                self._start_tasks()
                self._collect()
        except BaseException as error:  # raised to everyone who waits for pixels
            ending = error
        finally:
            self._end(ending)

    def _take_jobs(self) -> None:
        """Waits for one where there is nothing else to do."""
        while not (self._closed or self._new.empty()) or not (self._closed or self._waiting or self._under_way):
            batch = self._new.get()
            if batch is not None:
                self._waiting.extend(_chunks(batch, self._window.capacity // 4))
                self._heard_s = time.monotonic()

    def _start_tasks(self) -> None:
        while self._waiting and (self._waiting[0].batch.future.done() or self._window.fits(self._waiting[0].bytes)):
            chunk = self._waiting.popleft()
            if not chunk.batch.future.done():  # else another part of its batch has failed
                self._window.add(chunk.bytes)
                task = self._task.remote(self._view, list(chunk.pictures), chunk.batch.size)
                self._under_way.append((task, chunk))

    def _collect(self) -> None:
        """The oldest task's pixels, where they are there or come soon."""
        import ray

        if not self._under_way:
            return
        task, chunk = self._under_way[0]
        if not ray.wait([task], timeout=_POLL_S)[0]:
            if time.monotonic() - self._heard_s > self._patience_s:
                raise RunFailed(
                    f"no Ray task has decoded anything for {self._patience_s:.0f} s: the cluster has no CPU free "
                    "for it; give it more nodes, or decode in threads (feed.decode)"
                )
            return
        self._under_way.popleft()
        self._window.remove(chunk.bytes)
        self._heard_s = time.monotonic()
        try:
            chunk.finish(ray.get(task))
        except ray.exceptions.RayError as error:
            first, last = chunk.pictures[0].sample_id, chunk.pictures[-1].sample_id
            chunk.batch.fail(RunFailed(f"samples {first} to {last} were not decoded: {error}"))

    def _end(self, error: BaseException) -> None:
        import ray

        with self._lock:
            self._closed = True
        for task, _ in self._under_way:
            ray.cancel(task)
        unfinished = [chunk.batch for chunk in [*(chunk for _, chunk in self._under_way), *self._waiting]]
        while not self._new.empty():
            batch = self._new.get()
            unfinished += [] if batch is None else [batch]
        for batch in unfinished:
            batch.fail(error)


def _decode(view: View, pictures: list[Picture], size: int) -> "np.ndarray | str":
    """uint8 (B, size, size, 3), or why there is none."""
    pixels_BHWC = np.empty((len(pictures), size, size, 3), dtype=np.uint8)
    try:
        for picture, pixels_HWC in zip(pictures, pixels_BHWC, strict=True):
            view.draw(picture, pixels_HWC)
    except RunFailed as error:
        return str(error)
    return pixels_BHWC


def _cluster_cpus() -> int:
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))


class _Window:
    """Bytes and tasks under way."""

    def __init__(self, capacity: int, most_tasks: int) -> None:
        self.capacity, self.most_tasks = capacity, most_tasks
        self.bytes = self.tasks = 0

    def fits(self, size: int) -> bool:
        """Whether another may start; a picture that is larger than the window goes alone."""
        return self.tasks == 0 or (self.tasks < self.most_tasks and self.bytes + size <= self.capacity)

    def add(self, size: int) -> None:
        self.bytes, self.tasks = self.bytes + size, self.tasks + 1

    def remove(self, size: int) -> None:
        self.bytes, self.tasks = self.bytes - size, self.tasks - 1


@dataclass
class _Chunk:
    """Pictures of a batch that one task decodes."""

    batch: DecodingBatch
    start: int
    stop: int
    bytes: int
    """Encoded, and as pixels."""

    @property
    def pictures(self) -> Sequence[Picture]:
        return self.batch.pictures[self.start : self.stop]

    def finish(self, answer: "np.ndarray | str") -> None:
        if isinstance(answer, str):
            self.batch.fail(Undecodable(answer))
        else:
            self.batch.part(self.start, self.stop)[:] = answer
            self.batch.finish(self.stop - self.start)


def _chunks(batch: DecodingBatch, limit_bytes: int) -> list[_Chunk]:
    """Parts of at most so many bytes, but for a picture that is larger alone."""
    found: list[_Chunk] = []
    for index, picture in enumerate(batch.pictures):
        size = len(picture.encoded) + batch.size * batch.size * 3
        last = found[-1] if found else None
        if last is None or last.stop - last.start == _LARGEST_CHUNK or last.bytes + size > limit_bytes:
            last = _Chunk(batch, index, index, 0)
            found.append(last)
        last.stop, last.bytes = index + 1, last.bytes + size
    return found
