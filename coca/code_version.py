"""Which code made a thing: written into every version record and checkpoint."""

import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path


@cache
def code_version() -> str:
    """The installed version, with the git commit where the code runs from a checkout (`.dirty` if changed since)."""
    try:
        version = metadata.version("coca")
    except metadata.PackageNotFoundError:  # an unpacked working directory on a cluster
        version = "0+unknown"
    folder = Path(__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return version
    try:
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        dirty = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return version
    return f"{version}+g{commit}{'.dirty' if dirty else ''}"


def _git(folder: Path, *arguments: str) -> str:
    result = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
    )
    return result.stdout.strip()
