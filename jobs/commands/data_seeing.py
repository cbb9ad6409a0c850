"""``coca data show``, ``report`` and ``explain``: looking at a dataset."""

from pathlib import Path
from typing import Any

import click

from jobs.commands.options import coca_command, one_line

_LISTED = (
    "sample_id", "url", "caption", "format", "width", "height", "tokens", "language", "scores", "selected", "reason",
)  # fmt: skip
_TABLES = ("samples", "annotations", "links")
_VERSION_HELP = "By default the latest."


@click.command(
    epilog="""\b
Examples:
  coca data show data/mine
  coca data show s3://bucket/mine --version 3 --rows 10
  coca data show data/mine --where "width > 400 and language = 'en'" --html rows.html
  coca data show data/mine --where "reason = 'near_duplicate' and caption contains 'cat'"
  coca data show data/mine --where "scores.clip < 0.2 or host in ('a.example', 'b.example')"
"""
)
@click.argument("dataset")
@click.option("--version", type=int, help=_VERSION_HELP)
@click.option("--rows", type=click.IntRange(min=0), default=5, show_default=True, help="Rows to list.")
@click.option("--where", metavar="FILTER", help="Only rows that match: and, or, not, = < > in, contains, is null.")
@click.option("--unselected", is_flag=True, help="Rows that are stored and not selected, in place of samples.")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write a page with their pictures.")
@coca_command
def show(
    dataset: str, version: int | None, rows: int, where: str | None, unselected: bool, html: Path | None
) -> dict[str, Any]:
    """A version of a dataset: its tables, tokenizer, last funnel, and samples, all or those that match a filter.

    Only selected rows are listed; a filter that names `selected` or `reason` looks at every stored row. Withdrawn
    rows are never shown.
    """
    from coca.dataset import Dataset, list_versions
    from pipelines.rows import find_rows
    from pipelines.where import parse_where

    condition = parse_where(where) if where is not None else None
    opened = Dataset(dataset, version)
    decides = condition is not None and not condition.columns.isdisjoint({"selected", "reason"})
    selected = False if unselected else None if decides else True
    fields = {*_LISTED, *(("fetched_at", *(condition.columns if condition else ())) if html else ())}
    fields = {name for name in fields if not name.startswith("scores.")}
    found = list(find_rows(opened, fields, rows, where=condition, selected=selected))
    listed = [{name: row[name] for name in (*_LISTED, *sorted(fields - set(_LISTED)))} for _, row in found]
    if condition is None:
        in_it = sum(opened.row_groups["selected"].to_pylist())
        for line in _describe_record(opened.record.model_dump(), list_versions(opened.store), in_it):
            click.echo(line)
    for row in listed:
        click.echo(_describe_row(row))
    if condition is not None:
        click.echo(f"{len(listed)} rows{' (--rows N for more)' if rows and len(listed) == rows else ''}")
    if html is not None:
        _write_rows(html, opened, found, listed, where, selected)
    return {
        "dataset": opened.store.uri,
        "record": opened.record.model_dump(mode="json"),
        "samples": [row | {"scores": dict(row["scores"] or ())} for row in listed],
        "html": str(html) if html else None,
    }


@click.command(
    epilog="""\b
Examples:
  coca data report data/mine
  coca data report s3://bucket/mine --version 3 --out mine-3.html
  coca data report data/mine --compare 2
"""
)
@click.argument("dataset")
@click.option("--version", type=int, help=_VERSION_HELP)
@click.option("--compare", type=int, metavar="M", help="Another version, drawn beside this one.")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FILE", default=Path("report.html"), show_default=True,
    help="Where the page is written.",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Draws the pictures shown.")
@coca_command
def report(dataset: str, version: int | None, compare: int | None, out: Path, seed: int) -> dict[str, Any]:
    """One self-contained page about a version: funnel, reasons by host, distributions, pictures, changes.

    Kept and refused pictures are drawn at random; withdrawn ones are never shown.
    """
    from jobs.data_report import render_report
    from pipelines.survey import survey

    _check_out(out, "--out")
    measured = survey(dataset, version, compare, seed=seed)
    _write_page(out, render_report(measured))
    rows, ledger = measured.rows, measured.ledger
    looked_at = f"{rows.rows:,} of {rows.of_rows:,} rows" if rows.is_sample else f"{rows.rows:,} rows"
    click.echo(f"{measured.uri} version {measured.record['version']}: {looked_at} and {ledger.pairs:,} pairs looked at")
    click.echo(f"wrote {out.absolute()}")
    return {
        "dataset": measured.uri,
        "version": measured.record["version"],
        "out": str(out.absolute()),
        "rows": rows.rows,
        "selected": rows.selected,
        "unselected": dict(rows.unselected),
        "withdrawn": rows.withdrawn,
        "pairs": ledger.pairs,
        "due": ledger.due,
    }


@click.command(
    epilog="""\b
Examples:
  coca data explain data/mine https://example.com/cat.jpg
  coca data explain data/mine https://example.com/cat.jpg --version 3 --json
"""
)
@click.argument("dataset")
@click.argument("url")
@click.option("--version", type=int, help=_VERSION_HELP)
@coca_command
def explain(dataset: str, url: str, version: int | None) -> dict[str, Any]:
    """Everything known about a url: its address, each event, what is stored, why it is selected or not, when it is due.

    Reads the ledger's bucket of the url and the sample ids of the refreshes that stored it.
    """
    from dataclasses import asdict

    from coca.dataset import Dataset
    from pipelines.explain import explain as look_up

    found = look_up(Dataset(dataset, version), url)
    for line in _describe_explanation(found):
        click.echo(line)
    return asdict(found)


def _write_rows(
    html: Path, opened: Any, found: list[tuple[int, dict[str, Any]]], listed: list[dict[str, Any]],
    where: str | None, selected: bool | None,
) -> None:  # fmt: skip
    from jobs.data_report import render_rows
    from pipelines.rows import read_images

    _check_out(html, "--html")
    wanted: dict[int, list[str]] = {}
    for index, row in found:
        wanted.setdefault(index, []).append(row["sample_id"])
    images: dict[str, bytes] = {}
    for index, ids in wanted.items():
        images |= read_images(opened, index, ids)
    told = {True: "Selected samples", False: "Rows that are stored and not selected", None: "Stored rows"}[selected]
    page = render_rows(opened.store.uri, opened.record.version, listed, images, where=where, told=told)
    _write_page(html, page)
    click.echo(f"wrote {html.absolute()}")


def _check_out(out: Path, option: str) -> None:
    from coca.errors import BadInput

    if out.is_dir():
        raise BadInput(f"{option} {out} is a folder", "Name a file in it")
    if not out.absolute().parent.is_dir():
        raise BadInput(f"{option} {out}: {out.absolute().parent} is no folder", "Make it first")


def _write_page(out: Path, page: str) -> None:
    from coca.errors import BadInput

    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise BadInput(f"cannot write {out}: {error.strerror}", "Name another file") from None


def _describe_record(record: dict[str, Any], versions: list[int], selected: int) -> list[str]:
    """``selected``: samples that readers see, without what was withdrawn since."""
    from pipelines.funnel import Funnel, render_funnel

    withdrawn = record["selected"] - selected
    gone = f" ({withdrawn:,} withdrawn since)" if withdrawn else ""
    tokenizer, funnel = record["tokenizer"], record["funnel"]
    tables = (f"{name} {record[name]['rows']:,} rows in {record[name]['files']:,} files" for name in _TABLES)
    lines = [
        f"version {record['version']} (latest {versions[-1]}, {len(versions)} kept), made {record['created_at']} "
        f"by coca {record['code_version']}",
        f"samples: {selected:,} selected of {record['samples']['rows']:,} stored{gone}",
        f"tables: {', '.join(tables)}",
        f"tokenizer: {tokenizer['fingerprint']}, {tokenizer['vocab_size']:,} entries",
        "",
    ]
    if funnel.get("links"):
        told = render_funnel(Funnel(**{key: funnel[key] for key in ("links", "samples", "rejected")}))
        lines += ["the refresh that published it:", told, ""]
    return lines


def _describe_row(row: dict[str, Any]) -> str:
    reason = "" if row["selected"] else f"  [{row['reason']}]"
    language = f" {row['language']:<3}" if row["language"] else ""
    size = f"{row['width']:>5} x {row['height']:<5} {row['format']:<5}"
    return f"  {size}{language} {row['caption']!r}  {_printable(row['url'])}{reason}"


def _describe_explanation(found: Any) -> list[str]:
    lines = [f"url        {_printable(found.url)}"]
    if found.canonical != found.url:
        lines.append(f"known as   {_printable(found.canonical or found.url)}")
    lines += [f"address    {found.address}", f"bucket     {found.bucket} of the ledger of version {found.version}"]
    lines += [
        f"withdrawn  {entry['withdrawn_at']:%Y-%m-%d %H:%M:%S} {_printable(entry['reason'])}, by its "
        + next(name for name in ("url", "sample_id", "source_sha256") if entry[name])
        for entry in found.withdrawals
    ]
    if not found.events:
        hint = f"; the nearest that is known: {_printable(found.nearest)}" if found.nearest else ""
        return [*lines, f"events     none: {found.dataset} has never seen it{hint}"]
    lines += ["", f"{len(found.events)} event{'s' * (len(found.events) > 1)}, oldest first"]
    lines += [_describe_event(event) for event in found.events]
    for pair in found.pairs:
        lines += ["", *_describe_pair(pair)]
    return lines


def _describe_event(event: dict[str, Any]) -> str:
    status = f"status {event['status']}, " if event["status"] is not None else ""
    return (
        f"  {event['event_at']:%Y-%m-%d %H:%M:%S}  {event['state']:<9} {event['reason'] or '':<20} {status}"
        f"{event['attempts']} requests, refresh {event['refresh_id']}, {one_line(event['caption'], 60)!r}"
    )


def _describe_pair(pair: dict[str, Any]) -> list[str]:
    reason = f", {pair['reason']}" if pair["reason"] else ""
    head = [f"pair {pair['sample_id']} {one_line(pair['caption'], 200)!r}", f"  stands     {pair['state']}{reason}"]
    row, due = pair["row"], f"  due        {pair['due']}"
    if row is None:
        return [*head, "  stored     nothing", due]
    place = f"{row['file']} row group {row['row_group']} row {row['row']}"
    if row["withdrawn"]:
        return [*head, f"  withdrawn  yes: no reader sees it ({place})", due]
    scores = ", ".join(f"{_printable(name)} {value:.4g}" for name, value in row["scores"].items() if value is not None)
    original = f"{row['original_width']} x {row['original_height']}"
    lines = [
        *head,
        f"  stored     {place}",
        f"  picture    {row['format']} {row['width']} x {row['height']}, fetched as {original}",
        f"  digests    stored {row['sha256']}, fetched {row['source_sha256']}",
        f"  caption    {row['tokens']} tokens, language {row['language'] or 'not identified'}",
        f"  scores     {scores or 'none'}",
        f"  selected   {'yes' if row['selected'] else 'no: ' + (row['reason'] or 'no reason given')}",
    ]
    if row["winner"]:
        winner = row["winner"]
        near = f" ({winner['distance']} of 64 bits apart)" if row["reason"] == "near_duplicate" else " (the same bytes)"
        lines.append(f"  in favour  {_printable(winner['url'])} {one_line(winner['caption'], 80)!r}{near}")
    return [*lines, "  withdrawn  no", due]


def _printable(text: str) -> str:
    """Without the control characters a stranger may have put there for a terminal to obey."""
    return "".join(mark if mark.isprintable() else "\N{REPLACEMENT CHARACTER}" for mark in text)
