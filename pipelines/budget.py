"""A budget of bytes that tasks of one event loop share."""

import asyncio


class ByteBudget:
    """Hands out bytes up to ``limit`` at once; a request larger than what is left waits."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used = limit, 0
        self._freed = asyncio.Condition()

    async def acquire(self, amount: int) -> None:
        assert amount <= self._limit
        async with self._freed:
            await self._freed.wait_for(lambda: self._used + amount <= self._limit)
            self._used += amount

    async def release(self, amount: int) -> None:
        async with self._freed:
            self._used -= amount
            self._freed.notify_all()
