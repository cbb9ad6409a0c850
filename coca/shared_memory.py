"""Memory without a name, for arrays that other processes write into."""

import itertools
import mmap
import os
import weakref

_numbers = itertools.count()  # next() of a count is atomic


class SharedMemory:
    """``size`` bytes in a file that lies in memory; whoever gets its descriptor can map it. The system takes it back
    with the last process that has it, also after SIGKILL."""

    def __init__(self, size: int) -> None:
        self.number = next(_numbers)  # of all in this process
        self.descriptor = os.memfd_create("coca-pixels")
        weakref.finalize(self, os.close, self.descriptor)
        os.ftruncate(self.descriptor, size)
        self._memory = mmap.mmap(self.descriptor, size)
        self.data = memoryview(self._memory)

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self._memory)
