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

Curve = tuple[str, Sequence[float]]


def draw_curves(steps: Sequence[int], curves: Sequence[Curve], description: str, *, log: bool = False) -> str:
    """One curve over the steps of a run, or two with a legend, the second dashed; the last values are written out."""

    def draw(axes: Axes) -> None:
        for (name, values), colour, dash in zip(curves, (_FIRST, _SECOND), ("-", (0, (4, 2))), strict=False):
            last = f"{values[-1]:.3g}"
            axes.plot(steps, values, color=colour, linestyle=dash, linewidth=1.8, label=f"{name} {last}")
            if len(curves) == 1:
                place = (steps[-1], values[-1])
                axes.annotate(last, place, color=colour, va="center", xytext=(6, 0), textcoords="offset points")
        if len(curves) > 1:
            axes.legend(loc="upper right", frameon=False, labelcolor="linecolor", handlelength=2.6)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(_PLAIN)
            axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("step")
        axes.set_xlim(0, steps[-1])

    return _svg(draw, description)


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
