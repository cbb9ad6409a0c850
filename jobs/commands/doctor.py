"""``coca doctor``."""

from dataclasses import asdict

import click

from jobs.commands.options import EXIT_FAILED, Outcome, coca_command


@click.command()
@click.option("--ray/--no-ray", "with_ray", default=True, show_default=True, help="Start (or join) Ray and run a task.")
@click.option("--store", metavar="URI", help="A folder or s3://BUCKET/PREFIX: write, read and delete a probe there.")
@coca_command
def command(with_ray: bool, store: str | None) -> Outcome:
    """Check what works on this machine, each failure with its mend.

    Exits 1 where something necessary fails; warnings are parts that are not installed or scarce.
    """
    from jobs.doctor import examine, show

    checks = show(examine(with_ray, store), click.echo)
    failed = [check.name for check in checks if check.status == "failed"]
    click.echo(f"{len(failed)} failed: {', '.join(failed)}" if failed else "all that is necessary works")
    return Outcome({"ok": not failed, "checks": [asdict(check) for check in checks]}, EXIT_FAILED if failed else 0)
