"""`coca data select` and `coca data retokenize` as commands: settings go over the standing ones."""

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from coca.dataset import Dataset
from coca.tokenizer import Tokenizer, train_bpe
from jobs.cluster import ClusterInfo
from jobs.commands.data_selection import retokenize, select
from pipelines.select_config import SelectConfig
from tests.stored_dataset import publish, row

CONFIG = {
    "judge": {"min_words": 2},
    "image": {"limits": {"min_side": 32}},
    "select": SelectConfig(duplicates="none").model_dump(mode="json"),
}


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("jobs.cluster.connect", lambda: pytest.fail("Ray is started for a few rows"))
    rows = [row("a", "two words"), row("b", "three words here"), row("c", "now four words here", language="de")]
    publish(tmp_path / "mine", tokenizer, rows, config=CONFIG)
    (tmp_path / "t.json").write_text(train_bpe(["two words"], 280).to_json())
    return tmp_path


def run(command: click.Command, *words: str) -> Result:
    return CliRunner().invoke(command, [*words, "--json"])


def facts(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout.splitlines()[-1]))


def test_settings_go_over_the_standing_ones(folder: Path) -> None:
    first = run(select, f"{folder}/mine", "--set", "select.min_words=3")
    assert "- caption_too_short 1  33.3%" in first.stdout
    assert "version 2 selects 2 of 3 stored pairs (-1; 1 verdicts changed)" in first.stdout
    assert facts(first)["rejected"] == {"caption_too_short": 1}
    (folder / "c.yaml").write_text("select: {languages: [en]}\n")
    second = run(select, f"{folder}/mine", "--config", f"{folder}/c.yaml")
    assert facts(second)["rejected"] == {"caption_too_short": 1, "language": 1}
    third = run(select, f"{folder}/mine", "--set", "select.min_words=null")
    assert facts(third)["rejected"] == {"language": 1}
    expected = SelectConfig(duplicates="none", languages=("en",))
    assert Dataset(f"{folder}/mine").record.config["select"] == expected.model_dump(mode="json")
    again = run(select, f"{folder}/mine")
    assert "was selected by these rules already" in again.stdout
    assert facts(again)["version"] == 4


def test_a_gpu_that_is_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = ClusterInfo(address="", dashboard_url="", started_here=True, cpus=4, gpus=0, nodes=1)
    monkeypatch.setattr("jobs.cluster.connect", lambda: here)
    result = run(select, f"{folder}/mine", "--scorer", "jobs.scorers:CheckpointScorer", "--scorer-gpus", "1")
    assert result.exit_code == 2
    assert "1 scorers with 1 GPUs each: this machine has 0" in result.stderr


def test_other_tokens(folder: Path) -> None:
    result = facts(run(retokenize, f"{folder}/mine", "--tokenizer", f"{folder}/t.json"))
    assert (result["version"], result["changed"], result["stored"]) == (2, True, 3)
    again = run(retokenize, f"{folder}/mine", "--tokenizer", f"{folder}/t.json")
    assert "has the tokens of" in again.stdout
    assert not facts(again)["changed"]


@pytest.mark.parametrize(
    ("command", "words", "line"),
    [
        (select, ["--set", "select.min_words=1"], "select.min_words = 1 is looser than what version 1 admitted"),
        (select, ["--set", "select.min_word=3"], "unknown config key 'select.min_word'. Did you mean 'min_words'?"),
        (select, ["--set", "select.min_scores={x: 1}"], "'x', a score that no stored pair has"),
        (select, ["--scorer", "{}/none"], "is not a checkpoint"),
        (select, ["--set", "select.contaminants=[{}/none]"], "cannot read the hash list"),
        (retokenize, ["--tokenizer", "{}/none.json"], "cannot read the tokenizer"),
    ],
)
def test_wrong_use_is_one_line_and_exit_2(folder: Path, command: click.Command, words: list[str], line: str) -> None:
    result = run(command, f"{folder}/mine", *(word.replace("{}", str(folder)) for word in words))
    assert result.exit_code == 2, result.output
    assert line in result.stderr
    errors = [text for text in result.stderr.splitlines() if text.startswith("error:")]
    assert len(errors) == 1
    assert Dataset(f"{folder}/mine").record.version == 1


def test_no_dataset(tmp_path: Path) -> None:
    result = run(select, f"{tmp_path}/none")
    assert (result.exit_code, "holds no published dataset version" in result.stderr) == (2, True)
