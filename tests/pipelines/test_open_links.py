"""Parts come in one after the other, while few links are open."""

import asyncio

from pipelines.open_links import OpenLinks


def test_parts_come_in_while_few_links_are_open() -> None:
    asyncio.run(_parts_come_in())


async def _parts_come_in() -> None:
    gate, order = OpenLinks(10), []

    async def part(name: str, links: int) -> None:
        await gate.enter(links)
        order.append(name)

    await part("a", 15)
    waiting = [asyncio.create_task(part(name, 8)) for name in "bc"]
    for _ in range(5):
        await asyncio.sleep(0)
        gate.leave()
    await asyncio.sleep(0.01)
    assert order == ["a"]
    gate.leave()  # nine are open
    await asyncio.sleep(0.01)
    assert order == ["a", "b"]
    for _ in range(8):
        gate.leave()
    await asyncio.gather(*waiting)
    assert order == ["a", "b", "c"]
