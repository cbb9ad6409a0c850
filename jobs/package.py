"""Which files of a working directory travel with a job."""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from coca.errors import BadInput

# On top of what .gitignore and .rayignore exclude; a leading slash means: directly in the folder.
EXCLUDES = [
    *[".git", ".venv", "venv", "__pycache__", "*.egg-info", "node_modules"],
    *[".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis", ".ipynb_checkpoints"],
    *["/data", "/runs", "/build", "/dist"],
]
MAX_PACKAGE_BYTES = 512 << 20  # what one message to Ray's control plane holds


def packed_files(folder: Path) -> list[Path]:
    """What Ray will pack of a folder: all that neither ``EXCLUDES`` nor .gitignore nor .rayignore names.

    Raises:
        BadInput: more than Ray's limit.
    """
    # Ray's own walk, private but the truth about what it packs (ray is pinned below 2.61).
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    files: list[Path] = []
    quiet = logging.getLogger("coca.quiet")
    _dir_travel(folder, [_get_excludes(folder, EXCLUDES)], files.append, include_gitignore=True, logger=quiet)
    files = sorted(path for path in files if path.is_file())
    _check_size(folder, files)
    return files


def _check_size(folder: Path, files: Sequence[Path]) -> None:
    sizes = Counter[str]()
    for path in files:
        sizes[path.relative_to(folder).parts[0]] += path.stat().st_size
    if sizes.total() > MAX_PACKAGE_BYTES:
        shown = ", ".join(f"{name} ({size / 2**20:,.0f} MiB)" for name, size in sizes.most_common(3))
        raise BadInput(
            f"{folder} packs to {sizes.total() / 2**20:,.0f} MiB, and Ray takes {MAX_PACKAGE_BYTES >> 20}: {shown}",
            "Submit from the folder of the code, or name the big entries in a .rayignore there",
        )
