"""Running a ``coca`` command as a Ray job: pack the working directory, submit, follow the log, take the exit code.

On a Ray of our own the job runs as if started in the submitting folder, so relative paths mean what they mean here.
On a cluster elsewhere it runs in the unpacked package: name datasets and runs by ``s3://`` or a shared disk.
"""

import asyncio
import logging
import os
import shlex
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from coca.errors import BadInput, RunFailed
from jobs.cli import COMMANDS, nearest_command
from jobs.cluster import connect, set_environment
from jobs.package import EXCLUDES, packed_files

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

CONNECT_TIMEOUT_S = 10.0
AGENT_TIMEOUT_S = 60.0  # a cluster that has just started refuses jobs for some seconds
LOST_TIMEOUT_S = 120.0  # how long a cluster may be out of reach while its job is followed
STOP_WAIT_S = "600"  # for a training run to save a checkpoint after SIGTERM; Ray itself waits 3 s
_CHATTY_LOGGERS = [  # uploads, closed sockets, and that .git is left out of packages
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.working_dir",
]


@dataclass(frozen=True)
class Target:
    """Where a job goes."""

    address: str
    """``http://host:port`` of the Jobs API."""
    local: bool
    """All of the cluster is this machine: same files, same interpreter."""
    ends_with_us: bool
    """It is our own Ray and stops with this process."""
    gcs_address: str = ""
    """``host:port`` of a local cluster's control plane."""


def submit(
    command: Sequence[str],
    address: str | None = None,
    working_dir: Path | None = None,
    follow: bool = True,
    on_line: Callable[[str], None] = click.echo,
    env: Mapping[str, str] | None = None,
    submission_id: str | None = None,
    python: str | None = None,
) -> int:
    """Run a ``coca`` command line (with or without the leading ``coca``) as a Ray job.

    Args:
        address: URL of the cluster's dashboard; without one, the cluster of ``RAY_ADDRESS``, else a local Ray.
        working_dir: folder to pack; the current one by default.
        follow: hand each line of the log to ``on_line`` and wait for the end.
        env: environment variables of the job and its workers.
        submission_id: a name; where a job of that name exists, it is followed and no second one starts.
        python: the interpreter on the cluster; by default ``python``, and this one where the cluster is local.

    Returns:
        The job's exit code; 0 at once without ``follow``.

    Raises:
        BadInput: an unknown command, a cluster that cannot be reached or refuses us, a package too big.
        RunFailed: the job could not be started, or was lost.
    """
    words = _command_words(command)
    if not follow and not (address or _address_from_environment()):
        raise BadInput("--no-wait needs a cluster that outlives this command", "Give --address http://HOST:8265")
    folder = (working_dir or Path.cwd()).absolute()
    packed = packed_files(folder)
    target = find_target(address)
    if not target.local:
        _note_local_paths(words, folder, packed, on_line)
    client = _client(target)
    runtime_env = {
        "working_dir": str(folder),
        "excludes": EXCLUDES,
        "env_vars": {"PYTHONUNBUFFERED": "1", "RAY_JOB_STOP_WAIT_TIME_S": STOP_WAIT_S, **(env or {})},
    }
    line = entrypoint(words, target, folder, python)
    job_id = _start(client, line, runtime_env, submission_id, on_line)
    if not follow:
        on_line(f"submitted {job_id}")
        _print_hints(target, job_id, on_line)
        return 0
    try:
        return _exit_code(_follow(client, job_id, on_line))
    except KeyboardInterrupt:
        if target.ends_with_us:
            on_line(f"stopped following {job_id}; it ends with the local Ray of this process")
        else:
            on_line(f"stopped following {job_id}, which goes on")
            _print_hints(target, job_id, on_line)
        raise


def find_target(address: str | None) -> Target:
    """The cluster of ``address``, else of ``RAY_API_SERVER_ADDRESS`` or ``RAY_ADDRESS``, else a local Ray."""
    named = address or _address_from_environment()
    if address or named.startswith(("http://", "https://")):
        _check_reachable(named)
        return Target(address=named.rstrip("/"), local=False, ends_with_us=False)
    cluster = connect()
    if not cluster.dashboard_url:
        raise BadInput(
            f"the Ray at {cluster.address} has no dashboard", "Start it with its dashboard: jobs go through it"
        )
    return Target(
        cluster.dashboard_url,
        local=cluster.nodes == 1,
        ends_with_us=cluster.started_here,
        gcs_address=cluster.address,
    )


def _address_from_environment() -> str:
    return os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS", "")


def entrypoint(words: Sequence[str], target: Target, folder: Path, python: str | None = None) -> str:
    """The shell line of the job: ``[env RAY_ADDRESS=...] python -m jobs.cli [-C FOLDER] COMMAND...``."""
    interpreter = python or (sys.executable if target.local else "python")
    if not target.local:
        return shlex.join([interpreter, "-m", "jobs.cli", *words])
    # Ray's job supervisor hands a job the address of any Ray it finds on the machine, which may be another's.
    address = ["env", f"RAY_ADDRESS={target.gcs_address}"]
    return shlex.join([*address, interpreter, "-m", "jobs.cli", "-C", str(folder), *words])


def _command_words(command: Sequence[str]) -> list[str]:
    words = list(command[1:] if command and command[0] == "coca" else command)
    if not words:
        raise BadInput(
            "no command to submit", "For example `coca submit -- train --data s3://bucket/data --out /shared/run`"
        )
    if words[0] not in COMMANDS:
        raise BadInput(f"unknown command {words[0]!r}", f"Did you mean `coca submit -- {nearest_command(words[0])}`?")
    return words


def _note_local_paths(
    words: Sequence[str], folder: Path, packed: Sequence[Path], on_line: Callable[[str], None]
) -> None:
    names = set(packed)
    for word in words[1:]:
        path = folder / word.rpartition("=")[2]
        if word and path.exists() and path not in names:
            on_line(f"note: {word} is a path of this machine; the cluster needs it under the same name, or s3://")


def _check_reachable(address: str) -> None:
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadInput(f"{address!r} is not the URL of a Ray dashboard", "Write --address http://HOST:8265")
    if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(parts.hostname):
        return  # the proxy reaches it, not we
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    try:
        socket.create_connection((parts.hostname, port), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise BadInput(
            f"nothing answers at {address}: {error}",
            "Give the URL of the dashboard (port 8265), or forward it: kubectl port-forward service/HEAD 8265",
        ) from None


def _client(target: Target) -> "JobSubmissionClient":
    if not target.local:
        set_environment(local=False)
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in _CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with _without_env("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):  # they would override the address
            return JobSubmissionClient(target.address)
    except AuthenticationError:
        raise BadInput(
            f"the cluster at {target.address} refuses our token, or we have none",
            "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the cluster's token",
        ) from None
    except (ConnectionError, RuntimeError, requests.RequestException) as error:
        raise BadInput(
            f"{target.address} does not answer as a Ray dashboard: {error}", "Give the URL of the dashboard"
        ) from None


def _start(
    client: "JobSubmissionClient",
    line: str,
    runtime_env: dict[str, Any],
    submission_id: str | None,
    on_line: Callable[[str], None],
) -> str:
    known = _details(client, submission_id) if submission_id else None
    if known is not None:
        if known.entrypoint != line:
            raise BadInput(
                f"a job {submission_id!r} exists and runs another command: {known.entrypoint}",
                "Give another --submission-id",
            )
        on_line(f"job {submission_id} exists ({known.status.value}): not submitted again")
        return str(submission_id)
    waited_s, pause_s = 0.0, 0.5
    while True:
        try:
            return client.submit_job(entrypoint=line, runtime_env=runtime_env, submission_id=submission_id)
        except RuntimeError as error:
            if "No available agent" not in str(error) or waited_s >= AGENT_TIMEOUT_S:
                raise RunFailed(f"the cluster did not take the job: {str(error).splitlines()[-1]}") from error
        time.sleep(pause_s)
        waited_s, pause_s = waited_s + pause_s, min(2 * pause_s, 8.0)


def _details(client: "JobSubmissionClient", job_id: str) -> "JobDetails | None":
    try:
        return client.get_job_info(job_id)
    except RuntimeError as error:
        if "status code 404" in str(error):
            return None
        raise


class LogLines:
    """Cuts the chunks of a log into lines, and passes over what a reconnection sends again."""

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self._on_line = on_line
        self._seen = self._position = 0
        self._partial = ""

    def restart(self) -> None:
        """The next chunk begins at the start of the log again."""
        self._position = 0

    def feed(self, chunk: str) -> None:
        new = chunk[max(0, self._seen - self._position) :]
        self._position += len(chunk)
        self._seen = max(self._seen, self._position)
        *lines, self._partial = (self._partial + new).split("\n")
        for line in lines:
            self._on_line(line)

    def close(self) -> None:
        if self._partial:
            self._on_line(self._partial)
        self._partial = ""


def _follow(client: "JobSubmissionClient", job_id: str, on_line: Callable[[str], None]) -> "JobDetails":
    """Hand on the log until the job has ended, over broken connections."""
    import aiohttp

    lines = LogLines(on_line)
    last_contact_s = time.monotonic()
    while True:
        try:
            lines.restart()
            asyncio.run(_tail(client, job_id, lines))
            details = _details(client, job_id)
            last_contact_s = time.monotonic()
        except (OSError, RuntimeError, aiohttp.ClientError) as error:
            if time.monotonic() - last_contact_s > LOST_TIMEOUT_S:
                raise RunFailed(f"lost contact with the cluster while following {job_id}: {error}") from error
            time.sleep(2.0)
            continue
        if details is None:
            raise RunFailed(f"the cluster does not know {job_id} any more: it was restarted, and its jobs with it")
        if details.status.is_terminal():
            lines.close()
            return details
        time.sleep(0.5)


async def _tail(client: "JobSubmissionClient", job_id: str, lines: LogLines) -> None:
    async for chunk in client.tail_job_logs(job_id):
        lines.feed(chunk)


def _exit_code(details: "JobDetails") -> int:
    if details.driver_exit_code is not None:
        return int(details.driver_exit_code)
    if details.status.value == "SUCCEEDED":
        return 0
    raise RunFailed(f"the job ended as {details.status.value} without an exit code: {details.message or 'no message'}")


def _print_hints(target: Target, job_id: str, on_line: Callable[[str], None]) -> None:
    for verb in ("logs --follow", "status", "stop"):
        on_line(f"  ray job {verb} --address {target.address} {job_id}")


@contextmanager
def _without_env(*names: str) -> Iterator[None]:
    taken = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)
