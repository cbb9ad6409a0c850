"""The stages up to the dataset, for real: every planted kind of dirt under its reason, and a second refresh is idle."""

import httpx
import pyarrow.parquet as pq
import pytest

from coca.dataset import Dataset
from jobs.demo.config import DemoConfig
from jobs.demo.stages import Folders, build_web, refresh_config, refresh_dataset, train_tokenizer
from jobs.demo.web import serve_web
from pipelines.refresh import refresh

CONFIG = DemoConfig(scenes=220)


@pytest.mark.ray
def test_every_planted_kind_of_dirt_is_found_and_a_second_refresh_asks_for_nothing(ray_cluster, tmp_path):
    folders = Folders(tmp_path)
    web = build_web(folders, CONFIG)
    train_tokenizer(folders, CONFIG)
    result = refresh_dataset(folders, CONFIG)
    assert result["rejected"] == web["rejected"]
    assert (result["links"], result["samples"]) == (web["links"], web["samples"])
    assert result["links"] == result["samples"] + sum(result["rejected"].values())

    dataset = Dataset(str(folders.dataset))
    assert dataset.record.selected == web["samples"]
    samples = dataset.read_row_group(0, columns=("sample_id", "width", "height", "caption", "url"))
    assert set(samples["width"].to_pylist()) == set(samples["height"].to_pylist()) == {48}
    links = {
        (row["url"], " ".join((row["caption"] or "").split())) for row in pq.read_table(folders.web.links).to_pylist()
    }
    assert set(zip(samples["url"].to_pylist(), samples["caption"].to_pylist(), strict=True)) <= links

    with serve_web(folders.web.root) as base:
        again = refresh(refresh_config(folders))
        assert httpx.get(f"{base}/-/requests").json() == {}
    assert not again.changed
    assert again.rejected == web["rejected"]
