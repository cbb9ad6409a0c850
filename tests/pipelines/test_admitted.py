"""Selection against what was admitted: more may be asked, less may not."""

from types import SimpleNamespace
from typing import Any

import pytest

from coca.errors import BadInput
from pipelines.admitted import check_loosening
from pipelines.select_config import SelectConfig

CONFIG = {
    "judge": {"min_words": 3, "max_words": 20, "min_chars": 5, "max_chars": 50, "languages": ["en", "de"]},
    "image": {"limits": {"min_side": 32, "max_aspect_ratio": 5.0}},
}


def check(config: dict[str, Any], **settings: Any) -> None:
    check_loosening(SimpleNamespace(version=4, config=config), SelectConfig(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "tighter", "equal", "looser", "place"),
    [
        ("min_words", 4, 3, 2, "judge.min_words = 3"),
        ("max_words", 19, 20, 21, "judge.max_words = 20"),
        ("min_chars", 6, 5, 4, "judge.min_chars = 5"),
        ("max_chars", 49, 50, 51, "judge.max_chars = 50"),
        ("min_side", 33, 32, 31, "image.limits.min_side = 32"),
        ("max_aspect_ratio", 4.9, 5.0, 5.1, "image.limits.max_aspect_ratio = 5"),
        ("languages", ("de",), ("en", "de"), ("en", "fr"), "judge.languages = en, de"),
    ],
)
def test_each_rule(name: str, tighter: Any, equal: Any, looser: Any, place: str) -> None:
    check(CONFIG, **{name: tighter})
    check(CONFIG, **{name: equal})
    with pytest.raises(BadInput, match=place) as refusal:
        check(CONFIG, **{name: looser})
    assert f"select.{name}" in refusal.value.cause
    assert "version 4" in refusal.value.cause
    assert f"looser {place.partition(' ')[0]}" in refusal.value.way_out
    check({}, **{name: looser})  # a record that says nothing of the rule


def test_a_limit_on_captions_where_admission_had_one() -> None:
    check(CONFIG, max_caption_count=1000)
    limited = {"judge": {"max_caption_count": 10}}
    check(limited, max_caption_count=10)
    with pytest.raises(BadInput, match=r"judge\.max_caption_count = 10"):
        check(limited, max_caption_count=11)


def test_all_languages_were_admitted() -> None:
    check({"judge": {"languages": []}}, languages=("xx",))
