"""What works on this machine: each check measures something and, where it fails, names the mend."""

import importlib
import importlib.metadata
import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from coca.cpus import usable_cpus
from coca.errors import BadInput
from coca.storage import Store

Status = Literal["ok", "warning", "failed"]

GIB = 1 << 30
MIN_DISK_BYTES, SCARCE_DISK_BYTES = 1 * GIB, 10 * GIB
MIN_SHM_BYTES = GIB  # Ray's object store lies there
MIN_MEMORY_BYTES, SCARCE_MEMORY_BYTES = 2 * GIB, 6 * GIB
RUNTIME_EXTRAS = ("pipelines", "train", "tune", "serve", "report")

# Distributions whose module has another name.
_MODULES = {"pillow": "PIL", "pyyaml": "yaml", "python-multipart": "python_multipart"}


@dataclass(frozen=True)
class Check:
    """One line of the report. A ``failed`` check makes ``coca doctor`` exit 1; a ``warning`` does not."""

    name: str
    status: Status
    detail: str
    mend: str = ""


def examine(with_ray: bool = True, store: str | None = None) -> Iterator[Check]:
    """All checks, one after another; ``store`` is a folder or ``s3://`` to write a probe to."""
    yield check_python()
    yield from check_packages()
    yield check_torch()
    yield check_cpus()
    yield check_memory()
    yield check_disk(Path.cwd())
    yield check_shared_memory()
    yield check_temporary_folder()
    yield check_authentication()
    if with_ray:
        yield from check_ray()
    if store is not None:
        yield check_store(store)


def check_python() -> Check:
    wanted = importlib.metadata.metadata("coca")["Requires-Python"]
    found = ".".join(map(str, sys.version_info[:3]))
    if found in SpecifierSet(wanted):
        return Check("python", "ok", found)
    return Check(
        "python", "failed", f"{found}, and coca needs {wanted}", "Make the environment with Python 3.11 or 3.12"
    )


def check_packages() -> Iterator[Check]:
    """The core, then each extra: imported, and of a version in our range."""
    requirements = [Requirement(text) for text in importlib.metadata.requires("coca") or []]
    for group in ("", *RUNTIME_EXTRAS):
        yield _package_check(group, {r.name: _package_problem(r) for r in _expand(requirements, group)})


def _expand(requirements: list[Requirement], extra: str) -> list[Requirement]:
    """The requirements of the core (``extra=""``) or of an extra, following ``coca[...]`` inside extras."""
    found: dict[str, Requirement] = {}
    for requirement in requirements:
        marker = requirement.marker
        in_core = marker is None or marker.evaluate({"extra": ""})
        if extra and (in_core or not marker or not marker.evaluate({"extra": extra})):
            continue
        if not extra and not in_core:
            continue
        if requirement.name == "coca":
            for nested in sorted(requirement.extras):
                found |= {r.name: r for r in _expand(requirements, nested)}
        else:
            found[requirement.name] = requirement
    return list(found.values())


def _package_problem(requirement: Requirement) -> str:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{version} is outside {requirement.specifier}"
    try:
        importlib.import_module(_MODULES.get(requirement.name, requirement.name.replace("-", "_")))
    except (ImportError, OSError) as error:  # OSError: a shared library that is not there
        return f"{version} cannot be imported ({error})"
    return ""


def _package_check(group: str, problems: dict[str, str]) -> Check:
    name = f"packages: {group or 'core'}"
    target = f"coca[{group}]" if group else "coca"
    wrong = {package: problem for package, problem in problems.items() if problem}
    if not wrong:
        return Check(name, "ok", "installed, versions in range")
    detail = "; ".join(f"{package}: {problem}" for package, problem in wrong.items())
    if group and set(wrong.values()) == {"missing"}:
        return Check(name, "warning", detail, f"To have it: pip install '{target}'")
    return Check(name, "failed", detail, f"pip install -c constraints.txt '{target}'")


def check_torch() -> Check:
    try:
        import torch
        import torch.distributed as distributed
    except ImportError as error:
        return Check("torch", "warning", str(error), "To train and serve: pip install 'coca[train]'")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: trains on the CPU"
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    available = distributed.is_available() and (
        distributed.is_nccl_available() if backend == "nccl" else distributed.is_gloo_available()
    )
    detail = f"{torch.__version__}, {device}, {backend} {'available' if available else 'missing'}"
    if not available:
        return Check("torch", "failed", detail, "Install a torch built with distributed: pip install torch==2.13.0")
    return Check("torch", "ok", detail)


def check_cpus() -> Check:
    count = usable_cpus()
    if count < 2:
        return Check("cpus", "warning", f"{count}", "Give it two or more: the demo is timed for two")
    return Check("cpus", "ok", f"{count}")


def check_memory() -> Check:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _container_memory_bytes()
    usable = min(total, limit) if limit else total
    return _amount(
        "memory", usable, MIN_MEMORY_BYTES, SCARCE_MEMORY_BYTES, "Give this machine or container more memory"
    )


def _container_memory_bytes() -> int | None:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text(encoding="ascii").strip()
        except OSError:
            continue
        return int(text) if text.isdigit() else None
    return None


def check_disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    return _amount("disk", free, MIN_DISK_BYTES, SCARCE_DISK_BYTES, f"Free some space under {folder}", "free")


def check_shared_memory() -> Check:
    folder = Path("/dev/shm")  # noqa: S108  the mount itself, nothing is written
    if not folder.exists():
        return Check("shared memory", "warning", "no /dev/shm", "Ray falls back to slower files under /tmp")
    size = shutil.disk_usage(folder).total
    if size < MIN_SHM_BYTES:
        return Check(
            "shared memory", "warning", f"{size / GIB:.2f} GiB", "In Docker: --shm-size=2g; Ray is slow without"
        )
    return Check("shared memory", "ok", f"{size / GIB:.1f} GiB")


def check_temporary_folder() -> Check:
    folder = tempfile.gettempdir()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"probe")
            file.flush()
    except OSError as error:
        return Check("temporary folder", "failed", f"{folder}: {error}", "Set TMPDIR to a folder that can be written")
    return Check("temporary folder", "ok", folder)


def check_authentication() -> Check:
    """Anyone who reaches an open Ray runs code on it (CVE-2023-48022)."""
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode == "disabled":
        return Check(
            "ray authentication", "failed", "RAY_AUTH_MODE=disabled", "unset RAY_AUTH_MODE (the default is a token)"
        )
    return Check("ray authentication", "ok", mode)


def check_ray() -> Iterator[Check]:
    """Start or join Ray, run a task, ask the Jobs API."""
    try:
        import ray
    except ImportError as error:
        yield Check("ray", "warning", str(error), "To run jobs: pip install 'coca[pipelines]'")
        return
    from jobs.cluster import connect, disconnect

    ours = not ray.is_initialized()
    started_s = time.monotonic()
    try:
        cluster = connect()
        ray.get(ray.remote(_worker_pid).remote(), timeout=60)
    except (BadInput, OSError, RuntimeError, TimeoutError, ray.exceptions.RayError) as error:
        yield Check(
            "ray", "failed", " ".join(str(error).split())[:200], "See the newest logs under /tmp/ray/session_latest"
        )
        return
    finally:
        if ours:
            disconnect()
    verb = "started" if cluster.started_here else f"joined {cluster.address}"
    took_s = time.monotonic() - started_s
    yield Check(
        "ray", "ok", f"{ray.__version__}, {verb} in {took_s:.0f} s, {cluster.cpus:g} CPUs, {cluster.gpus:g} GPUs"
    )
    yield _check_dashboard(cluster.dashboard_url, cluster.started_here)


def _worker_pid() -> int:
    return os.getpid()


def _check_dashboard(url: str, started_here: bool) -> Check:
    if not url:
        return Check("ray dashboard", "warning", "none", "coca submit needs it: start Ray with its dashboard")
    if started_here and urlsplit(url).hostname not in ("127.0.0.1", "localhost", "::1"):
        return Check(
            "ray dashboard", "failed", f"{url} is open to the network", "Start it with dashboard_host=127.0.0.1"
        )
    return Check("ray dashboard", "ok", url)


def check_store(uri: str) -> Check:
    """Write, read, refuse to overwrite, delete: what publishing a dataset asks of a store."""
    name = f"coca store {uri}"
    probe = f".coca-doctor-{uuid.uuid4().hex}"
    try:
        store = Store(uri)
        created = store.write_once(probe, b"probe")
        refused = not store.write_once(probe, b"other")
        intact = store.read(probe) == b"probe"
        store.delete(probe)
    except BadInput as error:
        return Check(name, "failed", error.cause, error.way_out)
    except _store_errors() as error:
        mend = "Check the path, AWS_ENDPOINT_URL, AWS_REGION and the AWS credentials, and that the bucket exists"
        return Check(name, "failed", " ".join(str(error).split())[:200], mend)
    if not (created and refused and intact):
        return Check(
            name,
            "failed",
            "overwrites in spite of If-None-Match",
            "Use a store with conditional writes: publishing needs them",
        )
    return Check(name, "ok", "writes, reads, refuses to overwrite, deletes")


def _store_errors() -> tuple[type[Exception], ...]:
    try:
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        return (OSError,)
    return (OSError, BotoCoreError, ClientError)


def _amount(name: str, found: int, least: int, scarce: int, mend: str, what: str = "") -> Check:
    detail = f"{found / GIB:.1f} GiB {what}".rstrip()
    if found < least:
        return Check(name, "failed", f"{detail}, below {least / GIB:.0f}", mend)
    if found < scarce:
        return Check(name, "warning", f"{detail}, scarce below {scarce / GIB:.0f}", mend)
    return Check(name, "ok", detail)


def show(checks: Iterator[Check], on_line: Callable[[str], None]) -> list[Check]:
    """Print each check as it ends, with its mend below where it did not pass."""
    done = []
    for check in checks:
        on_line(f"{check.status:<8} {check.name:<22} {check.detail}")
        if check.mend:
            on_line(f"{'':<8} {'':<22} -> {check.mend}")
        done.append(check)
    return done
