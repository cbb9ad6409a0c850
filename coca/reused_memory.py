"""Memory of arrays that are made and dropped again and again: fresh pages cost more than writing to them."""

import math
import weakref
from collections import deque
from collections.abc import Callable
from typing import Protocol

import numpy as np


class Memory(Protocol):
    """What arrays are made of: an array of bytes, or `coca.shared_memory.SharedMemory`."""

    @property
    def data(self) -> memoryview: ...

    @property
    def size(self) -> int: ...


def own_memory(size: int) -> Memory:
    """Of this process alone."""
    return np.empty(size, dtype=np.uint8)


class ReusedMemory:
    """uint8 arrays whose memory is used again once nothing refers to them, nor to any view or tensor of them.

    Args:
        make: new memory of so many bytes.
        most: pieces of memory kept that are in no use.
    """

    def __init__(self, make: Callable[[int], Memory] = own_memory, most: int = 2) -> None:
        self._make = make
        self._free: deque[Memory] = deque(maxlen=most)  # safe in several threads

    def array(self, shape: tuple[int, ...]) -> tuple[np.ndarray, Memory]:
        """An array with arbitrary contents, and the memory that it fills; keep the array while you use that."""
        size = math.prod(shape)
        if size == 0:
            return np.empty(shape, dtype=np.uint8), own_memory(0)
        memory = self._take(size)
        # Of a buffer, not of an array: every view of `owner`, and views of those, have `owner` as their base.
        owner = np.frombuffer(memory.data, dtype=np.uint8)
        weakref.finalize(owner, self._free.append, memory).atexit = False
        return owner.reshape(shape), memory

    def _take(self, size: int) -> Memory:
        """Pieces of another size are dropped: the batches have changed theirs."""
        while self._free:
            try:
                memory = self._free.popleft()
            except IndexError:  # another thread was faster
                break
            if memory.size == size:
                return memory
        return self._make(size)
