"""``coca serve``: the Ray Serve application in the foreground, until Ctrl-C or SIGTERM."""

import json
import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from coca.typed_config import resolve_config
from jobs.commands.options import coca_command, config_options
from serving.config import ServeConfig

WATCH_INTERVAL_S = 5.0


@click.command()
@click.option("--checkpoint", required=True, metavar="DIR", help="A checkpoint folder, or a run folder for its newest.")
@click.option("--port", type=int, help="Port to listen on; 0 takes a free one.  [default: 8000]")
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@config_options
@coca_command
def command(
    checkpoint: str, port: int | None, host: str | None, config_file: Path | None, sets: tuple[str, ...]
) -> dict[str, Any]:
    """Answer with captions and embeddings over HTTP, until Ctrl-C or SIGTERM.

    \b
    Examples:
      coca serve --checkpoint runs/first
      coca serve --checkpoint s3://bucket/checkpoint --host 0.0.0.0 --set gpus_per_replica=1 --set replicas=4
    """
    flags = {"checkpoint": checkpoint, "port": port, "host": host}
    given = [f"{name}={json.dumps(value)}" for name, value in flags.items() if value is not None]
    config = resolve_config(ServeConfig(checkpoint=checkpoint), config_file, (*sets, *given))
    return serve_until_stopped(config)


def serve_until_stopped(config: ServeConfig) -> dict[str, Any]:
    """Deploy, print where it answers, and stop cleanly at Ctrl-C or SIGTERM.

    Raises:
        BadInput: the checkpoint is broken, the port taken, this machine too small, no cluster answers.
        RunFailed: the service does not start, or ends by itself.
    """
    from jobs import cluster
    from serving import app

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    plan = app.prepare(config)
    joined = cluster.connect()
    try:
        if joined.started_here:  # one that may grow is left to wait for its nodes
            app.refuse_too_large(config, joined.cpus, joined.gpus)
        with _sigterm_as_ctrl_c():
            service = app.start(plan)
            try:
                click.echo(_announcement(service.url, service.info.version, config))
                with suppress(KeyboardInterrupt):
                    while True:
                        time.sleep(WATCH_INTERVAL_S)
                        app.require_running()
                click.echo("stopping")
            finally:
                app.shutdown()
    finally:
        cluster.disconnect()
    return {"url": service.url, "model": config.model_name, "version": service.info.version}


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _announcement(url: str, version: str, config: ServeConfig) -> str:
    embed = "-H 'content-type: application/json' -d '{\"input\": \"a red circle\"}'"
    return "\n".join(
        [
            f"serving {config.model_name} ({version}) on {url}",
            f"  captions    curl -F image=@photo.jpg {url}/v1/caption",
            f"  embeddings  curl {url}/v1/embeddings {embed}",
            f"  docs        {url}/docs",
            "Ctrl-C stops it.",
        ]
    )
