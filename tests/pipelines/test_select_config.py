"""Settings of selection, and what they may not be."""

import pytest

from coca.errors import BadInput
from coca.typed_config import build_config
from pipelines.select_config import SelectConfig


def test_defaults_ask_for_exact_duplicates_only() -> None:
    config = SelectConfig()
    asked = {name for name, value in config.model_dump().items() if value not in (None, False, (), {})}
    assert asked == {"duplicates", "max_hamming", "max_hamming_contaminants"}
    assert not config.needs_captions
    assert not config.needs_sizes


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"min_words": 5, "max_words": 4}, "a minimum is above its maximum"),
        ({"max_hamming": 13}, "less than or equal to 12"),
        ({"duplicates": "fuzzy"}, "'exact'"),
        ({"min_word": 5}, "Did you mean 'min_words'"),
    ],
)
def test_bad_values_are_refused(values: dict[str, object], problem: str) -> None:
    with pytest.raises(BadInput, match=problem):
        build_config(SelectConfig, values)


def test_a_threshold_is_taken_away_with_null() -> None:
    assert build_config(SelectConfig, {"min_scores": {"a": 0.5, "b": None}}).min_scores == {"a": 0.5}


def test_a_config_survives_json() -> None:
    config = SelectConfig(languages=("en",), min_scores={"a": 0.5}, contaminants=("x.txt",))
    assert SelectConfig.model_validate(config.model_dump(mode="json")) == config
