"""Selection: the rules on rows, and that the winners among equal and near pictures depend on nothing but the rows."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.contaminants import Contaminants
from pipelines.select_config import SelectConfig
from pipelines.selection import CANDIDATES, UNSELECTED, candidate_columns, select_new, select_rows

# Half of the bits set, as in real hashes.
HASH = 0x0F0F_3355_00FF_C3A5


@dataclass(frozen=True)
class Rows:
    """A source that lies in memory."""

    table: pa.Table

    @property
    def rows(self) -> int:
        return int(self.table.num_rows)

    def read(self) -> pa.Table:
        return self.table


def candidates(*rows: dict[str, Any]) -> pa.Table:
    """Rows with defaults: pictures, urls and hashes of their own."""
    full = []
    for place, row in enumerate(rows):
        name = row.get("sample_id", f"{place:032x}")
        defaults = {
            "sample_id": name,
            "url": f"http://x/{name}",
            "source_sha256": f"{place:064x}",
            "phash": 0x5A5A_5A5A_5A5A_0000 ^ (place * 0x0101_0101_0101_0101),
            "caption": "a red ball",
            "language": "en",
            "original_width": 300,
            "original_height": 200,
            "scores": None,
            "standing": None,
        }
        full.append({**defaults, **row})
    return pa.Table.from_pylist(full, schema=CANDIDATES)


def reasons(config: SelectConfig, *rows: dict[str, Any], lists: Contaminants | None = None) -> list[str | None]:
    return select_rows(candidates(*rows), config, lists).to_pylist()


def test_each_rule_on_a_row() -> None:
    config = SelectConfig(
        duplicates="none",
        min_words=2,
        max_words=4,
        min_chars=5,
        max_chars=20,
        languages=("en", "de"),
        min_side=150,
        max_aspect_ratio=2.0,
        min_scores={"likeness": 0.25},
    )
    good = {"scores": [("likeness", 0.25), ("other", 0.0)]}
    found = reasons(
        config,
        good,
        {**good, "caption": "ball"},
        {**good, "caption": "a bb"},
        {**good, "caption": "a b c d e"},
        {**good, "caption": "a very long description"},
        {**good, "language": "fr"},
        {**good, "language": None},
        {**good, "original_height": 149},
        {**good, "original_height": 400, "original_width": 201},
        {**good, "original_height": 401, "original_width": 200},
        {"scores": [("likeness", 0.2)]},
        {"scores": [("other", 1.0)]},
        {"scores": None},
    )
    assert found == [
        None,
        "caption_too_short",
        "caption_too_short",
        "caption_too_long",
        "caption_too_long",
        "language",
        "language",
        "image_too_small",
        None,
        "aspect_ratio",
        "score",
        "score",
        "score",
    ]


def test_of_equal_pictures_the_url_with_the_lowest_id_wins_with_all_its_captions() -> None:
    rows = [
        {"sample_id": "3", "url": "b", "source_sha256": "X"},
        {"sample_id": "1", "url": "a", "source_sha256": "X"},
        {"sample_id": "9", "url": "a", "source_sha256": "X"},
        {"sample_id": "2", "url": "c", "source_sha256": "Y"},
    ]
    assert reasons(SelectConfig(), *rows) == ["duplicate_image", None, None, None]
    assert reasons(SelectConfig(duplicates="none"), *rows) == [None] * 4


def test_a_refused_row_wins_nothing() -> None:
    rows = [
        {"sample_id": "1", "url": "a", "source_sha256": "X", "caption": "ball"},
        {"sample_id": "2", "url": "b", "source_sha256": "X"},
    ]
    assert reasons(SelectConfig(min_words=2), *rows) == ["caption_too_short", None]


def test_a_selected_standing_row_wins_and_another_standing_row_does_not() -> None:
    stored = {"sample_id": "8", "url": "s", "source_sha256": "X", "standing": True}
    passed = {"sample_id": "0", "url": "p", "source_sha256": "X", "standing": False}
    new = {"sample_id": "1", "url": "a", "source_sha256": "X"}
    caption = {"sample_id": "2", "url": "s", "source_sha256": "X"}
    assert reasons(SelectConfig(), new, passed, stored, caption) == ["duplicate_image", None]
    assert reasons(SelectConfig(), new, passed) == [None]


def test_near_pictures_give_way_to_a_kept_one_only() -> None:
    config = SelectConfig(duplicates="perceptual", max_hamming=2)
    rows = [
        {"sample_id": "2", "phash": HASH},
        {"sample_id": "1", "phash": HASH ^ 0b11},
        {"sample_id": "3", "phash": HASH ^ 0b1100},  # near 2, which is lost
        {"sample_id": "4", "phash": HASH ^ 0b1111_0000},
    ]
    assert reasons(config, *rows) == ["near_duplicate", None, None, None]
    assert reasons(SelectConfig(), *rows) == [None] * 4
    # Another file of the winner's url is another caption of the winner.
    again = {"sample_id": "5", "url": "http://x/1", "phash": HASH ^ 0b110}
    assert reasons(config, *rows, again)[-1] is None


def test_blank_pictures_do_not_collapse() -> None:
    from PIL import Image

    from coca.images import phash

    blank = [phash(Image.new("RGB", (90, 70), colour)) for colour in ("white", "white", "red")] + [0, 0, 1]
    rows = [{"sample_id": f"{place}", "phash": value} for place, value in enumerate(blank)]
    assert reasons(SelectConfig(duplicates="perceptual", max_hamming=12), *rows) == [None] * 6


def test_pairs_with_equal_hash_and_caption() -> None:
    rows = [
        {"sample_id": "3", "phash": HASH, "caption": "a ball"},
        {"sample_id": "1", "phash": HASH, "caption": "a ball"},
        {"sample_id": "2", "phash": HASH, "caption": "a bell"},
        {"sample_id": "4", "phash": HASH ^ 3, "caption": "a ball"},
    ]
    assert reasons(SelectConfig(pair_duplicates_by_phash=True), *rows) == ["near_duplicate", None, None, None]


def test_pictures_and_captions_that_occur_too_often() -> None:
    popular = [{"url": "u", "source_sha256": "X", "caption": f"word {n}"} for n in range(3)]
    assert reasons(SelectConfig(max_captions_per_image=3), *popular) == [None] * 3
    stored = {"source_sha256": "X", "standing": False, "url": "w", "caption": "other"}
    too_many = reasons(SelectConfig(max_captions_per_image=3), *popular, stored, {"caption": "rare"})
    assert too_many == ["image_too_popular"] * 3 + [None]
    captions = [{"caption": "a dog"}, {"caption": "a dog"}, {"caption": "a cat"}]
    assert reasons(SelectConfig(max_caption_count=1), *captions) == ["caption_too_frequent"] * 2 + [None]
    assert reasons(SelectConfig(max_caption_count=2), *captions) == [None] * 3


def test_pictures_of_evaluation_sets() -> None:
    lists = Contaminants(pa.array(["X"]), np.array([HASH], dtype=np.uint64), max_hamming=2)
    rows = [{"source_sha256": "X"}, {"phash": HASH ^ 3}, {"phash": HASH ^ 15}]
    assert reasons(SelectConfig(), *rows, lists=lists) == ["contaminated", "contaminated", None]


def greedy(rows: list[dict[str, Any]], config: SelectConfig) -> dict[str, str | None]:
    """The definition, one row after the other."""
    ranked = sorted(rows, key=lambda row: (row["standing"] is None, row["sample_id"]))
    verdict: dict[str, str | None] = {row["sample_id"]: None for row in ranked if row["standing"] is None}
    winner: dict[str, str] = {}
    in_play = [row for row in ranked if row["standing"] is not False]
    for row in in_play:
        url = winner.setdefault(row["source_sha256"], row["url"])
        if row["standing"] is None and url != row["url"]:
            verdict[row["sample_id"]] = "duplicate_image"
    in_play = [row for row in in_play if verdict.get(row["sample_id"]) is None]
    pairs: set[tuple[int, str]] = set()
    for row in in_play:
        if row["standing"] is None and (row["phash"], row["caption"]) in pairs:
            verdict[row["sample_id"]] = "near_duplicate"
        pairs.add((row["phash"], row["caption"]))
    in_play = [row for row in in_play if verdict.get(row["sample_id"]) is None]
    best: dict[int, dict[str, Any]] = {}
    for row in in_play:
        best.setdefault(row["phash"], row)
    kept: list[dict[str, Any]] = []
    gives_way: dict[int, str] = {}
    for row in best.values():  # in the order of rank
        near = [k for k in kept if ((k["phash"] ^ row["phash"]) % 2**64).bit_count() <= config.max_hamming]
        if near and row["standing"] is None:
            gives_way[row["phash"]] = near[0]["url"]
        else:
            kept.append(row)
    for row in in_play:
        if row["standing"] is None and row["url"] != gives_way.get(row["phash"], best[row["phash"]]["url"]):
            verdict[row["sample_id"]] = "near_duplicate"
    return verdict


ROW = st.fixed_dictionaries(
    {
        "url": st.sampled_from("abcdefgh"),
        "source_sha256": st.sampled_from([f"{n:064x}" for n in range(6)]),
        "phash": st.tuples(*[st.sampled_from([0, 1, 3, 6])] * 3).map(lambda t: HASH ^ t[0] ^ t[1] << 20 ^ t[2] << 50),
        "caption": st.sampled_from(["one", "two"]),
        "standing": st.sampled_from([None, None, None, True, False]),
    }
)
FULL = SelectConfig(duplicates="perceptual", pair_duplicates_by_phash=True)


@settings(max_examples=60, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=14), st.randoms(use_true_random=False))
def test_the_winners_are_those_of_the_definition_in_any_order(rows: list[dict[str, Any]], random: Any) -> None:
    named = [{**row, "sample_id": f"{place:02x}"} for place, row in enumerate(rows)]
    expected = greedy(named, FULL)
    random.shuffle(named)
    table = candidates(*named)
    new = [row["sample_id"] for row in named if row["standing"] is None]
    assert dict(zip(new, select_rows(table, FULL).to_pylist(), strict=True)) == expected
    # Cut into sources in that order, of which standing rows are read separately and filtered.
    is_new = pa.array([row["standing"] is None for row in named])
    invert = pa.array([row["standing"] is not None for row in named])
    fresh, stored = table.filter(is_new), table.filter(invert)
    result = select_new([Rows(fresh.slice(0, 3)), Rows(fresh.slice(3))], [Rows(stored)], FULL)
    assert result.schema.names == UNSELECTED.names
    lost = {row["sample_id"]: row for row in result.to_pylist()}
    assert {key: row["reason"] for key, row in lost.items()} == {k: v for k, v in expected.items() if v}
    assert all(row["source"] == (new.index(key) >= 3) for key, row in lost.items())


def random_rows(count: int, seed: int) -> pa.Table:
    rng = np.random.default_rng(seed)
    hashes = (HASH ^ (1 << rng.integers(0, 60, count)) ^ (1 << rng.integers(0, 6, count))).astype(np.int64)
    rows = [
        {
            "sample_id": f"{number:032x}",
            "url": f"http://x/{rng.integers(0, count // 2)}",
            "source_sha256": f"{rng.integers(0, 2 * count):064x}",
            "phash": int(hashes[number]),
            "caption": f"caption {rng.integers(0, count // 3)}",
        }
        for number in rng.permutation(count)
    ]
    return candidates(*rows)


@pytest.mark.ray
def test_the_shuffle_gives_what_one_process_gives(ray_cluster: object) -> None:
    """With all rules that compare rows; more new rows than a process holds, then more standing ones."""
    config = FULL.model_copy(update={"max_captions_per_image": 2, "max_caption_count": 6, "max_hamming": 2})
    table, lists = random_rows(600, seed=0), Contaminants(pa.array([f"{7:064x}"]), np.empty(0, np.uint64), 0)
    standing = table.slice(0, 300).drop_columns("standing").append_column("standing", pa.array([True, False] * 150))
    new = [Rows(table.slice(start, 100)) for start in (300, 400, 500)]
    stored = [Rows(standing.slice(start, 100)) for start in (0, 100, 200)]
    whole = select_new(new, stored, config, lists)
    assert set(whole["reason"].to_pylist()) >= {
        "duplicate_image",
        "near_duplicate",
        "image_too_popular",
        "caption_too_frequent",
    }
    assert select_new(new, stored, config, lists, in_process_rows=200) == whole
    few = select_new(new[:1], stored, config, lists)
    assert few.num_rows
    assert select_new(new[:1], stored, config, lists, in_process_rows=150) == few


def test_only_columns_that_a_rule_needs_are_read() -> None:
    assert candidate_columns(SelectConfig()) == ["sample_id", "url", "source_sha256", "phash"]
    assert candidate_columns(SelectConfig(min_words=2, min_side=9))[4:] == [
        "caption",
        "original_width",
        "original_height",
    ]
    narrow = candidates({}, {}).select(candidate_columns(SelectConfig()))
    assert select_rows(narrow, SelectConfig()).to_pylist() == [None, None]
