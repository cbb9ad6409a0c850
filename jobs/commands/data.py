"""``coca data``: the group of commands on datasets, and ``refresh``."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from jobs.commands.data_keeping import compact, diff, history, purge, rollback, vacuum, verify, withdraw
from jobs.commands.data_seeing import explain, report, show
from jobs.commands.data_selection import retokenize, select
from jobs.commands.data_transfer import export, import_command
from jobs.commands.options import coca_command, config_options
from jobs.commands.scorer_options import connect_for, scorer_options, scorer_specs


@click.group()
def command() -> None:
    """Download, filter, tokenize and publish a dataset; look at it, keep it, change it."""


for each in (
    *(show, report, explain, select, retokenize, import_command, export),
    *(history, diff, verify, rollback, withdraw, purge, compact, vacuum),
):
    command.add_command(each)


@command.command(
    epilog="""\b
Examples:
  coca data refresh --links links.parquet --to data/mine --tokenizer tokenizer.json
  coca data refresh --links 's3://bucket/laion/*.parquet' --columns laion --preset laion400m --to s3://bucket/mine
  coca data refresh --links links.csv --to data/mine --dry-run
  coca data refresh --links links.csv --to data/mine --set image.size=384 --set fetch.timeout_s=10
  coca data refresh --links new.parquet --to data/mine --set recheck.max_stored=10000 --set budget.max_minutes=60
"""
)
@click.option("--links", metavar="URI", help="Parquet, CSV or JSON lines: a file, folder or pattern; https:// s3://.")
@click.option("--to", metavar="DATASET", help="The dataset: a folder or s3://BUCKET/PREFIX.")
@click.option("--tokenizer", metavar="FILE", help="Needed for a new dataset; later its own is used.")
@click.option(
    "--preset", metavar="NAME", help="The rules of a published dataset.  [align, coyo, laion400m, cc12m, ...]"
)
@click.option(
    "--columns", metavar="NAME", help="The columns of a published table.  [laion, datacomp, coyo, cc3m, cc12m]"
)
@click.option("--url-column", metavar="NAME", help="Column with the urls.  [default: url]")
@click.option("--caption-column", metavar="NAME", help="Column with the captions.  [default: caption]")
@scorer_options
@click.option("--dry-run", is_flag=True, help="Ask a sample of the links and estimate; nothing is published.")
@click.option(
    "--sample", type=click.IntRange(min=1), default=1000, show_default=True, metavar="N", help="Urls of a dry run."
)
@config_options
@coca_command
def refresh(
    links: str | None,
    to: str | None,
    tokenizer: str | None,
    preset: str | None,
    columns: str | None,
    url_column: str | None,
    caption_column: str | None,
    scorers: tuple[str, ...],
    scorer_actors: int,
    scorer_gpus: float,
    dry_run: bool,
    sample: int,
    config_file: Path | None,
    sets: tuple[str, ...],
) -> dict[str, Any]:
    """Fetch the links that are new or due and publish a version of the dataset.

    The same command again fetches nothing where nothing is due, and goes on where it was killed.
    """
    from coca.typed_config import lay_over
    from jobs.refresh_settings import resolve_refresh
    from pipelines.refresh import refresh as run_refresh

    named = {"uri": links, "columns": columns, "url_column": url_column, "caption_column": caption_column}
    flags = {"links": _given(named), **_given({"to": to, "tokenizer": tokenizer})}
    config = lay_over(resolve_refresh(preset, config_file, sets, to), flags)
    if dry_run:
        from pipelines.estimate import estimate

        found = estimate(config, sample)
        click.echo(_describe_estimate(found))
        return asdict(found)
    specs = scorer_specs(scorers, scorer_actors, scorer_gpus)
    start_ray = connect_for(scorers, scorer_actors, scorer_gpus)
    result = run_refresh(config, scorers=specs, start_ray=start_ray)
    click.echo(_describe_refresh(result))
    return asdict(result)


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in flags.items() if value is not None}


def _describe_refresh(result: Any) -> str:
    from pipelines.funnel import Funnel, render_funnel

    funnel = Funnel(links=result.links, samples=result.samples, rejected=result.rejected)
    if result.changed:
        done = (
            f"{result.dataset}: published version {result.version} with {result.version_samples:,} samples, after "
            f"{result.requests:,} requests and {result.bytes / 1e6:,.1f} MB in {result.seconds:,.1f} s "
            f"({result.links_per_s:,.0f} links/s, {result.bytes_per_s / 1e6:,.1f} MB/s)"
        )
    else:
        done = f"{result.dataset}: nothing due; version {result.version} stands with {result.version_samples:,} samples"
    if result.withdrawn:
        done += f"\n{result.withdrawn:,} stored samples have opted out since: they are in no version from now on"
    return f"{render_funnel(funnel)}\n\n{done}\nlook at it: coca data show {result.dataset}"


def _describe_estimate(found: Any) -> str:
    low, high = 100 * found.admitted_share_low, 100 * found.admitted_share_high
    lines = [
        f"{found.links:,} links: {found.due_urls:,} urls to ask; of the other rows:",
        *(f"  {count:>8,}  {reason}" for reason, count in found.others.items()),
        f"asked {found.asked_urls:,} urls: {100 * found.admitted_share:.1f} % of their pairs admitted "
        f"(95 % interval {low:.1f} to {high:.1f} %)",
        *(f"  {count:>8,}  {reason}" for reason, count in found.reasons.items()),
        f"expected: {found.expected_samples:,} samples before selection, "
        f"{_bytes(found.expected_download_bytes)} to download, {_bytes(found.expected_stored_bytes)} to store",
        f"one worker here asked {found.urls_per_s:,.0f} urls/s",
    ]
    return "\n".join(lines)


def _bytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
