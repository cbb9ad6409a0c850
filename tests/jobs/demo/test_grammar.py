"""The grammar: every phrasing tells every attribute, and none fits two scenes."""

import random
import re

from jobs.demo.grammar import caption, captions, classification_templates
from jobs.demo.scenes import Pair, Single, Thing, all_pairs, all_singles

ONE = Single(Thing("star", "orange"), "small", "top left", "grey")
TWO = Pair(Thing("star", "red"), Thing("ring", "orange"), "above", "black")


def test_no_two_scenes_share_a_phrasing():
    scenes = [*all_singles(), *all_pairs()]
    phrasings = [text for scene in scenes for text in captions(scene)]
    assert len(set(phrasings)) == len(phrasings) == 1920 * 4 + 24192 * 8


def test_every_phrasing_tells_every_attribute_of_a_single():
    for text in captions(ONE):
        assert all(word in text for word in ("star", "orange", "small", "top left", "grey")), text


def test_a_pair_is_told_from_both_sides():
    texts = captions(TWO)
    assert "a red star above an orange ring on a black background" in texts
    assert "an orange ring below a red star on a black background" in texts
    assert all("red star" in text and "orange ring" in text and "black" in text for text in texts)


def test_captions_are_lower_case_words_and_commas():
    for scene in (*all_singles()[::7], *all_pairs()[::97]):
        assert all(re.fullmatch(r"[a-z]+,?(?: [a-z]+,?)*", text) for text in captions(scene))


def test_a_drawn_caption_is_one_of_the_phrasings_and_all_are_drawn():
    assert {caption(TWO, random.Random(seed)) for seed in range(200)} == set(captions(TWO))


def test_a_classification_prompt_is_a_phrasing_of_some_scene():
    prompts = [template.format("red star") for template in classification_templates()]
    assert len(set(prompts)) == 2 * 5 * 3
    assert set(prompts) <= {text for scene in all_singles() for text in captions(scene)}
