"""Charts as SVG for an HTML page: text stays text, and colours come from the page, so light and dark both work."""

import io
import math
import re
from collections.abc import Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

# Drawn in colours that no chart uses, then replaced by what the page's style sheet names.
_INK, _FIRST, _SECOND, _FAINT, _PAPER = "#010201", "#010202", "#010203", "#010204", "#010205"
_PAGE_COLOURS = {
    _INK: "currentColor",
    _FIRST: "var(--first)",
    _SECOND: "var(--second)",
    _FAINT: "var(--line)",
    _PAPER: "var(--card)",
}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": _FAINT,
    "grid.linewidth": 0.7,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}
_SIZE_INCHES = (5.6, 2.9)
_PLAIN = FuncFormatter(lambda value, _: f"{value:g}")

_MOST_POINTS = 500

Curve = tuple[str, Sequence[float]]
Series = tuple[str, Sequence[int], Sequence[float | None]]


def draw_curves(steps: Sequence[int], curves: Sequence[Curve], description: str, *, log: bool = False) -> str:
    """One curve over the steps of a run, or two with a legend, the second dashed; the last values are written out."""
    return draw_series([(name, steps, values) for name, values in curves], description, log=log)


def draw_series(
    series: Sequence[Series], description: str, *, log: bool = False, marks: Sequence[int] = (), floor: bool = False
) -> str:
    """As ``draw_curves``, each curve over steps of its own; what is missing or no number is left out.

    Args:
        marks: steps at which an upright line stands.
        floor: whether the axis begins at 0.
    """
    usable = [(name, *_usable(steps, values, log)) for name, steps, values in series]
    named = len(series) > 1 or any(name for name, *_ in series)

    def draw(axes: Axes) -> None:
        for mark in marks:
            axes.axvline(mark, color=_INK, alpha=0.6, linewidth=1, linestyle=(0, (2, 2)))
        for (name, steps, values), colour, dash in zip(usable, (_FIRST, _SECOND), ("-", (0, (4, 2))), strict=False):
            if not steps:
                continue
            last, few = _told(values[-1]), "o" if len(steps) < 12 else ""
            style: dict[str, Any] = {"color": colour, "linestyle": dash, "marker": few, "markersize": 4}
            axes.plot(*_thinned(steps, values), linewidth=1.8, label=f"{name} {last}", **style)
            if not named:
                place = (steps[-1], values[-1])
                axes.annotate(last, place, color=colour, va="center", xytext=(6, 0), textcoords="offset points")
        if named:
            axes.legend(loc="best", frameon=False, labelcolor="linecolor", handlelength=2.6)
        if log:
            _label_log(axes)
        elif floor:
            axes.set_ylim(0, None)
        axes.set_xlabel("step")
        axes.set_xlim(0, max((steps[-1] for _, steps, _ in usable if steps), default=1))

    return _svg(draw, description)


def _told(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def _label_log(axes: Axes) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    # Over many decades a label at each 2 and 5 would overlap.
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
    axes.yaxis.set_major_formatter(_PLAIN)
    axes.yaxis.set_minor_locator(NullLocator())


def _usable(steps: Sequence[int], values: Sequence[float | None], log: bool) -> tuple[list[int], list[float]]:
    pairs = [
        (step, value)
        for step, value in zip(steps, values, strict=True)
        if value is not None and math.isfinite(value) and (value > 0 or not log)
    ]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _thinned(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """At most ``_MOST_POINTS``: of each stretch the lowest and the highest value, so that no spike is lost."""
    if len(steps) <= _MOST_POINTS:
        return steps, values
    parts = _MOST_POINTS // 2 - 1
    kept = {0, len(steps) - 1}
    for part in range(parts):
        inside = range(part * len(steps) // parts, (part + 1) * len(steps) // parts)
        kept |= {min(inside, key=values.__getitem__), max(inside, key=values.__getitem__)}
    return [steps[index] for index in sorted(kept)], [values[index] for index in sorted(kept)]


def draw_trials(trials: Sequence[dict[str, Any]], best: dict[str, Any], description: str) -> str:
    """Both loss weights of each trial, with its score written beside it; the best is filled."""

    def draw(axes: Axes) -> None:
        axes.set_xscale("log")
        axes.set_yscale("log")
        for trial in trials:
            place = trial["contrastive_weight"], trial["captioning_weight"]
            chosen = trial["trial"] == best["trial"]
            axes.plot(
                *place,
                "o",
                markersize=11,
                color=_FIRST,
                markerfacecolor=_FIRST if chosen else _PAPER,
                markeredgewidth=2,
            )
            text = f"{trial['score']:.3f}{' best' if chosen else ''}"
            offset, edge = ((0, -10), "top") if _has_neighbour_above(trial, trials) else ((0, 10), "bottom")
            axes.annotate(text, place, xytext=offset, textcoords="offset points", ha="center", va=edge)
        axes.set_xlim(_set_weight_ticks(axes.xaxis, [trial["contrastive_weight"] for trial in trials]))
        axes.set_ylim(_set_weight_ticks(axes.yaxis, [trial["captioning_weight"] for trial in trials]))
        axes.set_xlabel("contrastive weight")
        axes.set_ylabel("captioning weight")

    return _svg(draw, description)


def _has_neighbour_above(trial: dict[str, Any], trials: Sequence[dict[str, Any]]) -> bool:
    """Whether another trial lies where the label above this one would stand (distances in powers of two)."""

    def steps_to(other: dict[str, Any], name: str) -> float:
        return math.log2(other[name] / trial[name])

    return any(
        other is not trial
        and abs(steps_to(other, "contrastive_weight")) < 1.2
        and 0 <= steps_to(other, "captioning_weight") < 1.2
        for other in trials
    )


def _set_weight_ticks(axis: Axis, weights: Sequence[float]) -> tuple[float, float]:
    """Ticks at powers of two; gives a range that holds all weights and at least 1/4 to 4."""
    low, high = min(*weights, 0.25) / 1.4, max(*weights, 4.0) * 1.6
    axis.set_minor_locator(NullLocator())
    axis.set_major_locator(FixedLocator([2.0**power for power in range(-6, 7) if low <= 2.0**power <= high]))
    axis.set_major_formatter(_PLAIN)
    return low, high


def _svg(draw: Any, description: str) -> str:
    style: Any = _STYLE | {"svg.hashsalt": description}
    with rc_context(style):
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _for_page(buffer.getvalue(), description)


def _for_page(svg: str, description: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    used = set(re.findall(r"#([\w-]+)[\")]", svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda found: found[0] if found[1] in used else "", svg)
    for drawn, wanted in _PAGE_COLOURS.items():
        svg = svg.replace(drawn, wanted)
    return svg.replace("<svg", f'<svg role="img" aria-label="{description}"', 1)
