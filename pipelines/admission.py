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
        self._withdrawn = np.array(withdrawn.source_sha256.to_pylist(), dtype="S64")  # sorted
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
        prepared = await self._pool.prepare(body)
        if self._is_withdrawn(prepared.source_sha256):
            return Prepared(prepared.source_sha256, reason=Reason.WITHDRAWN)
        return prepared

    def _is_withdrawn(self, digest: str) -> bool:
        wanted = np.bytes_(digest)
        place = int(np.searchsorted(self._withdrawn, wanted))
        return place < len(self._withdrawn) and bool(self._withdrawn[place] == wanted)
