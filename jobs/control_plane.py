"""Ray's control plane, which may be away for a while, and the autoscaler behind it."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TypeVar

T = TypeVar("T")
_SAY_EVERY_S = 60.0


def say(text: str) -> None:
    """One line to whoever follows the run."""
    print(f"train: {text}", file=sys.stderr, flush=True)


class ControlPlane:
    """Asks, and takes no answer for one that comes later: a driver goes on where a call fails, and asks again."""

    def __init__(self) -> None:
        self._said_at: float | None = None

    def ask(self, call: Callable[[], T]) -> T | None:
        """What ``call`` gives; None where it fails, which is told once a minute."""
        try:
            return call()
        except Exception as error:  # Ray raises many kinds, also of its own internals
            now = time.monotonic()
            if self._said_at is None or now - self._said_at > _SAY_EVERY_S:
                self._said_at = now
                say(f"Ray's control plane did not answer, asking again: {type(error).__name__}: {error}")
            return None


@contextmanager
def asking_autoscaler(wanted: Mapping[str, float], count: int) -> Iterator[None]:
    """While the block lasts, an autoscaler is asked for room for ``count`` bundles of ``wanted`` resources.

    An elastic run starts with what is there, so that nothing else would tell an autoscaler that it can use more. Ray
    knows one such request for a cluster: the newest replaces the others. One of a driver that was killed stands until
    the next run is through.
    """
    _request([dict(wanted)] * count)
    try:
        yield
    finally:
        _request([])


def _request(bundles: list[dict[str, float]]) -> None:
    with suppress(Exception):  # a cluster without an autoscaler, or a control plane that is away: no matter for a run
        from ray.autoscaler.sdk import request_resources

        request_resources(bundles=bundles)
