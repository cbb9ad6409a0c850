"""The funnel: how many links came in, and where each of them ended."""

from collections import Counter
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from coca.contract import Reason

_BAR_WIDTH = 40


class Funnel(BaseModel):
    """Every link in ends as a selected sample or under one reason."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    links: int
    samples: int
    rejected: dict[str, int]
    """reason -> links, in the order of ``contract.Reason``; reasons without a link left out."""


def count_reasons(reasons: pa.ChunkedArray, rows: pa.ChunkedArray) -> dict[str, int]:
    """reason ("" for none) -> sum of ``rows``."""
    table = pa.table({"reason": pc.fill_null(reasons, ""), "rows": rows})
    counted = table.group_by("reason").aggregate([("rows", "sum")])
    return {row["reason"]: row["rows_sum"] for row in counted.to_pylist() if row["rows_sum"]}


def make_funnel(links: int, *counts: Mapping[str, int]) -> Funnel:
    """Sum up counts of links by reason; "" stands for selected samples."""
    total: Counter[str] = Counter()
    for part in counts:
        total.update(part)
    rejected = {reason.value: total[reason.value] for reason in Reason if total[reason.value]}
    assert total[""] + sum(rejected.values()) == links, "a link was lost or counted twice"
    return Funnel(links=links, samples=total[""], rejected=rejected)


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
