"""Saving a run's checkpoints beside its training: the state is copied to CPU memory, and written by a thread."""

import contextlib
import errno
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from coca.checkpoint import PlainParts, checkpoint_path, list_checkpoints
from coca.errors import BadInput, RunFailed
from coca.manifest import Entry, file_entry, write_manifest
from coca.progress import polling
from coca.run_folder import RunFolder
from coca.sharded_state import own_share, save_state
from coca.side_group import SideGroup
from coca.training_state import RESUME, HostCopies, ResumeFile, Score, TrainingState, read_resume

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_BEAT_S = 5.0


class CheckpointSaver:
    """Writes the checkpoints of a run and removes old ones; made and called on all ranks alike.

    ::

        with CheckpointSaver(run, keep=2, keep_best="loss") as saver:
            ...
            held_s = saver.save(state, plain, score=row["loss"])

    A checkpoint counts once its manifest is there. Rank 0 writes it last, when every rank's files and the rows of
    metrics up to it are there, and only then removes others: all but the ``keep`` newest and the best, those of steps
    that come after (a damaged one that the run has gone back behind), and what killed saves have left.
    """

    def __init__(
        self,
        run: RunFolder,
        *,
        keep: int,
        keep_best: str | None = None,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            keep_best: the measure whose values ``save`` gets as ``score``. The lowest is best where its name ends in
                ``loss``, else the highest.
            beat: called again and again while a save is waited for.
        """
        self._run, self._keep, self._measure, self._beat = run, keep, keep_best, beat
        self._side, self._checks = SideGroup(), SideGroup()
        self._copies = HostCopies()
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._scores: dict[int, float] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        self.wait()  # what ended the training is what the user must hear of

    def save(self, state: TrainingState, plain: PlainParts, *, score: float | None = None) -> float:
        """Begin to save ``state`` as the checkpoint of step ``state.position``. Collective.

        Args:
            plain: for use without the run, asked for on rank 0 only. It is handed over: weights that training goes on
                to change would be written as they are then.

        Returns:
            Seconds for which the caller was held: by a save still under way, and by the copying.

        Raises:
            RunFailed: the save before has failed.
        """
        started = time.perf_counter()
        self.wait()
        self.check()
        own = own_share(state.tensors, self._side)
        arguments = (state, plain, own, self._copies.take(own), self._score(score))
        self._thread = threading.Thread(target=self._write, args=arguments, name="save-checkpoint", daemon=True)
        self._thread.start()
        return time.perf_counter() - started

    def check(self) -> None:
        """Collective, and cheap: one number is exchanged.

        Raises:
            RunFailed: on all ranks, a save has failed on any.
        """
        if not self._checks.any(self._failure is not None):
            return
        failure = next(failure for failure in self._checks.gather(self._failure) if failure is not None)
        self._failure = None
        raise failure

    def close(self) -> None:
        """Wait for the save under way. Collective.

        Raises:
            RunFailed: it has failed.
        """
        self.wait()
        try:
            self.check()
        finally:
            self._side.close()
            self._checks.close()

    def wait(self) -> None:
        """Until the save under way has ended, well or not."""
        if self._thread is not None:
            with polling(self._beat, _BEAT_S):
                self._thread.join()
            self._thread = None

    def _score(self, value: float | None) -> Score | None:
        # A measure that is no number ranks nothing.
        if self._measure is None or value is None or not abs(value) < float("inf"):
            return None
        return Score(name=self._measure, value=value)

    def _write(
        self,
        state: TrainingState,
        plain: PlainParts,
        own: dict[str, Tensor],
        copies: dict[str, Tensor],
        score: Score | None,
    ) -> None:
        store, path = self._run.store, checkpoint_path(state.position)

        def finish(entries: dict[str, Entry]) -> None:
            resume = ResumeFile(position=state.position, fixed=state.fixed, counters=state.counters, score=score)
            for name, data in (*plain.files(), (RESUME, resume.to_json())):
                store.write(f"{path}/{name}", data)
                entries[name] = file_entry(data)
            self._run.flush()
            write_manifest(store, path, entries)
            self._remove_others(state.position, score)

        try:
            save_state(store, path, own, copies, self._side, finish)
        except (Exception, CheckpointException) as error:
            self._failure = _explain(error, self._run, state.position)
            if self._side.rank == 0:
                with contextlib.suppress(Exception):  # for the space; what remains is swept when the run goes on
                    if state.position not in list_checkpoints(store):
                        store.delete(path)

    def _remove_others(self, step: int, score: Score | None) -> None:
        steps = list_checkpoints(self._run.store)
        if self._scores is None:
            self._scores = {each: value for each in steps if (value := self._read_score(each)) is not None}
        self._scores.pop(step, None)
        if score is not None:
            self._scores[step] = score.value
        until_now = [each for each in steps if each <= step]
        kept = set(until_now[-self._keep :])
        scored = [each for each in until_now if each in self._scores]
        if scored:
            kept.add(max(scored, key=self._rank_of))
        for each in steps:
            if each not in kept:
                self._run.remove_checkpoint(each)
        self._run.sweep()

    def _rank_of(self, step: int) -> tuple[float, int]:
        """Higher is better; of equal ones the newer."""
        assert self._scores is not None
        assert self._measure is not None
        sign = -1 if self._measure.endswith("loss") else 1
        return sign * self._scores[step], step

    def _read_score(self, step: int) -> float | None:
        if self._measure is None:
            return None
        with contextlib.suppress(BadInput):
            score = read_resume(self._run.store.child(checkpoint_path(step))).score
            return score.value if score is not None and score.name == self._measure else None
        return None


def _explain(error: BaseException, run: RunFolder, step: int) -> Exception:
    """What a user needs to know of a save that failed."""
    causes: list[Any] = [error]
    if isinstance(error, CheckpointException):
        causes = [cause for cause, _ in error.failures.values()]
    for cause in causes:
        if isinstance(cause, OSError) and cause.errno in _NO_SPACE:
            return RunFailed(
                f"no space is left in {run.uri} for the checkpoint of step {step}: free some, or keep fewer"
                " (keep_checkpoints), and run the same command again; it goes on from the checkpoint before"
            )
    for cause in causes:
        if isinstance(cause, (BadInput, RunFailed)):
            return cause
    cause = causes[0]
    failure = RunFailed(
        f"the checkpoint of step {step} could not be written to {run.uri}: {type(cause).__name__}: {cause}; once it can"
        " be, run the same command again: it goes on from the checkpoint before"
    )
    failure.__cause__ = error
    return failure
