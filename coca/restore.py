"""Going on from a run's newest checkpoint that is whole."""

import os
import pickle
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from coca.checkpoint import checkpoint_path, list_checkpoints
from coca.errors import BadInput, RunFailed
from coca.manifest import Entry, find_damage, read_listed, read_manifest
from coca.run_folder import RunFolder
from coca.sharded_state import METADATA, load_state
from coca.side_group import SideGroup
from coca.state_metadata import describe_misfit, parse_metadata
from coca.storage import Store
from coca.training_state import RESUME, ResumeFile, read_resume

Result = TypeVar("Result")

_NEEDED = ("model.safetensors", "config.json", "preprocessing.json", RESUME, METADATA)
_THREADS = 4


@dataclass(frozen=True)
class Restored:
    """Where a run goes on; the tensors are loaded by then."""

    position: int
    """Global batches consumed, which is the checkpoint's step."""
    fixed: dict[str, Any]
    counters: dict[str, int]
    passed_over: list[str] = field(default_factory=list)
    """What was not gone on from, newest first, each with the reason."""


def restore(run: RunFolder, tensors: Mapping[str, Tensor]) -> Restored | None:
    """Load the newest whole checkpoint of a run into ``tensors``, in place. Collective.

    Every file of a checkpoint is read and held against the manifest before a tensor is touched; the ranks share that
    work. A damaged one is passed over for the one before, which is said on stderr.

    Args:
        tensors: as in ``TrainingState``, plain or DTensors, on as many ranks as there are now.

    Returns:
        None where the run has no checkpoint yet.

    Raises:
        BadInput: there are checkpoints and none is whole; the newest whole one holds other tensors; or the ranks see
            different ones.
        RunFailed: the storage does not answer as it should.
    """
    with SideGroup() as side:
        passed_over: list[str] = []
        restored = None
        for step in reversed(_common_steps(run, side)):
            folder = run.store.child(checkpoint_path(step))
            found = _on_all(side, partial(_share_of_damage, folder, step, side))
            damage = next((each for each in found if each is not None), None)
            if damage is None:
                resume = _load(folder, step, tensors, side)
                restored = Restored(resume.position, resume.fixed, resume.counters, passed_over)
                break
            passed_over.append(f"the checkpoint of step {step} is damaged: {damage}")
        if passed_over and restored is None:
            raise _nothing_whole(run, passed_over)
        unfinished = _on_all(side, lambda: run.sweep() if side.rank == 0 else [])[0]
        passed_over += [f"{name} was never finished, and is removed" for name in reversed(unfinished)]
    if side.rank == 0:
        for each in passed_over:
            print(f"resume: {each}", file=sys.stderr)
        if passed_over:
            where = f"the checkpoint of step {restored.position}" if restored else "the start"
            print(f"resume: going on from {where}", file=sys.stderr, flush=True)
    return restored


def is_whole(run: RunFolder, step: int) -> bool:
    """Whether a run could go on from the checkpoint of this step; every file of it is read."""
    return _share_of_damage(run.store.child(checkpoint_path(step)), step, SideGroup()) is None


def read_fixed(run: RunFolder) -> dict[str, Any] | None:
    """The config fields that a run resumed now must share; None where it has no checkpoint yet.

    Only resume.json is held against the manifest, of the newest checkpoint where that is whole.

    Raises:
        BadInput: there are checkpoints, and resume.json of none is whole.
    """
    problems = []
    for step in reversed(list_checkpoints(run.store)):
        try:
            return read_resume(run.store.child(checkpoint_path(step))).fixed
        except BadInput as problem:
            problems.append(f"the checkpoint of step {step} is damaged: {problem.cause}")
    if problems:
        raise _nothing_whole(run, problems)
    return None


def _common_steps(run: RunFolder, side: SideGroup) -> list[int]:
    seen = _on_all(side, lambda: list_checkpoints(run.store))
    if any(steps != seen[0] for steps in seen):
        newest = sorted(steps[-1] if steps else -1 for steps in seen)
        raise BadInput(
            f"the workers see different checkpoints in {run.uri}: newest steps {newest}",
            "Give --out a folder that every worker shares",
        )
    return seen[0]


def _share_of_damage(folder: Store, step: int, side: SideGroup) -> str | None:
    """What is wrong with a rank's share of a checkpoint's files; rank 0 also looks whether it can be gone on from."""
    try:
        entries, _ = read_manifest(folder)
        lacking = [name for name in _NEEDED if name not in entries]
        if lacking:
            return f"its manifest lists no {lacking[0]}"
        mine = _deal(entries, side.size)[side.rank]
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
            found = list(pool.map(lambda name: find_damage(folder, name, entries[name]), mine))
        damage = next((each for each in found if each is not None), None)
        if damage is None and side.rank == 0:
            position = read_resume(folder).position
            damage = None if position == step else f"it is that of step {position}"
        return damage
    except BadInput as problem:
        return problem.cause


def _deal(entries: dict[str, Entry], ranks: int) -> list[list[str]]:
    """Names for each rank, of about as many bytes."""

    def size(name: str) -> int:
        entry = entries[name]
        claimed = entry.get("bytes") if isinstance(entry, dict) else None
        return claimed if isinstance(claimed, int) else 0

    shares: list[list[str]] = [[] for _ in range(ranks)]
    filled = [0] * ranks
    for name in sorted(entries, key=lambda name: (-size(name), name)):
        least = filled.index(min(filled))
        shares[least].append(name)
        filled[least] += size(name)
    return shares


def _load(folder: Store, step: int, tensors: Mapping[str, Tensor], side: SideGroup) -> ResumeFile:
    def read() -> tuple[ResumeFile, bytes]:
        return read_resume(folder), read_listed(folder, METADATA, read_manifest(folder)[0])

    resume, data = _on_all(side, read)[side.rank]
    try:
        metadata = parse_metadata(data)
    except (pickle.UnpicklingError, AttributeError, ImportError) as problem:
        raise BadInput(
            f"{folder.uri}/{METADATA} cannot be read: {problem}", "Go on with the version of torch that wrote it"
        ) from None
    misfits = describe_misfit(metadata, tensors)
    if misfits:
        more = f" and {len(misfits) - 3} more" if len(misfits) > 3 else ""
        raise BadInput(
            f"{folder.uri} holds another model or optimizer: {'; '.join(misfits[:3])}{more}",
            "Give the config that the run was started with, or another --out for a new run",
        )
    try:
        load_state(folder, metadata, tensors, side)
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        raise next(
            (cause for cause in causes if isinstance(cause, (BadInput, RunFailed))),
            RunFailed(f"the checkpoint of step {step} could not be loaded from {folder.uri}: {causes[0]}"),
        ) from error
    return resume


def _on_all(side: SideGroup, action: Callable[[], Result]) -> list[Result]:
    """Every rank's result; what fails on one is raised on all."""
    result: Result | None = None
    failure: Exception | None = None
    try:
        result = action()
    except (BadInput, RunFailed, OSError) as error:
        failure = error
    outcomes = side.gather((result, failure))
    for _, problem in outcomes:
        if problem is not None:
            raise problem
    return [each for each, _ in outcomes]


def _nothing_whole(run: RunFolder, problems: list[str]) -> BadInput:
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    return BadInput(
        f"{run.uri} has no whole checkpoint to go on from: {'; '.join(problems[:3])}{more}",
        "Put a copy of one back, or start anew with another --out",
    )
