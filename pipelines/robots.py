"""robots.txt by RFC 9309: what a host asks crawlers to leave alone, read once per host."""

import asyncio
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from protego import Protego

from coca.contract import Reason

MAX_ROBOTS_BYTES = 500 * 1024
"""What RFC 9309, section 2.5, has a crawler read at least; of a longer file the beginning counts."""

# Text of rules kept per worker. Protego's objects take up to 80 times as much as a hostile text (measured).
_MOST_TEXT = 2 * 1024 * 1024
_ENTRY_COST = 200
_PARSED_AT_ONCE = 8 * 1024

_AGENT_LINE = re.compile(r"\s*user[- ]?agent\s*:?\s*([^#]*)", re.IGNORECASE)
_SITE_LINE = re.compile(r"\s*(site-?map|host)\b", re.IGNORECASE)
_PRODUCT = re.compile(r"[A-Za-z_-]+|\*")


@dataclass(frozen=True)
class RobotsFile:
    """How asking for a robots.txt ended: its text (empty where there is none), or why it could not be read."""

    text: str = ""
    unreadable: Reason | None = None


Get = Callable[[str], Awaitable[RobotsFile]]


@dataclass
class _Entry:
    rules: Protego | None  # None: everything is allowed
    unreadable: Reason | None
    ends_at: float
    cost: int


class RobotsCache:
    """The robots.txt of each origin, asked for by the first who needs it.

    A file that could not be read forbids everything for ``retry_s``, after which it is asked for again.
    """

    def __init__(
        self, agent: str, lifetime_s: float, retry_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._agent, self._clock = agent, clock
        self._lifetime_s, self._retry_s = lifetime_s, retry_s
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._asking: dict[str, asyncio.Task[_Entry]] = {}
        self._cost = 0

    async def refusal(self, url: str, get: Get) -> Reason | None:
        """Why ``url`` may not be fetched now: ``ROBOTS_DISALLOWED``, or what kept its robots.txt from being read.

        ``get(url)`` asks for the file, at most once for all who wait for it.
        """
        parts = urlsplit(url)
        origin = f"{parts.scheme}://{parts.netloc}"
        entry = self._entries.get(origin)
        if entry is None or entry.ends_at <= self._clock():
            entry = await self._ask(origin, get)
        if entry.unreadable is not None:
            return entry.unreadable
        if entry.rules is None or entry.rules.can_fetch(url, self._agent):
            return None
        return Reason.ROBOTS_DISALLOWED

    async def _ask(self, origin: str, get: Get) -> _Entry:
        task = self._asking.get(origin)
        if task is None:
            task = self._asking[origin] = asyncio.create_task(self._read(origin, get))
            task.add_done_callback(lambda _: self._asking.pop(origin, None))
        return await asyncio.shield(task)  # the others wait for it too

    async def _read(self, origin: str, get: Get) -> _Entry:
        file = await get(f"{origin}/robots.txt")
        if len(file.text) > _PARSED_AT_ONCE:
            text, rules = await asyncio.to_thread(_parse, file.text, self._agent)
        else:
            text, rules = _parse(file.text, self._agent)
        lifetime_s = self._retry_s if file.unreadable else self._lifetime_s
        entry = _Entry(rules, file.unreadable, self._clock() + lifetime_s, len(text) + _ENTRY_COST)
        self._keep(origin, entry)
        return entry

    def _keep(self, origin: str, entry: _Entry) -> None:
        before = self._entries.pop(origin, None)
        self._cost += entry.cost - (before.cost if before else 0)
        self._entries[origin] = entry
        while self._cost > _MOST_TEXT and len(self._entries) > 1:
            _, oldest = self._entries.popitem(last=False)
            self._cost -= oldest.cost


def _parse(text: str, agent: str) -> tuple[str, Protego | None]:
    rules = rules_for(text, agent)
    return rules, Protego.parse(f"User-agent: *\n{rules}") if rules else None


def rules_for(text: str, agent: str) -> str:
    """The lines of the groups that speak to ``agent``, else of those for everyone (RFC 9309, section 2.2.1).

    Protego keeps each rule for each agent of its group: 5,000 agents before 30,000 rules in a file of 250 KB took more
    than 20 GB. It gets the lines of one agent.
    """
    groups: dict[str, list[str]] = {agent: [], "*": []}
    named, in_names, open_groups = False, False, set[str]()
    for line in text.removeprefix("\ufeff").splitlines():
        agent_line = _AGENT_LINE.match(line)
        if agent_line:
            open_groups = open_groups if in_names else set()
            in_names = True
            product = _PRODUCT.match(agent_line[1])
            name = product[0].lower() if product else ""
            if name in groups:
                open_groups.add(name)
                named = named or name == agent
        elif line.partition("#")[0].strip() and not _SITE_LINE.match(line):
            in_names = False
            for name in open_groups:
                groups[name].append(line)
    return "\n".join(groups[agent] if named else groups["*"])
