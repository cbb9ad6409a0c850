"""The disk cache: whole or not there, within its size, for several processes that may be killed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from coca.disk_cache import DiskCache
from coca.errors import BadInput

KIB = 1024


def payload(key: str, size: int = 10 * KIB) -> bytes:
    return np.random.default_rng(list(key.encode())).bytes(size)


def entries(folder: Path) -> list[Path]:
    return [path for path in (folder / "entries").rglob("*") if path.is_file()]


def stored_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in entries(folder))


def test_what_is_put_is_got_also_by_another_process(tmp_path: Path) -> None:
    DiskCache(tmp_path, 100 * KIB).put("a", payload("a"))
    cache = DiskCache(tmp_path, 100 * KIB)
    got = cache.get("a")
    assert got is not None
    assert bytes(got) == payload("a")
    assert cache.get("b") is None


def damage_flip(path: Path, other: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage_cut(path: Path, other: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def damage_empty(path: Path, other: Path) -> None:
    os.truncate(path, 0)


def damage_swap(path: Path, other: Path) -> None:
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize("damage", [damage_flip, damage_cut, damage_empty, damage_swap])
def test_a_damaged_entry_is_not_there_and_can_be_put_again(tmp_path: Path, damage) -> None:
    cache = DiskCache(tmp_path, 100 * KIB)
    cache.put("a", payload("a"))
    (path,) = entries(tmp_path)
    cache.put("b", payload("b"))
    (other,) = set(entries(tmp_path)) - {path}
    damage(path, other)
    assert cache.get("a") is None
    assert not path.exists()
    cache.put("a", payload("a"))
    assert cache.get("a") == payload("a")
    assert cache.get("b") == payload("b")


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 55 * KIB)  # room for five
    for key in "abcde":
        cache.put(key, payload(key))
        time.sleep(0.01)
    assert cache.get("a") is not None
    time.sleep(0.01)
    cache.put("f", payload("f"))
    assert stored_bytes(tmp_path) <= 55 * KIB
    kept = [key for key in "abcdef" if cache.get(key) is not None]
    assert kept == ["a", "d", "e", "f"]  # room is made down to nine tenths


def test_an_entry_larger_than_the_cache_is_not_kept_and_evicts_nothing(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 30 * KIB)
    cache.put("a", payload("a"))
    cache.put("big", payload("big", 40 * KIB))
    assert cache.get("big") is None
    assert cache.get("a") is not None


def test_a_full_disk_costs_the_entry_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = DiskCache(tmp_path, 100 * KIB)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("coca.disk_cache.os.replace", full)
        cache.put("a", payload("a"))
    assert cache.get("a") is None
    assert entries(tmp_path) == []


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"the cache folder .*file cannot be used: .*Give another cache_dir"):
        DiskCache(tmp_path / "file", KIB)


@pytest.mark.parametrize("text", [b"", b"12", b"x" * 20])
def test_a_lost_count_is_made_anew(tmp_path: Path, text: bytes) -> None:
    cache = DiskCache(tmp_path, 55 * KIB)
    for key in "abcde":
        cache.put(key, payload(key))
    (tmp_path / "total").write_bytes(text)
    cache.put("f", payload("f"))
    assert stored_bytes(tmp_path) <= 55 * KIB


WRITER = """
import sys
from coca.disk_cache import DiskCache
from tests.coca.test_disk_cache import payload
cache, first = DiskCache(sys.argv[1], 200 * 1024), int(sys.argv[2])
print("ready", flush=True)
for number in range(first, first + int(sys.argv[3])):
    key = str(number % 40)
    found = cache.get(key)
    assert found is None or bytes(found) == payload(key)
    cache.put(key, payload(key))
"""


def writer(folder: Path, first: int, count: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", WRITER, str(folder), str(first), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_share_a_cache_and_may_be_killed(tmp_path: Path) -> None:
    writers = [writer(tmp_path, first, 10**6) for first in (0, 13)]
    for each in writers:
        assert each.stdout is not None
        assert each.stdout.readline() == "ready\n"
    seen, cache = [], DiskCache(tmp_path, 200 * KIB)
    for _ in range(20):
        time.sleep(0.02)
        with cache._locked_total():  # else what goes and what comes while we look is counted together
            seen.append(sum(map(size_of, entries(tmp_path))))
    for each in writers:
        each.kill()
        each.communicate()
    assert max(seen) <= 200 * KIB
    last = writer(tmp_path, 7, 100)
    assert last.communicate(timeout=60)[1] == ""
    assert last.returncode == 0
    assert 100 * KIB < stored_bytes(tmp_path) <= 200 * KIB


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
