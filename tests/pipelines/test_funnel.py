"""The funnel: counts that add up, and how they look."""

import pytest

from pipelines.funnel import Funnel, make_funnel, render_funnel


def test_counts_of_all_sources_are_summed_in_the_order_of_the_reasons() -> None:
    standing = {"": 5, "not_found": 1}
    batch = {"": 4, "timeout": 2, "invalid_url": 1}
    moved = {"duplicate_image": 3, "": -3}
    funnel = make_funnel(13, standing, batch, moved, {"waiting": 0})
    assert funnel == Funnel(
        links=13, samples=6, rejected={"invalid_url": 1, "timeout": 2, "not_found": 1, "duplicate_image": 3}
    )
    assert list(funnel.rejected) == ["invalid_url", "timeout", "not_found", "duplicate_image"]


def test_a_lost_link_is_noticed() -> None:
    with pytest.raises(AssertionError, match="lost or counted twice"):
        make_funnel(3, {"": 1}, {"timeout": 1})


def test_the_funnel_for_a_terminal() -> None:
    lines = render_funnel(Funnel(links=2000, samples=1500, rejected={"timeout": 500})).splitlines()
    assert lines[0] == "links     2,000 100.0% " + "█" * 40
    assert lines[1] == "- timeout   500  25.0% " + "█" * 10
    assert lines[2] == "samples   1,500  75.0% " + "█" * 30
