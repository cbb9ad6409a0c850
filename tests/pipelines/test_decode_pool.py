"""Decoders in processes that die, hang and swell: each costs its image, and no process stays behind."""

import asyncio
import hashlib
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from coca.contract import Reason
from coca.errors import RunFailed
from coca.images import encode
from pipelines.decode_pool import DecodePool
from pipelines.decode_worker import read_answer, write_answer
from pipelines.image_config import ImageConfig
from pipelines.prepare import Prepared, StoredImage, prepare

HANDLERS = """
import os, signal, time
from pipelines.prepare import prepare

def misbehave(body, config):
    match body:
        case b"exit": os._exit(3)
        case b"raise": raise RuntimeError("a bug of ours")
        case b"segfault": os.kill(os.getpid(), signal.SIGSEGV)
        case b"sleep": time.sleep(60)
        case b"spin":
            while True: pass
        case b"swell": bytearray(2 << 30)
        case b"slow": time.sleep(0.3)
        case b"leave": raise SystemExit(0)
    return prepare(body, config)
"""

CRASHES = [b"exit", b"raise", b"segfault", b"swell", b"leave"]


@pytest.fixture(scope="module")
def misbehave(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("handlers")
    (folder / "misbehaving_decoder.py").write_text(HANDLERS)
    sys.path.append(str(folder))
    try:
        import misbehaving_decoder  # type: ignore[import-not-found]

        yield misbehaving_decoder.misbehave
    finally:
        sys.path.remove(str(folder))


def children() -> set[int]:
    """Processes of ours, zombies included."""
    tasks = Path("/proc/self/task").iterdir()
    return {int(pid) for task in tasks for pid in (task / "children").read_text().split()}


def test_the_pool_gives_what_prepare_gives(pages: Any) -> None:
    config = ImageConfig(size=100)
    bodies = [pages.picture(name, (400, 300), kind) for name, kind in (("a", "jpeg"), ("b", "png"), ("c", "gif"))]
    bodies += [b"<html>", bodies[0][:2000], b"", pages.picture("d", (90, 80))]

    async def run() -> list[Prepared]:
        async with DecodePool(config, 2) as pool:
            return await asyncio.gather(*(pool.prepare(body) for body in bodies))

    before = children()
    assert asyncio.run(run()) == [prepare(body, config) for body in bodies]
    assert children() == before


def test_bodies_and_images_larger_than_the_first_memory() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
    config = ImageConfig(resize="no", store_formats=("jpeg",), encode_format="png")
    body = encode(Image.fromarray(pixels), "webp", 100)
    expected = prepare(body, config)
    assert expected.stored is not None
    assert len(body) > mmap.PAGESIZE * 256
    assert len(expected.stored.image) > len(body)

    async def run() -> list[Prepared]:
        async with DecodePool(config, 1) as pool:
            return [await pool.prepare(body), await pool.prepare(b"small"), await pool.prepare(body)]

    first, refused, again = asyncio.run(run())
    assert first == again == expected
    assert refused.reason is Reason.NOT_AN_IMAGE


def test_a_crash_costs_one_image(pages: Any, misbehave: Any) -> None:
    good = pages.picture("a", (400, 300))
    bodies = [good, *(body for crash in CRASHES for body in (crash, good, good))]

    async def run() -> list[Prepared]:
        async with DecodePool(ImageConfig(), 2, handler=misbehave) as pool:
            return await asyncio.gather(*(pool.prepare(body) for body in bodies))

    before = children()
    for body, prepared in zip(bodies, asyncio.run(run()), strict=True):
        assert prepared.source_sha256 == hashlib.sha256(body).hexdigest()
        if body in CRASHES:
            assert (prepared.reason, prepared.stored) == (Reason.DECODER_CRASH, None), body
        else:
            assert prepared == prepare(good, ImageConfig()), body
    assert children() == before


@pytest.mark.parametrize("body", [b"sleep", b"spin"])
def test_an_image_that_takes_too_long_ends_its_worker_alone(pages: Any, misbehave: Any, body: bytes) -> None:
    good = pages.picture("a")
    config = ImageConfig(decode_timeout_s=0.5)

    async def run() -> tuple[list[Prepared], float]:
        async with DecodePool(config, 2, handler=misbehave) as pool:
            await asyncio.gather(pool.prepare(good), pool.prepare(good))
            started = time.monotonic()
            found = await asyncio.gather(pool.prepare(body), *(pool.prepare(good) for _ in range(5)))
            return found, time.monotonic() - started

    (hung, *others), seconds = asyncio.run(run())
    assert hung.reason is Reason.DECODER_CRASH
    assert others == [prepare(good, config)] * 5
    assert 0.5 <= seconds < 5


def test_the_time_of_one_image_is_not_added_to_the_next(misbehave: Any) -> None:
    async def run() -> list[Prepared]:
        async with DecodePool(ImageConfig(decode_timeout_s=0.8), 1, handler=misbehave) as pool:
            return [await pool.prepare(b"slow") for _ in range(4)]

    assert {prepared.reason for prepared in asyncio.run(run())} == {Reason.NOT_AN_IMAGE}


def test_a_cancelled_task_leaves_a_pool_that_works(pages: Any, misbehave: Any) -> None:
    good = pages.picture("a")

    async def run() -> Prepared:
        async with DecodePool(ImageConfig(), 1, handler=misbehave) as pool:
            await pool.prepare(good)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(pool.prepare(b"sleep"), 0.2)
            return await pool.prepare(good)

    before = children()
    assert asyncio.run(run()) == prepare(good, ImageConfig())
    assert children() == before


def test_closing_with_a_body_in_flight_leaves_no_process(misbehave: Any) -> None:
    async def run() -> list[Any]:
        async with DecodePool(ImageConfig(), 1, handler=misbehave) as pool:
            tasks = [asyncio.create_task(pool.prepare(b"sleep")) for _ in range(3)]
            await asyncio.sleep(1)
        return await asyncio.gather(*tasks, return_exceptions=True)

    before = children()
    assert [type(end) for end in asyncio.run(run())] == [asyncio.CancelledError] * 3
    assert children() == before


def test_a_worker_that_cannot_start_ends_the_run_not_the_images() -> None:
    def unreachable(body: bytes, config: ImageConfig) -> Prepared:
        raise AssertionError

    async def run() -> None:
        async with DecodePool(ImageConfig(), 1, handler=unreachable) as pool:
            await pool.prepare(b"any")

    with pytest.raises(RunFailed, match="before its first image"):
        asyncio.run(run())


ACTOR = """
import asyncio, sys
from pipelines.decode_pool import DecodePool
from pipelines.decode_worker import read_answer, write_answer
from pipelines.image_config import ImageConfig
from misbehaving_decoder import misbehave

async def main():
    async with DecodePool(ImageConfig(decode_timeout_s=1.5), 3, handler=misbehave) as pool:
        await asyncio.gather(*(pool.prepare(b"slow") for _ in range(6)))
        spinning = asyncio.create_task(pool.prepare(b"spin"))
        await asyncio.sleep(0.2)
        print(*(worker._process.pid for worker in pool._all), flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


def test_workers_end_when_their_actor_is_killed(misbehave: Any) -> None:
    """Idle ones at once, one inside a decoder when its time is up."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    actor = subprocess.Popen([sys.executable, "-c", ACTOR], stdout=subprocess.PIPE, text=True, env=environment)
    assert actor.stdout is not None
    pids = [int(pid) for pid in actor.stdout.readline().split()]
    assert len(pids) == 3
    assert all(running(pid) for pid in pids)
    actor.send_signal(signal.SIGKILL)
    actor.wait()
    deadline = time.monotonic() + 10
    while any(running(pid) for pid in pids):
        assert time.monotonic() < deadline, [pid for pid in pids if running(pid)]
        time.sleep(0.05)


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"  # orphans are reaped by whoever inherits them


def test_workers_import_neither_ray_nor_torch() -> None:
    code = "import sys, pipelines.decode_worker; print({'ray', 'torch', 'deltalake', 'aiohttp'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_a_stored_image_of_every_field_crosses_unchanged() -> None:
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    stored = StoredImage(b"\xff\x00" * 100, "webp", 1, 2, 3, 4, "ab" * 32, -(2**63))
    for prepared in (Prepared("cd" * 32, stored=stored), Prepared("ef" * 32, reason=Reason.ASPECT_RATIO)):
        assert read_answer(memory, write_answer(memory, prepared)) == prepared
