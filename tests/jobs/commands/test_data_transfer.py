import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from coca.dataset import Dataset
from jobs.cluster import connect
from jobs.commands.data_transfer import export, import_command


@dataclass
class Result:
    dataset: str
    version: int
    version_samples: int
    links: int
    samples: int
    rejected: dict[str, int]


def test_export_of_a_dataset(make_dataset: Callable[..., Dataset], tmp_path: Path) -> None:
    arguments = [make_dataset().store.uri, "--to", str(tmp_path / "out"), "--samples-per-shard", "20"]
    done = CliRunner().invoke(export, [*arguments, "--format", "webdataset", "--json"])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{tmp_path}/out: 30 samples of version 1 in 2 shards, ")
    assert f"'{tmp_path}/out/{{00000..00001}}.tar' --train-num-samples 30" in lines[1]
    result = json.loads(lines[-1])
    assert (result["samples"], result["shards"], result["written"], result["format"]) == (30, 2, 2, "webdataset")
    assert (tmp_path / "out/00001.tar").stat().st_size + (tmp_path / "out/00000.tar").stat().st_size == result["bytes"]


def test_wrong_use_of_export(make_dataset: Callable[..., Dataset], tmp_path: Path) -> None:
    uri = make_dataset().store.uri
    assert CliRunner().invoke(export, [uri, "--to", "x", "--format", "tfrecord"]).exit_code == 2
    refused = CliRunner().invoke(export, [str(tmp_path / "none"), "--to", str(tmp_path / "x"), "--format", "parquet"])
    assert refused.exit_code == 2
    assert "holds no published dataset version" in refused.stderr


def test_import_hands_over_the_resolved_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []

    def import_dataset(config: Any, source: str, *, start_ray: object) -> Any:
        seen.extend([config, source, start_ray])
        return Result("mine", version=1, version_samples=5, links=9, samples=5, rejected={"timeout": 1, "not_found": 3})

    monkeypatch.setattr("pipelines.imports.import_dataset", import_dataset, raising=False)
    (tmp_path / "config.yaml").write_text("to: elsewhere\nimage: {size: 512}\n")
    arguments = ["shards", "--to", "mine", "--tokenizer", "t.json", "--config", str(tmp_path / "config.yaml")]
    done = CliRunner().invoke(import_command, [*arguments, "--set", 'image.resize="no"', "--json"])
    assert done.exit_code == 0, done.output
    config, source, start_ray = seen
    assert (source, config.to, config.tokenizer, config.image.size, config.image.resize) == (
        "shards",
        "mine",
        "t.json",
        512,
        "no",
    )
    assert start_ray is connect
    assert "mine: version 1 with 5 samples; of 9 links in shards 5 are in it" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["rejected"] == {"timeout": 1, "not_found": 3}
