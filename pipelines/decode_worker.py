"""A process that prepares bodies and nothing else: what a decoder does to it costs one image.

Started by :mod:`pipelines.decode_pool` as ``python -m pipelines.decode_worker SOCKET MEMORY CONFIG HANDLER``: two
inherited file descriptors, an ``ImageConfig`` as JSON, and ``module:function``. A request is the length of the body,
which lies in the shared memory; the answer is JSON on the socket, the stored bytes in the same memory. No pickles: the
process that asks need not trust this one.
"""

import importlib
import json
import mmap
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable

from coca.contract import Reason
from pipelines.image_config import ImageConfig
from pipelines.prepare import Prepared, StoredImage

READY = b"R"
LENGTH = struct.Struct("<Q")
LARGEST_ANSWER = 4096
OUT_OF_MEMORY_EXIT = 71

Handler = Callable[[bytes, ImageConfig], Prepared]


def write_body(memory: mmap.mmap, body: bytes) -> bytes:
    """Lay a body into the shared memory; the request to send."""
    _fit(memory, len(body))
    memory[: len(body)] = body
    return LENGTH.pack(len(body))


def read_answer(memory: mmap.mmap, answer: bytes) -> Prepared:
    """What :func:`write_answer` told."""
    fields = json.loads(answer)
    reason, stored = fields["reason"], fields["stored"]
    if stored is None:
        return Prepared(fields["source_sha256"], reason=Reason(reason))
    length = stored.pop("length")
    _fit(memory, length)
    return Prepared(fields["source_sha256"], stored=StoredImage(image=memory[:length], **stored))


def write_answer(memory: mmap.mmap, prepared: Prepared) -> bytes:
    stored = None
    if prepared.stored is not None:
        stored = dict(vars(prepared.stored))
        image = stored.pop("image")
        _fit(memory, len(image))
        memory[: len(image)] = image
        stored["length"] = len(image)
    fields = {"source_sha256": prepared.source_sha256, "reason": prepared.reason, "stored": stored}
    return json.dumps(fields).encode()


def _fit(memory: mmap.mmap, length: int) -> None:
    """Map at least this much; what both sides map lies in one file, which grows with it."""
    if length > len(memory):
        memory.resize(-(-length // mmap.PAGESIZE) * mmap.PAGESIZE)


def main() -> None:
    connection, memory_fd = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    config = ImageConfig.model_validate_json(sys.argv[3])
    handler = _handler(sys.argv[4])
    memory = mmap.mmap(memory_fd, os.fstat(memory_fd).st_size)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the pool decides
    limit = config.decode_memory_mib * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    connection.sendall(READY)
    while request := connection.recv(LENGTH.size):
        (length,) = LENGTH.unpack(request)
        _fit(memory, length)
        connection.sendall(_answer(memory, memory[:length], config, handler))


def _answer(memory: mmap.mmap, body: bytes, config: ImageConfig, handler: Handler) -> bytes:
    # Nobody handles SIGALRM: the kernel ends the process, also inside a decoder and where the pool is gone.
    signal.setitimer(signal.ITIMER_REAL, config.decode_timeout_s)
    try:
        return write_answer(memory, handler(body, config))
    except MemoryError:
        os._exit(OUT_OF_MEMORY_EXIT)  # what is left of a decoder after that is not worth keeping
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _handler(name: str) -> Handler:
    module, _, function = name.partition(":")
    found: Handler = getattr(importlib.import_module(module), function)
    return found


if __name__ == "__main__":
    main()
