"""The bare cost of decode, resize and encode as img2dataset does them with OpenCV: milliseconds of CPU an image.

Runs in the peer's environment, on one thread. Usage: bare_preparation.py FOLDER SIZE QUALITY IMAGES
"""

import json
import sys
import time
from pathlib import Path

import cv2
import numpy as np


def main() -> None:
    folder, (size, quality, images) = Path(sys.argv[1]), map(int, sys.argv[2:])
    cv2.setNumThreads(1)
    data = (folder / "bodies.bin").read_bytes()
    index = json.loads((folder / "bodies.json").read_text())[:images]
    bodies = [np.frombuffer(data[offset : offset + length], np.uint8) for offset, length, *_ in index]
    rounds = []
    for _ in range(3):
        started = time.process_time()
        for body in bodies:
            prepare(body, size, quality)
        rounds.append((time.process_time() - started) / len(bodies))
    print(json.dumps({"ms": 1000 * sorted(rounds)[1]}))


def prepare(body: np.ndarray, size: int, quality: int) -> bytes:
    """Short side to ``size`` where it is larger."""
    image = cv2.imdecode(body, cv2.IMREAD_UNCHANGED)
    height, width = image.shape[:2]
    scale = size / min(width, height)
    if scale < 1:
        target = (round(width * scale), round(height * scale))
        image = cv2.resize(image, target, interpolation=cv2.INTER_AREA)
    encoded: bytes = cv2.imencode(".jpg", image, [int(cv2.IMWRITE_JPEG_QUALITY), quality])[1].tobytes()
    return encoded


if __name__ == "__main__":
    main()
