"""`coca train`."""

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coca.errors import BadInput
from coca.typed_config import build_config, resolve_config
from jobs.commands.options import Outcome, coca_command, config_options

if TYPE_CHECKING:
    from jobs.config import TrainRunConfig

EXAMPLES = """\b
Examples:
  coca train --data data/mine --out runs/first --recipe scenes --workers 2
  coca train --data data/mine --out runs/first --recipe scenes --workers 2     (again: resumes)
  coca train --data s3://bucket/a --weight 3 --data s3://bucket/b --weight 1 --out s3://bucket/runs/base --workers 2:8
  coca train --data data/mine --out runs/first --recipe scenes --dry-run
"""


class WorkerRange(click.ParamType):
    """``N``, or ``MIN:MAX`` for as many as the cluster has room for: (least, count)."""

    name = "N or MIN:MAX"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int | None, int]:
        first, colon, last = str(value).partition(":")
        try:
            return (int(first), int(last)) if colon else (None, int(first))
        except ValueError:
            self.fail(f"{value!r} is neither a number nor of the form MIN:MAX, such as 2:8", param, ctx)


@click.command(epilog=EXAMPLES)
@click.option(
    "--data", required=True, multiple=True, metavar="DATASET", help="Dataset: a path or s3:// uri; several mix."
)
@click.option(
    "--weight", "weights", type=float, multiple=True, help="Share of each --data, in their order (default 1)."
)
@click.option("--version", "versions", type=int, multiple=True, help="Version of each --data, in their order.")
@click.option("--out", required=True, metavar="RUN", help="Run folder; an existing run is resumed.")
@click.option("--recipe", "recipe_name", default="coca_base", show_default=True, help="Named config to start from.")
@click.option("--workers", type=WorkerRange(), help="Ray Train workers (default 1); a range is elastic.")
@click.option("--steps", type=int, help="Optimizer steps of the whole run.")
@click.option("--batch-size", type=int, help="Samples of the global batch.")
@click.option("--held-out", metavar="FILE", help="Parquet with `image` and `captions` to evaluate on.")
@click.option("--decode-on", type=click.Choice(["processes", "threads", "ray"]), help="Where pictures are decoded.")
@click.option("--dry-run", is_flag=True, help="Check everything and say what it will take, without training.")
@click.option("--must-be-new", is_flag=True, help="Refuse to go on with an existing run.")
@config_options
@coca_command
def command(
    data: tuple[str, ...],
    weights: tuple[float, ...],
    versions: tuple[int, ...],
    out: str,
    recipe_name: str,
    workers: tuple[int | None, int] | None,
    steps: int | None,
    batch_size: int | None,
    held_out: str | None,
    decode_on: str | None,
    dry_run: bool,
    must_be_new: bool,
    config_file: Path | None,
    sets: tuple[str, ...],
) -> dict[str, Any] | Outcome:
    """Pretrain a captioner on a dataset, or on several; the same command again resumes.

    --set takes the names that `coca config show train` prints. SIGTERM and Ctrl-C end a run with a checkpoint, and the
    command with exit code 143 or 130.
    """
    from jobs.cluster import connect
    from jobs.config import TrainRunConfig
    from jobs.recipes import recipe
    from jobs.train import run_training

    flags = {
        "train.steps": steps,
        "train.batch_size": batch_size,
        "held_out": held_out,
        "feed.decode": decode_on,
    }
    named = {"data": datasets(data, weights, versions), "out": out, "train": recipe(recipe_name).model_dump()}
    base = build_config(TrainRunConfig, named)
    given = [f"{name}={value}" for name, value in flags.items() if value is not None]
    config = resolve_config(base, config_file, [*sets, *worker_settings(workers), *given])
    if dry_run:
        return _dry_run(config, must_be_new)
    result = run_training(config, must_be_new=must_be_new, start_ray=connect)
    _print(result)
    return outcome(result)


def worker_settings(workers: tuple[int | None, int] | None) -> list[str]:
    """``--workers`` as settings: one number alone also ends what a file says of ``least``."""
    if workers is None:
        return []
    least, count = workers
    return [f"workers.count={count}", f"workers.least={'null' if least is None else least}"]


def outcome(result: dict[str, Any]) -> Outcome:
    """With the exit code that a shell gives for a process that a signal ended: whoever waits must not go on as if the
    run were done."""
    stopped = result["stopped"]
    return Outcome(result, 0 if stopped is None else 128 + signal.Signals[stopped].value)


def datasets(uris: Sequence[str], weights: Sequence[float], versions: Sequence[int]) -> list[dict[str, Any]]:
    """Values of a DataConfig for each ``--data``.

    Raises:
        BadInput: weights or versions are given for some of them only.
    """
    values: list[dict[str, Any]] = [{"uri": uri} for uri in uris]
    for name, given in (("weight", weights), ("version", versions)):
        if given and len(given) != len(uris):
            raise BadInput(
                f"--{name} is given {len(given)} times, --data {len(uris)} times",
                f"Give one --{name} for each --data, in the same order",
            )
        for value, one in zip(values, given, strict=False):
            value[name] = one
    return values


def _dry_run(config: "TrainRunConfig", must_be_new: bool) -> dict[str, Any]:
    from jobs.cluster import connect
    from jobs.train import plan_training
    from jobs.train_plan import print_plan

    planned = plan_training(config, connect, must_be_new=must_be_new)
    print_plan(planned)
    return planned


def _print(result: dict[str, Any]) -> None:
    loss = "" if result["final_loss"] is None else f", final loss {result['final_loss']:.4f}"
    if result["stopped"]:
        lost = f", without a checkpoint of the steps since: {result['lost']}" if result["lost"] else ""
        click.echo(f"stopped at step {result['steps']:,}{loss}{lost}; the same command goes on")
    else:
        click.echo(f"trained {result['steps']:,} steps{loss}")
    if result["report"]:
        click.echo(f"report:     {result['report']}")
    if result.get("checkpoint"):
        click.echo(f"checkpoint: {result['run']}/{result['checkpoint']}")
        click.echo(f"serve it:   coca serve --checkpoint {result['run']}/{result['checkpoint']}")
