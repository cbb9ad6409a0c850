"""Names to addresses: one lookup for all, remembered for a while."""

import asyncio
import socket
from typing import Any

import pytest

from pipelines.connections import Resolver


def test_a_name_is_looked_up_once_for_all_and_failures_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def look_up(host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        if host == "gone.example":
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", port))]

    async def run() -> None:
        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        resolver = Resolver(threads=2, cache_s=0.2)
        many = await asyncio.gather(*(resolver.resolve("a.example", 80) for _ in range(10)))
        assert {(found[0]["host"], found[0]["port"], found[0]["hostname"]) for found in many} == {
            ("192.0.2.1", 80, "a.example")
        }
        for _ in range(3):
            with pytest.raises(socket.gaierror):
                await resolver.resolve("gone.example", 80)
        assert asked == ["a.example", "gone.example"]
        await asyncio.sleep(0.25)
        await resolver.resolve("a.example", 80)
        assert asked == ["a.example", "gone.example", "a.example"]
        await resolver.close()

    asyncio.run(run())
