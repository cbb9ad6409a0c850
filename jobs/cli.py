"""The ``coca`` command line. Imports a command's module only when that command runs: ``coca --help`` stays fast."""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from jobs.commands.options import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED, describe_error, one_line

# In the order data moves; each line of help is shown without importing the command's module.
COMMANDS = {
    "demo": "The whole road on one machine: generated web to served caption.",
    "data": "Download, filter, tokenize and publish a dataset; look at one.",
    "tokenizer": "Train a tokenizer on captions.",
    "train": "Pretrain a captioner on a dataset, or resume.",
    "tune": "Search the loss weights.",
    "evaluate": "Measure captions, retrieval and classification.",
    "weights": "Take over open_clip's weights; count what a model costs.",
    "serve": "Answer with captions and embeddings over HTTP.",
    "submit": "Run any of these commands as a job on a Ray cluster.",
    "config": "Show, describe and explain the settings.",
    "doctor": "Check what works on this machine, each failure with its mend.",
}

EXAMPLES = """\b
Examples:
  coca demo
  coca data refresh --links links.parquet --to data/mine --tokenizer tokenizer.json
  coca train --data data/mine --out runs/first --recipe scenes --workers 2
  coca serve --checkpoint runs/first --port 8000
  coca submit --address http://head:8265 -- train --data s3://bucket/mine --out /shared/runs/first
"""


class LazyGroup(click.Group):
    """A group over ``COMMANDS`` whose every ending is one line and an exit code, with no traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"jobs.commands.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(f"unknown command {args[0]!r}. Did you mean `coca {nearest_command(args[0])}`?", ctx)
        return super().resolve_command(ctx, args)

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> NoReturn:
        args = list(sys.argv[1:] if args is None else args) or ["--help"]
        extra |= {"prog_name": "coca", "standalone_mode": False}
        try:
            exit_code = super().main(args, *rest, **extra)
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx else "coca"
            _leave(EXIT_BAD_INPUT, f"{_sentence(error.format_message())} See `{path} --help`.")
        except click.ClickException as error:
            _leave(EXIT_BAD_INPUT, error.format_message())
        except click.Abort:
            _leave(EXIT_INTERRUPTED, "interrupted")
        except BrokenPipeError:
            sys.stdout = None  # the reader has gone: nothing to flush into
            sys.exit(EXIT_FAILED)
        except Exception as error:  # a command's module that cannot be imported
            _leave(*describe_error(error))
        sys.exit(exit_code if isinstance(exit_code, int) else 0)


def nearest_command(name: str) -> str:
    return difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)[0]


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?")) else f"{text}."


def _leave(exit_code: int, line: str) -> NoReturn:
    click.echo(f"error: {one_line(line)}", err=True)
    sys.exit(exit_code)


@click.group(cls=LazyGroup, epilog=EXAMPLES, no_args_is_help=False)
@click.version_option(package_name="coca", message="%(prog)s %(version)s")
@click.option("-C", "folder", type=click.Path(exists=True, file_okay=False), help="Run as if started in this folder.")
def cli(folder: str | None) -> None:
    """Contrastive captioners on Ray: from image-text links on the web to a served caption.

    Every command takes --help, --json (the result as the last line) and --debug (tracebacks).
    Exit codes: 0 done, 1 failed, 2 wrong usage or bad input.
    """
    if folder is not None:
        os.chdir(folder)


def main() -> NoReturn:
    """The console script."""
    cli.main()


if __name__ == "__main__":
    main()
