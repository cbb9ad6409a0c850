"""The budget of bytes in flight."""

import asyncio

from pipelines.budget import ByteBudget


def test_a_request_waits_until_enough_is_free() -> None:
    async def run() -> list[str]:
        budget, order = ByteBudget(10), []

        async def take(name: str, amount: int) -> None:
            await budget.acquire(amount)
            order.append(name)

        await take("a", 6)
        waiting = asyncio.create_task(take("b", 5))
        await asyncio.sleep(0)
        await take("c", 4)
        await budget.release(4)
        await asyncio.sleep(0)
        assert not waiting.done()
        await budget.release(6)
        await waiting
        return order

    assert asyncio.run(run()) == ["a", "c", "b"]
