"""Prometheus counters of a refresh, exported by the Ray node they are counted on.

| metric                          | labels | counts                                                     |
| ------------------------------- | ------ | ---------------------------------------------------------- |
| `coca_fetch_links_total`        | reason | links with a verdict; `ok` for an admitted one             |
| `coca_fetch_requests_total`     |        | HTTP requests, with repeats and redirects                  |
| `coca_fetch_bytes_total`        |        | body bytes received                                        |
| `coca_refresh_stage_seconds`    | stage  | a histogram of the seconds a part spent in a stage         |

Ray puts `ray_` before each name and adds labels of its own (node, job, worker).
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from coca.contract import Reason

OK = "ok"
_BOUNDARIES_S = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]


class FetchMetrics:
    """Counts in the process it is made in; where Ray is not initialised nothing is counted, and nothing imported.

    Make one for each actor: the export sums up the processes.
    """

    def __init__(self) -> None:
        self._links: Any = None
        # Ray that nobody imported is not initialised, and importing it takes seconds.
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return
        from ray.util.metrics import Counter, Histogram

        # Ray appends _total to the name of a counter.
        self._links = Counter("coca_fetch_links", "Links with a verdict, by reason.", tag_keys=("reason",))
        self._requests = Counter("coca_fetch_requests", "HTTP requests.")
        self._bytes = Counter("coca_fetch_bytes", "Body bytes received.")
        self._seconds = Histogram(
            "coca_refresh_stage_seconds",
            "Seconds a part spent in a stage.",
            boundaries=_BOUNDARIES_S,
            tag_keys=("stage",),
        )

    def count(self, reason: Reason | None, requests: int = 0, bytes: int = 0) -> None:  # noqa: A002
        """One link came to its verdict, after so many requests and body bytes; ``None`` is an admitted one."""
        self.count_many({reason: 1}, requests, bytes)

    def count_many(self, verdicts: dict[Reason | None, int], requests: int = 0, bytes: int = 0) -> None:  # noqa: A002
        """The same for a part at once."""
        if self._links is None:
            return
        for reason, links in verdicts.items():
            if links:
                self._links.inc(links, tags={"reason": reason.value if reason else OK})
        if requests:
            self._requests.inc(requests)
        if bytes:
            self._bytes.inc(bytes)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Observe how long the body takes, also where it raises."""
        started_s = time.monotonic()
        try:
            yield
        finally:
            if self._links is not None:
                self._seconds.observe(time.monotonic() - started_s, tags={"stage": stage})
