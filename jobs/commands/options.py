"""What every command shares: ``--json``, ``--debug``, ``--config``, ``--set``, and how errors leave the process."""

import functools
import json
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click

from coca.errors import BadInput, RunFailed

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130

# Which extra brings a package that may be missing.
_EXTRA_OF = {
    "aiohttp": "pipelines",
    "boto3": "s3",
    "fastapi": "serve",
    "jinja2": "report",
    "matplotlib": "report",
    "ray": "all",
    "safetensors": "model",
    "torch": "train",
}


class Outcome(NamedTuple):
    """What a command returns instead of a plain dict when its exit code is not 0."""

    result: dict[str, Any]
    exit_code: int


def coca_command(function: Callable[..., Any]) -> Callable[..., None]:
    """The body of a command: adds ``--json`` and ``--debug``, prints the result, turns errors into exit codes.

    Stands below ``@click.command`` and returns a dict, or an ``Outcome`` where the exit code is not 0::

        @click.command()
        @click.option("--out", required=True)
        @coca_command
        def command(out: str) -> dict[str, Any]: ...

    Exit codes: 0 done, 2 ``BadInput`` or a missing extra, 1 anything else; always one line on stderr.
    """

    @click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object on the last line.")
    @click.option("--debug", is_flag=True, help="Show the traceback of an error.")
    @functools.wraps(function)
    def wrapped(*args: Any, as_json: bool, debug: bool, **options: Any) -> None:
        try:
            returned = function(*args, **options)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:  # the edge of the process: everything becomes one line and an exit code
            if debug:
                traceback.print_exception(error)
            exit_code, line = describe_error(error)
            returned = Outcome({"error": line}, exit_code)
            click.echo(f"error: {line}", err=True)
        result, exit_code = returned if isinstance(returned, Outcome) else (returned, 0)
        if as_json:
            click.echo(json.dumps(result, ensure_ascii=False, default=str))
        if exit_code:
            raise click.exceptions.Exit(exit_code)

    return wrapped


def config_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--config FILE`` and ``--set a.b=VALUE``, handed on as ``config_file`` and ``sets``."""
    config = click.option(
        "--config", "config_file", type=click.Path(path_type=Path), metavar="FILE", help="A YAML file of settings."
    )
    sets = click.option(
        "--set", "sets", multiple=True, metavar="A.B=VALUE", help="One setting, VALUE in YAML; may be repeated."
    )
    return config(sets(function))


def describe_error(error: BaseException) -> tuple[int, str]:
    """The exit code of an error and the one line that explains it."""
    for cause in _causes(error):
        # Ray raises a subclass of both its own error and ours, whose ``cause`` is our error itself.
        if isinstance(cause, BadInput) and isinstance(cause.cause, str):
            return EXIT_BAD_INPUT, one_line(str(cause))
        if isinstance(cause, ModuleNotFoundError) and _root(cause) in _EXTRA_OF:
            return EXIT_BAD_INPUT, f"{_root(cause)} is not installed. pip install 'coca[{_EXTRA_OF[_root(cause)]}]'."
    innermost = list(_causes(error))[-1]
    if isinstance(innermost, RunFailed):
        return EXIT_FAILED, one_line(str(innermost))
    return EXIT_FAILED, f"{type(innermost).__name__}: {one_line(str(innermost))} (--debug shows the traceback)"


def one_line(text: str, limit: int = 600) -> str:
    joined = " ".join(text.split())
    return joined if len(joined) <= limit else joined[: limit - 3] + "..."


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, then what lies beneath it in Ray's wrappings, outermost first."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        current = waiting.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        failures = getattr(current, "worker_failures", None)  # ray.train.WorkerGroupError: rank -> error
        below = [getattr(current, "cause", None), current.__cause__, *(failures or {}).values()]
        waiting += [cause for cause in below if isinstance(cause, BaseException)]


def _root(error: ModuleNotFoundError) -> str:
    return (error.name or "").split(".")[0]
