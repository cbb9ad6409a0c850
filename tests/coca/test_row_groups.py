"""Row groups for a feed: the rows of `Dataset.read_row_group`, each read once, with one request a table on S3."""

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from werkzeug.serving import WSGIRequestHandler

from coca.dataset import Dataset
from coca.decode import make_decoder
from coca.errors import BadInput
from coca.feed import Feed
from coca.mixture import Mixture, Source
from coca.row_groups import RowGroups
from coca.storage import Store
from coca.train_config import FeedConfig, TrainConfig
from tests.pipelines.faulty_s3 import Faults, faulty_s3

MakeDataset = Callable[..., Dataset]
COLUMNS = ("sample_id", "image")
GATE_TIMEOUT_S = 30


@pytest.fixture
def dataset(make_dataset: MakeDataset) -> Dataset:
    """Ten row groups in three files."""
    return make_dataset(files=(18, 4, 14), unselected=(1, 5, 6, 7, 20))


def upload(dataset: Dataset, uri: str) -> Dataset:
    root, store = Path(dataset.store.root), Store(uri)
    for path in root.rglob("*"):
        if path.is_file():
            store.write(str(path.relative_to(root)), path.read_bytes())
    return Dataset(uri)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every row group that a dataset reads."""
    found: list[int] = []
    real = Dataset.read_row_group

    def read(self: Dataset, index: int, *args: object, **named: object) -> pa.Table:
        found.append(index)
        return real(self, index, *args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Dataset, "read_row_group", read)
    return found


def open_row_groups(dataset: Dataset, capacity: int = 4, **feed: object) -> RowGroups:
    return RowGroups(dataset, COLUMNS, capacity=capacity, feed=FeedConfig(**feed))  # type: ignore[arg-type]


def test_rows_are_those_of_the_dataset(dataset: Dataset) -> None:
    groups = open_row_groups(dataset)
    groups.expect([3, 0])
    for index in (0, 9, 4, 3, 5, 1):
        assert groups.get(index).equals(dataset.read_row_group(index, COLUMNS))
    groups.close()


def test_columns_that_lie_apart_and_one_that_an_older_contract_lacks(dataset: Dataset) -> None:
    columns = ("fetched_at", "caption")
    groups = RowGroups(dataset, columns, capacity=2, feed=FeedConfig())
    assert groups.get(2).equals(dataset.read_row_group(2, columns))
    groups.close()


def test_what_is_held_or_expected_is_read_once(dataset: Dataset, reads: list[int]) -> None:
    groups = open_row_groups(dataset, capacity=4)
    groups.expect([0, 1, 2])
    groups.expect([2, 0, 3])
    for index in (0, 1, 0, 2, 3, 1):
        groups.get(index)
    assert sorted(reads) == [0, 1, 2, 3]
    groups.close()


def test_the_least_recently_used_goes_and_not_what_is_still_to_come(dataset: Dataset, reads: list[int]) -> None:
    groups = open_row_groups(dataset, capacity=3)
    groups.expect([0, 1])
    for index in (4, 5, 4):
        groups.get(index)  # 5 goes for the second use of 4
    for index in (0, 1, 4, 5):
        groups.get(index)
    assert Counter(reads) == {0: 1, 1: 1, 4: 2, 5: 2}
    groups.close()


def test_reading_ahead_goes_on_while_the_caller_does_something_else(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived = threading.Barrier(3, timeout=GATE_TIMEOUT_S)
    real = Dataset.read_row_group

    def read(self: Dataset, index: int, *args: object) -> pa.Table:
        arrived.wait()  # two row groups are read at the same time, and nobody has asked for one
        return real(self, index, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Dataset, "read_row_group", read)
    groups = open_row_groups(dataset)
    groups.expect([0, 1])
    arrived.wait()
    groups.close()


def test_a_failed_read_is_told_and_made_again_when_asked(dataset: Dataset) -> None:
    path = Path(dataset.store.root) / "samples/part-00001.parquet"
    data = path.read_bytes()
    path.unlink()
    groups = open_row_groups(dataset)
    groups.expect([5])
    for _ in range(2):
        with pytest.raises(BadInput, match=r"samples/part-00001.parquet is missing"):
            groups.get(5)
    path.write_bytes(data)
    assert groups.get(5).num_rows == 3
    groups.close()


def test_damage_is_told(dataset: Dataset) -> None:
    path = Path(dataset.store.root) / "samples/part-00001.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    groups = open_row_groups(dataset)
    with pytest.raises(BadInput, match=r"part-00001.parquet cannot be read"):
        groups.get(5)
    groups.close()


def test_damaged_pages_are_told_with_the_file(dataset: Dataset) -> None:
    """Not as an error of Arrow's that names none: that one would be taken for a worker that died."""
    path = Path(dataset.store.root) / "annotations/part-00001.parquet"
    whole = path.read_bytes()
    pages_end = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    group = 5  # its only one
    told: list[str] = []
    for place in range(4, pages_end, max(1, pages_end // 120)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        groups = open_row_groups(dataset)
        try:
            groups.get(group)
        except BadInput as problem:
            told.append(str(problem))
        groups.close()
    assert len(told) > 5
    assert all("part-00001.parquet" in each or "row group" in each for each in told), told


# S3: requests counted by the server itself.


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[tuple[str, str, str]]]:
    """How often the S3 server has answered a (method, path, range)."""
    found: Counter[tuple[str, str, str]] = Counter()

    def log(self: WSGIRequestHandler, code: object = "-", size: object = "-") -> None:
        found[self.command, self.path.partition("?")[0].partition("/")[2], self.headers.get("Range", "")] += 1

    monkeypatch.setattr(WSGIRequestHandler, "log_request", log)
    return found


def ranges(requests: Counter[tuple[str, str, str]], table: str) -> Counter[tuple[str, str]]:
    return Counter({key[1:]: n for key, n in requests.items() if key[0] == "GET" and f"/{table}/" in key[1]})


def size_on_s3(path: str) -> int:
    folder, _, name = path.rpartition("/")
    return Store(f"s3://{folder}").size(name)


def large_dataset(make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch, uri: str) -> Dataset:
    """Footers are told from row groups by where they lie: a file is larger than what is read of its end."""
    monkeypatch.setattr("coca.parquet_ranges._TAIL_BYTES", 64)
    return upload(make_dataset(files=(32, 32, 32, 32)), uri)


def one_pass(dataset: Dataset, rank: int, world: int, cache: Path | None = None) -> None:
    """As a feed goes over its lanes: 8 lanes, windows of two row groups, the next ones expected."""
    feed = {} if cache is None else {"cache_dir": str(cache)}
    groups = open_row_groups(dataset, capacity=4 * 8 // world, **feed)
    lanes = [np.random.default_rng(lane).permutation(range(lane, 32, 8)).tolist() for lane in range(rank, 8, world)]
    for start in (0, 2):
        groups.expect(index for lane in lanes for index in lane[start : start + 2])
        for _ in range(4):
            for index in [index for lane in lanes for index in lane[start : start + 2]]:
                assert groups.get(index).num_rows == 4
    groups.close()


def feed_one_pass(dataset: Dataset, config: TrainConfig, settings: FeedConfig, rank: int) -> None:
    """What one of four workers does with its lanes."""
    decoder = make_decoder(settings, config.augment, config.seed)
    feed = Feed(Mixture([Source(dataset)]), config, settings, rank=rank, world_size=4, decoder=decoder)
    batches = feed.batches(0)
    for _ in range(128 // config.batch_size - 1):  # the last one of the pass is prepared ahead
        next(batches)
    batches.close()
    feed.close()


@pytest.mark.parametrize("read_ahead", [0, 1])
def test_four_workers_read_each_row_group_once_a_pass(
    make_dataset: MakeDataset,
    tiny_train: TrainConfig,
    s3: str,
    requests: Counter[tuple[str, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    read_ahead: int,
) -> None:
    dataset = large_dataset(make_dataset, monkeypatch, s3)
    assert dataset.row_groups.num_rows == 32
    config = tiny_train.model_copy(update={"lanes": 8, "batch_size": 16, "shuffle_window": 2})
    settings = FeedConfig(decode="threads", decode_workers=1, prefetch_batches=1, read_ahead=read_ahead)
    requests.clear()
    arguments = [(dataset, config, settings, rank) for rank in range(4)]
    workers = [threading.Thread(target=feed_one_pass, args=each) for each in arguments]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    heads = Counter({key[1]: n for key, n in requests.items() if key[0] == "HEAD"})
    for table in ("samples", "annotations"):
        found = ranges(requests, table)
        ends = {(path, size_on_s3(path) - 1) for path, _ in found}
        footers = {key: n for key, n in found.items() if (key[0], int(key[1].rpartition("-")[2])) in ends}
        groups = {key: n for key, n in found.items() if key not in footers}
        assert len(groups) == 32
        assert sum(groups.values()) <= 32 + 8 * read_ahead  # the first ones of the next pass
        assert sum(footers.values()) <= 2 * 4 * 4  # its end and its whole, for four files and four workers
    assert max(heads.values()) <= 4


def test_a_second_pass_comes_from_the_cache_on_disk(
    make_dataset: MakeDataset,
    s3: str,
    requests: Counter[tuple[str, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    dataset, cache = large_dataset(make_dataset, monkeypatch, s3), tmp_path / "cache"
    one_pass(dataset, 0, 1, cache)
    first = [path for path in (cache / "entries").rglob("*") if path.is_file()]
    assert len(first) == 64
    broken = first[0]
    os.truncate(broken, broken.stat().st_size - 1)
    requests.clear()
    one_pass(dataset, 0, 1, cache)
    gets = ranges(requests, "samples") + ranges(requests, "annotations")
    assert sum(gets.values()) == 2 * 8 + 1  # the footers of eight files, and the damaged entry
    assert broken.stat().st_size > 0


def test_another_file_under_the_same_name_is_not_taken_from_the_cache(
    make_dataset: MakeDataset, s3: str, tmp_path: Path
) -> None:
    dataset = upload(make_dataset(files=(4, 4)), s3)
    before = open_row_groups(dataset, cache_dir=str(tmp_path / "cache"))
    first = before.get(0)
    before.close()
    for table in ("samples", "annotations"):
        data = dataset.store.read(f"{table}/part-00001.parquet")
        dataset.store.write(f"{table}/part-00000.parquet", data)
    after = open_row_groups(dataset, cache_dir=str(tmp_path / "cache"))
    assert after.get(0)["sample_id"] != first["sample_id"]
    after.close()


def test_faults_of_the_store_change_nothing(
    dataset: Dataset, s3: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = upload(dataset, s3)
    with faulty_s3(s3_server, seed=5, faults=Faults(slow_down=0.1, cut=0.2, lost=0.1)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        groups = open_row_groups(Dataset(there.store.uri), capacity=10)
        groups.expect(range(10))
        for index in range(10):
            assert groups.get(index).equals(dataset.read_row_group(index, COLUMNS))
        groups.close()
        assert proxy.counts()["cut"] > 0


def test_a_cache_folder_that_cannot_be_used_is_refused(dataset: Dataset, s3: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be used"):
        open_row_groups(upload(dataset, s3), cache_dir=str(tmp_path / "file"))
