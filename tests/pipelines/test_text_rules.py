"""Rules on a caption."""

from pathlib import Path

import pytest

from coca.contract import Reason
from coca.errors import BadInput
from pipelines.judge_config import JudgeConfig
from pipelines.text_rules import BlockedWords, judge_captions, load_blocked_words, word_repetition


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("", Reason.EMPTY_CAPTION),
        ("word", Reason.CAPTION_TOO_SHORT),
        ("a b", Reason.CAPTION_TOO_SHORT),
        ("ab cd", None),
        ("a b c d e", None),
        ("a b c d e f", Reason.CAPTION_TOO_LONG),
        ("abcdefghij klmnopqrs", None),
        ("abcdefghij klmnopqrst", Reason.CAPTION_TOO_LONG),
        ("猫が 猫が", None),
        ("🙂 🙂", Reason.CAPTION_TOO_SHORT),
    ],
)
def test_caption_rules_at_their_edges(caption: str, reason: Reason | None) -> None:
    rules = JudgeConfig(min_words=2, max_words=5, min_chars=4, max_chars=20)
    assert judge_captions([caption], rules).to_pylist() == [reason]


@pytest.mark.parametrize(
    ("caption", "share"),
    [
        ("", 0.0),
        ("red", 0.0),
        ("red circle", 0.0),
        ("red red", 1 / 2),
        ("a b c d a", 1 / 5),
        ("A b c d a", 1 / 5),
        ("a a a a b", 3 / 5),
        ("STRASSE straße", 1 / 2),
    ],
)
def test_word_repetition(caption: str, share: float) -> None:
    assert word_repetition(caption) == share


def test_repetition_is_allowed_up_to_the_limit() -> None:
    rules = JudgeConfig(max_word_repetition=0.2)
    assert judge_captions(["a b c d a", "a b c a", "aa"], rules).to_pylist() == [
        None,
        Reason.CAPTION_REPEATS,
        Reason.CAPTION_TOO_SHORT,
    ]


@pytest.mark.parametrize(
    ("caption", "found"),
    [
        ("such a darn thing", True),
        ("DARN!", True),
        ("img_darn_01.jpg", True),
        ("darning needles", False),
        ("a hot potato", True),
        ("a Hot-Potato", True),
        ("hot, potato", True),
        ("hot sweet potato", False),
        ("hot hot potato", True),
        ("potato hot", False),
        ("a hot potato pie", True),
        ("ends in hot", False),
        ("GROSSE sachen", True),
        ("", False),
    ],
)
def test_blocked_words_are_whole_words(caption: str, found: bool) -> None:
    assert BlockedWords(["darn", "Hot Potato", "große"]).found_in(caption) is found


def test_blocked_words_are_judged_after_lengths_and_only_of_what_passed() -> None:
    blocked = BlockedWords(["darn"])
    captions = ["darn it", "da", "fine words", "darn " * 300]
    assert judge_captions([" ".join(each.split()) for each in captions], JudgeConfig(), blocked).to_pylist() == [
        Reason.CAPTION_BLOCKED_WORD,
        Reason.CAPTION_TOO_SHORT,
        None,
        Reason.CAPTION_TOO_LONG,
    ]


def test_no_captions() -> None:
    assert judge_captions([], JudgeConfig(max_word_repetition=0.2), BlockedWords(["x"])).to_pylist() == []


def test_a_list_of_words(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("# rude\ndarn\n\n  Hot Potato \nDARN\n", encoding="utf-8")
    assert len(load_blocked_words(str(path))) == 2


def test_a_line_without_a_word(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("darn\n***\n")
    with pytest.raises(BadInput, match=r"words.txt, line 2: '\*\*\*' holds no word"):
        load_blocked_words(str(path))
