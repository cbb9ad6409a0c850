"""Memory of arrays that are made and dropped again and again: fresh pages cost more than writing to them."""

import math
import weakref
from collections import deque

import numpy as np


class ReusedMemory:
    """uint8 arrays whose memory is used again once nothing refers to them, nor to any view or tensor of them.

    Args:
        most: pieces of memory kept that are in no use.
    """

    def __init__(self, most: int = 2) -> None:
        self._free: deque[np.ndarray] = deque(maxlen=most)  # safe in several threads

    def array(self, shape: tuple[int, ...]) -> np.ndarray:
        """An array with arbitrary contents."""
        size = math.prod(shape)
        if size == 0:
            return np.empty(shape, dtype=np.uint8)
        memory = self._take(size)
        # Of a buffer, not of an array: every view of `owner`, and views of those, have `owner` as their base.
        owner = np.frombuffer(memory.data, dtype=np.uint8)
        weakref.finalize(owner, self._free.append, memory).atexit = False
        return owner.reshape(shape)

    def _take(self, size: int) -> np.ndarray:
        """Pieces of another size are dropped: the batches have changed theirs."""
        while self._free:
            try:
                memory = self._free.popleft()
            except IndexError:  # another thread was faster
                break
            if memory.size == size:
                return memory
        return np.empty(size, dtype=np.uint8)
