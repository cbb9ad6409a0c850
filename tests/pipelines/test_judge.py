"""What url and caption decide before any request."""

from typing import Any

import pyarrow as pa
import pytest

from coca.contract import Reason, sample_id
from pipelines.judge import JUDGED, judge_caption, judge_links
from pipelines.judge_config import JudgeConfig


def judge(*pairs: tuple[Any, Any], **rules: int) -> pa.Table:
    urls, captions = zip(*pairs, strict=True)
    links = pa.table({"url": pa.array(urls, pa.string()), "caption": pa.array(captions, pa.string())})
    return judge_links(links, JudgeConfig(**rules))


def test_a_sound_pair_gets_its_key_and_canonical_form() -> None:
    table = judge(("HTTP://Example.COM:80/a#top", "  a red\n\tcircle "))
    assert table.schema == JUDGED
    assert table.to_pylist() == [
        {
            "sample_id": sample_id("http://example.com/a", "a red circle"),
            "url": "http://example.com/a",
            "caption": "a red circle",
            "reason": None,
        }
    ]


@pytest.mark.parametrize(
    "url", [None, "", "   ", "not a url", "ftp://a/b", "http://", "http://u:p@a/b", "http://[::1/", "http://a:99999/"]
)
def test_a_url_that_is_none(url: str | None) -> None:
    assert judge((url, "a red circle"))["reason"].to_pylist() == [Reason.INVALID_URL]


def test_a_url_too_long() -> None:
    table = judge(("http://a/" + "x" * 11, "fine words"), ("http://a/" + "x" * 12, "fine words"), max_url_chars=20)
    assert table["reason"].to_pylist() == [None, Reason.INVALID_URL]


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
    ],
)
def test_caption_rules_at_their_edges(caption: str, reason: Reason | None) -> None:
    rules = JudgeConfig(min_words=2, max_words=5, min_chars=4, max_chars=20)
    assert judge_caption(caption, rules) == reason


def test_missing_and_blank_captions_are_empty() -> None:
    table = judge(("http://a/1", None), ("http://a/2", ""), ("http://a/3", " \n\u00a0 "))
    assert table["reason"].to_pylist() == [Reason.EMPTY_CAPTION] * 3


def test_of_equal_pairs_one_stands() -> None:
    table = judge(
        ("http://a/1", "red circle"),
        ("HTTP://A/1", "red  circle"),
        ("http://a/1", "blue circle"),
        ("http://a/1#x", "red circle"),
    )
    assert sorted(map(str, table["reason"].to_pylist())) == ["None", "None", "duplicate_pair", "duplicate_pair"]
    assert len(set(table["sample_id"].to_pylist())) == 2


def test_equal_pairs_that_are_refused_keep_their_own_reason() -> None:
    table = judge(("http://a/1", ""), ("http://a/1", ""), (None, "red circle"), (None, "red circle"))
    assert table["reason"].to_pylist() == [Reason.EMPTY_CAPTION] * 2 + [Reason.INVALID_URL] * 2


def test_no_rows_are_no_rows() -> None:
    assert judge_links(pa.table({"url": [], "caption": []}), JudgeConfig()).num_rows == 0
