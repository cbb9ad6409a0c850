"""X-Robots-Tag: who is spoken to, and what counts. tdm-reservation: 1 and nothing else."""

import pytest

from pipelines.fetch_config import FetchConfig
from pipelines.opt_out import is_opted_out, is_tdm_reserved

DIRECTIVES = FetchConfig().opt_out_directives


@pytest.mark.parametrize(
    "headers",
    [
        ["noai"],
        ["noimageai"],
        ["noindex"],
        ["NoImageIndex"],
        ["none"],
        ["nofollow, noai"],
        ["nofollow", "noai"],
        ["coca: noai"],
        ["Coca: nofollow, noai"],
        ["*: noindex"],
        ["googlebot: nofollow, coca: noai"],
        ["max-snippet: 50, noai"],
        ["unavailable_after: 25 Jun 2030 15:00:00 PST, noai"],
    ],
)
def test_an_opt_out(headers: list[str]) -> None:
    assert is_opted_out(headers, DIRECTIVES, "coca")


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [""],
        ["all"],
        ["nofollow, noarchive"],
        ["googlebot: noindex"],
        ["googlebot: nofollow, noindex"],
        ["otherbot: noai", "nofollow"],
        ["max-image-preview: none"],
        ["noaix"],
    ],
)
def test_no_opt_out(headers: list[str]) -> None:
    assert not is_opted_out(headers, DIRECTIVES, "coca")


def test_only_the_configured_directives_count() -> None:
    assert not is_opted_out(["noindex"], ["noai"], "coca")


@pytest.mark.parametrize(
    ("headers", "reserved"),
    [
        (["1"], True),
        ([" 1 "], True),
        (["0", "1"], True),
        (["0"], False),
        ([], False),
        (["10"], False),
        (["true"], False),
    ],
)
def test_a_reservation_of_text_and_data_mining(headers: list[str], reserved: bool) -> None:
    assert is_tdm_reserved(headers) is reserved
