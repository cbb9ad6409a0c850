"""Damage is found, whatever it is."""

import json
from pathlib import Path

import pytest

from coca.errors import BadInput
from coca.manifest import file_entry, find_damage, read_manifest, write_manifest
from coca.storage import Store


@pytest.fixture
def folder(tmp_path: Path) -> Store:
    store = Store(tmp_path)
    files = {"a.bin": b"12345", "sub/b.bin": b"x" * 100}
    for name, data in files.items():
        store.write(f"c/{name}", data)
    write_manifest(store, "c", {name: file_entry(data) for name, data in files.items()})
    return store.child("c")


def test_whole_files_are_whole(folder: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coca.manifest._CHUNK_BYTES", 7)
    entries, _ = read_manifest(folder)
    assert {name: find_damage(folder, name, entry) for name, entry in entries.items()} == {
        "a.bin": None,
        "sub/b.bin": None,
    }


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"12346", "a.bin does not match its SHA-256 in the manifest"),
        (b"1234", "a.bin has 4 bytes where the manifest says 5"),
        (b"", "a.bin has 0 bytes where the manifest says 5"),
        (None, "a.bin is missing"),
    ],
)
def test_damage_is_named(folder: Store, data: bytes | None, problem: str) -> None:
    entries, _ = read_manifest(folder)
    if data is None:
        folder.delete("a.bin")
    else:
        folder.write("a.bin", data)
    assert find_damage(folder, "a.bin", entries["a.bin"]) == problem


@pytest.mark.parametrize("entry", [None, 5, "x", [], {}, {"bytes": 5}, {"bytes": 5, "sha256": 3}])
def test_a_hostile_entry_is_damage(folder: Store, entry: object) -> None:
    assert find_damage(folder, "a.bin", entry) is not None  # type: ignore[arg-type]


def test_a_folder_in_a_files_place_is_damage(folder: Store) -> None:
    assert find_damage(folder, "sub", file_entry(b"")) == "sub is missing"


def test_no_flipped_bit_of_a_manifest_goes_unseen(folder: Store) -> None:
    """It is no JSON any more, or says something else of some file."""
    entries, data = read_manifest(folder)
    unseen = []
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            unseen += [bit] if json.loads(flipped).get("files") == entries else []
        except (ValueError, AttributeError):
            continue
    assert not unseen


def test_a_file_in_a_folders_place_is_no_checkpoint(folder: Store) -> None:
    with pytest.raises(BadInput, match=r"a.bin is not a checkpoint"):
        read_manifest(folder.child("a.bin"))
