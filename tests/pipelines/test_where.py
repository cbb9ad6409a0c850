"""The filter language: what it selects, and where it says it was not understood."""

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coca.dataset import Dataset
from coca.errors import BadInput
from pipelines.rows import FIELDS, find_rows, read_images, read_rows
from pipelines.where import parse_where
from tests.seeing_fixtures import caption, key, picture, publish_world, withdraw


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset(publish_world(tmp_path_factory.mktemp("where") / "world"))


def numbers(world: Dataset, where: str, selected: bool | None = None) -> set[int]:
    known = {key(n): n for n in range(10)}
    rows = find_rows(world, ("url",), 100, where=parse_where(where), selected=selected)
    return {known[row["sample_id"]] for _, row in rows}


@pytest.mark.parametrize(
    ("where", "wanted"),
    [
        ("width > 64 and language = 'en'", {1, 4, 5, 8}),
        ("width >= 192 OR height != 64", {2, 5, 8}),
        ("not width = 64", {1, 2, 4, 5, 7, 8}),
        ("width = 64 or width = 128 and language = 'de'", {0, 3, 6, 9}),  # `and` binds closer
        ("(width = 64 or width = 192) and language = 'de'", {2, 6}),
        ("reason is null", {0, 1, 2, 3, 4, 6, 9}),
        ("reason is not null and not selected", {5, 7, 8}),
        ("selected = false", {5, 7, 8}),
        ("reason in ('score', 'near_duplicate')", {7, 8}),
        ("language not in ('en')", {2, 6}),  # null is no match
        ("not language in ('en')", {2, 6}),
        ("language != 'en'", {2, 6}),
        ("width in (64.0, 192, 12.5, 1e300)", {0, 2, 3, 5, 6, 8, 9}),
        ("caption contains 'CAT$'", {3}),
        ("caption not contains 'picture'", {3}),
        ("caption contains '.'", set()),  # no pattern
        ("caption = 'picture 9'", {9}),
        ('caption = "its" or url contains "P9"', {9}),
        ("host = 'three.example' and tokens <= 10", {8}),
        ("scores.clip >= 0.7", {7, 8}),
        ("scores.clip is null", {9}),
        ("scores.unknown < 1", set()),
        ("fetched_at < '2026-03-03' or fetched_at = '2026-03-10T00:00+00:00'", {0, 1, 9}),
        ("width > 99999999999999999999999", set()),
        ("phash = -1", set()),
    ],
)
def test_a_filter_matches_exactly(world: Dataset, where: str, wanted: set[int]) -> None:
    assert numbers(world, where) == wanted


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("widht > 3", "(character 1, at 'widht > 3'): there is no column 'widht'. Did you mean 'width'? Columns: "),
        ("width > 'a'", "(character 9, at \"'a'\"): 'width' is compared with a number, not with 'a'"),
        ("language = en", "(character 12, at 'en'): 'language' is compared with a text in quotes, not with en"),
        ("selected = 1", "'selected' is compared with true or false"),
        ("fetched_at > 'monday'", "(character 14, at \"'monday'\"): 'monday' is no time"),
        ("width contains 'x'", "(character 1, at \"width contains 'x'\"): 'width' holds no text"),
        ("width > ", "(its end): 'width' is compared with a number, not with the end"),
        ("", "(its end): a column is expected, not the end"),
        ("width = 3 4", "(character 11, at '4'): '4' is not expected"),
        ("caption = 'x", '(character 11, at "\'x"): a text that does not end'),
        ("width = 3; drop", "(character 10, at '; drop'): ';' has no meaning"),
        ("(width = 3", "(its end): `)` is expected"),
        ("width is 3", "(character 10, at '3'): `null` is expected"),
        ("width in ()", "(character 11, at ')')"),
        ("image is null", "there is no column 'image'"),
        ("__import__('os')", "there is no column '__import__'"),
        ("width = 1e", "has no meaning"),
        ("(" * 80 + "selected" + ")" * 80, "nested more than 50 deep"),
        ("not " * 80 + "selected", "nested more than 50 deep"),
    ],
)
def test_what_is_not_understood_is_named_with_its_place(where: str, line: str) -> None:
    with pytest.raises(BadInput) as raised:
        parse_where(where)
    assert line in str(raised.value)


WORDS = [
    "width",
    "caption",
    "selected",
    "and",
    "or",
    "not",
    "in",
    "is",
    "null",
    "contains",
    "(",
    ")",
    ",",
    "=",
    "<",
    "3",
]


@given(st.one_of(st.text(max_size=40), st.lists(st.sampled_from([*WORDS, "'x'", "scores.a"])).map(" ".join)))
def test_any_text_is_a_filter_or_bad_input(text: str) -> None:
    with contextlib.suppress(BadInput):
        assert parse_where(text).columns <= {"width", "caption", "selected", "scores.a"}


def test_only_the_wanted_number_of_rows_is_read_in_stored_order(world: Dataset) -> None:
    found = list(find_rows(world, ("caption",), 3, where=parse_where("width = 64"), selected=None))
    assert [row["caption"] for _, row in found] == [caption(0), caption(3), caption(6)]
    assert [index for index, _ in found] == [0, 0, 2]
    assert list(find_rows(world, ("caption",), 0, where=None, selected=True)) == []


def test_selected_and_unselected_rows(world: Dataset) -> None:
    assert numbers(world, "width > 0", selected=True) == {0, 1, 2, 3, 4, 6, 9}
    assert numbers(world, "width > 0", selected=False) == {5, 7, 8}


def test_fields_are_what_is_stored(world: Dataset) -> None:
    rows = read_rows(world, 1, [*FIELDS, "scores", "scores.clip"]).to_pylist()
    assert [row["sample_id"] for row in rows] == [key(4), key(5)]
    assert rows[1] | {"fetched_at": None} == {
        **{name: rows[1][name] for name in ("sha256", "source_sha256", "url", "phash")},
        **{"sample_id": key(5), "caption": caption(5), "format": "png", "width": 192, "height": 64, "extra": None},
        **{"original_width": 640, "original_height": 640, "fetched_at": None, "host": "two.example", "language": "en"},
        **{"selected": False, "reason": "duplicate_image", "tokens": 7},
        **{"scores": [("clip", 0.5)], "scores.clip": 0.5},
    }
    assert read_images(world, 1, [key(4), "none"]) == {key(4): picture(4)}


def test_withdrawn_rows_are_in_no_answer(tmp_path: Path) -> None:
    uri = publish_world(tmp_path / "world")
    withdraw(uri, 1)
    withdraw(uri, 1)  # again, as a list that grows may say it
    world = Dataset(uri)
    assert numbers(world, "width > 0") == set(range(10)) - {1}
    assert read_images(world, 0, [key(0), key(1)]).keys() == {key(0)}
    assert read_rows(world, 0, ("language", "scores.clip")).num_rows == 3
