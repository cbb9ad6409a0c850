"""Which kinds of scenes are kept for evaluation and for tuning, and which the links show."""

import random
from typing import TypeVar

from jobs.demo.scenes import Pair, Scene, Single, Thing, all_pairs, all_singles

S = TypeVar("S", Single, Pair)

HELD_OUT_ONE = 200
HELD_OUT_TWO = 64
TUNING = 60


def held_out_one(seed: int, count: int = HELD_OUT_ONE) -> list[Single]:
    """``count`` kinds with one thing that no link shows."""
    return random.Random(f"one {seed}").sample(all_singles(), count)


def tuning_one(seed: int, count: int = TUNING) -> list[Single]:
    """``count`` further kinds that no link shows: they choose between settings, so they may not also judge."""
    kept = set(held_out_one(seed))
    return random.Random(f"tuning {seed}").sample([scene for scene in all_singles() if scene not in kept], count)


def held_out_two(seed: int, count: int = HELD_OUT_TWO) -> list[Pair]:
    """``count`` kinds with two things that no link shows together, in any relation or on any background."""
    chosen: dict[frozenset[Thing], Pair] = {}
    pairs = all_pairs()
    rng = random.Random(f"two {seed}")
    while len(chosen) < count:
        pair = rng.choice(pairs)
        chosen.setdefault(_things(pair), pair)
    return list(chosen.values())


def training_scenes(seed: int, count: int, share_two: float = 0.3) -> list[Scene]:
    """``count`` scenes for the links, ``share_two`` of them with two things, in a seeded order.

    The kinds with one thing are gone through evenly: each occurs once before any occurs twice.
    """
    rng = random.Random(f"training {seed}")
    forbidden_kinds = {*held_out_one(seed), *tuning_one(seed)}
    forbidden_things = {_things(pair) for pair in held_out_two(seed)}
    singles = [scene for scene in all_singles() if scene not in forbidden_kinds]
    pairs = [pair for pair in all_pairs() if _things(pair) not in forbidden_things]
    two = round(count * share_two)
    scenes: list[Scene] = [*_evenly(singles, count - two, rng), *_evenly(pairs, two, rng)]
    rng.shuffle(scenes)
    return scenes


def _things(pair: Pair) -> frozenset[Thing]:
    return frozenset((pair.first, pair.second))


def _evenly(kinds: list[S], count: int, rng: random.Random) -> list[S]:
    rounds, rest = divmod(count, len(kinds))
    return kinds * rounds + rng.sample(kinds, rest)
