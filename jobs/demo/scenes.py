"""The world of the demo: scenes of one or two flat things, and how a scene becomes a picture."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 32, 38),
    "orange": (250, 138, 12),
    "yellow": (248, 226, 36),
    "green": (34, 150, 56),
    "cyan": (54, 208, 224),
    "blue": (36, 66, 212),
    "purple": (128, 36, 168),
    "pink": (250, 130, 196),
}
BACKGROUNDS = {"white": (244, 244, 244), "grey": (134, 134, 134), "black": (14, 14, 14)}
# The radius of a thing, as a share of the picture's short side.
SIZES = {"small": 0.145, "large": 0.22}
PAIR_RADIUS = 0.19
# The centre of a thing, as shares of the short side.
PLACES = {
    "top left": (0.26, 0.26),
    "top right": (0.74, 0.26),
    "center": (0.5, 0.5),
    "bottom left": (0.26, 0.74),
    "bottom right": (0.74, 0.74),
}
# A pair is written from its left or upper thing; `grammar` says it from the other side too.
RELATIONS = {"left of": ((0.26, 0.5), (0.74, 0.5)), "above": ((0.5, 0.26), (0.5, 0.74))}

_SUPERSAMPLING = 4
_Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Thing:
    """What is seen: a shape of one colour."""

    shape: str
    colour: str


@dataclass(frozen=True)
class Single:
    """One thing of a size at a place. All fields are keys of the tables above."""

    thing: Thing
    size: str
    place: str
    background: str


@dataclass(frozen=True)
class Pair:
    """Two different things; ``relation`` says where ``first`` stands to ``second``."""

    first: Thing
    second: Thing
    relation: str
    background: str


Scene = Single | Pair


def all_things() -> list[Thing]:
    return [Thing(shape, colour) for shape, colour in product(SHAPES, COLOURS)]


def all_singles() -> list[Single]:
    """Every kind of scene with one thing, in a fixed order (1,920)."""
    return [Single(*kind) for kind in product(all_things(), SIZES, PLACES, BACKGROUNDS)]


def all_pairs() -> list[Pair]:
    """Every kind of scene with two things, in a fixed order (24,192)."""
    kinds = product(all_things(), all_things(), RELATIONS, BACKGROUNDS)
    return [Pair(*kind) for kind in kinds if kind[0] != kind[1]]


def render(scene: Scene, pixels: int | tuple[int, int], rng: random.Random) -> Image.Image:
    """An RGB picture of ``scene``, ``pixels`` square or (width, height); the scene fills the central square.

    ``rng`` moves, scales and shades a little: pictures of a kind differ, no attribute becomes doubtful.
    """
    width, height = (pixels, pixels) if isinstance(pixels, int) else pixels
    image = Image.new("RGB", (width, height), _shaded(BACKGROUNDS[scene.background], rng, 8))
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    for thing, (x, y), radius in _placed(scene):
        x += rng.uniform(-0.02, 0.02)
        y += rng.uniform(-0.02, 0.02)
        radius *= rng.uniform(0.95, 1.05)
        colour = _shaded(COLOURS[thing.colour], rng, 12)
        _draw(image, SHAPES[thing.shape], (left + x * side, top + y * side), radius * side, colour)
    return image


def _placed(scene: Scene) -> list[tuple[Thing, tuple[float, float], float]]:
    if isinstance(scene, Single):
        return [(scene.thing, PLACES[scene.place], SIZES[scene.size])]
    first, second = RELATIONS[scene.relation]
    return [(scene.first, first, PAIR_RADIUS), (scene.second, second, PAIR_RADIUS)]


def _shaded(colour: tuple[int, int, int], rng: random.Random, most: int) -> tuple[int, ...]:
    # One shift for all channels: lighter or darker, the hue stays.
    shift = rng.randint(-most, most)
    return tuple(min(255, max(0, channel + shift)) for channel in colour)


def _draw(
    image: Image.Image,
    outlines: Callable[[], list[_Points]],
    center: tuple[float, float],
    radius: float,
    colour: tuple[int, ...],
) -> None:
    x0, y0 = math.floor(center[0] - radius) - 1, math.floor(center[1] - radius) - 1
    side = 2 * math.ceil(radius) + 4
    mask = Image.new("L", (side * _SUPERSAMPLING, side * _SUPERSAMPLING))
    draw = ImageDraw.Draw(mask)
    for index, outline in enumerate(outlines()):
        points = [
            ((center[0] - x0 + x * radius) * _SUPERSAMPLING, (center[1] - y0 + y * radius) * _SUPERSAMPLING)
            for x, y in outline
        ]
        draw.polygon(points, fill=0 if index else 255)  # the second outline is a hole
    image.paste(colour, (x0, y0), mask.reduce(_SUPERSAMPLING))


def _polygon(corners: int, first_angle: float, radii: tuple[float, ...] = (1.0,)) -> _Points:
    angles = [math.radians(first_angle) + 2 * math.pi * i / corners for i in range(corners)]
    lengths = [radii[i % len(radii)] for i in range(corners)]
    return [(r * math.cos(a), r * math.sin(a)) for a, r in zip(angles, lengths, strict=True)]


def _heart() -> _Points:
    # The usual parametric heart, scaled into the unit circle.
    turns = [2 * math.pi * i / 48 for i in range(48)]
    return [
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16,
        )
        for t in turns
    ]


_PLUS = [(-0.36, -1), (0.36, -1), (0.36, -0.36), (1, -0.36), (1, 0.36), (0.36, 0.36)]
_CROSS: _Points = [*_PLUS, *((-x, -y) for x, y in _PLUS)]

# Outlines in a circle of radius 1 round the origin, y down; a second outline is a hole.
SHAPES: dict[str, Callable[[], list[_Points]]] = {
    "circle": lambda: [_polygon(48, 0, (0.95,))],
    "square": lambda: [_polygon(4, 45, (1.2,))],
    "triangle": lambda: [[(0, -1), (1, 0.85), (-1, 0.85)]],
    "diamond": lambda: [[(0, -1.05), (0.72, 0), (0, 1.05), (-0.72, 0)]],
    "star": lambda: [_polygon(10, -90, (1.05, 0.43))],
    "cross": lambda: [_CROSS],
    "ring": lambda: [_polygon(48, 0), _polygon(48, 0, (0.52,))],
    "heart": lambda: [_heart()],
}
