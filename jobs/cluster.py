"""Connecting to Ray: the cluster that ``RAY_ADDRESS`` names, else one of our own on this machine."""

import logging
import os
import secrets
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coca.errors import BadInput

MIN_LOGICAL_CPUS = 4  # drivers, Ray Data and two training workers each need a share, also on two cores
MAX_OBJECT_STORE_BYTES = 1 << 30
MIN_OBJECT_STORE_BYTES = 128 << 20
CONNECT_TIMEOUT_S = 10.0
DASHBOARD_PORT = 8265


@dataclass(frozen=True)
class ClusterInfo:
    """A Ray cluster this process is connected to."""

    address: str
    """``host:port`` of the control plane, for ``RAY_ADDRESS``."""
    dashboard_url: str
    """``http://host:port`` of the dashboard and the Jobs API; empty where the dashboard is off."""
    started_here: bool
    """Whether this process started it and ends it with ``disconnect``."""
    cpus: float
    gpus: float
    nodes: int


_connected: ClusterInfo | None = None
_agent_port = 0


def connect(num_cpus: int | None = None) -> ClusterInfo:
    """Join the cluster of ``RAY_ADDRESS`` (set inside a Ray job), else start one here; again: the same one.

    A cluster started here has its dashboard on loopback only; all of it asks for a token that lives as long
    as this process. ``num_cpus`` is its number of logical CPUs.

    Raises:
        BadInput: ``RAY_ADDRESS`` names no cluster that answers.
    """
    global _connected
    address = os.environ.get("RAY_ADDRESS", "")
    set_environment(local=not address)
    import ray

    if _connected is not None and ray.is_initialized():
        return _connected
    context = _join(address) if address else _start(num_cpus or max(os.cpu_count() or 1, MIN_LOGICAL_CPUS))
    resources = ray.cluster_resources()
    url = context.dashboard_url or ""
    _connected = ClusterInfo(
        address=context.address_info["gcs_address"],
        dashboard_url=f"http://{url}" if url and "://" not in url else url,
        started_here=not address,
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
        nodes=sum(node["Alive"] for node in ray.nodes()),
    )
    return _connected


def is_connected() -> bool:
    """Whether this process has joined or started a cluster through ``connect``."""
    return _connected is not None


def disconnect() -> None:
    """Leave the cluster; one started by ``connect`` ends."""
    global _connected
    if _connected is None:
        return
    import ray

    ray.shutdown()
    _connected = None


def set_environment(local: bool) -> None:
    """What Ray reads from the environment at its import and start: no usage statistics, token authentication.

    ``local``: for a cluster of our own, with a fresh token unless the user has set one. For another cluster
    the token is the user's, and is sent where there is one.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray 2.60 warns of a coming default unless the choice is made; ours is the coming one.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    has_token = bool({"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys())
    if local or has_token or Path("~/.ray/auth_token").expanduser().exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    if local and os.environ["RAY_AUTH_MODE"] == "token" and not has_token:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    if "ray" in sys.modules:
        _reread_authentication()


def _reread_authentication() -> None:
    """Ray reads mode and token once, at its import; where that came first, do as ``ray.init`` does."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _join(address: str) -> Any:
    import ray

    _check_answers(address)
    try:
        return ray.init(log_to_driver=True, logging_level=logging.WARNING)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _no_cluster(address, error) from None


def _check_answers(address: str) -> None:
    """Ray itself would go on trying for minutes."""
    if address.startswith(("http://", "https://")):
        raise BadInput(
            f"RAY_ADDRESS={address} is a dashboard: it takes jobs, and no process can join a cluster there",
            "Put `coca submit --` before the command, or unset RAY_ADDRESS to have a local Ray",
        )
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():
        return  # such as "auto": Ray looks for the cluster
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise _no_cluster(address, error) from None


def _no_cluster(address: str, error: Exception) -> BadInput:
    return BadInput(
        f"no Ray cluster answers at RAY_ADDRESS={address}: {error}",
        "Start that cluster, or unset RAY_ADDRESS to have a local one",
    )


def _start(num_cpus: int) -> Any:
    import ray

    port = _free_port(DASHBOARD_PORT)
    _move_agent_port()
    # Workers inherit it: Ray Train's own actors look for their dashboard, and lose their way among several Rays.
    before = os.environ.get("RAY_API_SERVER_ADDRESS")
    os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
    try:
        return ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=True,  # carries the Jobs API
            dashboard_host="127.0.0.1",
            dashboard_port=port,
            object_store_memory=_object_store_bytes(),
            log_to_driver=True,
            logging_level=logging.WARNING,
        )
    finally:
        if before is None:
            del os.environ["RAY_API_SERVER_ADDRESS"]
        else:
            os.environ["RAY_API_SERVER_ADDRESS"] = before


def _move_agent_port() -> None:
    """Let the node's agent, which takes jobs, listen on a free port: Ray's is fixed, and ``ray.init`` cannot set it.

    Another Ray on this machine holds it, and for a minute so does the agent of one whose driver was killed; an agent
    without its port takes no jobs.
    """
    from ray._private.parameter import RayParams
    from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT as USUAL

    global _agent_port
    taken, _agent_port = _agent_port or USUAL, _free_port(USUAL)
    defaults = RayParams.__init__.__defaults__ or ()
    RayParams.__init__.__defaults__ = tuple(_agent_port if value == taken else value for value in defaults)


def _free_port(first: int) -> int:
    """``first``, or the next port that nobody listens on."""
    for port in range(first, first + 100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise BadInput(f"ports {first} to {port} are all taken", "Stop what is left of other Rays")


def _object_store_bytes() -> int:
    """A quarter of the free memory, within bounds: the store is set aside in shared memory."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(MIN_OBJECT_STORE_BYTES, min(MAX_OBJECT_STORE_BYTES, free // 4))
