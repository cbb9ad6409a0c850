"""The commands that keep a dataset: their exit codes, their words and their JSON."""

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from coca.dataset import Dataset, list_versions
from coca.tokenizer import Tokenizer
from jobs.commands import data_keeping
from tests.pipelines.published import Pair, Published, pairs


@pytest.fixture
def published(tmp_path: Path, tokenizer: Tokenizer) -> Published:
    dataset = Published(str(tmp_path / "d"), tokenizer)
    dataset.refresh([*pairs(1, 2), Pair(3, rejected="timeout")])
    dataset.refresh([Pair(3, rejected="not_found"), Pair(4, reason="near_duplicate")], config={"image": {"size": 128}})
    return dataset


def run(command: click.Command, *arguments: object, exit_code: int = 0) -> Result:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert result.exit_code == exit_code, result.output
    return result


def run_json(command: click.Command, *arguments: object, exit_code: int = 0) -> dict[str, Any]:
    return dict(json.loads(run(command, *arguments, "--json", exit_code=exit_code).stdout.splitlines()[-1]))


def test_history(published: Published) -> None:
    lines = run(data_keeping.history, published.uri).stdout.splitlines()
    assert len(lines) == 3
    assert lines[1].split() == ["1", "refresh", "2026-01-01T00:00:00+00:00", "-", "2", "2", "0"]
    assert lines[2].split() == ["2", "refresh", "2026-01-01T00:00:00+00:00", "1", "2", "3", "(+1)", "0"]
    assert [line["stored"] for line in run_json(data_keeping.history, published.uri)["versions"]] == [2, 3]


def test_diff(published: Published) -> None:
    text = run(data_keeping.diff, published.uri, 1, 2).stdout
    assert "added: 1\n             1  near_duplicate\n" in text
    assert "timeout -> not_found" in text
    assert "image.size: 64 -> 128" in text
    assert run_json(data_keeping.diff, published.uri, 1, 2)["added"] == {"near_duplicate": 1}


def test_rollback(published: Published) -> None:
    done = run_json(data_keeping.rollback, published.uri, "--to", 1)
    assert done == {"dataset": published.uri, "version": 3, "to": 1, "samples": 2}
    result = run(data_keeping.rollback, published.uri, "--to", 3, exit_code=2)
    assert "error: version 3 is the latest" in result.stderr


def test_verify_exits_1_on_a_fault_and_names_it(published: Published) -> None:
    assert "0 faults" in run(data_keeping.verify, published.uri).stdout
    path = "samples/refresh1-b00000-p00000.parquet"
    data = published.store.read(path)
    image = published.read("samples", "refresh1-b00000-p00000.parquet")["image"][0].as_py()
    published.store.write(path, data.replace(image, image[::-1]))
    result = run(data_keeping.verify, published.uri, exit_code=1)
    assert f"fault: {path} row group 0 row 0: the image does not match its sha256" in result.stdout
    done = run_json(data_keeping.verify, published.uri, "--version", 2, exit_code=1)
    assert done["faults"] == len(done["first_faults"]) == 1


def test_compact_and_vacuum(published: Published) -> None:
    assert run_json(data_keeping.compact, published.uri, "--min-files", 3)["buckets"] == 0
    assert "no bucket has 3 files" in run(data_keeping.compact, published.uri, "--min-files", 3).stdout
    assert run_json(data_keeping.compact, published.uri)["version"] == 3
    text = run(data_keeping.vacuum, published.uri, "--keep", 1, "--pin", 2, "--dry-run").stdout
    assert "would delete versions/1.json" in text
    assert list_versions(published.store) == [1, 2, 3]
    done = run_json(data_keeping.vacuum, published.uri, "--keep", 1, "--pin", 2)
    assert (done["kept"], done["pinned"], done["dropped"]) == ([2, 3], [2], [1])
    assert "pinned" in run(data_keeping.history, published.uri).stdout
    run(data_keeping.vacuum, published.uri, "--keep", 0, exit_code=2)


def test_withdraw_and_purge(published: Published, tmp_path: Path) -> None:
    targets = tmp_path / "takedowns.txt"
    targets.write_text(f"{Pair(1).url}\n{'f' * 64}\n")
    done = run_json(
        data_keeping.withdraw, published.uri, "--from", targets, "--sample-id", Pair(4).id, "--reason", "takedown"
    )
    assert (done["samples"], done["pictures"], done["refused"], done["withdrawn"]) == (2, 2, 1, 2)
    assert sum(Dataset(published.uri).row_groups["selected"].to_pylist()) == 1
    assert "overwrote 2 pictures" in run(data_keeping.purge, published.uri).stdout
    assert run_json(data_keeping.purge, published.uri)["purged_before"] == 2
    result = run(data_keeping.withdraw, published.uri, "--reason", "takedown", exit_code=2)
    assert "nothing to withdraw is named" in result.stderr
    run(data_keeping.withdraw, published.uri, "--url", Pair(1).url, exit_code=2)  # no reason


@pytest.mark.parametrize("name", ["history", "verify", "compact", "vacuum", "purge"])
def test_no_dataset_is_bad_input(name: str, tmp_path: Path) -> None:
    result = run(getattr(data_keeping, name), tmp_path, exit_code=2)
    assert "holds no published dataset version" in result.stderr
    assert list(tmp_path.iterdir()) == []
