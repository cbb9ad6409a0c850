"""A run's page, from a run folder made by hand: complete, self-contained, and nothing of strangers' texts unescaped."""

import io
import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from coca.errors import BadInput
from coca.goodput import LOSSES, NEW
from coca.run_folder import RunFolder
from jobs.charts import draw_series
from jobs.config import DataConfig, TrainRunConfig
from jobs.train_report import render_train_report, write_train_report

BEGAN = 1_800_000_000.0
HOSTILE = "</bdi><script>alert(1)</script>\u202e\x1b[31m"


def row(step: int, **changed: Any) -> dict[str, Any]:
    return {
        "step": step,
        "samples_seen": step * 96,
        "batch_digest": "0" * 16,
        "loss": 9.0 / step,
        "contrastive_loss": 3.0 / step,
        "captioning_loss": 3.0 / step,
        "learning_rate": 0.001,
        "grad_norm": 1.5,
        "temperature": 0.07,
        "skipped_steps": 0,
        "samples_per_s": 250.0,
        "data_wait": 0.01,
        "flop_utilisation_spec": None,
        "flop_utilisation_measured": 0.4,
        "peak_memory_gib": 1.25,
        **changed,
    }


def evaluated(recall: float) -> dict[str, float]:
    names = [f"{way}_recall_at_{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5)]
    return dict.fromkeys(names, recall) | {"caption_loss": 2.0}


def write_run(folder: Path, steps: int = 60) -> RunFolder:
    """A run of two attempts: killed at step 30, going on from step 20, with an evaluation every 10 steps."""
    run = RunFolder(folder)
    run.start(TrainRunConfig(data=(DataConfig(uri="data/mine"),), out=str(folder)).to_yaml())
    picture = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(picture, "JPEG")
    for number in (0, 1):
        run.store.write(f"evaluations/pictures/{number:05d}.jpg", picture.getvalue())
    for step in range(10, steps + 1, 10):
        measures = evaluated(step / 100)
        run.append_metrics(row(step) | {f"held_out_{name}": value for name, value in measures.items()})
        captions = [
            {"picture": 0, "caption": f"a guess at {step}", "accepted": [HOSTILE, "another"]},
            {"picture": 1, "caption": "", "accepted": ["a blue ring"]},
            {"picture": 2, "caption": HOSTILE, "accepted": ["a picture that is lost"]},
        ]
        values = {"step": step, "measures": measures, "captions": captions}
        run.store.write(f"evaluations/step_{step:09d}.json", json.dumps(values).encode())
    attempts = [
        {"time": BEGAN, "from_step": 0, "to_step": 30, "workers": 4},
        {"time": BEGAN + 50, "from_step": 20, "to_step": steps, "workers": 2},
        {"time": BEGAN + 90, "from_step": None, "to_step": None, "workers": 2},
    ]
    account = {
        "began": BEGAN,
        "until": BEGAN + 100,
        "phase": None,
        "seconds": dict.fromkeys((NEW, *LOSSES), 0.0) | {NEW: 70.0, "down": 20.0, "replayed": 10.0},
        "furthest_step": steps,
        "attempts": attempts,
    }
    run.store.write("goodput.json", json.dumps(account).encode())
    return run


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    run = write_run(tmp_path_factory.mktemp("report") / "run")
    path = write_train_report(run)
    assert path == f"{run.store.uri}/report.html"
    return run.store.read("report.html").decode()


class Page(HTMLParser):
    """Tags, what they point to, and handlers."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.targets: list[str | None] = []
        self.handlers: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.targets += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset")]
        self.handlers += [name for name, _ in attributes if name.startswith("on")]


def texts(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


def test_the_page_needs_no_other_file_and_forbids_any_request(page: str) -> None:
    parsed = Page(page)
    assert all(target and target.startswith(("data:", "#")) for target in parsed.targets)
    assert not {"script", "iframe", "object", "embed"} & set(parsed.tags)
    assert parsed.handlers == []
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert "default-src 'none'" in page


def test_texts_of_models_and_strangers_stay_text(page: str) -> None:
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 2
    assert not {"\u202e", "\x1b"} & set(page)


def test_every_curve_is_there_with_its_last_value(page: str) -> None:
    titles = re.findall(r"<h3>(.*?)</h3>", page)
    assert titles == [
        *("Losses", "Held-out caption loss", "Recall@1", "Recall@5", "Learning rate", "Gradient norm", "Temperature"),
        *("Samples per second", "Waiting for data", "FLOP utilisation", "Peak memory"),
    ]
    told = texts(page)
    pairs = ("captioning 0.05", "contrastive 0.05", "image to text 0.6", "text to image 0.6")
    for last in (*pairs, "of the measured product 0.4", "250", "1.25"):
        assert f" {last} " in told


def test_tiles_goodput_and_attempts_tell_the_numbers(page: str) -> None:
    told = texts(page)
    assert "steps 60 of 1,000, 6.0%" in told
    assert "loss 0.15 contrastive 0.05" in told
    assert "goodput 70.0% of 1m40s, 3 attempts" in told
    assert "FLOP utilisation 40.0% of a measured matrix product" in told
    assert 'aria-label="new steps 70.0%, down 20.0%, replayed 10.0%"' in page
    assert re.findall(r'<i class="(\w+)" style="width: ([\d.]+)%"', page) == [
        *(("new_steps", "70.000"), ("down", "20.000"), ("replayed", "10.000")),
    ]
    assert "2 2027-01-15 08:00:50 2 20 60" in told
    assert "3 2027-01-15 08:01:30 2 – –" in told


def test_captions_are_those_of_the_first_the_last_and_some_evaluations(page: str) -> None:
    first, empty, lost = re.findall(r'<figure class="written">(.*?)</figure>', page, re.S)
    assert texts(first).split()[:5] == ["10", "a", "guess", "at", "10"]
    assert re.findall(r"a guess at (\d+)", first) == ["10", "20", "30", "50", "60"]
    assert "(nothing)" in empty
    assert "no picture" in lost


def test_restarts_are_marked_on_the_curves() -> None:
    marked = draw_series([("", [10, 60], [1.0, 2.0])], "d", marks=[20])
    plain = draw_series([("", [10, 60], [1.0, 2.0])], "d")
    assert len(re.findall("<path", marked)) == len(re.findall("<path", plain)) + 1


def test_numbers_that_are_none_are_left_out_of_a_curve_and_spikes_stay_in() -> None:
    gaps = [1.0, math.nan, None, math.inf, 2.5]
    assert " 2.5 " in texts(draw_series([("", [1, 2, 3, 4, 5], gaps)], "d"))
    spiky = [1.0] * 100_000
    spiky[70_001] = 9000.0
    svg = draw_series([("", range(100_000), spiky)], "d")
    assert len(svg) < 60_000
    assert "8000" in texts(svg)  # a label of the axis that the spike needs
    ET.fromstring(draw_series([("none", [1], [math.nan]), ("one", [1], [2.0])], "d", log=True))


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time."""
    monkeypatch.setattr("jobs.train_report._charts", lambda rows, restarts: [])


@pytest.mark.usefixtures("no_charts")
def test_skipped_steps_are_told_where_they_were(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    run.append_metrics(row(61, skipped_steps=1, grad_norm=math.inf))
    run.append_metrics(row(70, skipped_steps=1))
    run.append_metrics(row(80, skipped_steps=3))
    told = texts(render_train_report(run))
    assert "3 steps had gradients that are no numbers" in told
    assert "1 step step 61 2 steps of steps 71 to 80" in told


@pytest.mark.usefixtures("no_charts")
def test_an_evaluation_of_a_step_that_is_to_be_replayed_is_not_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    run.forget_metrics_after(40)
    page = render_train_report(run)
    assert "a guess at 40" in page
    assert "a guess at 50" not in page


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.start(TrainRunConfig(data=(DataConfig(uri="data/mine"),), out="run").to_yaml())
    told = texts(render_train_report(run))
    assert "No step has been logged yet" in told
    assert "train.batch_size 96" in told
    run.append_metrics({key: row(1)[key] for key in ("step", "samples_seen", "loss")} | row(1))
    assert "steps 1 of 1,000" in texts(render_train_report(run))


@pytest.mark.usefixtures("no_charts")
def test_the_page_of_a_run_on_s3_lies_beside_it(s3: str) -> None:
    run = RunFolder(f"{s3}/run")
    run.start(TrainRunConfig(data=(DataConfig(uri="data/mine"),), out=run.store.uri).to_yaml())
    run.append_metrics(row(1))
    run.flush()
    assert write_train_report(run) == f"{s3}/run/report.html"
    assert "steps 1 of 1,000" in texts(run.store.read("report.html").decode())


def test_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no run"):
        render_train_report(RunFolder(tmp_path / "run"))
