"""Two hosts, one slow: what a server sees of our limits, and what the slow host costs the other one.

The fast host is fetched from alone, then together with a host that takes a second for each answer and has links enough
to be busy all the time; in turns, five times. Prints one JSON row with the bars. Limits are those of one worker
against the connections and requests that the servers, a process of their own, have counted. Run:
python benchmarks/politeness.py
"""

import asyncio
import json
import multiprocessing
import statistics
import time
from collections import Counter
from multiprocessing.connection import Connection

from pipelines.fetch import Fetcher
from pipelines.fetch_config import FetchConfig

FAST, SLOW = "127.0.0.1", "127.0.0.2"
DELAY_S = {FAST: 0.02, SLOW: 1.0}
CONNECTIONS, RATE, LINKS, ROUNDS = 8, 100.0, 300, 5
BODY = b"x" * 8192


def main() -> None:
    ours, theirs = multiprocessing.Pipe()
    servers = multiprocessing.Process(target=serve, args=(theirs,), daemon=True)
    servers.start()
    port = ours.recv()
    alone, together = [], []
    for _ in range(ROUNDS):
        alone.append(asyncio.run(throughput(port, with_slow=False)))
        together.append(asyncio.run(throughput(port, with_slow=True)))
    ours.send("stop")
    seen = ours.recv()
    servers.join()
    ratios = sorted(b / a for a, b in zip(alone, together, strict=True))
    row = {
        "benchmark": "two hosts, one slow",
        "alone_per_s": round(statistics.median(alone), 1),
        "beside_slow_per_s": round(statistics.median(together), 1),
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_min": round(ratios[0], 3),
        "ratio_bar": 0.9,
        "most_connections": {host: seen[host]["connections"] for host in (FAST, SLOW)},
        "connections_limit": CONNECTIONS,
        "most_requests_in_a_second": {host: seen[host]["requests"] for host in (FAST, SLOW)},
        "requests_per_second_limit": RATE,
    }
    print(json.dumps(row))


async def throughput(port: int, with_slow: bool) -> float:
    """Answers per second of the fast host."""
    config = FetchConfig(
        allow_networks=("127.0.0.0/8",),
        connections_per_domain=CONNECTIONS,
        requests_per_second_per_domain=RATE,
        concurrency_per_worker=2 * CONNECTIONS,
    )
    async with Fetcher(config, len(BODY), keep) as fetcher:
        slow = [asyncio.create_task(fetcher.fetch(f"http://{SLOW}:{port}/{n}")) for n in range(LINKS * with_slow)]
        await asyncio.sleep(0.1)
        started = time.perf_counter()
        got = await asyncio.gather(*(fetcher.fetch(f"http://{FAST}:{port}/{number}") for number in range(LINKS)))
        took_s = time.perf_counter() - started
        assert all(each.result for each in got)
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
    return LINKS / took_s


async def keep(body: bytes) -> int:
    return len(body)


def serve(pipe: Connection) -> None:
    asyncio.run(_serve(pipe))


async def _serve(pipe: Connection) -> None:
    open_now, most_open, times = Counter[str](), Counter[str](), {FAST: list[float](), SLOW: list[float]()}

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host = writer.get_extra_info("sockname")[0]
        open_now[host] += 1
        most_open[host] = max(most_open[host], open_now[host])
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                times[host].append(time.monotonic())
                if head.startswith(b"GET /robots.txt "):
                    writer.write(b"HTTP/1.1 404 X\r\nContent-Length: 0\r\n\r\n")
                    continue
                await asyncio.sleep(DELAY_S[host])
                writer.write(b"HTTP/1.1 200 X\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            open_now[host] -= 1
            writer.close()

    fast = await asyncio.start_server(connection, FAST, 0)
    port = fast.sockets[0].getsockname()[1]
    slow = await asyncio.start_server(connection, SLOW, port)
    pipe.send(port)
    await asyncio.to_thread(pipe.recv)
    pipe.send({host: {"connections": most_open[host], "requests": _most_in_a_second(times[host])} for host in times})
    fast.close()
    slow.close()


def _most_in_a_second(times: list[float]) -> int:
    first = most = 0
    for last, moment in enumerate(times):
        while times[first] <= moment - 1:
            first += 1
        most = max(most, last - first + 1)
    return most


if __name__ == "__main__":
    main()
