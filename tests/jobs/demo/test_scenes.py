"""The scenes: enough kinds, and pictures in which every attribute can be told at the model's size."""

import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from coca.images import model_pixels
from jobs.demo.scenes import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, Single, Thing, all_pairs, all_singles, render

PLAIN = Single(Thing("circle", "red"), "small", "center", "white")


def at_model_size(scene, seed=0, pixels=96):
    return model_pixels(render(scene, pixels, random.Random(seed)), 48).astype(np.int16)


def mask(scene, seed=0):
    """Where the picture differs from its corner, which is background."""
    pixels = at_model_size(scene, seed)
    return np.abs(pixels - pixels[0, 0]).sum(axis=-1) > 60


def overlap(first, second):
    """Intersection over union of two masks, each moved so that its box starts at the origin."""
    boxes = []
    for one in (first, second):
        rows, columns = np.nonzero(one)
        boxes.append(set(zip((rows - rows.min()).tolist(), (columns - columns.min()).tolist(), strict=True)))
    return len(boxes[0] & boxes[1]) / len(boxes[0] | boxes[1])


def test_there_are_1920_kinds_with_one_thing_and_all_differ():
    singles, pairs = all_singles(), all_pairs()
    assert len(set(singles)) == len(singles) == 1920
    assert len(set(pairs)) == len(pairs) == 64 * 63 * 2 * 3


def test_a_seed_gives_the_same_picture_and_another_seed_another():
    first, again, other = (render(PLAIN, 64, random.Random(seed)).tobytes() for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("size", [64, (100, 80), (80, 100)])
def test_the_picture_has_the_size_asked_for(size):
    image = render(PLAIN, size, random.Random(0))
    assert image.size == ((size, size) if isinstance(size, int) else size)
    assert image.mode == "RGB"


@pytest.mark.parametrize("size", SIZES)
def test_shapes_differ_at_the_models_size(size):
    masks = {shape: mask(replace(PLAIN, thing=Thing(shape, "blue"), size=size)) for shape in SHAPES}
    alike = {(a, b): overlap(masks[a], masks[b]) for a in SHAPES for b in SHAPES if a < b}
    assert max(alike.values()) < 0.85, max(alike, key=alike.get)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_large_thing_is_always_larger_than_a_small_one(shape):
    areas = {
        size: [mask(replace(PLAIN, thing=Thing(shape, "blue"), size=size), seed).sum() for seed in range(8)]
        for size in SIZES
    }
    assert min(areas["large"]) > 1.5 * max(areas["small"])


@pytest.mark.parametrize("place", PLACES)
def test_a_thing_lies_nearest_to_the_place_it_is_said_to_be(place):
    for seed in range(8):
        rows, columns = np.nonzero(mask(replace(PLAIN, place=place), seed))
        center = columns.mean() / 48, rows.mean() / 48
        distance = {name: np.hypot(center[0] - x, center[1] - y) for name, (x, y) in PLACES.items()}
        assert min(distance, key=distance.get) == place


def test_colours_and_backgrounds_stay_apart_under_their_shading():
    shaded = 12 * 3**0.5 + 8 * 3**0.5  # the farthest two shadings can meet
    tones = [*COLOURS.values(), *BACKGROUNDS.values()]
    gaps = [np.linalg.norm(np.subtract(a, b)) for i, a in enumerate(tones) for b in tones[:i]]
    assert min(gaps) > 1.5 * shaded
    assert all(abs(a[0] - b[0]) > 60 for a, b in pairwise(BACKGROUNDS.values()))


@pytest.mark.parametrize("relation", ["left of", "above"])
def test_the_first_of_a_pair_lies_where_the_relation_says(relation):
    pair = next(
        p for p in all_pairs() if p.relation == relation and (p.first.colour, p.second.colour) == ("red", "blue")
    )
    pixels = at_model_size(pair)
    reddish, bluish = pixels[..., 0] - pixels[..., 2] > 100, pixels[..., 2] - pixels[..., 0] > 100
    axis = 1 if relation == "left of" else 0
    assert np.nonzero(reddish)[axis].max() < np.nonzero(bluish)[axis].min()
