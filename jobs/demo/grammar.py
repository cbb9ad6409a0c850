"""The language of the demo: every phrasing of a scene.

Each phrasing tells every attribute, and no two scenes share one.
"""

import random
from itertools import product

from jobs.demo.scenes import BACKGROUNDS, PLACES, SIZES, Pair, Scene, Single, Thing

_SINGLE = (
    "a {size} {thing} in the {place} on a {background} background",
    "on a {background} background, a {size} {thing} in the {place}",
    "in the {place}, a {size} {thing} on {background}",
    "a {background} picture with a {size} {thing} in the {place}",
)
_PAIR = (
    "{first} {relation} {second} on a {background} background",
    "on a {background} background, {first} {relation} {second}",
    "{first} is {relation} {second} on {background}",
    "a {background} picture with {first} {relation} {second}",
)
_SEEN_FROM_THE_OTHER = {"left of": "right of", "above": "below"}


def captions(scene: Scene) -> tuple[str, ...]:
    """All phrasings of the truth about ``scene``, the plainest first."""
    if isinstance(scene, Single):
        values = {
            "size": scene.size,
            "thing": name_thing(scene.thing),
            "place": scene.place,
            "background": scene.background,
        }
        return tuple(template.format(**values) for template in _SINGLE)
    there, back = _told(scene.first, scene.relation, scene.second), _told_back(scene)
    return tuple(
        template.format(first=first, relation=relation, second=second, background=scene.background)
        for first, relation, second in (there, back)
        for template in _PAIR
    )


def caption(scene: Scene, rng: random.Random) -> str:
    """One phrasing, drawn evenly."""
    return rng.choice(captions(scene))


def name_thing(thing: Thing) -> str:
    return f"{thing.colour} {thing.shape}"


def classification_templates() -> list[str]:
    """Prompts for the name of a thing: the plainest phrasing, at every size, place and background."""
    kinds = product(SIZES, PLACES, BACKGROUNDS)
    return [
        _SINGLE[0].format(size=size, thing="{}", place=place, background=background)
        for size, place, background in kinds
    ]


def _told(first: Thing, relation: str, second: Thing) -> tuple[str, str, str]:
    return _with_article(first), relation, _with_article(second)


def _told_back(scene: Pair) -> tuple[str, str, str]:
    return _told(scene.second, _SEEN_FROM_THE_OTHER[scene.relation], scene.first)


def _with_article(thing: Thing) -> str:
    return f"{'an' if thing.colour[0] in 'aeiou' else 'a'} {name_thing(thing)}"
