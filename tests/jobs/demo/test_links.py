"""The generated web: planted counts are exact, pictures differ, and the same arguments give the same files."""

import hashlib
import json
from collections import Counter

import pyarrow.parquet as pq
import pytest

from coca.contract import Reason, canonical_url, sample_id
from coca.images import ImageLimits, ImageProblem, decode, decode_rgb
from jobs.demo.grammar import captions
from jobs.demo.links import make_web
from jobs.demo.planting import PLANTED
from jobs.demo.split import training_scenes
from jobs.demo.web import read_pages

LIMITS = ImageLimits(min_side=32, max_aspect_ratio=5)


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    return make_web(tmp_path_factory.mktemp("web"), seed=1, count=400)


@pytest.fixture(scope="module")
def rows(web):
    return pq.read_table(web.links).to_pylist()


def bodies(web):
    return {path: (web.root / page.file).read_bytes() for path, page in read_pages(web.root).items()}


def test_links_are_samples_and_planted_dirt(web, rows):
    expected = web.expected
    assert expected["rejected"] == {reason.value: count for reason, count in PLANTED.items()}
    assert expected["links"] == len(rows) == expected["samples"] + sum(PLANTED.values())
    assert expected["samples"] == 400 + PLANTED[Reason.DUPLICATE_IMAGE]


def test_pairs_repeat_exactly_as_planted(rows):
    keys = Counter(
        sample_id(url, " ".join(row["caption"].split()))
        for row in rows
        if row["caption"] and row["caption"].strip() and (url := canonical_url(row["url"]))
    )
    assert sum(count - 1 for count in keys.values()) == PLANTED[Reason.DUPLICATE_PAIR]


def test_urls_that_are_none_are_exactly_the_planted_ones(rows):
    assert sum(canonical_url(row["url"]) is None for row in rows) == PLANTED[Reason.INVALID_URL]


def test_bytes_get_the_verdict_that_was_planted(web):
    verdicts = Counter()
    for page in read_pages(web.root).values():
        if page.status != 200 or page.content_length or "Content-Encoding" in page.headers:
            continue
        try:
            decode_rgb((web.root / page.file).read_bytes(), LIMITS)
        except ImageProblem as problem:
            verdicts[problem.reason] += 1
    about_bytes = (
        Reason.NOT_AN_IMAGE,
        Reason.TRUNCATED_IMAGE,
        Reason.CORRUPT_IMAGE,
        Reason.TOO_MANY_PIXELS,
        Reason.IMAGE_TOO_SMALL,
        Reason.ASPECT_RATIO,
    )
    assert verdicts == {reason: PLANTED[reason] for reason in about_bytes}


def test_sound_pictures_repeat_exactly_as_planted(web):
    counts = Counter(
        hashlib.sha256(body).digest()
        for path, body in bodies(web).items()
        if path.endswith((".jpg", ".png", ".webp")) and not body.startswith(b"<!doctype")
    )
    assert sum(count - 1 for count in counts.values()) == PLANTED[Reason.DUPLICATE_IMAGE]


def test_formats_and_sizes_vary_and_labels_lie(web):
    seen = Counter()
    lying = 0
    for page in read_pages(web.root).values():
        if page.status == 200 and not page.content_length and page.headers["Content-Type"].startswith("image/"):
            try:
                image = decode((web.root / page.file).read_bytes(), LIMITS)
            except ImageProblem:
                continue
            seen[image.format, image.image.size] += 1
            lying += page.headers["Content-Type"] != f"image/{image.format}"
    assert {kind for kind, _ in seen} == {"jpeg", "png", "webp"}
    assert len({size for _, size in seen}) > 20
    assert lying == 20


@pytest.mark.parametrize(
    ("name", "pictures", "phrasings"), [("held_out_one", 200, 4), ("held_out_two", 64, 8), ("tuning", 60, 4)]
)
def test_evaluation_sets_show_what_no_link_tells(web, rows, name, pictures, phrasings):
    data = pq.read_table(getattr(web, name)).to_pylist()
    linked = {row["caption"] for row in rows}
    assert len(data) == len({tuple(row["captions"]) for row in data}) == pictures
    for row in data:
        assert min(decode_rgb(row["image"], LIMITS).size) >= 64
        assert len(row["captions"]) == phrasings
        assert not linked & set(row["captions"])
        assert phrasings == 8 or all(row["label"] in text for text in row["captions"])


def test_every_sound_caption_tells_a_training_scene(rows):
    true = {text for scene in training_scenes(1, 400) for text in captions(scene)}
    told = [" ".join((row["caption"] or "").split()) for row in rows]
    dirty = (Reason.EMPTY_CAPTION, Reason.CAPTION_TOO_SHORT, Reason.CAPTION_TOO_LONG)
    assert sum(text in true for text in told) == len(rows) - sum(PLANTED[reason] for reason in dirty)


def test_the_same_arguments_give_the_same_files(web, tmp_path):
    again = make_web(tmp_path, seed=1, count=400)
    for name in ("expected.json", "held_out_one.parquet", "held_out_two.parquet", "tuning.parquet"):
        assert (web.root / name).read_bytes() == (again.root / name).read_bytes()
    assert bodies(web) == bodies(again)
    ports = [(root / "port").read_text() for root in (web.root, again.root)]
    urls = [[str(row["url"]) for row in pq.read_table(w.links).to_pylist()] for w in (web, again)]
    assert [url.replace(f":{ports[0]}/", ":port/") for url in urls[0]] == [
        url.replace(f":{ports[1]}/", ":port/") for url in urls[1]
    ]


def test_a_finished_web_is_kept_and_an_unfinished_one_made_anew_on_its_port(tmp_path):
    web = make_web(tmp_path, count=40)
    before = web.links.read_bytes()
    files = sorted((tmp_path / "files").iterdir())
    touched = files[0].stat().st_mtime_ns
    assert make_web(tmp_path, count=40).links.read_bytes() == before
    assert files[0].stat().st_mtime_ns == touched

    (tmp_path / "web.json").unlink()  # killed just before the end
    files[0].unlink()
    assert make_web(tmp_path, count=40).links.read_bytes() == before
    assert files[0].exists()


def test_other_arguments_make_another_web_in_the_same_folder(tmp_path):
    make_web(tmp_path, count=40)
    web = make_web(tmp_path, count=50)
    assert web.expected["samples"] == 50 + PLANTED[Reason.DUPLICATE_IMAGE]
    assert json.loads((tmp_path / "web.json").read_text())["count"] == 50
