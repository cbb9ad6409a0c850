"""``coca data``: refresh a dataset from a table of links, and look at one."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from jobs.commands.options import coca_command, config_options


@click.group()
def command() -> None:
    """Download, filter, tokenize and publish a dataset; look at one."""


@command.command(
    epilog="""\b
Examples:
  coca data refresh --links links.parquet --to data/mine --tokenizer tokenizer.json
  coca data refresh --links 's3://bucket/links/*.parquet' --to s3://bucket/mine \\
    --url-column URL --caption-column TEXT
  coca data refresh --links links.csv --to data/mine --set image.size=384 --set fetch.timeout_s=10
"""
)
@click.option("--links", metavar="URI", help="Parquet or CSV: a file, a folder or a pattern, on disk or s3://.")
@click.option("--to", metavar="DATASET", help="The dataset: a folder or s3://BUCKET/PREFIX.")
@click.option("--tokenizer", metavar="FILE", help="Needed for a new dataset; later its own is used.")
@click.option("--url-column", metavar="NAME", help="Column with the urls.  [default: url]")
@click.option("--caption-column", metavar="NAME", help="Column with the captions.  [default: caption]")
@config_options
@coca_command
def refresh(
    links: str | None,
    to: str | None,
    tokenizer: str | None,
    url_column: str | None,
    caption_column: str | None,
    config_file: Path | None,
    sets: tuple[str, ...],
) -> dict[str, Any]:
    """Fetch the links that are new or due and publish a version of the dataset.

    The same command again fetches nothing where nothing is due, and goes on where it was killed.
    """
    from coca.typed_config import build_config, resolve_config
    from jobs.cluster import connect
    from pipelines.config import RefreshConfig
    from pipelines.refresh import refresh as run_refresh

    values = resolve_config(RefreshConfig(), config_file, sets).model_dump()
    for key, value in {"to": to, "tokenizer": tokenizer}.items():
        values[key] = value if value is not None else values[key]
    for key, value in {"uri": links, "url_column": url_column, "caption_column": caption_column}.items():
        values["links"][key] = value if value is not None else values["links"][key]
    result = run_refresh(build_config(RefreshConfig, values), start_ray=connect)
    click.echo(_describe_refresh(result))
    return asdict(result)


@command.command(
    epilog="""\b
Examples:
  coca data show data/mine
  coca data show s3://bucket/mine --version 3 --rows 10
"""
)
@click.argument("dataset")
@click.option("--version", type=int, help="By default the latest.")
@click.option("--rows", type=click.IntRange(min=0), default=5, show_default=True, help="Samples to list.")
@coca_command
def show(dataset: str, version: int | None, rows: int) -> dict[str, Any]:
    """A version of a dataset: its tables, tokenizer, last funnel and first samples."""
    from coca.dataset import Dataset, list_versions

    opened = Dataset(dataset, version)
    record, first = opened.record, _first_samples(opened, rows)
    for line in _describe_record(record.model_dump(), list_versions(opened.store)):
        click.echo(line)
    for row in first:
        click.echo(f"  {row['width']:>5} x {row['height']:<5} {row['format']:<5} {row['caption']!r}  {row['url']}")
    return {"dataset": opened.store.uri, "record": record.model_dump(mode="json"), "samples": first}


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
    return f"{render_funnel(funnel)}\n\n{done}\nlook at it: coca data show {result.dataset}"


def _describe_record(record: dict[str, Any], versions: list[int]) -> list[str]:
    from pipelines.funnel import Funnel, render_funnel

    tokenizer, funnel = record["tokenizer"], record["funnel"]
    tables = (f"{name} {record[name]['rows']:,} rows in {record[name]['files']:,} files" for name in _TABLES)
    return [
        f"version {record['version']} of {len(versions)} (latest {versions[-1]}), made {record['created_at']} "
        f"by coca {record['code_version']}",
        f"samples: {record['selected']:,} selected of {record['samples']['rows']:,} stored",
        f"tables: {', '.join(tables)}",
        f"tokenizer: {tokenizer['fingerprint']}, {tokenizer['vocab_size']:,} entries",
        "",
        "the refresh that published it:",
        render_funnel(Funnel(**{key: funnel[key] for key in Funnel.model_fields})),
        "",
    ]


_TABLES = ("samples", "annotations", "links")


def _first_samples(dataset: Any, wanted: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for index in range(dataset.row_groups.num_rows):
        if len(rows) >= wanted:
            break
        columns = ("sample_id", "url", "caption", "format", "width", "height")
        rows += dataset.read_row_group(index, columns=columns).slice(0, wanted - len(rows)).to_pylist()
    return rows
