"""robots.txt by RFC 9309: whose rules, which urls, one request a host, and texts that mean harm."""

import asyncio
import time
from collections import Counter

import pytest

from coca.contract import Reason
from pipelines import robots
from pipelines.robots import RobotsCache, RobotsFile, rules_for


class Site:
    """What is asked for, and the answers to it."""

    def __init__(self, **files: RobotsFile | str) -> None:
        self.files, self.requests = files, Counter[str]()

    async def get(self, url: str) -> RobotsFile:
        self.requests[url] += 1
        await asyncio.sleep(0.01)
        file = self.files.get(url.split("//")[1].split(".")[0], "")
        return RobotsFile(file) if isinstance(file, str) else file


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def refusals(text: str, *paths: str) -> list[Reason | None]:
    async def run() -> list[Reason | None]:
        cache, site = RobotsCache("coca", 100, 10), Site(a=text)
        return [await cache.refusal(f"http://a.example{path}", site.get) for path in paths]

    return asyncio.run(run())


NO = Reason.ROBOTS_DISALLOWED


@pytest.mark.parametrize(
    ("text", "path", "reason"),
    [
        ("", "/a.jpg", None),
        ("<html>no such page</html>", "/a.jpg", None),
        ("User-agent: *\nDisallow: /", "/a.jpg", NO),
        ("User-agent: *\nDisallow:", "/a.jpg", None),
        ("\ufeffUser-agent: *\r\nDisallow: /img/", "/img/a.jpg", NO),
        ("User-agent: *\nDisallow: /img/", "/image/a.jpg", None),
        ("User-agent: otherbot\nDisallow: /", "/a.jpg", None),
        ("User-agent: coca\nDisallow: /", "/a.jpg", NO),
        ("User-agent: CoCa/2.0\nDisallow: /", "/a.jpg", NO),
        ("User-agent: cocabot\nDisallow: /", "/a.jpg", None),
        ("User-agent: *\nDisallow: /\n\nUser-agent: coca\nAllow: /", "/a.jpg", None),
        ("User-agent: coca\nDisallow: /b\n\nUser-agent: *\nDisallow: /", "/a.jpg", None),
        ("User-agent: other\nUser-agent: coca\nDisallow: /", "/a.jpg", NO),
        ("User-agent: coca\nSitemap: /s.xml\nUser-agent: other\n\nDisallow: /", "/a.jpg", NO),
        ("User-agent: coca\nDisallow: /a\nUser-agent: x\nDisallow: /x\nUser-agent: coca\nDisallow: /b", "/b", NO),
        ("Disallow: /\nUser-agent: *\nDisallow: /x", "/a.jpg", None),  # a rule without an agent
        ("User-agent: * # everyone\nDisallow: /a # this", "/a.jpg", NO),
        ("User-agent: *\nDisallow: /\nAllow: /open/", "/open/a.jpg", None),  # the longest match wins
        ("User-agent: *\nDisallow: /*.jpg$", "/x/a.jpg", NO),
        ("User-agent: *\nDisallow: /*.jpg$", "/x/a.jpg?s=1", None),
        ("User-agent: *\nDisallow: /*?s=", "/x/a.jpg?s=1", NO),
        ("User-agent: *\nDisallow: /%7Ejoe/", "/~joe/a.jpg", NO),
        ("User-agent: *\nDisallow: /", "/robots.txt", None),
    ],
)
def test_what_a_text_says_of_a_path(text: str, path: str, reason: Reason | None) -> None:
    assert refusals(text, path) == [reason]


def test_a_host_is_asked_once_however_many_wait_and_again_after_its_lifetime() -> None:
    async def run() -> None:
        clock, site = Clock(), Site(a="User-agent: *\nDisallow: /x")
        cache = RobotsCache("coca", 100, 10, clock)
        urls = [f"http://a.example/{number}" for number in range(20)]
        assert set(await asyncio.gather(*(cache.refusal(url, site.get) for url in urls))) == {None}
        clock.now = 99.0
        assert await cache.refusal("http://a.example/x", site.get) is NO
        assert site.requests == {"http://a.example/robots.txt": 1}
        await cache.refusal("https://a.example/x", site.get)
        await cache.refusal("http://a.example:8080/x", site.get)
        assert site.requests.keys() == {
            f"{origin}/robots.txt" for origin in ("http://a.example", "https://a.example", "http://a.example:8080")
        }
        clock.now = 100.0
        await cache.refusal("http://a.example/x", site.get)
        assert site.requests["http://a.example/robots.txt"] == 2

    asyncio.run(run())


def test_a_file_that_could_not_be_read_forbids_all_until_it_is_asked_for_again() -> None:
    async def run() -> None:
        clock, site = Clock(), Site(a=RobotsFile(unreadable=Reason.HOST_UNAVAILABLE))
        cache = RobotsCache("coca", 100, 10, clock)
        for clock.now in (0.0, 9.9):
            assert await cache.refusal("http://a.example/x", site.get) is Reason.HOST_UNAVAILABLE
        assert site.requests.total() == 1
        clock.now, site.files["a"] = 10.0, ""
        assert await cache.refusal("http://a.example/x", site.get) is None

    asyncio.run(run())


def test_one_who_gives_up_does_not_end_the_wait_of_the_others() -> None:
    async def run() -> None:
        cache, site = RobotsCache("coca", 100, 10), Site(a="User-agent: *\nDisallow: /")
        first, second = (asyncio.create_task(cache.refusal(f"http://a.example/{n}", site.get)) for n in range(2))
        await asyncio.sleep(0)
        first.cancel()
        assert await second is NO
        assert site.requests.total() == 1

    asyncio.run(run())


def test_the_text_that_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robots, "_MOST_TEXT", 3000)

    async def run() -> None:
        long = "User-agent: *\nDisallow: /" + "x" * 1000
        cache, site = RobotsCache("coca", 100, 10), Site(a=long, b=long, c=long)
        for name in "abcc":
            await cache.refusal(f"http://{name}.example/", site.get)
        await cache.refusal("http://b.example/", site.get)
        assert site.requests.total() == 3
        await cache.refusal("http://a.example/", site.get)
        assert site.requests["http://a.example/robots.txt"] == 2

    asyncio.run(run())


def test_many_agents_before_many_rules_cost_no_more_than_their_text() -> None:
    agents = "".join(f"user-agent:{number:x}\n" for number in range(5000))
    rules = "".join(f"allow:/{number:x}\n" for number in range(30_000))
    started = time.monotonic()
    assert refusals(f"{agents}user-agent: coca\n{rules}disallow: /b.jpg\n", "/b.jpg") == [NO]
    assert time.monotonic() - started < 5.0
    assert len(rules_for(agents + rules, "coca")) == 0
