"""The pages about a dataset: self-contained, every stranger's text escaped, every picture encoded anew."""

import base64
import io
import re
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs.data_report import render_report, render_rows, thumbnail
from jobs.data_report_figures import bytes_told, draw_churn, draw_days, draw_histogram, draw_sizes
from pipelines.churn import Change
from pipelines.histogram import Histogram
from pipelines.survey import Survey, survey
from tests.seeing_fixtures import picture, publish_world, withdraw

HOSTILE = "\u202e<img src=x onerror=alert(2)>\x1b[31m\x00"


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Survey:
    return survey(publish_world(tmp_path_factory.mktemp("report") / "world"), against=1)


@pytest.fixture(scope="module")
def page(measured: Survey) -> str:
    return render_report(measured)


class Page(HTMLParser):
    """Tags, links and the attributes that name a resource."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.links: list[dict[str, str | None]] = []
        self.sources: list[str | None] = []
        self.handlers: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        named = dict(attributes)
        if tag == "a":
            self.links.append(named)
        elif tag != "link":
            self.sources += [named[name] for name in ("src", "href", "xlink:href", "srcset", "data") if name in named]
        self.handlers += [name for name in named if name.startswith("on")]


def texts(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


def test_the_page_needs_no_other_file_and_forbids_any_request(page: str) -> None:
    parsed = Page(page)
    assert all(source and source.startswith(("data:image/jpeg;base64,", "#")) for source in parsed.sources)
    assert not parsed.tags.keys() & {"script", "iframe", "object", "embed", "form", "base"}
    assert parsed.handlers == []
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in page


def test_captions_of_strangers_stay_text(page: str) -> None:
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; a $cat$" in page


def test_only_web_urls_are_links_and_they_tell_nobody(page: str) -> None:
    parsed = Page(page)
    assert parsed.links
    assert all(re.match(r"https?://", link["href"] or "") for link in parsed.links)
    assert all("noreferrer" in (link["rel"] or "").split() for link in parsed.links)
    assert "javascript:alert(1)" in texts(page)


def test_hostile_names_everywhere_stay_text(measured: Survey) -> None:
    hostile = replace(measured.rows, languages=Counter({HOSTILE: 2}), formats=Counter({HOSTILE: 1}))
    hostile.scores = {HOSTILE: measured.rows.scores["clip"], "$\\frac{": measured.rows.scores["clip"]}
    ledger = replace(measured.ledger, hosts={HOSTILE: Counter({"admitted": 1})}, verdicts=Counter({(HOSTILE, None): 1}))
    record = measured.record | {"unapplied_rules": [HOSTILE]}
    page = render_report(replace(measured, uri=HOSTILE, rows=hostile, ledger=ledger, record=record))
    parsed = Page(page)
    assert parsed.handlers == []
    assert set(parsed.sources) == set(Page(render_report(measured)).sources)
    assert "&lt;img src=x onerror=alert(2)&gt;" in page


def test_the_numbers_of_the_survey_stand_on_the_page(page: str) -> None:
    told = texts(page)
    assert "7 selected of 10 stored" in told
    assert "15 16 events in the ledger" in told
    assert "not found 2 16.7%" in told  # the funnel: of 12 links
    assert "dead not found 2 13.3%" in told  # the ledger: of 15 pairs
    assert "1 as duplicate image, 1 as near duplicate, 1 as score" in told
    for title in ("Width and height", "Aspect ratio", "Image bytes", "words", "tokens", "Score: clip", "Fetched"):
        assert title in told
    assert "mean 1.57, median ~1.08, 10 to 90 %: ~1.02 to" in told
    assert "en 4 57.1% 60.0% in 1" in told
    assert "3 select 2026-03-03 00:00 0 0 10 7 -1" in told
    assert "3 beside 1 select" in told


def test_kept_and_refused_pictures_are_shown_by_reason(page: str) -> None:
    assert Page(page).tags["img"] == 10
    headings = re.findall(r'<h3 class="reason">(.*?) <span class="soft">(.*?)</span>', page)
    assert sorted(headings) == [("duplicate image", "1 rows"), ("near duplicate", "1 rows"), ("score", "1 rows")]


def test_a_withdrawn_picture_is_not_on_the_page(tmp_path: Path) -> None:
    uri = publish_world(tmp_path / "world")
    before = render_report(survey(uri))
    withdraw(uri, 4)
    after = render_report(survey(uri))
    shown = thumbnail(picture(4), 200)
    assert shown is not None
    assert shown in before
    assert shown not in after
    assert "withdrawn 1" in texts(after)


def test_a_sample_of_a_large_version_says_so(tmp_path: Path) -> None:
    uri = publish_world(tmp_path / "world")
    told = texts(render_report(survey(uri, max_rows=1, max_events=4)))
    assert re.search(r"of its 10 rows were looked at, those of 1 of 2 files drawn with seed 0", told)
    assert re.search(r"these are the counts of \d of its \d+ buckets", told)


def test_an_empty_version_has_a_page(measured: Survey) -> None:
    fresh = type(measured.rows)(), type(measured.ledger)()
    bare = replace(measured, rows=fresh[0], ledger=fresh[1], other=None, against=None, churn=measured.churn[:1])
    page = render_report(replace(bare, record=measured.record | {"funnel": {}}))
    assert "Every stored row is selected" in page
    assert "No pair was refused" in page
    assert "holds no funnel" in page


def test_a_thumbnail_is_small_and_carries_nothing_of_the_source() -> None:
    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x010E] = "a secret"
    Image.new("RGB", (3000, 500), "red").save(out, "JPEG", exif=exif)
    shown = thumbnail(out.getvalue(), 200)
    assert shown is not None
    data = base64.b64decode(shown.removeprefix("data:image/jpeg;base64,"))
    assert Image.open(io.BytesIO(data)).size == (200, 33)
    assert b"secret" not in data
    assert thumbnail(b"no picture", 200) is None


ROW: dict[str, Any] = {
    "sample_id": "a" * 32,
    "url": "javascript:alert(3)",
    "caption": HOSTILE,
    "width": 64,
    "selected": True,
    "reason": None,
    "extra": '{"</style>": 1}',
    "scores": [("<b>", 0.5), ("none", None)],
}


def test_rows_are_shown_with_their_fields() -> None:
    page = render_rows("data/mine", 3, [ROW], {"a" * 32: b"broken"}, where="width > 3 and '<i>' = 'x'", told="Rows")
    parsed = Page(page)
    assert (parsed.links, parsed.handlers, parsed.tags["img"], parsed.tags["style"]) == ([], [], 0, 1)
    told = texts(page)
    assert "cannot be decoded" in told
    assert "javascript:alert(3)" in told
    assert "scores.&lt;b&gt; 0.5" in told
    assert "width &gt; 3 and" in told
    assert not {"\u202e", "\x1b", "\x00"} & set(page)
    assert "No row matches" in render_rows("data/mine", 3, [], {}, where=None, told="Rows")


def charts() -> list[str]:
    sizes = np.zeros((20, 20), dtype=np.int64)
    sizes[3, 4], sizes[8, 8] = 1, 900
    aspect = Histogram(-4, 4, log2=True)
    aspect.add(np.array([0.5, 0.75, 1, 1, 16]))
    score = Histogram.fitting(np.array([0.5]))
    score.add(np.array([0.1, 0.5, 0.5]))
    change = Change(1, None, "refresh", "", 5, 0, 0, 4, 4, False, 9)
    return [
        draw_sizes(sizes, "sizes"),
        draw_histogram(aspect, score, "w : h", "aspect", kind="ratio"),
        draw_histogram(score, aspect, "score", "score"),
        draw_days(Counter({"2026-01-01": 3, "2026-01-03": 1}), "days"),
        draw_days(Counter({"2020-01-01": 3, "2026-01-03": 1}), "months"),
        draw_churn([change, replace(change, version=2, parent=1, removed=3)], "churn"),
    ]


def test_charts_are_well_formed_and_take_their_colours_from_the_page() -> None:
    for svg in charts():
        root = ET.fromstring(svg)
        assert root.get("role") == "img"
        colours = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svg))
        assert colours <= {"none", "currentColor", "var(--first)", "var(--second)", "var(--line)", "var(--card)"}


def test_charts_are_the_same_each_time() -> None:
    assert charts() == charts()


def test_days_become_months_where_there_are_many() -> None:
    *_, days, months, _ = charts()
    assert "2026-01-02" in days
    assert {"2020-01", "2026-01"} <= set(re.findall(r">(20\d\d-\d\d)<", months))


def test_the_share_of_a_bin_is_kept_on_other_bins() -> None:
    from jobs.data_report_figures import _shares

    fine, coarse = Histogram(0, 8, 16), Histogram(0, 16, 16)
    for histogram in (fine, coarse):
        histogram.add(np.array([0.2, 1.5, 1.7, 7.1]))
    assert _shares(fine, coarse.edges)[:8].tolist() == pytest.approx(coarse.counts[:8] / 4)


def test_bytes_are_told_in_their_unit() -> None:
    assert [bytes_told(n) for n in (0, 1023, 1024, 1536, 20 * 1024**2, 5 * 1024**5)] == [
        *("0 B", "1023 B", "1 KiB", "1.5 KiB", "20 MiB", "5120 TiB"),
    ]
