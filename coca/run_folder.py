"""A run folder on local disk or S3: config.yaml, metrics.jsonl and checkpoints/."""

import json
import math
import os
import threading
import time
from pathlib import Path
from typing import Any

from coca.checkpoint import checkpoint_path, checkpoint_step, list_checkpoints
from coca.manifest import MANIFEST
from coca.storage import Store

METRICS = "metrics.jsonl"
_S3_WRITE_EVERY_S = 10.0
_S3_SHARE = 50  # of the time, one part at most goes into writing the file anew
_TAIL_BYTES = 64 << 10


class RunFolder:
    """A folder every worker of the run can reach; rank 0 alone writes to it.

    On disk each row of metrics is there as soon as it was appended, whatever kills the process. S3 knows no appending:
    the file is written anew, beside the training and at most every ten seconds, and by ``flush``.
    """

    def __init__(self, path: str | Path) -> None:
        self.store = Store(path)
        self.store.check_folder("--out")
        self._lines: list[bytes] | None = None  # on S3: all rows so far, once they are known
        self._written = 0  # of these
        self._written_at, self._writing_s = 0.0, 0.0
        self._failure: Exception | None = None
        self._appending, self._writing = threading.Lock(), threading.Lock()

    def __reduce__(self) -> tuple[type["RunFolder"], tuple[str]]:
        return type(self), (self.store.uri,)

    @property
    def uri(self) -> str:
        return self.store.uri

    @property
    def path(self) -> Path:
        """On disk only."""
        assert not self.store.is_s3, "a run folder on S3 has no path"
        return Path(self.store.root)

    @property
    def exists(self) -> bool:
        return self.store.exists("config.yaml")

    def start(self, config_yaml: str) -> None:
        self.store.write("config.yaml", config_yaml.encode())

    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint."""
        steps = list_checkpoints(self.store)
        return steps[-1] if steps else None

    def remove_checkpoint(self, step: int) -> None:
        """Its manifest goes first: a checkpoint that is there in part is none."""
        self.store.delete(f"{checkpoint_path(step)}/{MANIFEST}")
        self.store.delete(checkpoint_path(step))

    def sweep(self) -> list[str]:
        """Remove what saves that were killed have left: checkpoint folders without a manifest, files half written.

        Only for rank 0, while no save is under way.

        Returns:
            The folders' names.
        """
        whole = {checkpoint_path(step) for step in list_checkpoints(self.store)}
        names = [name for name in self.store.list("checkpoints") if checkpoint_step(name) is not None]
        unfinished = [name for name in names if f"checkpoints/{name}" not in whole]
        for name in unfinished:
            self.store.delete(f"checkpoints/{name}")
        self.store.sweep_unfinished("checkpoints")
        return unfinished

    def sweep_files(self) -> None:
        """Remove files half written; on S3, where others may write below the same prefix, those of checkpoints only."""
        self.store.sweep_unfinished("checkpoints" if self.store.is_s3 else "")

    def append_metrics(self, row: dict[str, Any]) -> None:
        """
        Raises:
            RunFailed: S3 has not taken earlier rows.
        """
        line = (json.dumps(_strict(row), allow_nan=False) + "\n").encode()
        if not self.store.is_s3:
            _append(self.path / METRICS, line)
            return
        self._raise_failure()
        with self._appending:
            self._known_lines().append(line)
            due = time.monotonic() - self._written_at >= max(_S3_WRITE_EVERY_S, _S3_SHARE * self._writing_s)
        if due and not self._writing.locked():
            threading.Thread(target=self._write_aside, name="metrics", daemon=True).start()

    def flush(self) -> None:
        """Make sure that the rows so far outlive the machine.

        Raises:
            RunFailed: S3 does not take them.
        """
        if self.store.is_s3:
            self._raise_failure()
            self._write_lines()
        elif (self.path / METRICS).exists():
            with (self.path / METRICS).open("rb") as stream:
                os.fsync(stream.fileno())

    def read_metrics(self) -> list[dict[str, Any]]:
        """All whole lines; a last line that a kill cut short is passed over."""
        return [json.loads(line) for line in self._read_lines()]

    def last_metrics(self) -> dict[str, Any] | None:
        """The last whole row; reads the end of the file only, so that it can be asked for again and again."""
        try:
            size = self.store.size(METRICS)
            start = max(0, size - _TAIL_BYTES)
            tail = self.store.retry(lambda: self._read_from(start))
        except FileNotFoundError:
            return None
        lines = tail.split(b"\n")[:-1]
        whole = lines if start == 0 else lines[1:]
        if not whole and start:
            whole = self._read_lines()  # a row as long as that
        return json.loads(whole[-1]) if whole else None

    def forget_metrics_after(self, step: int) -> None:
        """Drop the lines of steps that will be replayed."""
        kept = [line for line in self._read_lines() if json.loads(line)["step"] <= step]
        with self._writing, self._appending:
            self._lines = kept if self.store.is_s3 else None
            self._written, self._written_at = len(kept), time.monotonic()
            self.store.write(METRICS, b"".join(kept))

    def _read_from(self, start: int) -> bytes:
        with self.store.open(METRICS) as stream:
            stream.seek(start)
            return bytes(stream.read())

    def _read_lines(self) -> list[bytes]:
        try:
            data = self.store.read(METRICS)
        except FileNotFoundError:
            return []
        return [line + b"\n" for line in data.split(b"\n")[:-1] if line]

    def _known_lines(self) -> list[bytes]:
        if self._lines is None:
            self._lines = self._read_lines()
            self._written = len(self._lines)
        return self._lines

    def _write_lines(self) -> None:
        with self._writing:
            with self._appending:
                data, count = b"".join(self._known_lines()), len(self._known_lines())
            started = time.monotonic()
            if count != self._written:
                self.store.write(METRICS, data)
            self._written, self._written_at = count, time.monotonic()
            self._writing_s = self._written_at - started

    def _write_aside(self) -> None:
        try:
            self._write_lines()
        except Exception as error:
            self._failure = error

    def _raise_failure(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure


def _strict(value: Any) -> Any:
    """The same with null for numbers that JSON does not have: losses of skipped steps."""
    if isinstance(value, dict):
        return {name: _strict(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _append(path: Path, line: bytes) -> None:
    # One call of write: a kill leaves all of the line or nothing.
    with path.open("ab", buffering=0) as stream:
        written = stream.write(line)
        while written < len(line):
            written += stream.write(line[written:])
