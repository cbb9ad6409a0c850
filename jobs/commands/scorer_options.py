"""``--scorer`` and what goes with it: shared by the commands that score pairs."""

from collections.abc import Callable
from typing import Any

import click

from coca.errors import BadInput


def scorer_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--scorer`` (as ``scorers``), ``--scorer-actors`` and ``--scorer-gpus``."""
    scorers = click.option(
        "--scorer",
        "scorers",
        multiple=True,
        metavar="CKPT|MODULE:FUNCTION",
        help="Score pairs before the selection; scores stay. May be repeated.",
    )
    actors = click.option(
        "--scorer-actors", type=click.IntRange(min=1), default=1, show_default=True, help="Copies of a scorer."
    )
    gpus = click.option(
        "--scorer-gpus", type=click.FloatRange(min=0), default=0.0, show_default=True, help="GPUs of each copy."
    )
    return scorers(actors(gpus(function)))


def scorer_specs(scorers: tuple[str, ...], actors: int, gpus: float) -> list[Any]:
    """The ``pipelines.scorer.ScorerSpec`` of each ``--scorer``."""
    if not scorers:
        return []
    from jobs.scorers import scorer_spec

    return [scorer_spec(text, actors=actors, gpus=gpus) for text in scorers]


def connect_for(scorers: tuple[str, ...], actors: int, gpus: float) -> Callable[[], object]:
    """``jobs.cluster.connect``, which refuses scorers that a Ray on this machine alone could never start."""

    def connect() -> object:
        from jobs import cluster

        joined = cluster.connect()
        wanted = actors * gpus if scorers else 0.0
        # A cluster elsewhere may add nodes; this machine cannot.
        if joined.started_here and wanted > joined.gpus:
            raise BadInput(
                f"{actors} scorers with {gpus:g} GPUs each: this machine has {joined.gpus:g}",
                "Give fewer with --scorer-gpus, 0 for CPUs, or run it on a cluster",
            )
        return joined

    return connect
