"""A web that means harm: attacks by name, the server that plays them, and a worker that meets them all at once.

Run as a script it prints one JSON object: how each attack ended, every address connected to, the peak of memory.
Each attack has a host name of its own, so that what is learned of a host (robots.txt, failures) does not mix.
"""

import asyncio
import gzip
import io
import json
import socket
import struct
import sys
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from coca.contract import Reason
from pipelines.fetch import Fetcher
from pipelines.fetch_config import FetchConfig
from pipelines.image_config import ImageConfig
from pipelines.prepare import Prepared, prepare

Play = Callable[[asyncio.StreamWriter], Awaitable[None]]
Page = bytes | Play
OUR_ADDRESS = "127.0.0.1"


@dataclass(frozen=True)
class Attack:
    reason: Reason | None
    """What it must end in; None for an image that is admitted."""
    page: Page = b""
    url: str = ""
    """Where it differs from the host of the attack's name."""
    robots: Page = b"HTTP/1.1 404 X\r\nContent-Length: 0\r\n\r\n"
    times: int = 1
    """Played at once, as links of one host."""


def answer(body: bytes, *headers: str, status: int = 200, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return "\r\n".join([f"HTTP/1.1 {status} X", f"Content-Length: {size}", *headers, "", ""]).encode() + body


def redirect(to: str) -> bytes:
    return answer(b"", f"Location: {to}", status=302)


def forever(start: bytes, piece: bytes, pause_s: float = 0.0) -> Play:
    async def play(writer: asyncio.StreamWriter) -> None:
        writer.write(start)
        while True:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause_s)

    return play


async def silence(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(3600)


async def reset(writer: asyncio.StreamWriter) -> None:
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


def picture(kind: str = "JPEG", size: tuple[int, int] = (300, 200), **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 80).convert("RGB").save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, data: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


JPEG, PNG = picture(), picture("PNG")
BOMB = zlib.compress(bytes(64 << 20), 9)
SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
MANY_AGENTS = "".join(f"user-agent:{n:x}\n" for n in range(5000)) + "".join(f"allow:/{n:x}\n" for n in range(30000))
FORBIDDEN = Reason.FORBIDDEN_ADDRESS

ADDRESSES = {
    "loopback": "http://127.0.0.2:{port}/",
    "loopback-ipv6": "http://[::1]:{port}/",
    "loopback-mapped": "http://[::ffff:127.0.0.2]:{port}/",
    "loopback-nat64": "http://[64:ff9b::7f00:2]:{port}/",
    "loopback-6to4": "http://[2002:7f00:2::]/",
    "loopback-hexadecimal": "http://0x7f000002:{port}/",
    "unspecified": "http://0.0.0.0:{port}/",
    "unspecified-ipv6": "http://[::]:{port}/",
    "metadata": "http://169.254.169.254/latest/meta-data/",
    "metadata-ipv6": "http://[fd00:ec2::254]/latest/meta-data/",
    "metadata-mapped": "http://[::ffff:a9fe:a9fe]/",
    "private-10": "http://10.0.0.1/",
    "private-172": "http://172.16.0.1/",
    "private-192": "http://192.168.0.1/",
    "carrier-grade-nat": "http://100.64.0.1/",
    "link-local-ipv6": "http://[fe80::1]/",
    "unique-local-ipv6": "http://[fc00::1]/",
    "multicast": "http://224.0.0.1/",
    "broadcast": "http://255.255.255.255/",
    "port-of-redis": "http://8.8.8.8:6379/",
}

ATTACKS: dict[str, Attack] = {
    **{name: Attack(FORBIDDEN, url=url) for name, url in ADDRESSES.items()},
    **{f"redirect-to-{name}": Attack(FORBIDDEN, redirect(url)) for name, url in ADDRESSES.items()},
    "loopback-decimal": Attack(Reason.INVALID_URL, url="http://2130706434/"),
    "loopback-short": Attack(Reason.INVALID_URL, url="http://127.2/"),
    "loopback-octal": Attack(Reason.INVALID_URL, url="http://0177.0.0.2/"),
    "redirect-to-file": Attack(FORBIDDEN, redirect("file:///etc/passwd")),
    "redirect-to-gopher": Attack(FORBIDDEN, redirect("gopher://127.0.0.1:6379/_FLUSHALL")),
    "redirect-to-data": Attack(FORBIDDEN, redirect("data:image/png;base64,AAAA")),
    "redirect-with-credentials": Attack(FORBIDDEN, redirect("http://user:secret@8.8.8.8/")),
    "redirect-to-no-text": Attack(FORBIDDEN, b"HTTP/1.1 302 X\r\nContent-Length: 0\r\nLocation: /\xff\xfe\r\n\r\n"),
    "redirect-to-private-name": Attack(FORBIDDEN, redirect("http://private-name.test/")),
    "redirect-loop": Attack(Reason.TOO_MANY_REDIRECTS, redirect("/again")),
    "redirect-to-nowhere": Attack(Reason.CLIENT_ERROR, answer(b"", status=302)),
    "redirect-with-endless-body": Attack(
        Reason.TOO_MANY_REDIRECTS, forever(b"HTTP/1.1 302 X\r\nLocation: /a\r\n\r\n", b"x" * 65536)
    ),
    "dns-rebinding": Attack(FORBIDDEN, robots=b"HTTP/1.1 404 X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"),
    "dns-mixed": Attack(None, answer(JPEG)),
    "private-name": Attack(FORBIDDEN),
    "mapped-name": Attack(FORBIDDEN),
    "gzip-bomb": Attack(Reason.BODY_ENCODED, answer(gzip.compress(bytes(64 << 20)), "Content-Encoding: gzip")),
    "deflate-bomb": Attack(Reason.BODY_ENCODED, answer(BOMB, "Content-Encoding: deflate")),
    "gzip-bomb-unnamed": Attack(Reason.NOT_AN_IMAGE, answer(gzip.compress(bytes(64 << 20)))),
    "endless-chunks": Attack(
        Reason.BODY_TOO_LARGE,
        forever(b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b"x" * 65536 + b"\r\n"),
        times=12,
    ),
    "endless-body": Attack(Reason.BODY_TOO_LARGE, forever(b"HTTP/1.1 200 X\r\n\r\n", b"x" * 65536), times=12),
    "length-of-a-terabyte": Attack(Reason.BODY_TOO_LARGE, answer(b"", length=10**12)),
    "length-negative": Attack(Reason.SERVER_ERROR, answer(JPEG, length=-1)),
    "length-no-number": Attack(Reason.SERVER_ERROR, b"HTTP/1.1 200 X\r\nContent-Length: 0x10\r\n\r\n" + JPEG),
    "length-twice": Attack(Reason.SERVER_ERROR, answer(JPEG, "Content-Length: 3")),
    "length-and-chunks": Attack(Reason.SERVER_ERROR, answer(JPEG, "Transfer-Encoding: chunked")),
    "length-too-long": Attack(Reason.BODY_INCOMPLETE, answer(JPEG, "Connection: close", length=len(JPEG) + 9)),
    "length-too-short": Attack(Reason.SERVER_ERROR, answer(JPEG, length=len(JPEG) // 2)),
    "length-zero": Attack(Reason.BODY_TOO_SMALL, answer(b"")),
    "chunk-of-nonsense": Attack(
        Reason.SERVER_ERROR, b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" + JPEG
    ),
    "endless-header-lines": Attack(Reason.SERVER_ERROR, forever(b"HTTP/1.1 200 X\r\n", b"X-A: b\r\n" * 1000), times=8),
    "endless-header-line": Attack(Reason.SERVER_ERROR, forever(b"HTTP/1.1 200 X\r\nX-A: ", b"b" * 65536), times=8),
    "endless-status-line": Attack(Reason.SERVER_ERROR, forever(b"HTTP/1.1 200 ", b"X" * 65536)),
    "large-headers": Attack(Reason.SERVER_ERROR, answer(JPEG, *(f"X-{n}: {'b' * 8000}" for n in range(5)))),
    "endless-informational": Attack(Reason.TIMEOUT, forever(b"", b"HTTP/1.1 102 X\r\n\r\n", 0.01)),
    "trickle-of-body": Attack(Reason.TOO_SLOW, forever(b"HTTP/1.1 200 X\r\nContent-Length: 99999\r\n\r\n", b"x", 0.05)),
    "trickle-of-headers": Attack(Reason.TIMEOUT, forever(b"HTTP/1.1 200 X\r\nX-A: ", b"b", 0.05)),
    "silence": Attack(Reason.TIMEOUT, silence),
    "silence-after-headers": Attack(Reason.TOO_SLOW, forever(b"HTTP/1.1 200 X\r\nContent-Length: 999\r\n\r\n", b"", 9)),
    "hang-up": Attack(Reason.CONNECT_ERROR, b""),
    "reset": Attack(Reason.CONNECT_ERROR, reset),
    "no-http": Attack(Reason.SERVER_ERROR, b"SSH-2.0-OpenSSH_9.2\r\n\r\n"),
    "status-of-nonsense": Attack(Reason.SERVER_ERROR, b"HTTP/1.1 2000 X\r\nContent-Length: 0\r\n\r\n"),
    "small-body-that-never-comes": Attack(
        Reason.BODY_TOO_SMALL, forever(b"HTTP/1.1 200 X\r\nContent-Length: 9\r\n\r\n", b"", 9)
    ),
    "page-that-never-ends": Attack(
        Reason.NOT_FOUND, forever(b"HTTP/1.1 404 X\r\nContent-Length: 9999\r\n\r\n", b"x", 0.05)
    ),
    "switching-protocols": Attack(
        Reason.CLIENT_ERROR, b"HTTP/1.1 101 X\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n"
    ),
    "two-answers-for-one": Attack(None, answer(JPEG) + answer(b"another", status=500), times=4),
    "validator-of-no-text": Attack(None, answer(JPEG)[:17] + b"ETag: \xff\xfe\x80\r\n" + answer(JPEG)[17:]),
    "html-as-jpeg": Attack(Reason.NOT_AN_IMAGE, answer(b"<html>" + b"x" * 500, "Content-Type: image/jpeg")),
    "svg": Attack(Reason.NOT_AN_IMAGE, answer(SVG, "Content-Type: image/svg+xml")),
    "svg-as-png": Attack(Reason.NOT_AN_IMAGE, answer(SVG, "Content-Type: image/png")),
    "pdf": Attack(Reason.NOT_AN_IMAGE, answer(b"%PDF-1.7\n" + b"x" * 500)),
    "postscript": Attack(Reason.NOT_AN_IMAGE, answer(b"%!PS-Adobe-3.0 EPSF-3.0\n" + b"x" * 500)),
    "tiff": Attack(Reason.NOT_AN_IMAGE, answer(picture("TIFF"))),
    "bmp": Attack(Reason.NOT_AN_IMAGE, answer(picture("BMP"))),
    "polyglot-gif-script": Attack(Reason.TOO_MANY_PIXELS, answer(b"GIF89a/*" + b"x" * 200 + b"*/=1;alert(1)")),
    "polyglot-html-jpeg": Attack(Reason.NOT_AN_IMAGE, answer(b"<script>" + JPEG)),
    "pixel-bomb": Attack(Reason.TOO_MANY_PIXELS, answer(png(60_000, 60_000, data=bytes(1 << 20))), times=8),
    "pixel-bomb-gif": Attack(Reason.TOO_MANY_PIXELS, answer(b"GIF89a\xff\xff\xff\xff\x00\x00\x00," + bytes(300))),
    "text-chunk-bomb": Attack(
        Reason.CORRUPT_IMAGE, answer(png(64, 64, chunk(b"zTXt", b"a\0\0" + BOMB), data=b"\0" * 99)), times=8
    ),
    "side-of-zero": Attack(Reason.CORRUPT_IMAGE, answer(png(0, 64))),
    "jpeg-cut": Attack(Reason.TRUNCATED_IMAGE, answer(JPEG[: len(JPEG) // 2])),
    "png-cut": Attack(Reason.TRUNCATED_IMAGE, answer(PNG[: len(PNG) // 2])),
    "png-corrupt": Attack(Reason.CORRUPT_IMAGE, answer(PNG[:60] + b"\0" * 40 + PNG[100:])),
    "robots-of-many-agents": Attack(None, answer(JPEG), robots=answer(MANY_AGENTS.encode())),
    "robots-endless": Attack(None, answer(JPEG), robots=forever(b"HTTP/1.1 200 X\r\n\r\n", b"Disallow: /x\n" * 5000)),
    "robots-trickle": Attack(Reason.TOO_SLOW, robots=forever(b"HTTP/1.1 200 X\r\n\r\n", b"x", 0.05)),
    "robots-to-metadata": Attack(Reason.HOST_UNAVAILABLE, robots=redirect("http://169.254.169.254/")),
    "robots-bomb": Attack(
        Reason.HOST_UNAVAILABLE, robots=answer(gzip.compress(bytes(1 << 20)), "Content-Encoding: gzip")
    ),
}


async def serve() -> asyncio.Server:
    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                name = head.partition("Host: ")[2].partition(".test")[0]
                page = ATTACKS[name].robots if head.startswith("GET /robots.txt ") else ATTACKS[name].page
                if isinstance(page, bytes):
                    writer.write(page)
                else:
                    await page(writer)
                await writer.drain()
                if not page or (isinstance(page, bytes) and (b"Content-Length" not in page or b"close" in page)):
                    return
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    return await asyncio.start_server(connection, OUR_ADDRESS, 0)


def watch_sockets(connects: list[str]) -> None:
    """Names of the attacks resolve as they wish; each address that a socket is connected to is written down."""
    real, asked = socket.getaddrinfo, dict[str, int]()

    def look_up(host: str, port: int, *arguments: Any, **options: Any) -> Any:
        if not host.endswith(".test"):
            return real(host, port, *arguments, **options)
        asked[host] = asked.get(host, 0) + 1
        addresses = {
            "dns-rebinding.test": [OUR_ADDRESS if asked[host] == 1 else "169.254.169.254"],
            "dns-mixed.test": ["169.254.169.254", OUR_ADDRESS, "10.0.0.1"],
            "private-name.test": ["10.0.0.1"],
            "mapped-name.test": ["::ffff:127.0.0.2"],
        }.get(host, [OUR_ADDRESS])
        families = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in addresses]
        return [
            (family, socket.SOCK_STREAM, 6, "", (address, port))
            for family, address in zip(families, addresses, strict=True)
        ]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.connect":
            connects.append(str(arguments[1][0]))

    socket.getaddrinfo = look_up
    sys.addaudithook(watch)


async def meet_all() -> dict[str, list[str | None]]:
    """Every attack at once against one worker, with the limits of a real one where they do not cost time."""
    image = ImageConfig()
    config = FetchConfig(
        allow_networks=(f"{OUR_ADDRESS}/32",),
        timeout_s=6.0,
        min_rate_grace_s=1.0,
        retries=0,
        dns_cache_s=0,
        requests_per_second_per_domain=1000,
    )

    async def handle(body: bytes) -> Prepared:
        return await asyncio.to_thread(prepare, body, image)

    server = await serve()
    port = server.sockets[0].getsockname()[1]
    async with Fetcher(config, image.limits.max_bytes, handle, min_bytes=16) as fetcher:

        async def meet(name: str, attack: Attack, number: int) -> tuple[str, str | None]:
            got = await fetcher.fetch((attack.url or f"http://{name}.test:{{port}}/{number}").format(port=port))
            reason = got.reason or (got.result.reason if got.result else None)
            return name, reason.value if reason else None

        jobs = [meet(name, attack, number) for name, attack in ATTACKS.items() for number in range(attack.times)]
        ends = await asyncio.gather(*jobs)
    server.close()
    return {name: [end for other, end in ends if other == name] for name in ATTACKS}


if __name__ == "__main__":
    connects: list[str] = []
    watch_sockets(connects)
    ends = asyncio.run(meet_all())
    # Of this program alone: ru_maxrss would carry over what the process was before it became this one.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak_mb = int(status["VmHWM"].split()[0]) / 1024
    print(json.dumps({"ends": ends, "connects": sorted(set(connects)), "peak_mb": peak_mb}))
