"""A budget that tasks share: order, cancellation, a limit that changes, an end."""

import asyncio

import pytest

from pipelines.budget import Budget


async def settle() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


def test_a_request_waits_until_enough_is_free_and_is_not_overtaken() -> None:
    async def run() -> list[str]:
        budget, order = Budget(10), []

        async def take(name: str, amount: int) -> None:
            await budget.acquire(amount)
            order.append(name)

        await take("a", 6)
        tasks = [asyncio.create_task(take(name, amount)) for name, amount in (("b", 5), ("c", 4))]
        await settle()
        assert order == ["a"]  # c would fit, but b came first
        budget.release(6)
        await asyncio.gather(*tasks)
        assert budget.used == 9
        return order

    assert asyncio.run(run()) == ["a", "b", "c"]


def test_who_gives_up_takes_nothing_and_lets_the_next_one_in() -> None:
    async def run() -> None:
        budget = Budget(10)
        await budget.acquire(6)
        large, small = (asyncio.create_task(budget.acquire(amount)) for amount in (5, 4))
        await settle()
        large.cancel()
        await small
        assert budget.used == 10
        late = asyncio.create_task(budget.acquire(4))
        await settle()
        budget.release(4)  # granted, and cancelled before it could run
        late.cancel()
        await asyncio.gather(late, return_exceptions=True)
        assert budget.used == 6

    asyncio.run(run())


def test_a_limit_that_shrinks_takes_nothing_back_and_one_that_grows_lets_in() -> None:
    async def run() -> None:
        budget = Budget(2)
        await budget.acquire()
        await budget.acquire()
        budget.resize(1)
        waiting = asyncio.create_task(budget.acquire())
        budget.release()
        await settle()
        assert (budget.used, waiting.done()) == (1, False)
        budget.resize(2)
        await waiting
        assert budget.used == 2

    asyncio.run(run())


def test_who_waits_for_what_will_not_come_gets_the_error() -> None:
    async def run() -> None:
        budget = Budget(0)
        waiting = asyncio.create_task(budget.acquire())
        await settle()
        budget.fail(RuntimeError("gone"))
        with pytest.raises(RuntimeError, match="gone"):
            await waiting
        with pytest.raises(RuntimeError, match="gone"):
            await budget.acquire()

    asyncio.run(run())
