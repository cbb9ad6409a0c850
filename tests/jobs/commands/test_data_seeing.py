"""`coca data show`, `report` and `explain` as commands: what they print, write and refuse."""

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from jobs.commands.data_seeing import explain, report, show
from tests.seeing_fixtures import caption, key, publish_world, url, withdraw

group = click.Group("data", commands={"show": show, "report": report, "explain": explain})


def data(*words: str) -> Result:
    return CliRunner().invoke(group, list(words))


def facts(*words: str) -> dict[str, Any]:
    result = data(*words, "--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return publish_world(tmp_path_factory.mktemp("seeing") / "world")


def test_show_tells_the_version_and_lists_its_first_samples(uri: str) -> None:
    result = data("show", uri, "--rows", "2")
    assert result.exit_code == 0, result.output
    assert "version 3 (latest 3, 3 kept)" in result.stdout
    assert "samples: 7 selected of 10 stored" in result.stdout
    assert "- not_found" in result.stdout
    assert result.stdout.splitlines()[-1] == "    128 x 64    png   en  'picture 1 of'  http://one.example/p1.png"
    shown = facts("show", uri, "--version", "1", "--rows", "100")
    assert shown["record"]["version"] == 1
    assert [row["sample_id"] for row in shown["samples"]] == [key(n) for n in range(5)]
    assert shown["samples"][1]["scores"] == {"clip": pytest.approx(0.1)}


def test_a_filter_lists_what_matches_and_says_how_many(uri: str) -> None:
    result = data("show", uri, "--where", "width > 64 and language = 'en'")
    assert result.exit_code == 0, result.output
    assert "version 3" not in result.stdout
    assert result.stdout.splitlines()[-1] == "2 rows"
    assert data("show", uri, "--where", "width > 0", "--rows", "2").stdout.endswith("2 rows (--rows N for more)\n")


def test_a_filter_by_reason_looks_at_every_row_and_unselected_at_the_others(uri: str) -> None:
    def ids(*words: str) -> list[str]:
        return [row["sample_id"] for row in facts("show", uri, *words)["samples"]]

    assert ids("--where", "reason = 'score'") == [key(8)]
    assert ids("--where", "selected or width > 0", "--rows", "20") == [key(n) for n in range(10)]
    assert ids("--unselected") == [key(5), key(7), key(8)]
    assert ids("--unselected", "--where", "width = 128") == [key(7)]
    assert ids("--where", "tokens > 100") == []


def test_show_writes_a_page_with_the_rows_and_their_pictures(uri: str, tmp_path: Path) -> None:
    out = tmp_path / "rows.html"
    result = data("show", uri, "--where", "fetched_at > '2026-03-03' and scores.clip < 0.5", "--html", str(out))
    assert result.exit_code == 0, result.output
    assert f"wrote {out}" in result.stdout
    page = out.read_text(encoding="utf-8")
    assert page.count("<img ") == 2  # number 2 came at midnight, not later
    assert page.count("<dt>fetched_at</dt>") == 2
    assert "<script" not in page


def test_a_withdrawn_row_is_listed_nowhere(tmp_path: Path) -> None:
    uri = publish_world(tmp_path / "world")
    withdraw(uri, 0)
    shown = facts("show", uri, "--rows", "20", "--html", str(tmp_path / "rows.html"))
    assert key(0) not in {row["sample_id"] for row in shown["samples"]}
    assert key(0) not in (tmp_path / "rows.html").read_text(encoding="utf-8")
    told = data("explain", uri, url(0)).stdout
    assert "withdrawn  2026-03-01 00:00:00 takedown, by its url" in told
    assert "withdrawn  yes: no reader sees it (aaaa-b00000-p00000.parquet row group 0 row 0)" in told


def test_report_writes_a_page_into_the_working_directory(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = facts("report", uri)
    assert told == {
        **{"dataset": uri, "version": 3, "out": str(tmp_path / "report.html"), "rows": 10, "selected": 7},
        **{
            "unselected": {"duplicate_image": 1, "near_duplicate": 1, "score": 1},
            "withdrawn": 0,
            "pairs": 15,
            "due": 2,
        },
    }
    assert "<title>" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_report_compares_two_versions(uri: str, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    result = data("report", uri, "--compare", "1", "--out", str(out), "--seed", "3")
    assert result.exit_code == 0, result.output
    assert "10 rows and 15 pairs looked at" in result.stdout
    page = out.read_text(encoding="utf-8")
    assert 'class="other"></i>version 1' in page
    assert "drawn with seed 3" in page


def test_explain_tells_why_a_row_is_not_selected(uri: str) -> None:
    result = data("explain", uri, url(5) + "#top")
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert f"known as {url(5)}" in lines
    assert "selected no: duplicate_image" in lines
    assert f"in favour {url(2)} {caption(2)!r} (the same bytes)" in lines
    assert "stored aaaa-b00000-p00000.parquet row group 1 row 1" in lines
    near = " ".join(data("explain", uri, url(7)).stdout.split())
    assert f"in favour {url(6)} {caption(6)!r} (1 of 64 bits apart)" in near


def test_explain_of_an_unknown_url_names_the_nearest(uri: str) -> None:
    result = data("explain", uri, "http://two.example/p5.jpg\x1b[2J")
    assert result.exit_code == 0, result.output
    assert f"has never seen it; the nearest that is known: {url(5)}" in result.stdout
    assert "\x1b" not in result.stdout
    told = facts("explain", uri, "http://two.example/slow")
    assert [event["state"] for event in told["events"]] == ["transient", "transient"]
    assert told["pairs"][0]["row"] is None


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["show", "{}", "--where", "widht > 3"], "there is no column 'widht'. Did you mean 'width'?"),
        (["show", "{}", "--html", "/nowhere/rows.html"], "--html /nowhere/rows.html: /nowhere is no folder"),
        (["show", "{}/none"], "holds no published dataset version"),
        (["report", "{}", "--out", "/nowhere/a.html"], "--out /nowhere/a.html: /nowhere is no folder. Make it first."),
        (["report", "{}", "--out", "{}"], "is a folder. Name a file in it."),
        (["report", "{}", "--compare", "9"], "has no version 9. It has 1, 2, 3."),
        (["explain", "{}/none", "http://a.example/"], "holds no published dataset version"),
    ],
)
def test_wrong_use_is_one_line_and_exit_2(uri: str, words: list[str], line: str) -> None:
    result = data(*(word.format(uri) for word in words))
    assert result.exit_code == 2
    assert line in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_help_has_examples() -> None:
    for name in group.commands:
        assert f"Examples:\n    coca data {name}" in data(name, "--help").stdout
