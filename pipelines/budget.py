"""A budget of bytes, connections or anything else countable that the tasks of one event loop share."""

import asyncio
from collections import deque


class Budget:
    """Hands out up to ``limit`` at once, first come first served: a large request is not overtaken for ever."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self.error: Exception | None = None

    async def acquire(self, amount: int = 1) -> None:
        """Wait for ``amount``; one larger than the limit would wait until the limit has grown."""
        if self.error is not None:
            raise self.error
        if not self._waiting and self.used + amount <= self.limit:
            self.used += amount
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (amount, future)
        self._waiting.append(entry)
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self.release(amount)  # granted in the moment of the cancellation
            else:
                self._waiting.remove(entry)
                self._grant()
            raise

    def release(self, amount: int = 1) -> None:
        self.used -= amount
        self._grant()

    def resize(self, limit: int) -> None:
        """From now on ``limit``; what is out already stays out until it is released."""
        self.limit = limit
        self._grant()

    def fail(self, error: Exception) -> None:
        """Nothing will come any more: who waits or asks gets ``error``."""
        self.error = error
        while self._waiting:
            _, future = self._waiting.popleft()
            if not future.done():
                future.set_exception(error)

    def _grant(self) -> None:
        while self._waiting:
            amount, future = self._waiting[0]
            if not future.done():
                if self.used + amount > self.limit:
                    return
                self.used += amount
                future.set_result(None)
            self._waiting.popleft()
