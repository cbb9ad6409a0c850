"""Memory that another process writes into, and that goes with those who have it."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from coca.shared_memory import SharedMemory

WRITER = "import mmap, sys; mmap.mmap(int(sys.argv[1]), int(sys.argv[2]))[2:5] = b'abc'"


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_what_another_process_writes_is_here() -> None:
    memory = SharedMemory(5000)
    array = np.frombuffer(memory.data, np.uint8)
    array[0] = 9
    command = [sys.executable, "-c", WRITER, str(memory.descriptor), str(memory.size)]
    subprocess.run(command, pass_fds=[memory.descriptor], check=True)
    assert (memory.size, array[:6].tobytes()) == (5000, b"\t\0abc\0")


def test_nothing_is_left() -> None:
    gc.collect()  # of tests before
    before, names, mapped = descriptors(), set(os.listdir("/dev/shm")), mappings()
    numbers = {SharedMemory(100).number for _ in range(20)}
    assert len(numbers) == 20
    assert descriptors() == before
    assert set(os.listdir("/dev/shm")) == names
    kept = np.frombuffer(SharedMemory(100).data, np.uint8)
    kept[:] = 1  # an array is enough to keep it
    assert mappings() == mapped + 1
    del kept
    assert mappings() == mapped
    assert descriptors() == before


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("coca-pixels")
