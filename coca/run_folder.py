"""A run folder: config.yaml, metrics.jsonl and checkpoints/."""

import json
from pathlib import Path
from typing import Any

from coca.checkpoint import checkpoint_path, checkpoint_step, list_checkpoints
from coca.errors import BadInput
from coca.storage import Store

METRICS = "metrics.jsonl"


class RunFolder:
    """A folder every worker of the run can reach; rank 0 alone writes to it."""

    def __init__(self, path: str | Path) -> None:
        self.store = Store(path)
        if self.store.is_s3:
            raise BadInput(f"--out {path}: a run folder cannot lie on S3 yet", "Give a path on local or shared disk")
        self.path = Path(self.store.root)
        self.store.check_folder("--out")

    @property
    def exists(self) -> bool:
        return (self.path / "config.yaml").exists()

    def start(self, config_yaml: str) -> None:
        self.store.write("config.yaml", config_yaml.encode())

    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint."""
        steps = list_checkpoints(self.store)
        return steps[-1] if steps else None

    def keep_newest(self, count: int) -> None:
        """Remove older checkpoints, and those that never got a manifest; a folder with another name is not ours."""
        keep = {checkpoint_path(step).split("/")[1] for step in list_checkpoints(self.store)[-count:]}
        for name in self.store.list("checkpoints"):
            if checkpoint_step(name) is not None and name not in keep:
                self.store.delete(f"checkpoints/{name}")

    def append_metrics(self, row: dict[str, Any]) -> None:
        with (self.path / METRICS).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All whole lines; a last line that a kill cut short is passed over."""
        if not (self.path / METRICS).exists():
            return []
        lines = (self.path / METRICS).read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1] if line]

    def forget_metrics_after(self, step: int) -> None:
        """Drop the lines of steps that will be replayed."""
        kept = [row for row in self.read_metrics() if row["step"] <= step]
        self.store.write(METRICS, "".join(json.dumps(row) + "\n" for row in kept).encode())
