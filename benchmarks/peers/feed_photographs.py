"""Photographs as a dataset stores them: sides of 256 to 384 pixels, JPEG, from those of photographs.py.

Runs in the peer's environment. Writes bodies.bin and bodies.json as photographs.py does. Usage: feed_photographs.py
FOLDER NUMBER
"""

import io
import json
import multiprocessing
import sys
from pathlib import Path

import numpy as np
from photographs import _crop


def main() -> None:
    folder, number = Path(sys.argv[1]), int(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    index, offset = [], 0
    with multiprocessing.Pool() as pool, (folder / "bodies.bin").open("wb") as out:
        for body, width, height in pool.imap(_body, range(number), chunksize=32):
            out.write(body)
            index.append([offset, len(body), width, height])
            offset += len(body)
    (folder / "bodies.json").write_text(json.dumps(index))


def _body(seed: int) -> tuple[bytes, int, int]:
    random = np.random.default_rng(seed)
    width, height = (int(side) for side in random.integers(256, 385, 2))
    buffer = io.BytesIO()
    _crop(width, height, random).save(buffer, "jpeg", quality=int(random.integers(80, 96)))
    return buffer.getvalue(), width, height


if __name__ == "__main__":
    main()
