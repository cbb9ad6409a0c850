"""Scorers: models that grade stored pairs, handed in from outside, on actors of their own. Scores are annotations."""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from coca.contract import ANNOTATIONS, SAMPLES
from coca.errors import BadInput, RunFailed
from coca.images import ImageLimits, ImageProblem, decode_pixels
from coca.storage import Store

SCORES = pa.schema([SAMPLES.field("sample_id"), ANNOTATIONS.field("scores")])

# Stored bytes were admitted under tighter rules; purged ones are zeros and decode to nothing.
_STORED_LIMITS = ImageLimits()


class Scorer(Protocol):
    """Grades pictures with their captions."""

    def score(self, images: list[np.ndarray], captions: list[str]) -> Mapping[str, np.ndarray]:
        """Scores by name, arrays of shape (B,), NaN where there is none.

        Args:
            images: B pictures as uint8 arrays of shape (H, W, 3), RGB, each of its own size.
            captions: theirs.
        """
        ...


@dataclass(frozen=True)
class ScorerSpec:
    """How to make a scorer, where it runs. Travels to Ray workers."""

    factory: Callable[..., Scorer]
    source: str
    """What it is, for the version record: a checkpoint's uri or ``module:function``."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    actors: int = 1
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    """Of each actor."""
    batch_size: int = 64

    def make(self) -> Scorer:
        return self.factory(**self.arguments)


def scores_path(folder: str, samples_path: str) -> str:
    """Where ``score_parts`` leaves the ``SCORES`` of a samples file, rows in its order."""
    return f"{folder}/{samples_path}"


def read_scores(store: Store, folder: str, samples_path: str) -> pa.Table:
    """The ``SCORES`` that ``score_parts`` has left, for ``annotations.with_scores``."""
    with store.filesystem.open_input_file(store.path(scores_path(folder, samples_path))) as source:
        return pq.read_table(source, schema=SCORES)


def score_parts(
    store: Store, samples_paths: Sequence[str], spec: ScorerSpec, folder: str, start_ray: Callable[[], object] | None
) -> None:
    """Score every row of samples files on a pool of actors. Files that are scored already are passed over.

    Args:
        samples_paths: relative to the samples table.
        folder: in the dataset, for ``scores_path``; named after all that decides about the scores.
        start_ray: called where there is something to score; without it Ray is initialised already.

    Raises:
        BadInput: the actors would take every CPU of the cluster.
    """
    waiting = [path for path in samples_paths if not store.exists(scores_path(folder, path))]
    if not waiting:
        return
    if start_ray is not None:
        start_ray()
    import ray.data

    from pipelines.ray_data import quiet_ray_data

    actors = min(spec.actors, len(waiting))
    _check_cpus(ray.cluster_resources().get("CPU", 0.0), actors, spec)
    with quiet_ray_data():
        items = [{"path": path} for path in waiting]
        files = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            ScoreFiles,
            fn_constructor_kwargs={"store": store, "spec": spec, "folder": folder},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=spec.num_cpus,
            num_gpus=spec.num_gpus,
        )
        for _ in files.iter_batches(batch_size=None):
            pass


def _check_cpus(cpus: float, actors: int, spec: ScorerSpec) -> None:
    """Without a whole CPU beside the actors a Ray Data job waits for ever."""
    if actors * spec.num_cpus > cpus - 1:
        most = max(0, int((cpus - 1) / spec.num_cpus))
        raise BadInput(
            f"{actors} scorers with {spec.num_cpus:g} CPUs each leave none to read with: the Ray cluster has {cpus:g}",
            f"Take {most} or fewer" if most else "Give Ray 2 CPUs or more",
        )


class ScoreFiles:
    """The actor: holds a scorer and scores one samples file after the other."""

    def __init__(self, store: Store, spec: ScorerSpec, folder: str) -> None:
        self._store, self._spec, self._folder = store, spec, folder
        self._scorer = spec.make()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for path in batch["path"]:
            self.score_file(str(path))
        return {"path": batch["path"]}

    def score_file(self, samples_path: str) -> None:
        rows: list[dict[str, Any]] = []
        for ids, pictures, captions in self._batches(samples_path):
            rows += self._score_batch(ids, pictures, captions)
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=SCORES), buffer, compression="zstd")
        self._store.write(scores_path(self._folder, samples_path), buffer.getvalue())

    def _batches(self, samples_path: str) -> Iterator[tuple[list[str], list[np.ndarray | None], list[str]]]:
        path = self._store.path(f"samples/{samples_path}")
        with self._store.filesystem.open_input_file(path) as source:
            file = pq.ParquetFile(source, pre_buffer=False)
            for batch in file.iter_batches(self._spec.batch_size, columns=["sample_id", "caption", "image"]):
                pictures = [_decode(data) for data in batch["image"].to_pylist()]
                yield batch["sample_id"].to_pylist(), pictures, batch["caption"].to_pylist()

    def _score_batch(
        self, ids: list[str], pictures: list[np.ndarray | None], captions: list[str]
    ) -> Iterator[dict[str, Any]]:
        images = [picture for picture in pictures if picture is not None]
        texts = [caption for picture, caption in zip(pictures, captions, strict=True) if picture is not None]
        scores = _checked(self._scorer.score(images, texts), len(images), self._spec.source) if images else {}
        place = 0
        for key, picture in zip(ids, pictures, strict=True):
            found = [] if picture is None else [(name, float(values[place])) for name, values in scores.items()]
            place += picture is not None
            yield {"sample_id": key, "scores": [(name, value) for name, value in found if value == value] or None}


def _decode(data: bytes) -> np.ndarray | None:
    try:
        return decode_pixels(data, _STORED_LIMITS)
    except ImageProblem:
        return None


def _checked(scores: Mapping[str, np.ndarray], count: int, source: str) -> dict[str, np.ndarray]:
    for name, values in scores.items():
        if np.shape(values) != (count,):
            raise RunFailed(f"the scorer {source} gave {name!r} of shape {np.shape(values)} for {count} pictures")
    return {name: np.asarray(values, dtype=np.float32) for name, values in scores.items()}
