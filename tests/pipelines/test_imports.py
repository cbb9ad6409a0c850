"""Importing img2dataset's output: its rows become samples by the same rules, without a request."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coca.dataset import Dataset
from coca.errors import BadInput
from pipelines.config import RefreshConfig
from pipelines.import_shards import list_shards, read_shard
from pipelines.imports import import_dataset
from pipelines.refresh import refresh
from pipelines.verify import verify

Build = Callable[..., RefreshConfig]
SHARDS = Path(__file__).parents[1] / "data" / "img2dataset"


def samples(dataset: str) -> dict[tuple[str, str], bytes]:
    opened = Dataset(dataset)
    tables = [
        opened.read_row_group(i, columns=("url", "caption", "image"), only_selected=False)
        for i in range(opened.row_groups.num_rows)
    ]
    return {(row["url"], row["caption"]): row["image"] for table in tables for row in table.to_pylist()}


@pytest.mark.parametrize("age_s", [0, 400 * 86400], ids=["new", "old"])
@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_what_was_fetched_is_taken_over(
    web: Any, refresh_config: Build, without_ray: None, kind: str, age_s: int, tmp_path: Path
) -> None:
    source = str(shutil.copytree(SHARDS / kind, tmp_path / "source"))
    for path in Path(source).iterdir():
        os.utime(path, (time.time() - age_s,) * 2)
    rows = [row for shard in list_shards(source) for row in read_shard(shard)]
    config = refresh_config([], image={"resize": "no", "limits": {"min_side": 1}})
    result = import_dataset(config, source)
    assert (result.links, result.requests, result.changed) == (len(rows), 0, True)
    bodies = {row.body for row in rows if row.body is not None}
    stored = samples(config.to)
    assert stored
    assert set(stored.values()) <= bodies
    assert result.samples + sum(result.rejected.values()) == len(rows)
    assert Dataset(config.to).record.kind == "import"
    faults: list[Any] = []
    verify(config.to, report=faults.append)
    assert faults == []
    assert import_dataset(config, source).changed is False
    assert not web.requests


def test_the_same_shards_under_another_name_are_nothing_new(
    refresh_config: Build, without_ray: None, tmp_path: Path
) -> None:
    shutil.copytree(SHARDS / "parquet", tmp_path / "copy")
    config = refresh_config([], image={"limits": {"min_side": 1}})
    first = import_dataset(config, str(SHARDS / "parquet"))
    again = import_dataset(config, str(tmp_path / "copy"))
    assert (again.changed, again.samples) == (False, first.samples)


def test_small_parts_give_the_same_rows(refresh_config: Build, without_ray: None) -> None:
    source = str(SHARDS / "parquet")
    config = refresh_config([], image={"limits": {"min_side": 1}})
    import_dataset(config, source)
    small = {"links_per_part": 1, "links_per_batch": 2}
    other = refresh_config([], to=f"{config.to}-small", image={"limits": {"min_side": 1}}, publish=small)
    import_dataset(other, source)
    assert samples(other.to) == samples(config.to)


def test_a_refresh_asks_again_what_failed_there(web: Any, pages: Any, refresh_config: Build, without_ray: None) -> None:
    source = str(SHARDS / "parquet")
    config = refresh_config([], image={"limits": {"min_side": 1}})
    result = import_dataset(config, source)
    failed = [row for shard in list_shards(source) for row in read_shard(shard) if row.body is None]
    assert len(failed) == sum(count for reason, count in result.rejected.items() if reason != "duplicate_image")
    links = [(row.url, row.caption) for row in failed]
    again = refresh(refresh_config(links, recheck={"dead_after_s": 0}))
    assert again.links == len(failed)


def test_a_folder_without_shards_is_refused_before_anything_is_made(refresh_config: Build, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    config = refresh_config([])
    with pytest.raises(BadInput):
        import_dataset(config, str(tmp_path / "empty"))
    assert not Path(config.to).exists()


def test_shards_that_change_after_a_kill_are_another_import(
    refresh_config: Build, without_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet as pq

    from pipelines import refresh as refresh_module

    source = tmp_path / "shards"
    shutil.copytree(SHARDS / "parquet", source)
    config = refresh_config([], image={"limits": {"min_side": 1}})
    expected = refresh_config([], to=f"{config.to}-expected", image={"limits": {"min_side": 1}})
    import_dataset(expected, str(source))
    write_plan = refresh_module.write_plan

    def killed(*arguments: Any) -> None:
        write_plan(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(refresh_module, "write_plan", killed)
        import_dataset(config, str(source))
    for path in source.glob("*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.take(list(range(table.num_rows - 1, -1, -1))), path)
    import_dataset(config, str(source))
    assert samples(config.to) == samples(expected.to)
