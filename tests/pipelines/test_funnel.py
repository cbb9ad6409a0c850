"""Every link in is counted once."""

import pyarrow as pa
import pytest

from coca.contract import Reason, State, sample_id
from pipelines.funnel import Funnel, count_verdicts, render_funnel
from pipelines.judge import JUDGED


def judged(*rows: tuple[str, str | None]) -> pa.Table:
    return pa.Table.from_pylist(
        [{"sample_id": sample_id(key, ""), "url": key, "caption": "", "reason": reason} for key, reason in rows],
        schema=JUDGED,
    )


def latest(*rows: tuple[str, str | None]) -> pa.Table:
    return pa.table(
        {
            "sample_id": [sample_id(key, "") for key, _ in rows],
            "state": [(State.OK if reason is None else State.REJECTED).value for _, reason in rows],
            "reason": pa.array([reason for _, reason in rows], pa.string()),
        }
    )


def test_every_row_counts_once_by_its_standing_verdict() -> None:
    links = judged(
        ("a", None), ("a", "duplicate_pair"), ("b", None), ("c", None), ("d", "empty_caption"), ("d", "empty_caption")
    )
    standing = latest(("a", None), ("b", None), ("c", "not_found"), ("d", "empty_caption"), ("e", "timeout"))
    funnel = count_verdicts(links, standing, {sample_id("b", "")})
    assert funnel == Funnel(
        links=6,
        samples=1,
        rejected={"empty_caption": 2, "duplicate_pair": 1, "not_found": 1, "duplicate_image": 1},
    )
    assert list(funnel.rejected) == [r.value for r in Reason if r.value in funnel.rejected]


def test_a_pair_without_a_verdict_is_a_fault_of_ours() -> None:
    with pytest.raises(AssertionError, match="without a verdict"):
        count_verdicts(judged(("a", None)), latest(("b", None)), set())


def test_the_table_for_a_terminal() -> None:
    text = render_funnel(Funnel(links=2000, samples=1500, rejected={"timeout": 1, "not_found": 499}))
    assert text.splitlines() == [
        "links       2,000 100.0% " + "█" * 40,
        "- timeout       1   0.1% █",
        "- not_found   499  24.9% " + "█" * 10,
        "samples     1,500  75.0% " + "█" * 30,
    ]
