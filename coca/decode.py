"""Encoded pictures to the pixels of a batch, in threads here or in processes beside (`coca.decode_processes`).

Where and when a picture is decoded never decides how it looks: its view is a function of (seed, sample, pass). Views
are drawn where the batch lies: to copy them would take a tenth of the time of decoding.

Shapes: B pictures, H = W = size, C = 3 channels.
"""

import itertools
import math
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np

from coca.augment import random_view
from coca.cpus import usable_cpus
from coca.errors import BadInput, RunFailed
from coca.images import ImageLimits, ImageProblem, decode_pixels
from coca.reused_memory import ReusedMemory
from coca.train_config import AugmentConfig, FeedConfig


class Picture(NamedTuple):
    """One picture to decode, and what its random view depends on."""

    encoded: bytes
    sample_id: str
    lane_pass: int


class Decoder(Protocol):
    """Decodes batches. Several may be under way at once: their pictures share the workers, first come first served."""

    def submit(self, pictures: Sequence[Picture], size: int) -> "Future[np.ndarray]":
        """What `decode` gives, later; its result raises what `decode` raises."""
        ...

    def decode(self, pictures: Sequence[Picture], size: int) -> np.ndarray:
        """uint8 views (B, size, size, 3) in the order given.

        Raises:
            RunFailed: a picture does not decode, or what decodes has ended; names the sample.
        """
        return self.submit(pictures, size).result()

    def close(self) -> None:
        """Ends the workers. What is still under way fails with `CancelledError`, so that nobody waits for ever."""
        ...


class Undecodable(RunFailed):
    """A sample that does not decode, and will not the next time."""

    repeat_helps = False


class View(NamedTuple):
    """What makes a training view of a picture; travels to wherever pictures are decoded."""

    augment: AugmentConfig
    seed: int

    def draw(self, picture: Picture, pixels_HWC: np.ndarray) -> None:
        """Write it into ``pixels_HWC`` (uint8), which says its size.

        Raises:
            RunFailed: the picture does not decode.
        """
        try:
            image_HWC = self._decode(picture.encoded, len(pixels_HWC))
        except ImageProblem as problem:
            raise Undecodable(
                f"sample {picture.sample_id} does not decode: {problem}. Withdraw it, or where that was done meanwhile,"
                " give the same command again"
            ) from None
        random_view(
            image_HWC,
            pixels_HWC,
            self.augment,
            seed=self.seed,
            sample_id=picture.sample_id,
            lane_pass=picture.lane_pass,
        )

    def _decode(self, encoded: bytes, size: int) -> np.ndarray:
        if self.augment.min_crop_area == 1:
            return decode_pixels(encoded, ImageLimits())  # pixel for pixel what evaluation sees
        # The smallest crop is still at least twice the view: a large JPEG need not be decoded at its full size.
        return decode_pixels(encoded, ImageLimits(), short_side=math.ceil(size / self.augment.min_crop_area**0.5))


def make_decoder(feed: FeedConfig, augment: AugmentConfig, seed: int) -> Decoder:
    """The decoder that a config asks for, but for Ray's, which `jobs.ray_decode` has."""
    view, workers = View(augment, seed), feed.decode_workers or _own_cpus()
    if feed.decode == "threads":
        return ThreadDecoder(view, workers)
    if feed.decode == "processes":
        from coca.decode_processes import ProcessDecoder

        return ProcessDecoder(view, workers)
    raise BadInput("feed.decode = ray needs a Ray cluster", "Run it with `coca train`, or decode in threads here")


def _own_cpus() -> int:
    """The share of the CPUs here that is left to this of the workers of the node."""
    return max(1, usable_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class DecodingBatch:
    """A batch under way: pixels come in parts, in any order and from any thread."""

    def __init__(self, pictures: Sequence[Picture], size: int, memory: ReusedMemory) -> None:
        self.pictures, self.size = pictures, size
        self.future: Future[np.ndarray] = Future()
        self._pixels_BHWC, self.memory = memory.array((len(pictures), size, size, 3))
        self._left, self._lock = len(pictures), threading.Lock()
        if not pictures:
            self.future.set_result(self._pixels_BHWC)

    def part(self, start: int, stop: int) -> np.ndarray:
        """Where the pixels of these pictures go; followed by ``finish``."""
        return self._pixels_BHWC[start:stop]

    def finish(self, count: int) -> None:
        """So many more pictures are there; the last of them make the result."""
        with self._lock:
            self._left -= count
            if self._left == 0 and not self.future.done():
                self.future.set_result(self._pixels_BHWC)

    def fail(self, error: BaseException) -> None:
        """The first error is the result."""
        with self._lock:
            if not self.future.done():
                self.future.set_exception(error)


class ThreadDecoder(Decoder):
    """Threads of this process; it is without the interpreter that they decode and resize, most of the time."""

    def __init__(self, view: View, workers: int) -> None:
        self._view, self._workers, self._closed = view, workers, threading.Event()
        self._pool, self._memory = ThreadPoolExecutor(workers, thread_name_prefix="decode"), ReusedMemory()

    def submit(self, pictures: Sequence[Picture], size: int) -> "Future[np.ndarray]":
        batch, numbers = DecodingBatch(pictures, size, self._memory), itertools.count()  # next() of a count is atomic
        for _ in range(min(self._workers, len(pictures))):
            self._pool.submit(self._work, batch, numbers)
        return batch.future

    def close(self) -> None:
        self._closed.set()
        self._pool.shutdown()

    def _work(self, batch: DecodingBatch, numbers: Iterator[int]) -> None:
        """Each thread takes whatever picture is next."""
        while (index := next(numbers)) < len(batch.pictures) and not batch.future.done():
            try:
                if self._closed.is_set():
                    raise CancelledError
                self._view.draw(batch.pictures[index], batch.part(index, index + 1)[0])
                batch.finish(1)
            except BaseException as error:  # raised to whoever waits for the batch
                batch.fail(error)
