"""`coca tune`."""

from pathlib import Path
from typing import Any

import click

from coca.typed_config import resolve_config
from jobs.commands.options import coca_command, config_options

EXAMPLES = """\b
Examples:
  coca tune --data data/mine --held-out held_out.parquet --out runs/study --trials 8 --recipe scenes
  coca tune --data data/mine --held-out held_out.parquet --out runs/study --set train.steps=200
"""


@click.command(epilog=EXAMPLES)
@click.option("--data", required=True, metavar="DATASET", help="Dataset folder: a path or s3:// uri.")
@click.option("--held-out", required=True, metavar="FILE", help="Parquet with `image` and `captions`: the judge.")
@click.option("--out", required=True, metavar="STUDY", help="Study folder; an existing study goes on.")
@click.option("--trials", type=int, help="Number of trials (default 8).")
@click.option("--recipe", "recipe_name", default="coca_base", show_default=True, help="Named config of a trial.")
@click.option("--workers", type=int, help="Ray Train workers of a trial (default 1).")
@click.option("--steps", type=int, help="Steps of a trial.")
@config_options
@coca_command
def command(
    data: str,
    held_out: str,
    out: str,
    trials: int | None,
    recipe_name: str,
    workers: int | None,
    steps: int | None,
    config_file: Path | None,
    sets: tuple[str, ...],
) -> dict[str, Any]:
    """Search the weights of the two losses.

    Trials are judged by held-out recall@1 and caption perplexity, which the weights do not scale.
    """
    from jobs.cluster import connect
    from jobs.config import TuneConfig
    from jobs.recipes import recipe
    from jobs.tune import run_tuning

    base = TuneConfig(data=data, held_out=held_out, out=out, train=recipe(recipe_name))
    flags = {"trials": trials, "workers.count": workers, "train.steps": steps}
    config = resolve_config(base, config_file, [*sets, *(f"{k}={v}" for k, v in flags.items() if v is not None)])
    result = run_tuning(config, start_ray=connect)
    click.echo("trial  contrastive  captioning  recall@1  perplexity  score")
    for row in sorted(result["trials"], key=lambda row: -row["score"]):
        click.echo(
            f"{row['trial']:>5}  {row['contrastive_weight']:>11.3f}  {row['captioning_weight']:>10.3f}"
            f"  {row['recall_at_1']:>8.3f}  {row['perplexity']:>10.3f}  {row['score']:.3f}"
        )
    return result
