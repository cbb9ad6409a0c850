"""The charts of ``coca data report``: distributions, sizes, days and versions, in the colours of the page."""

import re
from collections import Counter
from collections.abc import Sequence
from datetime import date, timedelta
from html import escape
from typing import Literal

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from jobs.charts import _FIRST, _INK, _SECOND, _svg
from pipelines.churn import Change
from pipelines.histogram import Histogram
from pipelines.survey import SIDE_EXPONENTS

_THOUSANDS = FuncFormatter(lambda value, _: f"{value:,.0f}")
_RATIOS = (1 / 16, 1 / 8, 1 / 4, 1 / 3, 1 / 2, 3 / 4, 1, 4 / 3, 2, 3, 4, 8, 16)
_DAYS_SHOWN = 90

Kind = Literal["number", "count", "ratio", "bytes"]


def draw_histogram(
    values: Histogram, other: Histogram | None, label: str, description: str, *, kind: Kind = "number"
) -> Markup:
    """Share of samples by value, and as an outline that of another version.

    Args:
        kind: what the ticks are: numbers, whole ones (``count``), ratios of sides (1:2, 3:4) or ``bytes``.
    """
    edges = _edges(values, other)
    shares = _shares(values, edges)

    def draw(axes: Axes) -> None:
        axes.bar(edges[:-1], shares, np.diff(edges), align="edge", color=_FIRST, linewidth=0)
        if other is not None and other.count:
            axes.stairs(_shares(other, edges), edges, color=_SECOND, linewidth=1.8, linestyle=(0, (4, 2)))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_ylabel("of samples")
        axes.set_xlabel(label)
        if values.log2:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_minor_locator(NullLocator())
            _tick_logarithm(axes, edges, kind)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=kind == "count"))
        axes.set_xlim(edges[0], edges[-1])
        axes.grid(visible=False, axis="x")

    return _chart(draw, description)


def draw_sizes(sides: np.ndarray, description: str) -> Markup:
    """Pictures by width and height: the darker a field, the more lie in it."""
    edges = np.exp2(SIDE_EXPONENTS)
    largest = max(int(sides.max()), 1)

    def draw(axes: Axes) -> None:
        for column, row in np.argwhere(sides):
            # The root, so that fields with few pictures are seen beside one with very many.
            shade = 0.12 + 0.88 * float(np.sqrt(sides[column, row] / largest))
            corner = (edges[column], edges[row])
            size = edges[column + 1] - edges[column], edges[row + 1] - edges[row]
            axes.add_patch(Rectangle(corner, *size, color=_FIRST, alpha=shade, linewidth=0))
        low, high = _filled(sides.sum(axis=0) + sides.sum(axis=1))
        ticks = [2.0**power for power in range(4, 15) if edges[low] <= 2.0**power <= edges[high]]
        for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
            scale("log", base=2)
            axis.set_minor_locator(NullLocator())
            axis.set_major_locator(FixedLocator(ticks))
            axis.set_major_formatter(_THOUSANDS)
        axes.plot([edges[0], edges[-1]], [edges[0], edges[-1]], color=_INK, linewidth=0.8, linestyle=(0, (2, 3)))
        axes.set_xlim(edges[low], edges[high])
        axes.set_ylim(edges[low], edges[high])
        axes.set_xlabel("width, pixels")
        axes.set_ylabel("height, pixels")

    return _chart(draw, description)


def draw_days(days: Counter[str], description: str) -> Markup:
    """Stored rows by the day, or the month where there are many days, on which their bytes came."""
    dates = {date.fromisoformat(day): count for day, count in days.items()}
    first, last = min(dates), max(dates)
    if (last - first).days < _DAYS_SHOWN:
        counts = [dates.get(first + timedelta(days=n), 0) for n in range((last - first).days + 1)]
        names = [(first + timedelta(days=n)).isoformat() for n in range(len(counts))]
    else:
        months = [(m // 12, m % 12 + 1) for m in range(_month(first), _month(last) + 1)]
        by_month: Counter[tuple[int, int]] = Counter()
        for day, count in dates.items():
            by_month[day.year, day.month] += count
        counts, names = [by_month[month] for month in months], [f"{year}-{month:02d}" for year, month in months]

    def draw(axes: Axes) -> None:
        axes.bar(range(len(counts)), counts, 0.8, color=_FIRST, linewidth=0)
        shown = sorted({0, len(names) // 2, len(names) - 1} if len(names) > 4 else set(range(len(names))))
        axes.set_xticks(shown, [names[at] for at in shown])
        axes.set_xlim(-0.9, max(len(names), 3) - 0.1)
        axes.yaxis.set_major_formatter(_THOUSANDS)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_ylabel("pictures")
        axes.grid(visible=False, axis="x")

    return _chart(draw, description)


def draw_churn(changes: Sequence[Change], description: str) -> Markup:
    """Rows that each version added and left out (bars), and how many samples it has selected (line)."""
    places = range(len(changes))

    def draw(axes: Axes) -> None:
        axes.bar(places, [change.added for change in changes], 0.5, color=_FIRST, label="rows added")
        axes.bar(places, [-change.removed for change in changes], 0.5, color=_SECOND, label="rows removed")
        selected = [change.selected for change in changes]
        axes.plot(places, selected, color=_INK, linewidth=1.4, marker="o", markersize=4, label="selected in all")
        axes.axhline(0, color=_INK, linewidth=0.8)
        axes.set_xticks(places, [str(change.version) for change in changes])
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True)) if len(changes) > 12 else None
        axes.set_xlim(-0.8, max(len(changes), 3) - 0.2)
        axes.yaxis.set_major_formatter(_THOUSANDS)
        axes.set_xlabel("version")
        axes.legend(loc="upper left", frameon=False, fontsize=9.5)
        axes.grid(visible=False, axis="x")

    return _chart(draw, description)


def _chart(draw: object, description: str) -> Markup:
    # Names of scorers come from outside and stand in the description, which becomes an attribute.
    plain = re.sub(r"[^\w .,:()/-]", "?", description)
    return Markup(_svg(draw, escape(plain)))  # noqa: S704 - drawn here, from numbers; the description is escaped


def _edges(values: Histogram, other: Histogram | None) -> np.ndarray:
    """The bins of the wider of the two, without those at the ends that are empty in both."""
    shown = [one for one in (values, other) if one is not None and one.count]
    wider = max(shown or [values], key=lambda one: one.high - one.low)
    filled = np.zeros(len(wider.counts))
    for one in shown:
        filled += _shares(one, wider.edges)
    low, high = _filled(filled)
    return wider.edges[low : high + 1]


def _filled(counts: np.ndarray) -> tuple[int, int]:
    """The first bin with a count, and one past the last; a bin of margin at each side."""
    places = np.flatnonzero(counts > 0)
    if not len(places):
        return 0, len(counts)
    return max(0, int(places[0]) - 1), min(len(counts), int(places[-1]) + 2)


def _shares(values: Histogram, edges: np.ndarray) -> np.ndarray:
    """The share of all values in each bin of ``edges``, as if they lay evenly in their own."""
    below = np.concatenate([[0], np.cumsum(values.counts)]) / max(values.count, 1)
    own, wanted = (np.log2(values.edges), np.log2(edges)) if values.log2 else (values.edges, edges)
    return np.diff(np.interp(wanted, own, below))


def _tick_logarithm(axes: Axes, edges: np.ndarray, kind: Kind) -> None:
    if kind == "ratio":
        ticks = [value for value in _RATIOS if edges[0] <= value <= edges[-1]]
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _ratio_told(value)))
    else:
        powers = range(int(np.ceil(np.log2(edges[0]))), int(np.floor(np.log2(edges[-1]))) + 1)
        step = 1 + len(powers) // 7
        axes.xaxis.set_major_locator(FixedLocator([2.0**power for power in powers if power % step == 0]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: bytes_told(value)))


def _ratio_told(value: float) -> str:
    named = {3 / 4: "3:4", 4 / 3: "4:3"}
    near = min(named, key=lambda one: abs(one - value))
    if abs(near - value) < 1e-6:
        return named[near]
    return f"{value:.0f}:1" if value >= 1 else f"1:{1 / value:.0f}"


def bytes_told(count: float) -> str:
    """A number of bytes in the largest unit (powers of 1024) that leaves at least one."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}".replace(".0 ", " ")
        count /= 1024
    raise AssertionError


def _month(day: date) -> int:
    return day.year * 12 + day.month - 1
