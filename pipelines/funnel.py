"""The funnel: how many links came in, and where each of them ended."""

from collections import Counter
from collections.abc import Collection

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from coca.contract import Reason, State

_BAR_WIDTH = 40


class Funnel(BaseModel):
    """Every link in ends as a selected sample or under one reason."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    links: int
    samples: int
    rejected: dict[str, int]
    """reason -> links, in the order of ``contract.Reason``; reasons without a link left out."""


def count_verdicts(judged: pa.Table, latest: pa.Table, unselected: Collection[str]) -> Funnel:
    """The standing verdict of every row of a links table.

    Args:
        judged: ``judge.JUDGED``, all rows.
        latest: the latest ledger event of every pair: ``sample_id``, ``state``, ``reason``.
        unselected: sample ids that are stored but not selected.
    """
    repeated = pc.fill_null(pc.equal(judged["reason"], Reason.DUPLICATE_PAIR.value), False)
    counts = Counter({Reason.DUPLICATE_PAIR.value: pc.sum(repeated).as_py() or 0})
    ids = judged["sample_id"].filter(pc.invert(repeated))
    events = latest.take(pc.index_in(ids, value_set=latest["sample_id"].combine_chunks()))
    assert events["state"].null_count == 0, "a pair without a verdict"
    is_ok = pc.equal(events["state"], State.OK.value)
    passed_over = pc.is_in(events["sample_id"], value_set=pa.array(list(unselected), pa.string()))
    counts[Reason.DUPLICATE_IMAGE.value] = pc.sum(pc.and_(is_ok, passed_over)).as_py() or 0
    for reason in events["reason"].filter(pc.invert(is_ok)).to_pylist():
        counts[reason] += 1
    samples = pc.sum(pc.and_(is_ok, pc.invert(passed_over))).as_py() or 0
    rejected = {reason.value: counts[reason.value] for reason in Reason if counts[reason.value]}
    assert samples + sum(rejected.values()) == judged.num_rows, "a link was lost or counted twice"
    return Funnel(links=judged.num_rows, samples=samples, rejected=rejected)


def render_funnel(funnel: Funnel) -> str:
    """The funnel as an aligned table with bars, for a terminal."""
    rows = [("links", funnel.links), *funnel.rejected.items(), ("samples", funnel.samples)]
    name_width = max(len(name) for name, _ in rows) + 2
    count_width = max(len(f"{count:,}") for _, count in rows)
    return "\n".join(_line(name, count, funnel.links, name_width, count_width) for name, count in rows)


def _line(name: str, count: int, total: int, name_width: int, count_width: int) -> str:
    indent = "" if name in ("links", "samples") else "- "
    share = count / total
    bar = "█" * max(1, round(share * _BAR_WIDTH)) if count else ""
    return f"{indent + name:<{name_width}} {count:>{count_width},} {share:>6.1%} {bar}".rstrip()
