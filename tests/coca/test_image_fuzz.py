"""Whatever is done to an image, it ends as pixels or as an ImageProblem, within bounds of time and memory."""

import io
import random
import resource
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from coca.contract import Reason
from coca.images import ImageLimits, ImageProblem, decode, decode_pixels, encode, phash, resize

# pytest starts every test with filters of its own: those that coca.images sets, again.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore::UserWarning:PIL\."),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]

LIMITS = ImageLimits(max_pixels=1_000_000)
REASONS = {
    Reason.BODY_TOO_LARGE,
    Reason.NOT_AN_IMAGE,
    Reason.TRUNCATED_IMAGE,
    Reason.CORRUPT_IMAGE,
    Reason.TOO_MANY_PIXELS,
    Reason.IMAGE_TOO_SMALL,
    Reason.ASPECT_RATIO,
}
SECONDS = 2.0
MEMORY_BYTES = 256 * 2**20


def picture(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def originals() -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [picture(1), picture(2, (20, 15))]
    grey_16 = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)
    clear = picture()
    clear.putalpha(clear.getchannel(1))
    return [
        saved(picture(), "jpeg", exif=exif),
        saved(picture(), "jpeg", progressive=True, icc_profile=b"profile" * 100),
        saved(picture().convert("CMYK"), "jpeg", subsampling=0, restart_marker_blocks=2),
        saved(picture().convert("L"), "jpeg", comment=b"a comment"),
        saved(picture(size=(600, 500)), "jpeg", quality=50),
        saved(picture().convert("P"), "png", transparency=3),
        saved(clear, "png", exif=exif, icc_profile=b"profile" * 100),
        saved(grey_16, "png"),
        saved(picture().convert("1"), "png"),
        saved(picture(), "png", save_all=True, append_images=frames),
        saved(clear, "webp", exif=exif),
        saved(picture(), "webp", lossless=True),
        saved(picture(), "webp"),
        saved(picture(), "webp", save_all=True, append_images=[picture(1)]),
        saved(picture(), "gif", save_all=True, append_images=[picture(1)]),
        saved(picture().convert("L"), "gif", transparency=5, interlace=1),
    ]


def flip(data: bytes, source: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(source.randint(1, 8)):
        place = int(len(data) * source.random() ** source.choice([1, 3]))  # the headers come first
        changed[place] = source.choice([0, 0xFF, changed[place] ^ 1 << source.randrange(8), source.randrange(256)])
    return bytes(changed)


def cut(data: bytes, source: random.Random) -> bytes:
    return data[: source.randrange(len(data))] + source.choice([b"", b"\xff\xd9", b";", bytes(40)])


def splice(data: bytes, source: random.Random) -> bytes:
    other = source.choice(ORIGINALS)
    return data[: source.randrange(len(data))] + other[source.randrange(len(other)) :]


def repeat(data: bytes, source: random.Random) -> bytes:
    start, end = sorted(source.choices(range(len(data)), k=2))
    return data[:end] + data[start:end] * source.choice([1, 2, 30]) + data[end:]


def extreme_field(data: bytes, source: random.Random) -> bytes:
    changed, layout = bytearray(data.ljust(4, b"\0")), source.choice(["<H", ">H", "<I", ">I"])
    width = struct.calcsize(layout)
    largest = 256**width - 1
    value = source.choice([0, 1, largest, largest // 2, largest // 2 + 1, largest - 8, source.randrange(largest)])
    struct.pack_into(layout, changed, int((len(changed) - width) * source.random() ** 3), value)
    return bytes(changed)


ORIGINALS = originals()
MUTATIONS: list[Callable[[bytes, random.Random], bytes]] = [flip, cut, splice, repeat, extreme_field]


def fuzz(rounds: int, seed: int) -> None:
    source, decoded, reasons = random.Random(seed), 0, set()
    for _ in range(rounds):
        data = source.choice(ORIGINALS)
        for mutate in source.choices(MUTATIONS, k=source.choice([1, 1, 2, 3])):
            data = mutate(data, source)[: 2**20] or b"\0"
        with bounded():
            found = outcome(data)
            compare_decoders(data)
        if isinstance(found, Reason):
            reasons.add(found)
        else:
            decoded += 1
    assert decoded > rounds / 20
    assert {Reason.NOT_AN_IMAGE, Reason.TRUNCATED_IMAGE, Reason.CORRUPT_IMAGE} <= reasons


def outcome(data: bytes, limits: ImageLimits = LIMITS) -> Reason | tuple[int, int]:
    """The reason of a refusal, or the size of a picture that went all the way."""
    try:
        decoded = decode(data, limits, short_side=16)
    except ImageProblem as problem:
        reason = problem.reason
    else:
        assert decoded.image.mode == "RGB"
        assert decoded.image.width * decoded.image.height <= limits.max_pixels
        small = resize(decoded.image, "keep_ratio", 16)
        phash(small)
        encode(small, "jpeg", 90)
        return decoded.image.size
    assert reason in REASONS
    return reason


def compare_decoders(data: bytes) -> None:
    """What decodes straight to an array is what Pillow gives, and nothing that Pillow refuses."""
    by_pillow = pixels_or_reason(lambda: decode(data, LIMITS).image)
    straight = pixels_or_reason(lambda: decode_pixels(data, LIMITS))
    assert type(by_pillow) is type(straight)
    assert np.array_equal(by_pillow, straight)


def pixels_or_reason(decoding: Callable[[], Image.Image | np.ndarray]) -> np.ndarray | Reason:
    try:
        return np.asarray(decoding())
    except ImageProblem as problem:
        return problem.reason


@contextmanager
def bounded() -> Iterator[None]:
    """At most MEMORY_BYTES more than now, and SECONDS of processor time."""
    with open("/proc/self/statm") as statm:
        now = int(statm.read().split()[5]) * resource.getpagesize()
    before, started = resource.getrlimit(resource.RLIMIT_DATA), time.process_time()
    resource.setrlimit(resource.RLIMIT_DATA, (now + MEMORY_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
    assert time.process_time() - started < SECONDS


def test_the_memory_bound_is_one() -> None:
    with pytest.raises(MemoryError), bounded():
        bytearray(2 * MEMORY_BYTES)


def test_every_original_decodes() -> None:
    assert all(isinstance(outcome(data), tuple) for data in ORIGINALS)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_bytes_end_in_pixels_or_a_reason(seed: int) -> None:
    fuzz(100, seed)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100, 120))
def test_damaged_bytes_end_in_pixels_or_a_reason_long(seed: int) -> None:
    fuzz(5000, seed)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(*chunks: bytes, size: tuple[int, int] = (8, 8), rows: bytes | None = None) -> bytes:
    header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    rows = bytes((size[0] * 3 + 1) * size[1]) if rows is None else rows
    body = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


BOMB = zlib.compress(bytes(300 * 2**20), 9)  # 300 MiB from 300 KB


@pytest.mark.parametrize(
    "data",
    [
        png(chunk(b"iCCP", b"profile\0\0" + BOMB)),
        png(chunk(b"zTXt", b"text\0\0" + BOMB)),
        png(*[chunk(b"zTXt", b"text\0\0" + zlib.compress(bytes(900_000)))] * 400),
        png(chunk(b"iTXt", b"text\0\1\0\0\0" + BOMB)),
        png(*[chunk(b"tEXt", b"text\0" + bytes(1000))] * 5000),
        png(chunk(b"eXIf", b"MM\0*\0\0\0\x08\xff\xff" + bytes(40))),
        png(rows=bytes(300 * 2**20)),
        png(size=(1000, 1000), rows=b""),
    ],
    ids=["iccp", "ztxt", "many-ztxt", "itxt", "many-text", "exif", "rows-behind", "no-rows"],
)
def test_png_bombs(data: bytes) -> None:
    with bounded():
        outcome(data)


def test_webp_whose_canvas_lies() -> None:
    data = bytearray(saved(picture(), "webp", save_all=True, append_images=[picture(1)]))
    assert data[12:16] == b"VP8X"
    for width, height in ((1, 1), (39, 30), (900, 900), (2**24, 2**24)):
        data[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        with bounded():
            assert outcome(bytes(data)) in (Reason.CORRUPT_IMAGE, Reason.TOO_MANY_PIXELS, (width, height))


def test_gif_frames_larger_than_the_screen() -> None:
    data = bytearray(saved(picture().convert("P"), "gif"))
    place = data.index(b",", 13 + 3 * 2 ** ((data[10] & 7) + 1))
    for width, height in ((41, 30), (900, 900), (10_000, 10_000), (65535, 65535)):
        data[place + 5 : place + 9] = struct.pack("<HH", width, height)
        with bounded():
            found = outcome(bytes(data))
        assert found == (Reason.TOO_MANY_PIXELS if width > 1000 else found)


def test_jpeg_with_as_many_scans_as_pass_takes_little_time() -> None:
    """The cheapest scan to write and the dearest to read: one that says nothing of every block."""
    data = saved(picture(size=(1000, 1000)), "jpeg", progressive=True)
    marks = [place for place in range(len(data)) if data[place : place + 2] == b"\xff\xda"]
    scans = [data[a:b] for a, b in pairwise([*marks, len(data) - 2])]
    last = min(scans, key=len)
    for copies in (50, 5000):
        with bounded():
            found = outcome(data[:-2] + last * copies + b"\xff\xd9")
        assert found == (Reason.CORRUPT_IMAGE if copies > 64 else found)


def test_exif_that_points_at_itself() -> None:
    loop = b"MM\0*\0\0\0\x08" + b"\0\x02" + struct.pack(">HHII", 0x8769, 4, 1, 8) * 2 + struct.pack(">I", 8)
    many = b"II*\0\x08\0\0\0\xff\xff" + struct.pack("<HHII", 0x0112, 3, 0xFFFFFFFF, 8) * 4000
    for exif in (loop, many, b"II*\0\xff\xff\xff\xff", b"MM\0+" + bytes(8)):
        block = b"Exif\0\0" + exif
        jpeg = ORIGINALS[3]
        with bounded():
            segment = b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block
            assert outcome(jpeg[:2] + segment + jpeg[2:]) == (40, 30)
            assert outcome(png(chunk(b"eXIf", exif))) == (8, 8)
