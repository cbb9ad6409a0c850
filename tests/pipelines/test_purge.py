"""Purge: the bytes are gone from every file, and nothing else has changed."""

import hashlib
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coca.dataset import Dataset
from coca.errors import BadInput, RunFailed
from coca.tokenizer import Tokenizer
from coca.withdrawn import read_withdrawn
from pipelines import purge as purge_module
from pipelines.lease import hold_lease
from pipelines.purge import is_zero, purge
from pipelines.tables import lying_files
from pipelines.verify import verify
from pipelines.withdraw import withdraw
from tests.pipelines.published import Pair, Published, everything, pairs


@pytest.fixture(params=["disk", "s3"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path, tokenizer: Tokenizer) -> Published:
    uri = f"{request.getfixturevalue('s3')}/d" if request.param == "s3" else str(tmp_path / "d")
    return Published(uri, tokenizer)


@pytest.fixture
def published(tmp_path: Path, tokenizer: Tokenizer) -> Published:
    return Published(str(tmp_path / "d"), tokenizer)


def samples_bytes(published: Published) -> dict[str, bytes]:
    return {path: published.store.read(f"samples/{path}") for path in lying_files(published.store, "samples")}


def test_the_bytes_are_gone_everywhere_and_nothing_else_changes(anywhere: Published) -> None:
    copy = Pair(70, picture=2)
    anywhere.refresh(pairs(1, 2, 3, 4, 5, 6, 7), [*pairs(8), copy])
    anywhere.refresh(pairs(9))
    withdraw(anywhere.uri, urls=[Pair(2).url], reason="takedown")
    before, rows = samples_bytes(anywhere), everything(Dataset(anywhere.uri))
    assert sum(Pair(2).image in data for data in before.values()) == 2  # the check below can fail
    result = purge(anywhere.uri)
    assert (result.files, result.samples, result.bytes, result.purged_before) == (2, 2, 2 * len(Pair(2).image), 0)
    after = samples_bytes(anywhere)
    assert not any(Pair(2).image[:16] in data for data in after.values())
    assert {path: len(data) for path, data in after.items()} == {path: len(data) for path, data in before.items()}
    for path, data in before.items():
        assert after[path] == data.replace(Pair(2).image, bytes(len(Pair(2).image)))
    assert everything(Dataset(anywhere.uri)) == rows
    assert verify(anywhere.uri, report=print).faults == 0
    again = purge(anywhere.uri)
    assert (again.files, again.samples, again.bytes, again.purged_before) == (0, 0, 0, 2)
    assert samples_bytes(anywhere) == after


def test_files_of_no_version_are_purged_too(published: Published) -> None:
    published.refresh(pairs(1, 2))
    name = "samples/killed-b00000-p00000.parquet"
    published.store.write(name, published.store.read("samples/refresh1-b00000-p00000.parquet"))
    withdraw(published.uri, urls=[Pair(1).url], reason="takedown")
    assert purge(published.uri).files == 2
    assert Pair(1).image[:16] not in published.store.read(name)


def test_copies_that_came_after_the_list_are_withdrawn_and_purged(published: Published) -> None:
    published.refresh(pairs(1, 2))
    withdraw(published.uri, urls=[Pair(1).url], reason="takedown")
    published.refresh([Pair(3, picture=1), *pairs(4)])  # a refresh must refuse it; this one did not
    result = purge(published.uri)
    assert result.samples == 2
    assert Pair(3).id in read_withdrawn(published.store).sample_ids.to_pylist()
    assert {row["sample_id"] for row in everything(Dataset(published.uri))} == {pair.id for pair in pairs(2, 4)}


def test_a_killed_purge_goes_on(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    published.refresh(pairs(1), pairs(2), pairs(3))
    withdraw(published.uri, urls=[Pair(n).url for n in (1, 2, 3)], reason="takedown")
    zero, done = purge_module._zero, []

    def killed(store: object, path: str, spans: object) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(path)
        zero(store, path, spans)

    with monkeypatch.context() as patch:
        patch.setattr(purge_module, "_zero", killed)
        with pytest.raises(KeyboardInterrupt):
            purge(published.uri)
    result = purge(published.uri)
    assert (result.samples, result.purged_before) == (2, 1)
    assert all(is_zero(image) for image in images(published))


def test_equal_bytes_beside_each_other_are_told_apart(published: Published) -> None:
    """A picture that is a part of another, which stays, and rows in every place of a row group."""
    whole, part = Pair(1), Pair(2)
    part.image = whole.image[50:150]
    published.refresh([whole, part, *pairs(3, 4, 5, 6)])
    withdraw(published.uri, sample_ids=[part.id], reason="takedown")
    purge(published.uri)
    kept = {row["sample_id"]: row["image"] for row in everything(Dataset(published.uri))}
    assert kept[whole.id] == whole.image
    assert len(kept) == 5
    assert sum(is_zero(image) for image in images(published)) == 1


def test_many_pages_are_walked(published: Published) -> None:
    """Pages end at 1 MiB by default: with larger pictures each has headers between its values."""
    big = pairs(1, 2, 3, 4, 5, 6)
    for pair in big:
        pair.image = pair.image * 3000  # 600 kB
    published.refresh(big)
    withdraw(published.uri, sample_ids=[pair.id for pair in big[::2]], reason="takedown")
    assert purge(published.uri).samples == 3
    assert sum(is_zero(image) for image in images(published)) == 3


def test_images_that_cannot_be_overwritten_in_place_are_refused(published: Published) -> None:
    published.refresh(pairs(1, 2, 3))
    path = "samples/refresh1-b00000-p00000.parquet"
    table = pq.read_table(io.BytesIO(published.store.read(path)))
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    published.store.write(path, buffer.getvalue())
    withdraw(published.uri, urls=[Pair(1).url], reason="takedown")
    with pytest.raises(
        RunFailed, match=r"keeps its images compressed \(SNAPPY\) or by a dictionary.*Export the dataset"
    ):
        purge(published.uri)


def test_damage_by_the_purge_itself_is_noticed(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    published.refresh(pairs(1, 2, 3))
    withdraw(published.uri, urls=[Pair(1).url], reason="takedown")
    with monkeypatch.context() as patch:
        patch.setattr(purge_module, "_zero", lambda store, path, spans: None)
        with pytest.raises(RunFailed, match=f"still holds the picture of {Pair(1).id} after its purge"):
            purge(published.uri)
    zero = purge_module._zero
    monkeypatch.setattr(
        purge_module, "_zero", lambda store, path, spans: zero(store, path, [span._replace(start=4) for span in spans])
    )
    with pytest.raises((RunFailed, pa.ArrowInvalid, OSError)):
        purge(published.uri)


def test_nothing_withdrawn_and_a_dataset_that_is_written(published: Published) -> None:
    published.refresh(pairs(1))
    assert purge(published.uri).samples == 0
    with (
        hold_lease(published.store, "coca data refresh", 0.6),
        pytest.raises(BadInput, match="is being written by `coca data refresh`"),
    ):
        purge(published.uri)


def test_a_samples_file_of_a_refresh_can_be_purged(published: Published) -> None:
    """The layout that purge needs is the one that a refresh writes."""
    from pipelines.part_files import encode_samples

    published.refresh(pairs(1, 2, 3, 4))
    path = "samples/refresh1-b00000-p00000.parquet"
    table = published.read("samples", "refresh1-b00000-p00000.parquet")
    published.store.write(path, encode_samples([table.slice(0, 3), table.slice(3)]))
    withdraw(published.uri, urls=[Pair(1).url], reason="takedown")
    assert purge(published.uri).samples == 1
    digests = {hashlib.sha256(image).hexdigest() for image in images(published) if not is_zero(image)}
    assert digests == {hashlib.sha256(pair.image).hexdigest() for pair in pairs(2, 3, 4)}


def images(published: Published) -> list[bytes]:
    """Stored pictures of all files, withdrawn or not."""
    paths = sorted(lying_files(published.store, "samples"))
    return [image for path in paths for image in published.read("samples", path)["image"].to_pylist()]
