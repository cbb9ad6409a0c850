"""`coca data` over links that need no request, so that no Ray is started where none is needed."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from coca.tokenizer import train_bpe
from jobs.cli import cli


def data(*words: str) -> Result:
    return CliRunner().invoke(cli, ["data", *words])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("jobs.cluster.connect", lambda: pytest.fail("Ray is started, and nothing is to be fetched"))
    (tmp_path / "links.csv").write_text("URL,TEXT\nnonsense,a red circle\nhttp://a/1,\n,a blue square\n")
    (tmp_path / "tokenizer.json").write_text(train_bpe(["a red circle"], 270).to_json())
    return tmp_path


def refresh(folder: Path, *words: str) -> Result:
    columns = ("--url-column", "URL", "--caption-column", "TEXT")
    place = ("--links", f"{folder}/links.csv", "--to", f"{folder}/mine", "--tokenizer", f"{folder}/tokenizer.json")
    return data("refresh", *place, *columns, *words)


def test_refresh_prints_the_funnel_and_show_prints_the_version(folder: Path) -> None:
    result = refresh(folder, "--json")
    assert result.exit_code == 0, result.output
    assert "- invalid_url   2  66.7% " in result.stdout
    assert "published version 1 with 0 samples, after 0 requests" in result.stdout
    facts = json.loads(result.stdout.splitlines()[-1])
    assert (facts["version"], facts["changed"], facts["links"]) == (1, True, 3)
    assert facts["rejected"] == {"invalid_url": 2, "empty_caption": 1}

    again = refresh(folder)
    assert again.exit_code == 0
    assert "nothing due; version 1 stands" in again.stdout

    shown = data("show", f"{folder}/mine", "--json")
    assert shown.exit_code == 0, shown.output
    assert "links 3 rows in " in shown.stdout
    assert "- empty_caption 1  33.3%" in shown.stdout
    assert json.loads(shown.stdout.splitlines()[-1])["record"]["funnel"]["links"] == 3


def test_flags_go_over_set_and_set_over_the_file(folder: Path) -> None:
    (folder / "config.yaml").write_text("judge: {min_words: 7, max_words: 9}\nlinks: {url_column: nope}\n")
    config = ("--config", f"{folder}/config.yaml", "--set", "judge.max_words=8")
    assert refresh(folder, *config).exit_code == 0
    record = json.loads((folder / "mine/versions/1.json").read_text())
    assert (record["config"]["judge"]["min_words"], record["config"]["judge"]["max_words"]) == (7, 8)
    assert record["config"]["links"]["url_column"] == "URL"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--links", "{}/no.parquet"], "no.parquet does not exist. Give a Parquet, CSV, TSV or JSON lines file"),
        (["--url-column", "url"], "has no column 'url'. Did you mean 'URL'? It has URL, TEXT"),
        (["--tokenizer", "{}/no.json"], "cannot read the tokenizer"),
        (["--set", "fetch.timout_s=3"], "unknown config key 'fetch.timout_s'. Did you mean 'timeout_s'?"),
        (["--to", "ftp://a/b"], "storage scheme 'ftp' is not supported"),
    ],
)
def test_wrong_use_is_one_line_and_exit_2(folder: Path, words: list[str], line: str) -> None:
    result = refresh(folder, *(word.format(folder) for word in words))
    assert result.exit_code == 2
    assert line in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (folder / "mine").exists()


def test_show_of_nothing_is_exit_2(tmp_path: Path) -> None:
    result = data("show", str(tmp_path))
    assert result.exit_code == 2
    assert "holds no published dataset version" in result.stderr


def test_help_has_examples() -> None:
    for words in (["refresh", "--help"], ["show", "--help"]):
        assert "Examples:\n    coca data" in data(*words).stdout
