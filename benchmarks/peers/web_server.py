"""A static web on loopback: JPEG files by number from many addresses, each file with a comment of its own.

Usage: web_server.py FOLDER PORT ADDRESS... (those with a trailing ~ trickle, those with a trailing ! never answer)
"""

import asyncio
import json
import mmap
import struct
import sys
from pathlib import Path

TRICKLED_BYTES, TRICKLE_S = 120, 0.5


class Web:
    """What all connections share."""

    def __init__(self, folder: Path) -> None:
        self.index = json.loads((folder / "bodies.json").read_text())
        with (folder / "bodies.bin").open("rb") as file:
            self.bodies = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def body(self, number: int) -> bytes:
        """The file of a link: a comment behind the start marker makes every link's bytes its own."""
        offset, length, *_ = self.index[number % len(self.index)]
        comment = str(number).encode()
        segment = b"\xff\xd8\xff\xfe" + struct.pack(">H", len(comment) + 2) + comment
        return segment + self.bodies[offset + 2 : offset + length]


class Connection(asyncio.Protocol):
    """One keep-alive connection; requests come one after the other."""

    def __init__(self, web: Web, behaviour: str) -> None:
        self._web, self._behaviour, self._received = web, behaviour, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            path = self._received.split(b" ", 2)[1].decode()
            self._received = self._received[end + 4 :]
            self._answer(path)

    def _answer(self, path: str) -> None:
        number = path.removeprefix("/").removesuffix(".jpg")
        if not number.isdigit():
            self._send("404 Not Found", "text/plain", b"")
        elif self._behaviour == "~":
            self._transport.write(f"HTTP/1.1 200 OK\r\nContent-Length: {TRICKLED_BYTES}\r\n\r\n".encode())
            self._trickle(TRICKLED_BYTES)
        elif self._behaviour != "!":
            self._send("200 OK", "image/jpeg", self._web.body(int(number)))

    def _send(self, status: str, kind: str, body: bytes) -> None:
        head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        self._transport.write(head.encode() + body)

    def _trickle(self, left: int) -> None:
        if left and not self._transport.is_closing():
            self._transport.write(b"x")
            asyncio.get_running_loop().call_later(TRICKLE_S, self._trickle, left - 1)


async def main() -> None:
    web, port, loop = Web(Path(sys.argv[1])), int(sys.argv[2]), asyncio.get_running_loop()
    servers = []
    for argument in sys.argv[3:]:
        address = argument.rstrip("~!")

        def connect(behaviour: str = argument[len(address) :]) -> Connection:
            return Connection(web, behaviour)

        servers.append(await loop.create_server(connect, address, port, backlog=1024))
    print("ready", flush=True)
    await asyncio.gather(*(server.serve_forever() for server in servers))


if __name__ == "__main__":
    asyncio.run(main())
