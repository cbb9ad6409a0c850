"""A run's page: one self-contained HTML file with curves, goodput, restarts and what the model wrote on the way."""

import base64
import math
import unicodedata
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from coca.checkpoint import read_description
from coca.errors import BadInput
from coca.goodput import LOSSES, NEW, read_goodput
from coca.held_out import FOLDER, PREFIX, picture_name, read_evaluations
from coca.progress import format_duration
from coca.run_folder import RunFolder
from coca.storage import Store
from coca.typed_config import flatten
from jobs.charts import Series, draw_series

REPORT = "report.html"
_SHOWN_EVALUATIONS, _SHOWN_ATTEMPTS, _SHOWN_SKIPS = 5, 40, 20
_CAUSES = {
    NEW: "new steps",
    "starting": "starting: processes, model, data, the first look at the device",
    "restoring": "restoring: reading and verifying a checkpoint",
    "replayed": "replayed: steps done again after a restart",
    "checkpoint": "checkpoints: the loop held by saving",
    "evaluation": "evaluation on the held-out set",
    "data": "waiting for data",
    "down": "down: between attempts",
}
_SUMMARY = (
    "train.steps",
    "train.batch_size",
    "train.precision",
    "train.optimizer.name",
    "train.optimizer.learning_rate",
    "train.optimizer.schedule",
    "train.optimizer.ema_decay",
    "train.loss.contrastive_weight",
    "train.loss.captioning_weight",
    "train.resolutions",
    "train.parallel.kind",
    "train.parallel.micro_batches",
    "train.lanes",
    "train.seed",
    "workers.count",
    "workers.use_gpu",
    "held_out",
    "held_out_pictures",
)


class Chart(NamedTuple):
    """What is drawn from the rows: one field of metrics.jsonl, or two with names."""

    title: str
    told: str
    fields: tuple[tuple[str, str], ...]
    log: bool = False
    floor: bool = False


_RECALL = "share of the held-out pictures and captions whose partner is among the nearest"
_CHARTS = (
    Chart(
        "Losses",
        "of the training batches, not weighted",
        (("captioning", "captioning_loss"), ("contrastive", "contrastive_loss")),
        log=True,
    ),
    Chart("Held-out caption loss", "per token, no training pictures", (("", f"{PREFIX}caption_loss"),)),
    *(
        Chart(
            f"Recall@{k}",
            _RECALL,
            (
                ("image to text", f"{PREFIX}image_to_text_recall_at_{k}"),
                ("text to image", f"{PREFIX}text_to_image_recall_at_{k}"),
            ),
            floor=True,
        )
        for k in (1, 5)
    ),
    Chart("Learning rate", "of AdamW's or Adafactor's parameters", (("", "learning_rate"),), floor=True),
    Chart("Gradient norm", "before clipping", (("", "grad_norm"),), log=True),
    Chart("Temperature", "of the contrastive loss", (("", "temperature"),)),
    Chart("Samples per second", "all workers, evaluations and checkpoints apart", (("", "samples_per_s"),), floor=True),
    Chart("Waiting for data", "share of the time of the steps", (("", "data_wait"),), floor=True),
    Chart(
        "FLOP utilisation",
        "of the device's data sheet, and of a matrix product measured on it",
        (("of the measured product", "flop_utilisation_measured"), ("of the spec", "flop_utilisation_spec")),
        floor=True,
    ),
    Chart("Peak memory", "GiB of worker 0", (("", "peak_memory_gib"),), floor=True),
)


def write_train_report(run: RunFolder) -> str:
    """Write ``report.html`` into a run folder and give its path. It needs no other file and no network.

    Whatever a run does not have yet is left out, so a run under way has a page too.

    Raises:
        BadInput: the run has no config.yaml, or its account of goodput is damaged.
    """
    run.store.write(REPORT, render_train_report(run).encode())
    return f"{run.store.uri}/{REPORT}"


def render_train_report(run: RunFolder) -> str:
    """The page as text."""
    config_yaml = _read_config(run.store)
    config = flatten(yaml.safe_load(config_yaml))
    rows = run.read_metrics()
    account = read_goodput(run.store)
    last_step = rows[-1]["step"] if rows else 0
    evaluations = [each for each in read_evaluations(run.store) if each["step"] <= last_step]
    attempts = account["attempts"] if account else []
    return (
        _environment()
        .get_template("train_report.html.j2")
        .render(
            uri=run.store.uri,
            written=datetime.now(UTC),
            last=rows[-1] if rows else None,
            steps=config.get("train.steps"),
            evaluation=evaluations[-1] if evaluations else None,
            charts=_charts(rows, [each["from_step"] for each in attempts[1:] if each["from_step"] is not None]),
            account=account,
            causes=_causes(account["seconds"]) if account else [],
            attempts=list(enumerate(attempts, start=1))[-_SHOWN_ATTEMPTS:],
            skipped=_skipped(rows),
            shown_skips=_SHOWN_SKIPS,
            captions=_captions(run.store, evaluations),
            summary=[(name, config[name]) for name in _SUMMARY if config.get(name) not in (None, [])],
            config_yaml=config_yaml,
            provenance=_provenance(run),
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("jobs"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "duration": lambda seconds: f"{seconds:.1f}s" if seconds < 10 else format_duration(seconds),
        "moment": lambda seconds: datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S"),
        "count": lambda count: f"{count:,}",
        "percent": lambda share: f"{share:.1%}",
        "plain": _plain,
    }
    return environment


def _plain(text: str, limit: int = 160) -> str:
    """Without marks that steer a terminal or turn the direction of a text: a caption is a stranger's."""
    kept = "".join(mark for mark in text if unicodedata.category(mark) not in ("Cc", "Cf"))
    return kept if len(kept) <= limit else kept[: limit - 1] + "…"


def _read_config(store: Store) -> str:
    try:
        return store.read("config.yaml").decode()
    except FileNotFoundError:
        raise BadInput(f"{store.uri} holds no run", "Name a folder that `coca train --out` wrote") from None


def _charts(rows: Sequence[dict[str, Any]], restarts: Sequence[int]) -> list[dict[str, Any]]:
    drawn = []
    for chart in _CHARTS:
        series: list[Series] = []
        for name, field in chart.fields:
            having = [row for row in rows if _is_number(row.get(field), chart.log)]
            if having:
                series.append((name, [row["step"] for row in having], [row[field] for row in having]))
        if series:
            description = f"{chart.title.lower()} over the steps of training"
            svg = draw_series(series, description, log=chart.log, marks=restarts, floor=chart.floor)
            drawn.append({"title": chart.title, "told": chart.told, "svg": Markup(svg)})  # noqa: S704 - from numbers
    return drawn


def _is_number(value: float | None, log: bool) -> bool:
    return value is not None and math.isfinite(value) and (value > 0 or not log)


def _causes(seconds: dict[str, float]) -> list[dict[str, Any]]:
    """Of the run's time, new steps first, then losses, the largest first."""
    total = sum(seconds.values()) or 1.0
    losses = sorted((cause for cause in LOSSES if seconds[cause] > 0), key=lambda cause: -seconds[cause])
    return [
        {"name": cause, "told": _CAUSES[cause], "seconds": seconds[cause], "share": seconds[cause] / total}
        for cause in (NEW, *losses)
    ]


def _skipped(rows: Sequence[dict[str, Any]]) -> list[dict[str, int]]:
    """Where the count of skipped steps grew, from row to row."""
    found, before, since = [], 0, 0
    for row in rows:
        count = row.get("skipped_steps", 0)
        if count > before:
            found.append({"count": count - before, "after": since, "until": row["step"]})
        before, since = count, row["step"]
    return found


def _captions(store: Store, evaluations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each picture what was written at the first evaluation, the last, and some between."""
    if not evaluations:
        return []
    chosen = [evaluations[index] for index in _spread(len(evaluations), _SHOWN_EVALUATIONS)]
    cards = []
    for last in chosen[-1]["captions"]:
        written = [
            {"step": each["step"], "caption": caption["caption"]}
            for each in chosen
            for caption in each["captions"]
            if caption["picture"] == last["picture"]
        ]
        image = _data_uri(store, f"{FOLDER}/pictures/{picture_name(last['picture'])}")
        cards.append({"image": image, "accepted": last["accepted"], "written": written})
    return cards


def _spread(count: int, most: int) -> list[int]:
    """Indices below ``count``, at most ``most``, even, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]


def _data_uri(store: Store, path: str) -> str | None:
    try:
        return f"data:image/jpeg;base64,{base64.b64encode(store.read(path)).decode()}"
    except FileNotFoundError:
        return None


def _provenance(run: RunFolder) -> Iterable[tuple[str, Any]]:
    """Of the newest checkpoint; nothing where the run has none yet."""
    try:
        described = read_description(run.store.uri)
    except BadInput:
        return []
    return [("checkpoint", f"step {described.step:,}"), *flatten(described.provenance).items()]
