"""Speaks to a peer that runs in an environment of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("OPEN_CLIP_PYTHON", ROOT / ".venv-open-clip" / "bin" / "python"))


class OpenClip:
    """A process with open_clip's CoCa; ``ask`` sends one request and waits for its answer."""

    def __enter__(self) -> Self:
        if not PYTHON.exists():
            sys.exit(f"error: there is no {PYTHON}. Make the peer's environment with `make peers`.")
        script = str(Path(__file__).with_name("open_clip_coca.py"))
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        self._process = subprocess.Popen(
            [str(PYTHON), script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"error: the peer ended with exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
