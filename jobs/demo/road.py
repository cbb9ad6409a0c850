"""The whole road: every stage once, in order, each with a marker written last; then the summary and the page."""

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from coca.errors import BadInput
from coca.progress import format_duration
from coca.run_folder import RunFolder
from jobs.demo.config import DemoConfig
from jobs.demo.pictures import data_uri
from jobs.demo.stages import STAGES, Folders, Result, Stage

SUMMARY, REPORT = "summary.json", "report.html"

# What the summary leaves to the stages' own markers: one entry for each picture.
_LONG = ("captions", "captions_two_objects")


def run_demo(out: Path, config: DemoConfig) -> dict[str, Any]:
    """Run what is not done of every stage into ``out``; write summary.json and report.html; return the summary.

    A stage is done when its marker, ``stages/<name>.json``, holds the settings it and all before it were made with.
    A stage that was cut off goes on; one made with other settings is made anew, with all after it.

    Raises:
        BadInput: ``out`` is no demo's folder, or another demo works in it.
        RunFailed: a stage failed.
    """
    out = out.absolute()
    with _hold(out):
        markers = _run_stages(Folders(out), config)
        summary = summarize(markers)
        _write_json(out / SUMMARY, summary)
        _write_page(Folders(out), summary, markers)
    _show_end(out, summary)
    return summary


def summarize(markers: dict[str, Result]) -> dict[str, Any]:
    """summary.json from the stages' markers."""
    results = {name: marker["result"] for name, marker in markers.items()}
    refreshed, planted = results["refresh"], results["web"]
    evaluated = {name: value for name, value in results["evaluate"].items() if name not in _LONG}
    return {
        "links": refreshed["links"],
        "samples": refreshed["samples"],
        "rejected": refreshed["rejected"],
        "rejected_as_planted": refreshed["rejected"] == planted["rejected"],
        "train": results["train"],
        "tune": results["tune"],
        "evaluate": evaluated,
        "serve": {name: value for name, value in results["serve"].items() if name != "pictures"},
        "wall_s": {name: marker["wall_s"] for name, marker in markers.items()},
    }


def _run_stages(folders: Folders, config: DemoConfig) -> dict[str, Result]:
    from jobs.cluster import disconnect, is_connected

    was_connected = is_connected()
    markers: dict[str, Result] = {}
    made_with: dict[str, Any] = {}
    try:
        for number, stage in enumerate(STAGES, start=1):
            made_with = made_with | {name: getattr(config, name) for name in stage.settings}
            heading = f"[{number}/{len(STAGES)}] {stage.name}"
            markers[stage.name] = _run_stage(stage, folders, config, made_with, heading)
    finally:
        if not was_connected:  # a Ray that was there before us is not ours to end
            disconnect()
    return markers


def _run_stage(
    stage: Stage, folders: Folders, config: DemoConfig, made_with: dict[str, Any], heading: str
) -> dict[str, Any]:
    done = folders.out / "stages" / f"{stage.name}.json"
    begun = folders.out / "stages" / f"{stage.name}.begun.json"
    marker = _read_json(done)
    if marker is not None and marker["made_with"] == made_with:
        told = f"{stage.tell(marker['result'])} ({format_duration(marker['wall_s'])})"
        click.echo(f"{heading}: done before, skipped. {told}")
        return marker
    attempts = _begin(stage, folders, begun, made_with)
    click.echo(f"{heading}: {stage.title}{', going on' if attempts > 1 else ''}")
    started = time.monotonic()
    result = stage.function(folders, config)
    wall_s = round(time.monotonic() - started, 2)
    marker = {"made_with": made_with, "result": result, "wall_s": wall_s, "attempts": attempts}
    _write_json(done, marker)
    click.echo(f"      {stage.tell(result)} ({format_duration(wall_s)})")
    return marker


def _begin(stage: Stage, folders: Folders, begun: Path, made_with: dict[str, Any]) -> int:
    """Note that the stage begins, clear what it made with other settings, and give the number of this attempt."""
    before = _read_json(begun)
    if before is not None and before["made_with"] == made_with:
        attempts = before["attempts"] + 1
    else:
        # The web clears its folder itself: its port stays.
        if stage.makes and stage.name != "web":
            _remove(folders.out / stage.makes)
        attempts = 1
    # A stage made anew takes all after it along, also where a kill comes in between.
    for later in STAGES[STAGES.index(stage) :]:
        (folders.out / "stages" / f"{later.name}.json").unlink(missing_ok=True)
    _write_json(begun, {"made_with": made_with, "attempts": attempts})
    return attempts


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _hold(out: Path) -> Iterator[None]:
    """Claim the folder for one demo at a time; one with other things in it is refused, since stages clear theirs."""
    if out.exists() and not out.is_dir():
        raise BadInput(f"--out {out} is a file", "Give a folder")
    if out.exists() and any(out.iterdir()) and not (out / "stages").is_dir():
        raise BadInput(f"--out {out} holds other things than a demo", "Give a new or empty folder")
    (out / "stages").mkdir(parents=True, exist_ok=True)
    with (out / "stages" / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"another coca demo works in {out}", "Wait for it, or give another --out") from None
        yield


def _write_page(folders: Folders, summary: dict[str, Any], markers: dict[str, Result]) -> None:
    from coca.evaluate import read_evaluation_set
    from jobs.report import Answer, ReportData, Score, write_report

    results = {name: marker["result"] for name, marker in markers.items()}
    evaluated, served = results["evaluate"], results["serve"]
    one = read_evaluation_set(str(folders.web.held_out_one))
    two = read_evaluation_set(str(folders.web.held_out_two))

    def answers(images: list[bytes], accepted: list[list[str]], written: list[str]) -> list[Answer]:
        rows = zip(images, accepted, written, strict=True)
        return [Answer.judge(data_uri(image), truths, text) for image, truths, text in rows]

    images, accepted = [*one.images, *two.images], [*one.captions, *two.captions]
    asked = served["pictures"]
    data = ReportData(
        summary=summary,
        stages=[
            {"name": s.name, "title": s.title, "told": s.tell(results[s.name]), "wall_s": markers[s.name]["wall_s"]}
            for s in STAGES
        ],
        planted=results["web"]["rejected"],
        metrics=RunFolder(folders.run).read_metrics(),
        one=answers(one.images, one.captions, evaluated["captions"]),
        two=answers(two.images, two.captions, evaluated["captions_two_objects"]),
        scores=[Score(name, evaluated[value], evaluated[chance]) for name, value, chance in _SCORES],
        served=answers(
            [images[index] for index in asked],
            [accepted[index] for index in asked],
            [row["caption"] for row in served["captions"]],
        ),
        run=_shown(folders.run),
    )
    write_report(folders.out / REPORT, data)


_SCORES = (
    ("exact caption, one thing", "exact_caption", "chance_exact_caption"),
    ("exact caption, two things", "exact_caption_two_objects", "chance_exact_caption_two_objects"),
    ("recall@1, image to text", "image_to_text_recall_at_1", "chance_image_to_text_at_1"),
    ("recall@1, text to image", "text_to_image_recall_at_1", "chance_text_to_image_at_1"),
    ("zero-shot accuracy", "zero_shot_accuracy", "chance_zero_shot"),
)


def _show_end(out: Path, summary: dict[str, Any]) -> None:
    evaluated = summary["evaluate"]
    click.echo()
    for name, value, chance in _SCORES:
        click.echo(f"  {name:<26} {evaluated[value]:.3f}   (chance {evaluated[chance]:.2g})")
    click.echo()
    for answer in summary["serve"]["captions"][:3]:
        click.echo(f"  served: {answer['caption']}{'' if answer['exact'] else '   (true: ' + answer['expected'] + ')'}")
    if not summary["rejected_as_planted"]:
        click.echo("\n  the rejected links differ from the planted ones: compare them in the report")
    total = format_duration(sum(summary["wall_s"].values()))
    shown = _shown(out)
    click.echo(f"\nThe whole road took {total}. Look at:")
    click.echo(f"  {shown}/{REPORT}   (open it in a browser)")
    click.echo(f"  {shown}/{SUMMARY}")
    click.echo(f"  coca serve --checkpoint {shown}/run")


def _shown(path: Path) -> str:
    """Relative to where the user stands, if below."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """Whole or not at all, also after a kill or a power cut."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)
