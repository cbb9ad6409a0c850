"""``coca data import`` and ``coca data export``: datasets of other tools in, datasets for other tools out."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import click

from jobs.commands.options import coca_command, config_options


@click.command(
    "import",
    epilog="""\b
Examples:
  coca data import laion400m-data --to data/mine --tokenizer tokenizer.json
  coca data import s3://bucket/img2dataset-output --to s3://bucket/mine --set image.size=512
""",
)
@click.argument("source")
@click.option("--to", metavar="DATASET", help="The dataset: a folder or s3://BUCKET/PREFIX.")
@click.option("--tokenizer", metavar="FILE", help="Needed for a new dataset; later its own is used.")
@config_options
@coca_command
def import_command(
    source: str, to: str | None, tokenizer: str | None, config_file: Path | None, sets: tuple[str, ...]
) -> dict[str, Any]:
    """Take over what img2dataset fetched, without fetching it again.

    SOURCE is the folder with its parquet or webdataset shards. The images pass the same checks as fetched ones; what
    failed there keeps its reason, and a later refresh asks again where that may help.
    """
    from coca.typed_config import build_config, resolve_config
    from jobs.cluster import connect
    from pipelines.config import RefreshConfig
    from pipelines.imports import import_dataset

    values = resolve_config(RefreshConfig(), config_file, sets).model_dump()
    for key, value in {"to": to, "tokenizer": tokenizer}.items():
        values[key] = value if value is not None else values[key]
    result = import_dataset(build_config(RefreshConfig, values), source, start_ray=connect)
    click.echo(
        f"{result.dataset}: version {result.version} with {result.version_samples:,} samples; of {result.links:,} "
        f"links in {source} {result.samples:,} are in it"
    )
    for reason, count in sorted(result.rejected.items(), key=lambda item: -item[1]):
        click.echo(f"  {count:>12,}  {reason}")
    click.echo(f"look at it: coca data show {result.dataset}")
    return asdict(result)


@click.command(
    epilog="""\b
Examples:
  coca data export data/mine --to out --format webdataset
  coca data export s3://bucket/mine --version 3 --to s3://bucket/shards --format parquet
"""
)
@click.argument("dataset")
@click.option("--to", required=True, metavar="FOLDER", help="A new folder, or s3://BUCKET/PREFIX.")
@click.option(
    "--format",
    "form",
    required=True,
    type=click.Choice(["webdataset", "parquet"]),
    help="webdataset: tar shards that open_clip trains from.",
)
@click.option("--version", type=int, help="By default the latest.")
@click.option("--samples-per-shard", type=click.IntRange(min=1), default=10_000, show_default=True)
@coca_command
def export(
    dataset: str, to: str, form: Literal["webdataset", "parquet"], version: int | None, samples_per_shard: int
) -> dict[str, Any]:
    """Write a version's selected samples as webdataset shards or Parquet files.

    Withdrawn samples are left out. The same command again goes on where it was stopped.
    """
    from pipelines.export import export_dataset

    result = export_dataset(dataset, to, form, version=version, samples_per_shard=samples_per_shard)
    click.echo(
        f"{result.to}: {result.samples:,} samples of version {result.version} in {result.shards:,} shards, "
        f"{result.bytes / 1e6:,.1f} MB ({result.written:,} shards written now)"
    )
    if form == "webdataset":
        last = f"{result.shards - 1:05d}"
        click.echo(
            f"train: python -m open_clip_train.main --dataset-type webdataset --train-data "
            f"'{result.to}/{{00000..{last}}}.tar' --train-num-samples {result.samples}"
        )
    return asdict(result)
