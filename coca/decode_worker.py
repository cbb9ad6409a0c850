"""A process that decodes pictures and nothing else; started by `coca.decode_processes`.

``python -m coca.decode_worker SOCKET MEMORY... VIEW``: inherited file descriptors, and what a view depends on as JSON.
A request names one of the memories, in which the encoded pictures lie end to end; their pixels go behind them, and the
answer is an error or none. The process ends with the socket: nothing is left of it when its parent is killed.
"""

import json
import mmap
import os
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import numpy as np

from coca.decode import Picture, View
from coca.errors import RunFailed
from coca.train_config import AugmentConfig

READY = b"ready"
LARGEST_MESSAGE = 2**16


def pixels_start(encoded_bytes: int) -> int:
    return -(-encoded_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def fit(memory: mmap.mmap, encoded_bytes: int, pixel_bytes: int) -> None:
    """Map at least what both need; what both sides map lies in one file, which grows with it."""
    needed = pixels_start(encoded_bytes) + pixels_start(pixel_bytes)
    if needed > len(memory):
        memory.resize(needed)


def pixels_in(memory: mmap.mmap, encoded_bytes: int, count: int, size: int) -> np.ndarray:
    """The views (count, size, size, 3) of a request."""
    flat = np.frombuffer(memory, np.uint8, count * size * size * 3, pixels_start(encoded_bytes))
    return flat.reshape(count, size, size, 3)


def request(slot: int, size: int, pictures: Sequence[Picture]) -> bytes:
    told = [[len(each.encoded), each.sample_id, each.lane_pass] for each in pictures]
    return json.dumps({"slot": slot, "size": size, "pictures": told}).encode()


def main() -> None:
    descriptor, *memories, view = sys.argv[1:]
    connection = socket.socket(fileno=int(descriptor))
    slots = [mmap.mmap(int(memory), os.fstat(int(memory)).st_size) for memory in memories]
    fields = json.loads(view)
    decoding = View(AugmentConfig(**fields["augment"]), fields["seed"])
    if decoding.augment.min_crop_area < 1:
        import torch  # noqa: F401  now, while the parent is still busy with other things
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    try:
        connection.sendall(READY)
        while asked := connection.recv(LARGEST_MESSAGE):
            fields = json.loads(asked)
            answer = {"slot": fields["slot"], "error": _decode(decoding, slots[fields["slot"]], fields)}
            connection.sendall(json.dumps(answer).encode())
    except ConnectionError:
        pass  # the parent is gone


def _decode(view: View, memory: mmap.mmap, asked: dict[str, Any]) -> str | None:
    """What went wrong, None where nothing did."""
    size, pictures = asked["size"], asked["pictures"]
    encoded_bytes = sum(length for length, *_ in pictures)
    fit(memory, encoded_bytes, len(pictures) * size * size * 3)
    pixels_BHWC = pixels_in(memory, encoded_bytes, len(pictures), size)
    start = 0
    try:
        for index, (length, sample_id, lane_pass) in enumerate(pictures):
            picture = Picture(memory[start : start + length], sample_id, lane_pass)
            view.draw(picture, pixels_BHWC[index])
            start += length
    except RunFailed as error:
        return str(error)
    except Exception:
        return f"a decoder process failed:\n{traceback.format_exc()}"
    return None


if __name__ == "__main__":
    main()
