"""Which verdicts looser settings make void."""

from types import SimpleNamespace
from typing import Any

import pytest

from coca.contract import Reason
from coca.storage import Store
from coca.typed_config import lay_over
from pipelines.config import RefreshConfig
from pipelines.reopen import reopened_by_refresh, reopened_reasons


def reopened(before: dict[str, Any], now: dict[str, Any]) -> set[Reason]:
    parent: Any = SimpleNamespace(config=lay_over(RefreshConfig(), before).model_dump(mode="json"))
    return set(reopened_reasons(lay_over(RefreshConfig(), now), parent)) - TEXT_RULES


TEXT_RULES = {
    Reason.CAPTION_TOO_SHORT,
    Reason.CAPTION_TOO_LONG,
    Reason.CAPTION_REPEATS,
    Reason.CAPTION_TOO_FREQUENT,
    Reason.CAPTION_BLOCKED_WORD,
    Reason.LANGUAGE,
    Reason.BLOCKED_URL,
}


def limits(**values: Any) -> dict[str, Any]:
    return {"image": {"limits": values}}


CASES = [
    ({}, {}, set()),
    (limits(min_side=200), limits(min_side=100), {Reason.IMAGE_TOO_SMALL}),
    (limits(min_side=100), limits(min_side=200), set()),
    (limits(max_aspect_ratio=3), limits(max_aspect_ratio=4), {Reason.ASPECT_RATIO}),
    (limits(max_pixels=10_000), limits(max_pixels=10_001), {Reason.TOO_MANY_PIXELS}),
    (limits(max_bytes=100), limits(max_bytes=200, min_bytes=5), {Reason.BODY_TOO_LARGE}),
    (limits(min_bytes=5000), {}, {Reason.BODY_TOO_SMALL}),
    (
        {},
        {"judge": {"max_url_chars": 4096}, "fetch": {"max_redirects": 6}},
        {Reason.INVALID_URL, Reason.TOO_MANY_REDIRECTS},
    ),
    ({}, {"fetch": {"allow_networks": ["10.0.0.0/8"]}}, {Reason.FORBIDDEN_ADDRESS}),
    ({"fetch": {"allow_networks": ["10.0.0.0/8"]}}, {}, set()),
    ({}, {"fetch": {"robots_txt": False, "tdm_reservation": False}}, {Reason.ROBOTS_DISALLOWED, Reason.TDM_RESERVED}),
    ({"fetch": {"robots_txt": False}}, {}, set()),
    ({}, {"fetch": {"opt_out_directives": ["noai"]}}, {Reason.OPTED_OUT}),
    ({"fetch": {"opt_out_directives": ["noai"]}}, {}, set()),
    (limits(formats=["jpeg"]), {}, {Reason.NOT_AN_IMAGE}),
    ({}, limits(formats=["jpeg"]), set()),
    ({"judge": {"block_hashes": "old.txt"}}, {"judge": {"block_hashes": "new.txt"}}, {Reason.BLOCKED_IMAGE}),
    ({"judge": {"block_hashes": "old.txt"}}, {}, {Reason.BLOCKED_IMAGE}),
    ({}, {"judge": {"block_hashes": "new.txt"}}, set()),
]


@pytest.mark.parametrize(("before", "now", "expected"), CASES)
def test_only_what_is_looser_is_opened_again(
    before: dict[str, Any], now: dict[str, Any], expected: set[Reason]
) -> None:
    assert reopened(before, now) == expected


def test_a_setting_that_the_parent_did_not_know_is_unchanged() -> None:
    parent: Any = SimpleNamespace(config={"image": {"limits": {"min_side": 64}}})
    found = reopened_reasons(lay_over(RefreshConfig(), limits(min_side=32)), parent)
    assert found == {Reason.IMAGE_TOO_SMALL} | TEXT_RULES


def test_a_first_refresh_reopens_nothing() -> None:
    assert reopened_by_refresh(RefreshConfig(), Store("/nowhere"), None) == {}
