"""A process that decodes pictures and nothing else; started by `coca.decode_processes`.

``python -m coca.decode_worker SOCKET MEMORY... VIEW``: inherited file descriptors, and what a view depends on as JSON.
A request names one of the memories, in which the encoded pictures lie end to end, and the memory of the batch that
their views are drawn into, which comes with it as a descriptor where it is new; the answer is an error or none. The
process ends with the socket: nothing is left of it when its parent is killed.
"""

import json
import mmap
import os
import signal
import socket
import sys
import traceback
from typing import NamedTuple

import numpy as np

from coca.decode import Picture, View
from coca.errors import RunFailed
from coca.train_config import AugmentConfig

READY = b"ready"
LARGEST_MESSAGE = 2**16


class Request(NamedTuple):
    """What travels as JSON; ``pictures`` are (encoded bytes, sample id, pass)."""

    slot: int
    pictures: list[tuple[int, str, int]]
    size: int
    batch: int
    """Number of the batch's memory."""
    start: int
    """Place of the first picture in its batch."""
    forget: list[int]
    """Numbers of memories that are gone."""


def fit(memory: mmap.mmap, needed: int) -> None:
    """Map at least so many bytes; what both sides map lies in one file, which grows with it."""
    if needed > len(memory):
        memory.resize(needed)


def main() -> None:
    descriptor, *memories, view = sys.argv[1:]
    connection = socket.socket(fileno=int(descriptor))
    slots = [mmap.mmap(int(memory), os.fstat(int(memory)).st_size) for memory in memories]
    fields = json.loads(view)
    decoding = View(AugmentConfig(**fields["augment"]), fields["seed"])
    if decoding.augment.min_crop_area < 1:
        import torch  # noqa: F401  now, while the parent is still busy with other things
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    batches: dict[int, mmap.mmap] = {}
    try:
        connection.sendall(READY)
        while (asked := _receive(connection, batches)) is not None:
            answer = {"slot": asked.slot, "error": _decode(decoding, slots[asked.slot], batches[asked.batch], asked)}
            connection.sendall(json.dumps(answer).encode())
    except ConnectionError:
        pass  # the parent is gone


def _receive(connection: socket.socket, batches: dict[int, mmap.mmap]) -> Request | None:
    """The next request, its batch's memory mapped; None where the parent has closed the socket."""
    message, descriptors, *_ = socket.recv_fds(connection, LARGEST_MESSAGE, 1)
    if not message:
        return None
    asked = Request(*json.loads(message))
    for number in asked.forget:
        batches.pop(number, None)
    for descriptor in descriptors:
        batches[asked.batch] = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
        os.close(descriptor)
    return asked


def _decode(view: View, encoded: mmap.mmap, batch: mmap.mmap, asked: Request) -> str | None:
    """What went wrong, None where nothing did."""
    fit(encoded, sum(length for length, *_ in asked.pictures))
    view_bytes, start = asked.size * asked.size * 3, 0
    pixels = np.frombuffer(batch, np.uint8, len(asked.pictures) * view_bytes, asked.start * view_bytes)
    pixels_BHWC = pixels.reshape(-1, asked.size, asked.size, 3)
    try:
        for (length, sample_id, lane_pass), pixels_HWC in zip(asked.pictures, pixels_BHWC, strict=True):
            view.draw(Picture(encoded[start : start + length], sample_id, lane_pass), pixels_HWC)
            start += length
    except RunFailed as error:
        return str(error)
    except Exception:
        return f"a decoder process failed:\n{traceback.format_exc()}"
    return None


if __name__ == "__main__":
    main()
