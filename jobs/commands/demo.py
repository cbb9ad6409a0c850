"""``coca demo``."""

from pathlib import Path
from typing import Any

import click

from jobs.commands.options import coca_command, config_options

EPILOG = """\b
Examples:
  coca demo
  coca demo                                            (again: skips what is done, or goes on)
  coca demo --out runs/longer --steps 1200 --workers 4
  coca demo --out runs/other --set seed=1 --set trials=8
"""


@click.command(epilog=EPILOG)
@click.option(
    "--out", type=click.Path(path_type=Path), default="runs/demo", show_default=True, help="The demo's folder."
)
@click.option("--workers", type=int, help="Ray Train workers.  [default: 2]")
@click.option("--steps", type=int, help="Steps of training.")
@config_options
@coca_command
def command(
    out: Path, workers: int | None, steps: int | None, config_file: Path | None, sets: tuple[str, ...]
) -> dict[str, Any]:
    """Walk the whole road on one machine: generated web, dataset, training, tuning, evaluation, service.

    Writes summary.json and report.html. Killed and started again, it goes on where it was.
    """
    from coca.typed_config import resolve_config
    from jobs.demo.config import DemoConfig
    from jobs.demo.road import run_demo

    given = {"workers": workers, "steps": steps}
    flags = [f"{name}={value}" for name, value in given.items() if value is not None]
    return run_demo(out, resolve_config(DemoConfig(), config_file, [*sets, *flags]))
