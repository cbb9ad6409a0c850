"""Charts: SVG that takes its colours from the page and carries its numbers as text."""

import re
import xml.etree.ElementTree as ET

from jobs.charts import draw_curves, draw_trials

TRIALS = [
    {"trial": 0, "contrastive_weight": 1.0, "captioning_weight": 2.0, "score": 1.25},
    {"trial": 1, "contrastive_weight": 0.3, "captioning_weight": 7.5, "score": 1.5},
]


def charts():
    curves = [("captioning", [3.0, 2.0, 1.25]), ("contrastive", [4.0, 1.0, 0.5])]
    yield draw_curves([10, 20, 30], curves, "both losses")
    yield draw_curves([10, 20, 30], [("", [1.0, 100.0, 3.5])], "norm", log=True)
    yield draw_trials(TRIALS, TRIALS[1], "trials")


def texts(svg):
    return [element.text.strip() for element in ET.fromstring(svg).iter() if element.tag.endswith("}text")]


def test_every_colour_is_the_pages():
    for svg in charts():
        colours = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svg))
        assert colours <= {"none", "currentColor", "var(--first)", "var(--second)", "var(--line)", "var(--card)"}


def test_a_chart_is_well_formed_described_and_scales_with_its_place():
    for svg in charts():
        root = ET.fromstring(svg)
        assert root.get("role") == "img"
        assert root.get("aria-label")
        assert root.get("viewBox")
        assert root.get("width") is None
        assert root.get("height") is None


def test_the_end_of_each_curve_is_written_beside_it():
    losses, norm, _ = charts()
    assert {"captioning 1.25", "contrastive 0.5"} <= set(texts(losses))
    assert "3.5" in texts(norm)


def test_scores_stand_beside_their_trials_and_the_best_is_named():
    *_, trials = charts()
    assert {"1.250", "1.500 best"} <= set(texts(trials))


def test_a_chart_is_the_same_each_time():
    assert list(charts()) == list(charts())
