"""The demo's page: one self-contained HTML file with the funnel, curves, pictures, trials and the service's answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from coca.progress import format_duration
from jobs.charts import draw_curves, draw_trials

_SHOWN_RIGHT, _SHOWN_WRONG = 16, 12


@dataclass(frozen=True)
class Answer:
    """A picture with what is true of it and what the model wrote."""

    image: str
    """A data URI."""
    expected: str
    """The true caption."""
    caption: str
    exact: bool

    @classmethod
    def judge(cls, image: str, accepted: Sequence[str], caption: str) -> "Answer":
        """Beside the accepted caption that is nearest to what was written."""
        expected = max(accepted, key=lambda text: _match(text, caption).ratio())
        return cls(image, expected, caption, caption in accepted)

    @property
    def words(self) -> list[tuple[str, bool]]:
        """The written words, each with whether the expected caption has it there."""
        match = _match(self.expected, self.caption)
        known = {block.b + offset for block in match.get_matching_blocks() for offset in range(block.size)}
        return [(word, index in known) for index, word in enumerate(self.caption.split())]


def _match(expected: str, written: str) -> SequenceMatcher:
    return SequenceMatcher(None, expected.split(), written.split(), autojunk=False)


@dataclass(frozen=True)
class Score:
    """A measure in 0..1 beside what chance gives."""

    name: str
    value: float
    chance: float


@dataclass(frozen=True)
class ReportData:
    """All that the page shows."""

    summary: dict[str, Any]
    stages: Sequence[dict[str, Any]]
    """``name``, ``title``, ``told`` (its result in a line), ``wall_s``."""
    planted: dict[str, int]
    """Reason -> links that were made to deserve it."""
    metrics: Sequence[dict[str, Any]]
    """Rows of metrics.jsonl."""
    one: Sequence[Answer]
    two: Sequence[Answer]
    scores: Sequence[Score]
    served: Sequence[Answer]
    run: str
    """The run folder, for the command that serves it again."""


def write_report(path: Path, data: ReportData) -> None:
    """Write the page; it needs no other file and no network."""
    environment = Environment(
        loader=PackageLoader("jobs"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"duration": _duration, "words": lambda text: text.replace("_", " ")}
    page = environment.get_template("report.html.j2").render(
        data=data,
        summary=data.summary,
        funnel=_funnel(data.summary, data.planted),
        longest_s=max(stage["wall_s"] for stage in data.stages),
        total_s=sum(stage["wall_s"] for stage in data.stages),
        charts=_charts(data),
        one=_choose(data.one),
        two=_choose(data.two),
        latency_ms=median(answer["latency_ms"] for answer in data.summary["serve"]["captions"]),
    )
    path.write_text(page, encoding="utf-8")


def _duration(seconds: float) -> str:
    return f"{seconds:.1f}s" if seconds < 10 else format_duration(seconds)


def _funnel(summary: dict[str, Any], planted: dict[str, int]) -> list[dict[str, Any]]:
    """Rows of the funnel, most frequent first; ``share`` is relative to the largest reason."""
    rejected = summary["rejected"]
    reasons = sorted(rejected.keys() | planted.keys(), key=lambda reason: (-rejected.get(reason, 0), reason))
    largest = max(rejected.values(), default=1)
    return [
        {
            "reason": reason,
            "count": rejected.get(reason, 0),
            "planted": planted.get(reason, 0),
            "share": rejected.get(reason, 0) / largest,
        }
        for reason in reasons
    ]


def _choose(answers: Sequence[Answer]) -> list[Answer]:
    """Mistakes and successes, as many of each as fit; mistakes first, they say more."""
    wrong = [answer for answer in answers if not answer.exact][:_SHOWN_WRONG]
    right = [answer for answer in answers if answer.exact]
    return wrong + right[: _SHOWN_RIGHT + _SHOWN_WRONG - len(wrong)]


def _charts(data: ReportData) -> dict[str, Markup]:
    rows = data.metrics
    steps = [row["step"] for row in rows]

    def curve(name: str) -> list[float]:
        return [row[name] for row in rows]

    trials, best = data.summary["tune"]["trials"], data.summary["tune"]["best"]
    drawn = {
        "Loss, both parts": draw_curves(
            steps,
            [("captioning", curve("captioning_loss")), ("contrastive", curve("contrastive_loss"))],
            "contrastive and captioning loss over the steps of training",
            log=True,
        ),
        "Learning rate": draw_curves(steps, [("", curve("learning_rate"))], "learning rate over the steps of training"),
        "Gradient norm": draw_curves(
            steps, [("", curve("grad_norm"))], "gradient norm over the steps of training", log=True
        ),
        "Samples per second": draw_curves(
            steps, [("", curve("samples_per_s"))], "samples per second over the steps of training"
        ),
        "Tuning": draw_trials(trials, best, "score of each trial by its two loss weights"),
    }
    return {title: Markup(svg) for title, svg in drawn.items()}  # noqa: S704 - drawn here, from numbers
