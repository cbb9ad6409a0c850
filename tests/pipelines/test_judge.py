"""What url and caption decide before any request."""

import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coca.contract import Reason, sample_id
from coca.errors import BadInput
from pipelines.judge import JUDGED, Rules, caption_hashes, judge_pairs, load_rules
from pipelines.judge_config import JudgeConfig


def judge(*pairs: tuple[Any, Any], **rules: Any) -> pa.Table:
    urls, captions = zip(*pairs, strict=True)
    links = pa.table({"url": pa.array(urls, pa.string()), "caption": pa.array(captions, pa.string())})
    return judge_pairs(links, load_rules(JudgeConfig(**rules)))


def verdicts(*pairs: tuple[Any, Any], **rules: Any) -> list[str | None]:
    return judge(*pairs, **rules)["reason"].to_pylist()


def test_a_sound_pair_gets_its_key_and_canonical_form() -> None:
    links = pa.table(
        {
            "url": ["HTTP://Example.COM:80/a#top"],
            "caption": ["  a red\n\tcircle on a white background "],
            "extra": ['{"license": "cc0"}'],
        }
    )
    table = judge_pairs(links, Rules(JudgeConfig()))
    assert table.schema == JUDGED
    assert table.to_pylist() == [
        {
            "sample_id": sample_id("http://example.com/a", "a red circle on a white background"),
            "url": "http://example.com/a",
            "caption": "a red circle on a white background",
            "language": "en",
            "extra": '{"license": "cc0"}',
            "reason": None,
        }
    ]


@pytest.mark.parametrize(
    "url", [None, "", "   ", "not a url", "ftp://a/b", "http://", "http://u:p@a/b", "http://[::1/", "http://a:99999/"]
)
def test_a_url_that_is_none(url: str | None) -> None:
    table = judge((url, "a red circle"))
    assert table["reason"].to_pylist() == [Reason.INVALID_URL]
    assert table["url"].to_pylist() == [(url or "").strip()]
    assert table["sample_id"].to_pylist() == [sample_id((url or "").strip(), "a red circle")]


def test_a_url_too_long() -> None:
    pairs = ("http://a/" + "x" * 11, "fine words"), ("http://a/" + "x" * 12, "fine words")
    assert verdicts(*pairs, max_url_chars=20) == [None, Reason.INVALID_URL]


def test_missing_and_blank_captions_are_empty() -> None:
    pairs = ("http://a/1", None), ("http://a/2", ""), ("http://a/3", " \n\u00a0 ")
    assert verdicts(*pairs) == [Reason.EMPTY_CAPTION] * 3


def test_equal_pairs_get_equal_keys_and_are_not_told_apart() -> None:
    table = judge(
        ("http://a/1", "red circle"),
        ("HTTP://A/1", "red  circle"),
        ("http://a/1", "blue circle"),
        ("http://a/1#x", "red circle"),
    )
    assert table["reason"].to_pylist() == [None] * 4
    first, second, other, fourth = table["sample_id"].to_pylist()
    assert first == second == fourth != other


def test_the_url_is_judged_before_the_caption_and_the_caption_before_the_language() -> None:
    pairs = (None, ""), ("http://bad.com/", ""), ("http://a/", ""), ("http://a/", "ein roter Kreis auf weißem Grund")
    expected = [Reason.INVALID_URL, Reason.BLOCKED_URL, Reason.EMPTY_CAPTION, Reason.LANGUAGE]
    assert verdicts(*pairs, languages=("en",), block_url_parts=("bad.com",)) == expected


def test_languages() -> None:
    pairs = (
        ("http://a/1", "a man riding a horse on the beach"),
        ("http://a/2", "ein roter Kreis auf weißem Grund"),
        ("http://a/3", "1234 5678"),
        ("http://a/4", "ab"),
    )
    table = judge(*pairs)
    assert table["language"].to_pylist() == ["en", "de", None, None]
    assert table["reason"].to_pylist() == [None, None, None, Reason.CAPTION_TOO_SHORT]
    assert verdicts(*pairs, languages=("de",))[:3] == [Reason.LANGUAGE, None, Reason.LANGUAGE]
    assert judge(*pairs, identify_language=False)["language"].to_pylist() == [None] * 4
    assert judge(*pairs, min_language_confidence=1.0)["language"].to_pylist() == [None] * 4


def test_block_lists(tmp_path: Path) -> None:
    (tmp_path / "domains").write_text("Bad.example\n2001:db8::1\n")
    (tmp_path / "urls").write_text("http://Good.example/no.jpg#top\n")
    (tmp_path / "words").write_text("spam\n")
    lists = {"block_domains": "domains", "block_urls": "urls", "blocked_words": "words"}
    pairs = (
        ("http://good.example/yes.jpg", "fine words"),
        ("http://good.example/no.jpg", "fine words"),
        ("http://cdn.BAD.example:8080/yes.jpg", "fine words"),
        ("http://notbad.example/", "fine words"),
        ("http://[2001:DB8::1]/a:b", "fine words"),
        ("http://[2001:db8::1]:8080/", "fine words"),
        ("http://[2001:db8::2]/", "fine words"),
        ("http://good.example/yes.jpg", "fine Spam"),
        ("bad.example", "fine words"),
    )
    assert verdicts(*pairs, **{key: str(tmp_path / name) for key, name in lists.items()}) == [
        None,
        Reason.BLOCKED_URL,
        Reason.BLOCKED_URL,
        None,
        Reason.BLOCKED_URL,
        Reason.BLOCKED_URL,
        None,
        Reason.CAPTION_BLOCKED_WORD,
        Reason.INVALID_URL,
    ]


def test_parts_of_urls_are_blocked_and_case_counts() -> None:
    pairs = ("http://a/b.svg?x=1", "fine words"), ("http://a/b.SVG", "fine words"), ("http://a/bsvg", "fine words")
    assert verdicts(*pairs, block_url_parts=(".svg",)) == [Reason.BLOCKED_URL, None, None]


def test_rules_pickle(tmp_path: Path) -> None:
    (tmp_path / "domains").write_text("bad.example\n")
    rules = load_rules(JudgeConfig(block_domains=str(tmp_path / "domains")))
    links = pa.table({"url": ["http://bad.example/", "http://a/"], "caption": ["fine words"] * 2})
    again = pickle.loads(pickle.dumps(rules))
    assert judge_pairs(links, again)["reason"].to_pylist() == [Reason.BLOCKED_URL, None]


def test_a_language_that_nobody_identifies() -> None:
    with pytest.raises(BadInput, match=r"judge.languages: 'english'.*Did you mean"):
        load_rules(JudgeConfig(languages=("english",)))


@pytest.mark.parametrize(
    "rules",
    [{"min_words": 9, "max_words": 8}, {"languages": ("en",), "identify_language": False}, {"block_url_parts": ("",)}],
)
def test_settings_that_nothing_could_pass(rules: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"no caption could pass|every url contains"):
        JudgeConfig(**rules)


@pytest.mark.parametrize("pieces", [0, 1, 3])
def test_chunks_and_no_rows(pieces: int) -> None:
    links = pa.table({"url": ["http://a/"], "caption": ["fine words"], "extra": pa.nulls(1, pa.string())})
    table = judge_pairs(pa.concat_tables([links] * pieces) if pieces else links.slice(0, 0), Rules(JudgeConfig()))
    assert table.schema == JUDGED
    assert table["reason"].to_pylist() == [None] * pieces


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    """A Parquet file may hold any bytes in a text column; nothing checks them on the way in."""
    raw = pa.array([b"http://a/\xff.jpg", b"http://a/ok"]), pa.array([b"fine words", b"fine\xff \xed\xa0\x80words"])
    texts = [pa.StringArray.from_buffers(len(each), each.buffers()[1], each.buffers()[2]) for each in raw]
    pq.write_table(pa.table(texts, names=["url", "caption"]), tmp_path / "links.parquet")
    table = judge_pairs(pq.read_table(tmp_path / "links.parquet"), Rules(JudgeConfig()))
    assert table["reason"].to_pylist() == [Reason.INVALID_URL, None]
    assert table["caption"].to_pylist() == ["fine words", "fine\ufffd \ufffd\ufffd\ufffdwords"]
    table.validate(full=True)


@pytest.mark.parametrize(
    "caption",
    [
        "\x00\x00\x00\x00",
        "\u200f\u202e circle \u2066red",
        "👩‍👩‍👧‍👦 " * 100_000,
        "word " * 200_000,
        "x" * 1_000_000,
        "a" + "\u0301\u0323" * 300_000,
        "\u00a0" * 500_000 + "x",
    ],
    ids=["nul", "rtl", "emoji", "words", "letters", "marks", "spaces"],
)
def test_hostile_captions_take_no_time(caption: str, tmp_path: Path) -> None:
    (tmp_path / "words").write_text("spam\nfree spam\n")
    rules = {"max_words": 10**9, "max_chars": 10**9, "min_chars": 1, "max_word_repetition": 1.0}
    started = time.process_time()
    table = judge(("http://a/", caption), **rules, blocked_words=str(tmp_path / "words"))
    assert time.process_time() - started < 3
    assert table["caption"].to_pylist() == [" ".join(caption.split())]
    assert table["reason"].to_pylist() == [None]


def test_caption_hashes_are_the_same_everywhere_and_mind_case() -> None:
    hashes = caption_hashes(pa.chunked_array([["image for", "Image for"], ["image for", "größe"]]))
    assert hashes.dtype == np.uint64
    assert hashes.tolist() == [1810314222379548933, 15556125963549810666, 1810314222379548933, 16832822397561338100]
    assert len(caption_hashes(pa.chunked_array([], pa.string()))) == 0
