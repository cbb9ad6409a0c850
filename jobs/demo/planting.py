"""The dirt of the demo's web: for each reason to refuse a pair, exactly so many links that deserve it."""

import random
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from coca.contract import Reason
from jobs.demo.grammar import caption, captions
from jobs.demo.pictures import Picture, picture, small_picture
from jobs.demo.scenes import Scene
from jobs.demo.web import Page

PLANTED = {
    Reason.INVALID_URL: 6,
    Reason.EMPTY_CAPTION: 8,
    Reason.CAPTION_TOO_SHORT: 5,
    Reason.CAPTION_TOO_LONG: 4,
    Reason.DUPLICATE_PAIR: 24,
    Reason.FORBIDDEN_ADDRESS: 6,
    Reason.CONNECT_ERROR: 3,
    Reason.TIMEOUT: 4,
    Reason.NOT_FOUND: 40,
    Reason.CLIENT_ERROR: 8,
    Reason.RATE_LIMITED: 2,
    Reason.SERVER_ERROR: 6,
    Reason.TOO_MANY_REDIRECTS: 3,
    Reason.BODY_TOO_LARGE: 3,
    Reason.BODY_ENCODED: 3,
    Reason.BODY_INCOMPLETE: 8,
    Reason.OPTED_OUT: 12,
    Reason.NOT_AN_IMAGE: 20,
    Reason.TRUNCATED_IMAGE: 15,
    Reason.CORRUPT_IMAGE: 6,
    Reason.TOO_MANY_PIXELS: 2,
    Reason.IMAGE_TOO_SMALL: 10,
    Reason.ASPECT_RATIO: 4,
    Reason.DUPLICATE_IMAGE: 20,
}

_NEVER_S = 3600.0
_HUGE_BYTES = 1 << 30
_HTML = b"<!doctype html><title>Not found</title><p>This picture has moved."


class Garden:
    """The web as it grows: files on disk, pages, and links with the verdict each one deserves."""

    def __init__(self, root: Path, base: str, seed: int) -> None:
        self.base = base
        self.rng = random.Random(f"garden {seed}")
        self.pages: list[Page] = []
        self.links: list[tuple[str | None, str | None]] = []
        self.rejected: dict[Reason, int] = {}
        self._root = root
        (root / "files").mkdir(parents=True)

    def add_page(self, body: bytes, suffix: str, content_type: str, **manners: object) -> str:
        """A page with this body; gives its url."""
        name = f"{len(self.pages):06d}{suffix}"
        (self._root / "files" / name).write_bytes(body)
        headers = {"Content-Type": content_type, **manners.pop("headers", {})}  # type: ignore[dict-item]
        page = Page(f"/gallery/{name}", f"files/{name}", headers=headers, **manners)  # type: ignore[arg-type]
        self.pages.append(page)
        return self.base + page.path

    def add_picture(self, image: Picture, **manners: object) -> str:
        return self.add_page(image.data, image.suffix, image.content_type, **manners)

    def add_link(self, url: str | None, text: str | None, reason: Reason | None = None) -> None:
        """A pair of the links table; without a ``reason`` it should become a sample."""
        self.links.append((url, text))
        if reason is not None:
            self.rejected[reason] = self.rejected.get(reason, 0) + 1


def plant(garden: Garden, scenes: list[Scene]) -> None:
    """Add every planted pair; they tell of ``scenes``, so that none shows what is held out."""
    sound = list(garden.links)
    for reason, count in PLANTED.items():
        if reason is Reason.DUPLICATE_PAIR:
            _repeat_pairs(garden, sound, count)
        elif reason is Reason.DUPLICATE_IMAGE:
            _repeat_pictures(garden, scenes, count)
        else:
            rows = _PLANTERS[reason]
            for number in range(count):
                scene = garden.rng.choice(scenes)
                url, text = rows(garden, scene, number)
                garden.add_link(url, text, reason)


def _repeat_pairs(garden: Garden, sound: list[tuple[str | None, str | None]], count: int) -> None:
    spellings: list[Callable[[str], str]] = [
        lambda url: url,
        lambda url: f"{url}#top",
        lambda url: url.replace("http://", "HTTP://"),
        lambda url: url.replace("/gallery/", "/g%61llery/"),
    ]
    for number, (url, text) in enumerate(garden.rng.sample(sound, count)):
        assert url is not None
        assert text is not None
        # Captions are compared with their white space collapsed.
        spaced = f" {text.replace(' on ', '  on ')}" if number % 8 == 0 else text
        garden.add_link(spellings[number % len(spellings)](url), spaced, Reason.DUPLICATE_PAIR)


def _repeat_pictures(garden: Garden, scenes: list[Scene], count: int) -> None:
    """Pairs of urls with the same bytes: of each, one is a sample and one a duplicate."""
    for scene in garden.rng.sample(scenes, count):
        image = picture(scene, garden.rng)
        for reason in (None, Reason.DUPLICATE_IMAGE):
            garden.add_link(garden.add_picture(image), caption(scene, garden.rng), reason)


Row = tuple[str | None, str | None]


def _told(garden: Garden, scene: Scene, url: str | None) -> Row:
    return url, caption(scene, garden.rng)


def _shown(garden: Garden, scene: Scene, **manners: object) -> Row:
    return _told(garden, scene, garden.add_picture(picture(scene, garden.rng), **manners))


def _invalid_url(garden: Garden, scene: Scene, number: int) -> Row:
    urls = (
        "picture.jpg",
        "ftp://127.0.0.1/picture.jpg",
        "http:///picture.jpg",
        "http://127.0.0.1:99999/picture.jpg",
    )
    return _told(
        garden,
        scene,
        (*urls, "data:image/png;base64,iVBORw0KGgo=", "http://[127.0.0.1/picture.jpg")[number % 6],
    )


def _empty_caption(garden: Garden, scene: Scene, number: int) -> Row:
    return garden.add_picture(picture(scene, garden.rng)), ("", "   ", None, "\t\n")[number % 4]


def _caption_too_short(garden: Garden, scene: Scene, number: int) -> Row:
    return garden.add_picture(picture(scene, garden.rng)), ("x", "ok", "?", "1", "..")[number % 5]


def _caption_too_long(garden: Garden, scene: Scene, number: int) -> Row:
    url = garden.add_picture(picture(scene, garden.rng))
    return url, ", ".join(captions(scene) * 100)


def _forbidden_address(garden: Garden, scene: Scene, number: int) -> Row:
    hosts = ("10.0.0.1", "192.168.1.1", "169.254.169.254", "[::1]", "172.16.0.9", "[::ffff:10.0.0.1]")
    return _told(garden, scene, f"http://{hosts[number % len(hosts)]}/{number}.jpg")


def _connect_error(garden: Garden, scene: Scene, number: int) -> Row:
    return _told(garden, scene, f"http://127.0.0.1:1/{number}.jpg")  # tcpmux: nobody listens there


def _not_found(garden: Garden, scene: Scene, number: int) -> Row:
    gone = garden.add_page(_HTML, ".jpg", "text/html", status=410 if number % 4 == 0 else 404)
    return _told(garden, scene, gone)


def _redirect_loop(garden: Garden, scene: Scene, number: int) -> Row:
    here = f"/gallery/{len(garden.pages):06d}.html"
    return _told(garden, scene, garden.add_page(b"", ".html", "text/html", status=302, headers={"Location": here}))


def _truncated_transfer(garden: Garden, scene: Scene, number: int) -> Row:
    image = picture(scene, garden.rng)
    half = Picture(image.data[: len(image.data) // 2], image.format)
    return _told(garden, scene, garden.add_picture(half, content_length=len(image.data)))


def _opted_out(garden: Garden, scene: Scene, number: int) -> Row:
    value = ("noai", "noimageai", "noai, noimageai")[number % 3]
    return _shown(garden, scene, headers={"X-Robots-Tag": value})


def _not_an_image(garden: Garden, scene: Scene, number: int) -> Row:
    return _told(garden, scene, garden.add_page(_HTML, ".jpg", "image/jpeg"))


def _truncated_image(garden: Garden, scene: Scene, number: int) -> Row:
    image = picture(scene, garden.rng, format=("jpeg", "png", "webp")[number % 3])
    return _told(garden, scene, garden.add_picture(Picture(image.data[: len(image.data) // 2], image.format)))


def _corrupt_image(garden: Garden, scene: Scene, number: int) -> Row:
    data = picture(scene, garden.rng, format="png").data
    at = data.index(b"IDAT") + 4
    return _told(garden, scene, garden.add_page(data[:at] + b"\xff" * 8 + data[at + 8 :], ".png", "image/png"))


def _too_many_pixels(garden: Garden, scene: Scene, number: int) -> Row:
    return _told(garden, scene, garden.add_page(_png_bomb(30_000 + number), ".png", "image/png"))


def _png_bomb(side: int) -> bytes:
    """A black one-bit PNG of ``side`` x ``side``: about 100 KB that would decode to a gigabyte."""
    row = b"\0" * (1 + (side + 7) // 8)
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunks((b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")))


def _chunks(*chunks: tuple[bytes, bytes]) -> Iterator[bytes]:
    for kind, body in chunks:
        yield struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _tiny(garden: Garden, scene: Scene, number: int) -> Row:
    side = 1 + number % 16
    return _told(garden, scene, garden.add_picture(small_picture(scene, side, side, garden.rng)))


def _banner(garden: Garden, scene: Scene, number: int) -> Row:
    return _told(garden, scene, garden.add_picture(small_picture(scene, 468, 40, garden.rng)))


_PLANTERS: dict[Reason, Callable[[Garden, Scene, int], Row]] = {
    Reason.INVALID_URL: _invalid_url,
    Reason.EMPTY_CAPTION: _empty_caption,
    Reason.CAPTION_TOO_SHORT: _caption_too_short,
    Reason.CAPTION_TOO_LONG: _caption_too_long,
    Reason.FORBIDDEN_ADDRESS: _forbidden_address,
    Reason.CONNECT_ERROR: _connect_error,
    Reason.TIMEOUT: lambda garden, scene, _: _shown(garden, scene, delay_s=_NEVER_S),
    Reason.NOT_FOUND: _not_found,
    Reason.CLIENT_ERROR: lambda garden, scene, _: _shown(garden, scene, status=403),
    Reason.RATE_LIMITED: lambda garden, scene, _: _shown(garden, scene, status=429),
    Reason.SERVER_ERROR: lambda garden, scene, _: _shown(garden, scene, status=500),
    Reason.TOO_MANY_REDIRECTS: _redirect_loop,
    Reason.BODY_TOO_LARGE: lambda garden, scene, _: _shown(garden, scene, content_length=_HUGE_BYTES),
    Reason.BODY_ENCODED: lambda garden, scene, _: _shown(garden, scene, headers={"Content-Encoding": "gzip"}),
    Reason.BODY_INCOMPLETE: _truncated_transfer,
    Reason.OPTED_OUT: _opted_out,
    Reason.NOT_AN_IMAGE: _not_an_image,
    Reason.TRUNCATED_IMAGE: _truncated_image,
    Reason.CORRUPT_IMAGE: _corrupt_image,
    Reason.TOO_MANY_PIXELS: _too_many_pixels,
    Reason.IMAGE_TOO_SMALL: _tiny,
    Reason.ASPECT_RATIO: _banner,
}
