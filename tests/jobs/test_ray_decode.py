"""Decoding in Ray tasks: the pixels of a decoder in threads, in order, within the window."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest

from coca.decode import DecodingBatch, Picture, ThreadDecoder, View
from coca.errors import RunFailed
from coca.reused_memory import ReusedMemory
from coca.train_config import AugmentConfig, FeedConfig
from jobs.cluster import ClusterInfo
from jobs.ray_decode import RayDecoder, _chunks, _Window
from tests.coca.test_decode import BROKEN, PICTURES

HALF = AugmentConfig(min_crop_area=0.5)


@pytest.fixture
def in_threads() -> Iterator[ThreadDecoder]:
    decoder = ThreadDecoder(View(HALF, 3), 1)
    yield decoder
    decoder.close()


def test_the_window_counts_bytes_and_tasks() -> None:
    window = _Window(capacity=10, most_tasks=2)
    assert window.fits(11)  # alone, or it would never go
    window.add(6)
    assert window.fits(4)
    assert not window.fits(5)
    window.add(1)
    assert not window.fits(1)  # a third task
    window.remove(6)
    assert window.fits(9)
    assert not window.fits(10)


def test_parts_of_a_batch_keep_to_their_bytes() -> None:
    pictures = [Picture(b"x" * length, "0", 0) for length in (100, 200, 300, 5000, 1, 1)]
    parts = _chunks(DecodingBatch(pictures, 10, ReusedMemory()), 1000)  # 300 bytes of pixels each
    assert [(part.start, part.stop, part.bytes) for part in parts] == [
        (0, 2, 900),
        (2, 3, 600),
        (3, 4, 5300),
        (4, 6, 602),
    ]
    assert [part.stop - part.start for part in _chunks(DecodingBatch([BROKEN] * 40, 10, ReusedMemory()), 10**9)] == [
        16,
        16,
        8,
    ]


@pytest.mark.ray
def test_ray_tasks_decode_what_threads_decode(ray_cluster: ClusterInfo, in_threads: ThreadDecoder) -> None:
    decoder = RayDecoder(FeedConfig(prefetch_mib=2, decode_workers=7), HALF, 3, world_size=2)
    assert (decoder._window.capacity, decoder._window.most_tasks) == (2**20, 3)
    held: list[int] = []
    add = decoder._window.add

    def watch(size: int) -> None:
        add(size)
        held.append(decoder._window.bytes)

    decoder._window.add = watch  # type: ignore[method-assign]
    batches = [(PICTURES * 2, 100), (PICTURES, 24), (PICTURES[:1], 80), ([], 24)]
    try:
        futures = [decoder.submit(pictures, size) for pictures, size in batches]
        for future, (pictures, size) in zip(futures, batches, strict=True):
            assert np.array_equal(future.result(120), in_threads.decode(pictures, size))
        assert 2**19 < max(held) <= 2**20
        assert decoder._window.bytes == decoder._window.tasks == 0
        with pytest.raises(RunFailed, match=rf"^sample {BROKEN.sample_id} does not decode: not_an_image"):
            decoder.decode([*PICTURES, BROKEN], 24)
        late = decoder.submit(PICTURES * 200, 100)
    finally:
        decoder.close()
    with pytest.raises(CancelledError):
        late.result(10)


@pytest.mark.ray
def test_a_lost_worker_changes_nothing_and_one_without_a_cpu_is_told(
    ray_cluster: ClusterInfo, in_threads: ThreadDecoder, tmp_path: Path
) -> None:
    mark = tmp_path / "killed"

    class Killing(View):
        """Ends the first process that sees the tenth picture."""

        def draw(self, picture: Picture, pixels_HWC: np.ndarray) -> None:
            if picture.sample_id == PICTURES[10].sample_id and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            super().draw(picture, pixels_HWC)

    import ray

    decoder = RayDecoder(FeedConfig(), HALF, 3, world_size=100, patience_s=60)
    assert decoder._window.most_tasks == 1  # however many share the CPUs
    decoder._view = ray.put(Killing(HALF, 3))
    try:
        assert np.array_equal(decoder.decode(PICTURES * 3, 24), in_threads.decode(PICTURES * 3, 24))
        assert mark.exists()
    finally:
        decoder.close()
    decoder = RayDecoder(FeedConfig(), HALF, 3, patience_s=1)
    decoder._task = decoder._task.options(num_cpus=1000)
    try:
        with pytest.raises(RunFailed, match="no Ray task has decoded anything for 1 s: the cluster has no CPU free"):
            decoder.submit(PICTURES, 24).result(60)
    finally:
        decoder.close()
