"""The page: one file, nothing unescaped, right and wrong told in words."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from jobs.report import Answer, ReportData, Score, write_report

PICTURE = "data:image/png;base64,AAAA"
ROWS = [
    {
        "step": step,
        "loss": 5.0 / step,
        "contrastive_loss": 2.0 / step,
        "captioning_loss": 1.0 / step,
        "learning_rate": 0.01,
        "grad_norm": 1.5,
        "samples_per_s": 200.0,
    }
    for step in (10, 20, 30)
]
TRIAL = {"trial": 0, "contrastive_weight": 1.0, "captioning_weight": 2.0, "recall_at_1": 0.5, "perplexity": 2.0}
SUMMARY = {
    "links": 12,
    "samples": 9,
    "rejected": {"not_found": 2, "timeout": 1},
    "train": {"steps": 30, "workers": 2, "samples_per_s": None, "final_loss": 0.5},
    "tune": {"trials": [TRIAL | {"score": 1.0}], "best": TRIAL | {"score": 1.0}},
    "evaluate": {
        "held_out": 2,
        "exact_caption": 0.5,
        "image_to_text_recall_at_1": 0.75,
        "chance_image_to_text_at_1": 0.005,
    },
    "serve": {
        "captions": [{"expected": "a red star", "caption": "a red star", "exact": True, "latency_ms": 12.0}],
        "embedding_dim": 128,
        "similarity": {"own_caption": 0.8, "other_captions": None},
        "bad_image_status": 400,
    },
}
DATA = ReportData(
    summary=SUMMARY,
    stages=[{"name": "web", "title": "a web", "told": "12 links", "wall_s": 0.25}],
    planted={"not_found": 2, "timeout": 2},
    metrics=ROWS,
    one=[
        Answer.judge(PICTURE, ["a red star", "the star is red"], "a red star"),
        Answer.judge(PICTURE, ["a red star", "the star is red"], "the star is blue"),
    ],
    two=[],
    scores=[Score("exact caption", 0.5, 0.25)],
    served=[Answer.judge(PICTURE, ["a red star"], "<script>alert(1)</script>")],
    run="runs/demo/run",
)


@pytest.fixture
def page(tmp_path):
    write_report(tmp_path / "report.html", DATA)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


class Links(HTMLParser):
    """Everything the page points to, and its tags."""

    def __init__(self, page):
        super().__init__()
        self.targets, self.tags = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.targets += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset")]


def test_the_page_needs_no_other_file_and_no_network(page):
    links = Links(page)
    assert all(target.startswith(("data:", "#")) for target in links.targets)
    assert not {"script", "iframe", "object", "link rel=stylesheet"} & set(links.tags)
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_what_a_model_wrote_cannot_become_markup(page):
    assert "<script>" not in page
    assert "alert(1)" in page


def test_right_and_wrong_are_told_in_words_and_the_wrong_word_is_marked(page):
    assert page.count("✓ exact") == 1
    assert page.count("✗ differs") == 2
    assert "<em>blue</em>" in page
    assert '<span class="truth">the star is red</span>' in page


def test_the_funnel_shows_what_was_planted_beside_what_was_found(page):
    rows = {
        re.sub(r"<[^>]+>", "", cells[0]): [re.sub(r"<[^>]+>", "", cell) for cell in cells[2:]]
        for cells in (re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page, re.S))
        if len(cells) == 5
    }
    assert rows["not found"] == ["2", "2", "✓"]
    assert rows["timeout"] == ["1", "2", "✗"]


def test_scores_stand_beside_chance(page):
    assert 'aria-label="0.500, chance 0.2500"' in page
    assert "left: 25.00%" in page


def test_light_and_dark_and_narrow(page):
    assert "prefers-color-scheme: dark" in page
    assert "max-width: 620px" in page
    assert 'name="viewport"' in page


def test_a_missing_field_is_an_error_and_not_a_gap(tmp_path):
    summary = SUMMARY | {"train": {"steps": 30}}
    with pytest.raises(Exception, match="no attribute 'workers'"):
        write_report(tmp_path / "report.html", replace(DATA, summary=summary))


def test_an_answer_is_compared_with_the_nearest_true_caption():
    answer = Answer.judge(PICTURE, ["a red star on black", "on black, a red star"], "on black, a red ring")
    assert answer.expected == "on black, a red star"
    assert answer.words == [("on", True), ("black,", True), ("a", True), ("red", True), ("ring", False)]
