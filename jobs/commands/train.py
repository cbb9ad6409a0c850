"""`coca train`."""

from pathlib import Path
from typing import Any

import click

from coca.typed_config import resolve_config
from jobs.commands.options import coca_command, config_options

EXAMPLES = """\b
Examples:
  coca train --data data/mine --out runs/first --recipe scenes --workers 2
  coca train --data data/mine --out runs/first --recipe scenes --workers 2     (again: resumes)
  coca train --data s3://bucket/mine --out /shared/runs/base --set train.optimizer.learning_rate=1e-3
"""


@click.command(epilog=EXAMPLES)
@click.option("--data", required=True, metavar="DATASET", help="Dataset folder: a path or s3:// uri.")
@click.option("--version", type=int, help="Version of the dataset (default: the newest).")
@click.option("--out", required=True, metavar="RUN", help="Run folder; an existing run is resumed.")
@click.option("--recipe", "recipe_name", default="coca_base", show_default=True, help="Named config to start from.")
@click.option("--workers", type=int, help="Ray Train workers (default 1).")
@click.option("--steps", type=int, help="Optimizer steps of the whole run.")
@click.option("--batch-size", type=int, help="Samples of the global batch.")
@click.option("--must-be-new", is_flag=True, help="Refuse to go on with an existing run.")
@config_options
@coca_command
def command(
    data: str,
    version: int | None,
    out: str,
    recipe_name: str,
    workers: int | None,
    steps: int | None,
    batch_size: int | None,
    must_be_new: bool,
    config_file: Path | None,
    sets: tuple[str, ...],
) -> dict[str, Any]:
    """Pretrain a captioner on a dataset; the same command again resumes.

    --set takes the names that `coca config show train` prints.
    """
    from jobs.cluster import connect
    from jobs.config import TrainRunConfig
    from jobs.recipes import recipe
    from jobs.train import run_training

    base = TrainRunConfig(data=data, out=out, train=recipe(recipe_name))
    flags = {"version": version, "workers.count": workers, "train.steps": steps, "train.batch_size": batch_size}
    config = resolve_config(base, config_file, [*sets, *(f"{k}={v}" for k, v in flags.items() if v is not None)])
    result = run_training(config, must_be_new=must_be_new, start_ray=connect)
    loss = "" if result["final_loss"] is None else f", final loss {result['final_loss']:.4f}"
    click.echo(f"trained {result['steps']:,} steps{loss}")
    click.echo(f"checkpoint: {result['run']}/{result['checkpoint']}")
    click.echo(f"serve it:   coca serve --checkpoint {result['run']}/{result['checkpoint']}")
    return result
