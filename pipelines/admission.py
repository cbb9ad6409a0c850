"""Which fetched bytes may be stored at all: not what a block list or the withdrawn list holds, and only images."""

import asyncio
import hashlib
from typing import Self

import numpy as np

from coca.contract import Reason
from coca.withdrawn import Withdrawn
from pipelines.block_lists import load_blocked_hashes
from pipelines.config import RefreshConfig
from pipelines.decode_pool import DecodePool
from pipelines.prepare import Prepared


class Admission:
    """The pool of decoding processes and the lists of one worker; used within one event loop."""

    def __init__(self, config: RefreshConfig, withdrawn: Withdrawn) -> None:
        self._fetched = np.array(withdrawn.source_sha256.to_pylist(), dtype="S64")  # sorted
        self._stored = np.array(withdrawn.stored_sha256.to_pylist(), dtype="S64")
        self._blocked = load_blocked_hashes(config.judge.block_hashes) if config.judge.block_hashes else None
        self._pool = DecodePool(config.image, config.fetch.decode_processes)

    async def __aenter__(self) -> Self:
        await self._pool.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._pool.__aexit__(None, None, None)

    async def prepare(self, body: bytes) -> Prepared:
        """A body to its stored form, or to the reason why it is refused."""
        if self._blocked is not None and await asyncio.to_thread(self._blocked.matches, body):
            return Prepared(hashlib.sha256(body).hexdigest(), reason=Reason.BLOCKED_IMAGE)
        return self.judge(await self._pool.prepare(body))

    def judge(self, prepared: Prepared) -> Prepared:
        """The same, or its refusal where the picture is withdrawn: as it came, or as it would be stored."""
        stored = prepared.stored
        gone = _holds(self._fetched, prepared.source_sha256)
        if gone or (stored is not None and _holds(self._stored, stored.sha256)):
            return Prepared(prepared.source_sha256, reason=Reason.WITHDRAWN)
        return prepared


def _holds(digests: np.ndarray, digest: str) -> bool:
    wanted = np.bytes_(digest)
    place = int(np.searchsorted(digests, wanted))
    return place < len(digests) and bool(digests[place] == wanted)
