"""How many links of a worker are under way: its next part comes in while few are."""

import asyncio


class OpenLinks:
    """Lets parts in, in the order of their coming, while fewer than ``limit`` links of a worker are under way."""

    def __init__(self, limit: int) -> None:
        self._limit, self._open = limit, 0
        self._turn, self._left = asyncio.Lock(), asyncio.Event()

    async def enter(self, links: int) -> None:
        async with self._turn:
            while self._open >= self._limit:
                self._left.clear()
                await self._left.wait()
            self._open += links

    def leave(self) -> None:
        self._open -= 1
        self._left.set()
