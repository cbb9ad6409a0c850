"""The split: what is held out never occurs in training, and every single attribute does."""

from collections import Counter

from jobs.demo.scenes import Pair, Single
from jobs.demo.split import held_out_one, held_out_two, training_scenes, tuning_one


def test_enough_is_held_out_and_all_of_it_differs():
    assert len(set(held_out_one(0))) == 200
    assert len({frozenset((pair.first, pair.second)) for pair in held_out_two(0)}) == 64


def test_what_chooses_settings_does_not_judge_them():
    assert len(set(tuning_one(0)) - set(held_out_one(0))) == 60


def test_no_training_scene_shows_what_is_held_out():
    scenes = training_scenes(0, 4000)
    assert not {*held_out_one(0), *tuning_one(0)} & set(scenes)
    shown = {frozenset((scene.first, scene.second)) for scene in scenes if isinstance(scene, Pair)}
    assert not shown & {frozenset((pair.first, pair.second)) for pair in held_out_two(0)}


def test_every_value_of_every_attribute_is_held_out_and_trained_on():
    for scenes in (held_out_one(0), [s for s in training_scenes(0, 3000) if isinstance(s, Single)]):
        assert [len({getattr(s.thing, name) for s in scenes}) for name in ("shape", "colour")] == [8, 8]
        assert [len({getattr(s, name) for s in scenes}) for name in ("size", "place", "background")] == [2, 5, 3]


def test_every_kind_with_one_thing_that_is_not_held_out_is_trained_on():
    counts = Counter(scene for scene in training_scenes(0, 3000) if isinstance(scene, Single))
    assert len(counts) == 1920 - 200 - 60
    assert set(counts.values()) <= {1, 2}


def test_the_share_of_pairs_is_exact_and_the_draw_is_seeded():
    scenes = training_scenes(3, 1000, share_two=0.4)
    assert sum(isinstance(scene, Pair) for scene in scenes) == 400
    assert scenes == training_scenes(3, 1000, share_two=0.4) != training_scenes(4, 1000, share_two=0.4)
