"""``coca submit``."""

import secrets
from pathlib import Path
from typing import Any

import click

from jobs.commands.options import Outcome, coca_command

EPILOG = """\b
Examples:
  coca submit -- doctor
  coca submit --address http://head:8265 -- train --data s3://bucket/data --out /shared/run
  coca submit --address http://head:8265 --no-wait --submission-id nightly-7 -- data refresh ...
"""


@click.command(context_settings={"allow_interspersed_args": False}, epilog=EPILOG)
@click.argument("words", nargs=-1, required=True, metavar="-- COMMAND...")
@click.option("--address", metavar="URL", help="The cluster's dashboard. Default: $RAY_ADDRESS, else a local Ray.")
@click.option("--no-wait", is_flag=True, help="Return once the job is submitted.")
@click.option("--submission-id", metavar="ID", help="A name. A job that has it is followed, not started again.")
@click.option("--working-dir", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder to pack.")
@click.option("--python", metavar="PATH", help="The interpreter on the cluster. Default there: python.")
@coca_command
def command(
    words: tuple[str, ...],
    address: str | None,
    no_wait: bool,
    submission_id: str | None,
    working_dir: Path | None,
    python: str | None,
) -> Outcome:
    """Run a coca command as a job on a Ray cluster and return its exit code.

    Packs the working directory without .git, .venv, data, runs and what .gitignore and .rayignore name, and
    follows the log. On a local Ray, relative paths are those of the working directory; on a cluster elsewhere
    name data by s3:// or a shared disk. Ctrl-C stops following, not the job.
    """
    from jobs.submit import submit

    submission_id = submission_id or f"coca-{secrets.token_hex(6)}"
    exit_code = submit(
        words,
        address=address,
        working_dir=working_dir,
        follow=not no_wait,
        submission_id=submission_id,
        python=python,
    )
    result: dict[str, Any] = {"command": list(words), "submission_id": submission_id, "exit_code": exit_code}
    return Outcome(result, exit_code)
