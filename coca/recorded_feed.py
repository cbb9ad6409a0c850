"""Batches written into a folder as they come, and read from there again: to time a model without decoding.

A rank's batches lie under ``rank-<r>-of-<world>/batch-<number>.safetensors``; what is no tensor is in their metadata.
"""

import itertools
import json
from collections.abc import Generator

import safetensors
import safetensors.torch
from torch import Tensor

from coca.errors import BadInput
from coca.feed import Batch, BatchSource, patches_kept, pin_memory
from coca.prefetch import prefetch
from coca.storage import Store
from coca.train_config import FeedConfig, TrainConfig

_SUFFIX = ".safetensors"


class Recorder:
    """Passes on the batches of another source and keeps each in a folder, on disk before it is passed on."""

    def __init__(self, source: BatchSource, folder: str, *, rank: int, world_size: int) -> None:
        """
        Args:
            folder: a path or s3:// uri; what was recorded there before under the same numbers is replaced.
        """
        self._source, self._store, self._folder = source, Store(folder), _rank_folder(rank, world_size)
        self._store.check_folder("feed.record")

    def batches(self, start: int) -> Generator[Batch]:
        """Those of the source."""
        batches = self._source.batches(start)
        try:
            for number, batch in enumerate(batches, start):
                self._store.write(_path(self._folder, number), _to_bytes(batch))
                yield batch
        finally:
            batches.close()

    def close(self) -> None:
        """Closes the source."""
        self._source.close()


class RecordedFeed:
    """Replays what `Recorder` kept, in order; after the last batch it begins again."""

    def __init__(self, folder: str, config: TrainConfig, feed: FeedConfig, *, rank: int, world_size: int) -> None:
        """
        Raises:
            BadInput: nothing was recorded there for this rank and world size.
        """
        self._store, self._folder = Store(folder), _rank_folder(rank, world_size)
        self._config, self._depth, self._pin = config, feed.prefetch_batches, pin_memory()
        self._samples, self._lanes = config.batch_size // world_size, config.lanes // world_size
        self._numbers = _recorded(self._store, self._folder)
        if not self._numbers:
            worlds = {name.rpartition("-")[2] for name in self._store.list() if name.startswith("rank-")}
            raise BadInput(
                f"{self._store.uri} holds no batches of rank {rank} of {world_size} workers",
                f"It was recorded with {' and '.join(sorted(worlds))} workers: use as many"
                if worlds
                else f"Record some with feed.record={folder}, in a run of as many workers",
            )

    def batches(self, start: int) -> Generator[Batch]:
        """This rank's share of global batches ``start``, ``start + 1``, ... without end."""
        return prefetch(iter(itertools.count(start)), self.batch, self._depth)

    def batch(self, number: int) -> Batch:
        """The recorded batch that comes at position ``number``.

        Raises:
            BadInput: it cannot be read, or is none that this config would give.
        """
        first = self._numbers[0]
        path = _path(self._folder, self._numbers[(number - first) % len(self._numbers)])
        batch = _from_bytes(self._store.read(path), f"{self._store.uri}/{path}")
        self._check(batch, number, path)
        kept = batch.kept_patches_BK
        return Batch(
            pixels_BHWC=self._pin(batch.pixels_BHWC),
            tokens_BT=self._pin(batch.tokens_BT),
            lane_digests=batch.lane_digests,
            kept_patches_BK=None if kept is None else self._pin(kept),
            sample_ids=batch.sample_ids,
        )

    def close(self) -> None:
        """Nothing is held between batches."""

    def _check(self, batch: Batch, number: int, path: str) -> None:
        size, kept, text = self._config.image_size(number), patches_kept(self._config, number), self._config.model.text
        tokens = batch.tokens_BT
        for what, found, wanted in (
            ("pictures", tuple(batch.pixels_BHWC.shape), (self._samples, size, size, 3)),
            ("kept patches", _shape(batch.kept_patches_BK), None if kept is None else (self._samples, kept[1])),
            ("captions", len(tokens), self._samples),
            ("lanes", len(batch.lane_digests), self._lanes),
            ("captions at most as long as", max(tokens.shape[1], text.context_length), text.context_length),
            ("token ids below", max(int(tokens.max()) + 1, text.vocab_size), text.vocab_size),
        ):
            if found != wanted:
                raise BadInput(
                    f"{self._store.uri}/{path} has {what} {found}, step {number + 1} of this run {wanted}",
                    "Record the batches again with this configuration, or replay them with the one they are of",
                )


def _recorded(store: Store, folder: str) -> list[int]:
    names = [name for name in store.list(folder) if name.startswith("batch-") and name.endswith(_SUFFIX)]
    return sorted(int(name.removeprefix("batch-").removesuffix(_SUFFIX)) for name in names)


def _rank_folder(rank: int, world_size: int) -> str:
    return f"rank-{rank}-of-{world_size}"


def _path(folder: str, number: int) -> str:
    return f"{folder}/batch-{number:09d}{_SUFFIX}"


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def _to_bytes(batch: Batch) -> bytes:
    tensors = {"pixels": batch.pixels_BHWC, "tokens": batch.tokens_BT}
    if batch.kept_patches_BK is not None:
        tensors["kept_patches"] = batch.kept_patches_BK
    rest = {"lane_digests": json.dumps(batch.lane_digests), "sample_ids": json.dumps(batch.sample_ids)}
    return safetensors.torch.save(tensors, metadata=rest)


def _from_bytes(data: bytes, source: str) -> Batch:
    try:
        length = int.from_bytes(data[:8], "little")
        rest = json.loads(data[8 : 8 + length])["__metadata__"]
        tensors = safetensors.torch.load(data)
        return Batch(
            pixels_BHWC=tensors["pixels"],
            tokens_BT=tensors["tokens"],
            lane_digests=json.loads(rest["lane_digests"]),
            kept_patches_BK=tensors.get("kept_patches"),
            sample_ids=json.loads(rest["sample_ids"]),
        )
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise BadInput(f"{source} is no recorded batch: {error}", "Record it again") from None
