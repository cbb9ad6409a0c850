"""A web's worth of photographs: crops and resamplings of those that scikit-image and scikit-learn ship.

Runs in the peer's environment. Writes bodies.bin, the JPEG files end to end, and bodies.json, one [offset, bytes,
width, height] for each. Usage: photographs.py FOLDER NUMBER LEAST_MEGAPIXELS MOST_MEGAPIXELS
"""

import io
import json
import multiprocessing
import sys
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

PHOTOGRAPHS = [
    ("skimage.data", "astronaut.png"),
    ("skimage.data", "chelsea.png"),
    ("skimage.data", "coffee.png"),
    ("skimage.data", "hubble_deep_field.jpg"),
    ("skimage.data", "ihc.png"),
    ("skimage.data", "motorcycle_left.png"),
    ("skimage.data", "motorcycle_right.png"),
    ("skimage.data", "retina.jpg"),
    ("skimage.data", "rocket.jpg"),
    ("sklearn.datasets.images", "china.jpg"),
    ("sklearn.datasets.images", "flower.jpg"),
]


def main() -> None:
    folder, number = Path(sys.argv[1]), int(sys.argv[2])
    least, most = float(sys.argv[3]), float(sys.argv[4])
    folder.mkdir(parents=True, exist_ok=True)
    index, offset = [], 0
    with multiprocessing.Pool() as pool, (folder / "bodies.bin").open("wb") as out:
        for body, width, height in pool.imap(_body, ((seed, least, most) for seed in range(number)), chunksize=16):
            out.write(body)
            index.append([offset, len(body), width, height])
            offset += len(body)
    (folder / "bodies.json").write_text(json.dumps(index))


def _body(task: tuple[int, float, float]) -> tuple[bytes, int, int]:
    seed, least, most = task
    random = np.random.default_rng(seed)
    pixels = 1e6 * np.exp(random.uniform(np.log(least), np.log(most)))
    ratio = np.exp(random.uniform(np.log(0.6), np.log(1.8)))
    width, height = round((pixels * ratio) ** 0.5), round((pixels / ratio) ** 0.5)
    picture = _mosaic(width, height, random)
    buffer = io.BytesIO()
    picture.save(
        buffer,
        "jpeg",
        quality=int(random.integers(60, 96)),
        subsampling=0 if random.random() < 0.2 else 2,
        progressive=bool(random.random() < 0.2),
    )
    return buffer.getvalue(), width, height


def _mosaic(width: int, height: int, random: np.random.Generator) -> Image.Image:
    """One crop, or tiles of at most 900 pixels: an enlarged photograph would have no detail to decode."""
    picture = Image.new("RGB", (width, height))
    across, down = -(-width // 900), -(-height // 900)
    for row in range(down):
        for column in range(across):
            left, right = width * column // across, width * (column + 1) // across
            top, bottom = height * row // down, height * (row + 1) // down
            picture.paste(_crop(right - left, bottom - top, random), (left, top))
    return picture


def _crop(width: int, height: int, random: np.random.Generator) -> Image.Image:
    photograph = _photograph(int(random.integers(len(PHOTOGRAPHS))))
    scale = min(photograph.width / width, photograph.height / height) * random.uniform(0.6, 1)
    wide, high = width * scale, height * scale
    left, top = random.uniform(0, photograph.width - wide), random.uniform(0, photograph.height - high)
    box = (left, top, left + wide, top + high)
    crop = photograph.resize((width, height), Image.Resampling.LANCZOS, box=box)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else crop


@cache
def _photograph(number: int) -> Image.Image:
    package, name = PHOTOGRAPHS[number]
    with Image.open(io.BytesIO(files(package).joinpath(name).read_bytes())) as image:
        return image.convert("RGB")


if __name__ == "__main__":
    main()
