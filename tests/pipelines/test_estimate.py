"""A dry run: what a sample tells, and that nothing is left behind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import RefreshConfig
from pipelines.estimate import estimate, wilson_interval
from pipelines.refresh import refresh

Build = Callable[..., RefreshConfig]


def test_a_sample_tells_the_yield(web: Any, pages: Any, refresh_config: Build, without_ray: None) -> None:
    for number in range(0, 60, 2):  # every second link is dead
        web.pages[f"/{number}"] = pages.image(str(number))
    config = refresh_config([*((f"/{n}", f"picture {n}") for n in range(60)), ("nonsense", "no url")])
    found = estimate(config, 40)
    assert (found.links, found.due_urls, found.others) == (61, 60, {"invalid_url": 1})
    assert found.asked_urls == 40 == sum(web.requests.values())
    assert set(found.reasons) == {"not_found"}
    assert found.admitted_share_low < 0.5 < found.admitted_share_high
    assert 0 < found.expected_samples < 60
    assert found.expected_download_bytes > 0
    assert not Path(config.to).exists()
    web.requests.clear()
    refresh(config)
    again = estimate(config, 40)
    assert (again.due_urls, again.asked_urls) == (0, 0)
    assert again.others == {"stored": 30, "not_found": 30, "invalid_url": 1}
    assert sum(web.requests.values()) == 60
    assert sorted(path.name for path in Path(config.to).iterdir()) == sorted(
        ["annotations", "leases", "links", "samples", "tokenizers", "versions"]
    )


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"),
    [
        # Newcombe 1998, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_of_a_share(hits: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(hits, trials) == pytest.approx((low, high), abs=1e-4)


def test_without_trials_anything_is_possible() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
