"""Of the same picture under several urls one is selected, and never by luck."""

import pyarrow as pa

from coca.contract import LINKS, State
from pipelines.selection import duplicate_images, winning_urls


def admitted(*rows: tuple[str, str, str]) -> pa.Table:
    return pa.table(dict(zip(("sample_id", "url", "source_sha256"), map(list, zip(*rows, strict=True)), strict=True)))


def test_the_lowest_id_wins_in_any_order() -> None:
    rows = [("3", "b", "X"), ("1", "c", "X"), ("2", "a", "X"), ("0", "d", "Y")]
    assert duplicate_images(admitted(*rows), {}) == duplicate_images(admitted(*reversed(rows)), {}) == {"2", "3"}


def test_all_captions_of_the_winning_url_stay() -> None:
    rows = [("1", "a", "X"), ("2", "b", "X"), ("3", "a", "X"), ("4", "b", "X")]
    assert duplicate_images(admitted(*rows), {}) == {"2", "4"}


def test_what_is_stored_already_wins() -> None:
    winners = {"X": "b"}
    assert duplicate_images(admitted(("1", "a", "X"), ("2", "b", "X"), ("3", "c", "Z")), winners) == {"1"}
    assert winners == {"X": "b", "Z": "c"}


def test_the_stored_winner_is_the_selected_one() -> None:
    schema = pa.schema([LINKS.field(name) for name in ("sample_id", "url", "state", "source_sha256")])
    rows = [
        ("1", "a", State.OK.value, "X"),
        ("2", "b", State.OK.value, "X"),  # stored, not selected
        ("3", "c", State.REJECTED.value, "Y"),  # fetched, not stored
        ("4", "d", State.OK.value, "Z"),
    ]
    latest = pa.Table.from_pylist([dict(zip(schema.names, row, strict=True)) for row in rows], schema=schema)
    assert winning_urls(latest, {"2"}, pa.chunked_array([["X", "Y", "W"]])) == {"X": "a"}
