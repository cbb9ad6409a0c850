"""What a Hamming threshold of the perceptual hash finds and what it mistakes, on a folder of different drawings.

For each threshold: pairs of different files within it, drawings that selection would pass over, and the share of
re-encoded and resized copies that lie within it of their original. Prints one JSON row for each.

Run: python benchmarks/near_duplicates.py FOLDER_OF_PICTURES
"""

import argparse
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from coca.images import ImageLimits, decode_rgb, phash
from pipelines.duplicates import near_pairs, signed_hashes
from pipelines.select_config import SelectConfig
from pipelines.selection import select_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    files = {path.name: path.read_bytes() for path in sorted(parser.parse_args().folder.iterdir())}
    images = [decode_rgb(data, ImageLimits()) for data in files.values()]
    rows = pa.table(
        {
            "sample_id": [hashlib.blake2b(name.encode(), digest_size=16).hexdigest() for name in files],
            "url": list(files),
            "source_sha256": [hashlib.sha256(data).hexdigest() for data in files.values()],
            "phash": pa.array([phash(image) for image in images], pa.int64()),
        }
    )
    hashes = signed_hashes(rows["phash"])
    copies = {name: _distances(change, images, hashes) for name, change in CHANGES.items()}
    for most in range(0, 13, 2):
        reasons = select_rows(rows, SelectConfig(duplicates="perceptual", max_hamming=most)).to_pylist()
        row = {
            "max_hamming": most,
            "pictures": len(images),
            "pairs": _different_pairs(hashes, rows["source_sha256"].to_pylist(), most),
            "passed_over": reasons.count("near_duplicate"),
            **{f"found_{name}": round(float((distances <= most).mean()), 4) for name, distances in copies.items()},
        }
        print(json.dumps(row))


def _different_pairs(hashes: np.ndarray, digests: list[str], most: int) -> int:
    """Pairs of files with different bytes whose hashes lie within ``most`` bits."""
    values, places = np.unique(hashes, return_inverse=True)
    equal = [np.flatnonzero(places == place) for place in range(len(values))]
    pairs = [(a, b) for same in equal for a in same for b in same if a < b]
    pairs += [(a, b) for i, j in zip(*near_pairs(values, most), strict=True) for a in equal[i] for b in equal[j]]
    return sum(digests[a] != digests[b] for a, b in pairs)


def _distances(
    change: Callable[[Image.Image], Image.Image], images: list[Image.Image], hashes: np.ndarray
) -> np.ndarray:
    changed = np.array([phash(change(image)) for image in images], dtype=np.int64).view(np.uint64)
    return np.bitwise_count(changed ^ hashes)


def _jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue()))


def _scaled(image: Image.Image, factor: float) -> Image.Image:
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "jpeg_75": lambda image: _jpeg(image, 75),
    "jpeg_30": lambda image: _jpeg(image, 30),
    "half_size": lambda image: _scaled(image, 0.5),
    "double_size_jpeg_75": lambda image: _jpeg(_scaled(image, 2), 75),
    "cropped_2_percent": lambda image: image.crop(
        (image.width // 64, image.height // 64, image.width - image.width // 64, image.height - image.height // 64)
    ),
}


if __name__ == "__main__":
    main()
