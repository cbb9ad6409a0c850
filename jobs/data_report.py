"""The pages about a dataset: ``coca data report`` and ``coca data show --html``, each one self-contained file.

What they show was written by strangers. Every text is escaped, only http(s) is linked, pictures are decoded within
limits and encoded anew, and the page's own policy forbids scripts and any request.
"""

import base64
import unicodedata
from collections import Counter
from datetime import datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from coca.images import ImageLimits, ImageProblem, decode, encode, resize
from jobs.data_report_figures import Kind, bytes_told, draw_churn, draw_days, draw_histogram, draw_sizes
from pipelines.histogram import Histogram
from pipelines.survey import RowSurvey, Survey
from pipelines.survey_ledger import ADMITTED

_HOSTS, _REASONS, _NAMES = 25, 9, 14
_THUMBNAIL, _LARGE = 200, 480
_NUMBERS: tuple[tuple[str, str, str, Kind], ...] = (
    ("Aspect ratio", "aspect", "width : height", "ratio"),
    ("Image bytes", "image_bytes", "bytes of the stored picture", "bytes"),
    ("Caption length, words", "words", "words", "count"),
    ("Caption length, tokens", "tokens", "tokens, begin and end included", "count"),
)
_TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_FORMATS = {"number": "{:.3g}", "count": "{:,.0f}", "ratio": "{:.2f}"}


def render_report(survey: Survey) -> str:
    """The page of ``coca data report``."""
    rows, ledger, record = survey.rows, survey.ledger, survey.record
    changes = [*survey.churn, *([survey.against] if survey.against else [])]
    return (
        _environment()
        .get_template("data_report.html.j2")
        .render(
            uri=survey.uri,
            record=record,
            seed=survey.seed,
            table_bytes=survey.table_bytes,
            rows=rows,
            ledger=ledger,
            funnel=_funnel(record["funnel"]),
            verdicts=ledger.verdicts.most_common(),
            **_hosts(survey),
            charts=_charts(rows, survey.other),
            bars=_bars(rows, survey.other),
            kept=rows.kept.rows,
            refused=[(reason, rows.refused[reason].rows) for reason, _ in rows.unselected.most_common()],
            pictures={key: thumbnail(data, _THUMBNAIL) for key, data in survey.pictures.items()},
            examples=[(reason, reservoir.rows) for reason, reservoir in sorted(ledger.examples.items())],
            changes=changes,
            against=survey.against,
            churn_chart=draw_churn(survey.churn, "rows added and removed by version")
            if len(survey.churn) > 1
            else None,
        )
    )


def render_rows(
    uri: str, version: int, rows: list[dict[str, Any]], images: dict[str, bytes], *, where: str | None, told: str
) -> str:
    """The page of ``coca data show --html``: rows with their pictures and every field."""
    pictures = {key: thumbnail(data, _LARGE) for key, data in images.items()}
    return (
        _environment()
        .get_template("data_show.html.j2")
        .render(uri=uri, version=version, rows=rows, pictures=pictures, where=where, told=told)
    )


def thumbnail(data: bytes, side: int) -> str | None:
    """A picture as a data URI, its long side at most ``side`` pixels; None where it does not decode."""
    try:
        # JPEG is decoded at a fraction of its size where that is still twice as large as needed.
        image = decode(data, ImageLimits(), short_side=side // 2).image
    except ImageProblem:
        return None
    encoded = encode(resize(image, "keep_ratio_largest", side), "jpeg", 82)
    return f"data:image/jpeg;base64,{base64.b64encode(encoded).decode()}"


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("jobs"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "bytes": bytes_told,
        "clip": _clip,
        "field": lambda value: value.isoformat(" ", "seconds") if isinstance(value, datetime) else str(value),
        "number": lambda count: f"{count:,}",
        "percent": lambda share: f"{share:.1%}",
        "words": lambda text: text.replace("_", " "),
    }
    environment.tests["web_url"] = lambda url: url.startswith(("http://", "https://"))
    return environment


def _clip(text: str, limit: int) -> str:
    """Without control characters and marks that turn the direction of a text, and at most ``limit`` characters long."""
    kept = (mark for mark in text[: 2 * limit] if mark not in _TURNING and unicodedata.category(mark) != "Cc")
    plain = "".join(kept)
    return plain if len(plain) <= limit else plain[: limit - 1] + "…"


def _funnel(funnel: dict[str, Any]) -> list[dict[str, Any]]:
    if not funnel.get("links"):
        return []
    counts = [("samples", funnel["samples"]), *sorted(funnel["rejected"].items(), key=lambda item: -item[1])]
    return [{"reason": name, "count": count, "share": count / funnel["links"]} for name, count in counts]


def _hosts(survey: Survey) -> dict[str, Any]:
    """The table of hosts by reasons: the commonest reasons have a column, the rest share one."""
    largest = survey.ledger.largest_hosts(_HOSTS)
    totals: Counter[str] = Counter()
    for _, counts in largest:
        totals.update(counts)
    reasons = [name for name, _ in totals.most_common() if name != ADMITTED][:_REASONS]
    shown = [ADMITTED, *reasons]
    hosts = [
        {
            "name": name,
            "total": counts.total(),
            "counts": [*(counts[column] for column in shown), counts.total() - sum(counts[c] for c in shown)],
        }
        for name, counts in largest
    ]
    return {"hosts": hosts, "host_reasons": shown}


def _charts(rows: RowSurvey, other: RowSurvey | None) -> list[dict[str, Any]]:
    charts = []
    if rows.selected:
        told = "each field is half an octave; the line is the square"
        svg = draw_sizes(rows.sides, "pictures by width and height")
        charts.append({"title": "Width and height", "told": told, "svg": svg})
    for title, name, label, kind in _NUMBERS:
        values = getattr(rows, name)
        if values.count:
            before = getattr(other, name) if other and name != "image_bytes" else None
            svg = draw_histogram(values, before, label, f"samples by {title.lower()}", kind=kind)
            told = _told(values, kind)
            told += ", in the row groups opened for pictures" if name == "image_bytes" else ""
            charts.append({"title": title, "told": told, "svg": svg})
    for name, values in sorted(rows.scores.items()):
        if values.count:
            before = other.scores.get(name) if other else None
            svg = draw_histogram(values, before, "score", f"samples by the score {name}")
            title = f"Score: {_clip(name, 60)}"
            charts.append({"title": title, "told": _told(values, "number"), "svg": svg})
    if rows.days:
        told = f"{min(rows.days)} to {max(rows.days)}, stored rows"
        charts.append({"title": "Fetched", "told": told, "svg": draw_days(rows.days, "stored rows by day of fetch")})
    return charts


def _told(values: Histogram, kind: Kind) -> str:
    def said(value: float) -> str:
        return bytes_told(value) if kind == "bytes" else _FORMATS[kind].format(value)

    low, middle, high = (said(values.quantile(share)) for share in (0.1, 0.5, 0.9))
    told = f"mean {said(values.mean)}, median ~{middle}, 10 to 90 %: ~{low} to ~{high}, of {values.count:,}"
    return told + (f"; {values.unusable:,} are no number" if values.unusable else "")


def _bars(rows: RowSurvey, other: RowSurvey | None) -> list[tuple[str, list[dict[str, Any]]]]:
    return [
        (title, _shares(getattr(rows, name), getattr(other, name) if other else None))
        for title, name in (("Language", "languages"), ("Format", "formats"))
        if getattr(rows, name)
    ]


def _shares(counts: Counter[str | None], before: Counter[str | None] | None) -> list[dict[str, Any]]:
    total, total_before = counts.total(), before.total() if before else 0
    shown = counts.most_common(_NAMES)
    shares = [
        {
            "name": name or "not identified",
            "count": count,
            "share": count / total,
            "before": before[name] / total_before if before and total_before else None,
        }
        for name, count in shown
    ]
    rest = total - sum(count for _, count in shown)
    if rest:
        shares.append({"name": f"{len(counts) - _NAMES} others", "count": rest, "share": rest / total, "before": None})
    return shares
